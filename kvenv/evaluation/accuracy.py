"""How many questions the model still answers rightly once its cache was cut."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvenv.errors import KvenvError
from kvenv.evaluation.cut import Cutter, Prompt, forward
from kvenv.evaluation.metrics import score
from kvenv.evaluation.statistics import interval, paired
from kvenv.recording import tokens
from kvenv.trace import EpisodeInfo, TraceSet

MARGIN = 16
"""New tokens allowed beyond the recorded reply's, at least; half of the reply's if that is more."""


@dataclass
class _Group:
    """The scores of one task's episodes; those of agents are (episodes, budgets, agents)."""

    documents: list[str] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    cut: list[list[list[float]]] = field(default_factory=list)


class Accuracy:
    """How right the answers are after each prompt was cut once, by task, prompting and length.

    Of a question-agnostic episode the question follows the cut. Of a question-aware one the
    question is part of what is cut, and the answer starts from what the whole prompt made the
    model expect, as it does when a model decodes; an answer's first token is then the full
    cache's, so that one-token choices tell nothing there and are refused.

    Answers are written greedily, up to the recorded reply's length and a margin, and scored by
    `kvenv.evaluation.metrics.score`; of multiple choices, the one with the largest summed
    log-likelihood is taken.

    Args:
        cutter: agents, budgets and model.
        tokenizer: the model's.
    """

    def __init__(self, cutter: Cutter, tokenizer: PreTrainedTokenizerBase) -> None:
        self._cutter, self._tokenizer = cutter, tokenizer
        self._stops = stop_tokens(cutter.model, tokenizer)
        self._groups: defaultdict[tuple[str, str, int], _Group] = defaultdict(_Group)

    def judges(self, traces: TraceSet, index: int) -> bool:
        """Whether an episode has an answer to compare with.

        Raises:
            KvenvError: if it has one that cannot be judged, naming the episode.
        """
        info = traces.info(index)
        facts = info.metadata
        if not (facts.get("answers") or facts.get("choices")):
            return False
        try:
            if _agnostic(info) and not 0 < facts.get("question_tokens", 0) < info.T:
                raise KvenvError(
                    f'its "question_tokens" {facts.get("question_tokens")!r} must be a part of its '
                    f"{info.T} future tokens: mend the workload"
                )
            if facts.get("choices"):
                self._choices(info)
            else:
                score(facts, "")
        except KvenvError as error:
            raise KvenvError(
                f"episode {index} of {traces.path} cannot be judged: {error}"
            ) from error
        return True

    @torch.inference_mode()
    def add(self, prompt: Prompt) -> None:
        """Answer the question of an episode that `judges` accepts: in full and after every cut."""
        info, n = prompt.info, prompt.info.n
        facts = info.metadata
        answer = self._choose if facts.get("choices") else self._write
        task = str(facts.get("task", info.workload))
        length = int(prompt.traces.manifest.arguments.get("prompt_tokens", n))
        group = self._groups[task, str(facts.get("prompting", "aware")), length]
        group.documents.append(info.document)
        group.full += answer(prompt, prompt.whole(), 1)
        group.cut.append(
            [
                [
                    right
                    for cache in self._cutter.cuts(prompt, share)
                    for right in answer(prompt, cache, prompt.rows)
                ]
                for share in self._cutter.budgets
            ]
        )

    def result(self) -> dict[str, Any]:
        """The "accuracy" section of an evaluation."""

        def figures(group: _Group) -> dict[str, Any]:
            cut = np.array(group.cut)
            return {
                "prompts": len(group.full),
                "full": _interval(np.array(group.full), group.documents),
                "agents": {
                    name: {
                        str(fraction): _interval(cut[:, row, column], group.documents)
                        | self._compared(name, cut[:, row], group.documents)
                        for row, fraction in enumerate(self._cutter.budgets)
                    }
                    for column, name in enumerate(self._cutter.agents)
                },
            }

        return {
            "sinks": self._cutter.sinks,
            "recent": self._cutter.recent,
            "groups": [
                {"task": task, "prompting": prompting, "prompt_tokens": length, **figures(group)}
                for (task, prompting, length), group in sorted(self._groups.items())
            ],
        }

    def _compared(
        self, name: str, scores: np.ndarray, documents: list[str]
    ) -> dict[str, dict[str, Any]]:
        """A learned agent's paired differences, from all agents' scores (episodes, agents).

        "versus_heuristic" is to the one that is right most often, named as "baseline".
        """
        kinds, mine = self._cutter.kinds, scores[:, self._cutter.agents.index(name)]
        if kinds[name] != "learned":
            return {}
        found: dict[str, dict[str, Any]] = {}
        means = dict(zip(self._cutter.agents, scores.mean(0), strict=True))
        if rivals := [agent for agent in means if kinds[agent] == "heuristic"]:
            best = max(rivals, key=means.__getitem__)
            theirs = scores[:, self._cutter.agents.index(best)]
            found["versus_heuristic"] = {"baseline": best, **paired(mine, theirs, documents)}
        if self._cutter.oracle is not None:
            theirs = scores[:, self._cutter.agents.index(self._cutter.oracle)]
            found["versus_oracle"] = paired(mine, theirs, documents)
        return found

    def _ask(self, prompt: Prompt, cache: Cache, rows: int) -> tuple[torch.Tensor, int]:
        """The question, where it follows the cut: logits (rows, V) after it, and its length."""
        if not _agnostic(prompt.info):
            return prompt.logits.expand(rows, -1), 0
        length = int(prompt.info.metadata["question_tokens"])
        question = prompt.future[:length].expand(rows, -1)
        return forward(self._cutter.model, cache, question, prompt.info.n, keep=1)[:, -1], length

    def _write(self, prompt: Prompt, cache: Cache, rows: int) -> list[float]:
        """Scores of each row's own answer."""
        logits, question = self._ask(prompt, cache, rows)
        reply = len(prompt.future) - question
        limit = reply + max(MARGIN, reply // 2)
        start = prompt.info.n + question
        answers = greedy(self._cutter.model, cache, logits, start, limit, self._stops)
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [score(prompt.info.metadata, text) for text in texts]

    def _choose(self, prompt: Prompt, cache: Cache, rows: int) -> list[float]:
        """1 for each row that finds the right choice likeliest, else 0."""
        logits, question = self._ask(prompt, cache, rows)
        start, sums = prompt.info.n + question, []
        for choice in self._choices(prompt.info):
            ids = torch.tensor(choice, device=logits.device).expand(rows, -1)
            expected = logits.unsqueeze(1)
            if len(choice) > 1:  # on a copy: the next choice starts from the same cache
                more = forward(self._cutter.model, copy.deepcopy(cache), ids[:, :-1], start)
                expected = torch.cat([expected, more], dim=1)
            likelihood = expected.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1))
            sums.append(likelihood.double().sum((1, 2)))
        best = torch.stack(sums, -1).argmax(-1)
        return (best == prompt.info.metadata["answer"]).double().tolist()

    def _choices(self, info: EpisodeInfo) -> list[list[int]]:
        """The token ids of every choice."""
        facts = info.metadata
        choices = [tokens.encode(self._tokenizer, str(choice)) for choice in facts["choices"]]
        right = facts.get("answer")
        if not all(choices) or right not in range(len(choices)):
            raise KvenvError(
                f'its "answer" {right!r} must be an index of its {len(choices)} "choices", none of '
                "them empty: mend the workload"
            )
        if not _agnostic(info) and all(len(choice) == 1 for choice in choices):
            raise KvenvError(
                "its choices are of one token, which the whole prompt decides before anything is "
                "evicted: record it with prompting agnostic"
            )
        return choices


def _interval(scores: np.ndarray, documents: list[str]) -> dict[str, float]:
    """Mean and 95 % interval: Wilson's for scores of 0 and 1, which a bootstrap is too sure of.

    Where all are right, or all are wrong, every resample is the same.
    """
    if len(set(documents)) == len(documents) and np.isin(scores, (0, 1)).all():
        right = int(scores.sum())
        ends = stats.binomtest(right, len(scores)).proportion_ci(method="wilson")
        return {"mean": right / len(scores), "low": float(ends.low), "high": float(ends.high)}
    return interval(scores, documents)


def _agnostic(info: EpisodeInfo) -> bool:
    """Whether the question follows the prompt, at the head of the future."""
    return info.metadata.get("prompting") == "agnostic"


@torch.inference_mode()
def greedy(
    model: PreTrainedModel,
    cache: Cache,
    logits: torch.Tensor,
    start: int,
    limit: int,
    stops: frozenset[int],
) -> list[list[int]]:
    """The likeliest next tokens, one by one, of every row of a cache.

    Args:
        model: the model.
        cache: B rows; grows with the tokens.
        logits: (B, V) what is expected first.
        start: position of the first new token.
        limit: most new tokens, at least 1.
        stops: tokens that end an answer.

    Returns:
        B lists of token ids, without the stop token.
    """
    ends = torch.tensor(sorted(stops), dtype=torch.int64, device=logits.device)
    written: list[torch.Tensor] = []
    over = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for step in range(limit):
        if step:
            logits = forward(model, cache, written[-1], start + step - 1, keep=1)[:, -1]
        token = logits.argmax(-1)
        written.append(token.unsqueeze(-1))
        over |= torch.isin(token, ends)
        if over.all():
            break
    rows = torch.cat(written, dim=-1).tolist()
    return [row[: next((i for i, t in enumerate(row) if t in stops), limit)] for row in rows]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: the model's, the tokenizer's, and the end of a turn."""
    given: Any = getattr(model.generation_config, "eos_token_id", None)
    found = [*(given if isinstance(given, list) else [given]), *tokens.end_of_turn(tokenizer)]
    return frozenset(t for t in (*found, tokenizer.eos_token_id) if isinstance(t, int))
