"""RULER: synthetic retrieval, tracing and aggregation tasks of any length, with known answers."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvenv.errors import KvenvError
from kvenv.recording import ruler, tokens
from kvenv.recording.workload import Sample


@dataclass(kw_only=True)
class Ruler(ruler.Options):
    """RULER's tasks: needles in a haystack, variable tracking, common and frequent words.

    Source: Hsieh et al. 2024, arXiv 2404.06654; rebuilt without any downloaded text (see
    `kvenv.recording.ruler`). The haystack grows until the prompt is as long as it may be.

    Args:
        tasks: the tasks, taken in turn by episode: niah_single, niah_multikey, niah_multivalue,
            niah_multiquery, vt, cwe, fwe.
        prompting: aware: the question is part of the prompt. agnostic: the prompt ends with the
            context, so that a cache is cut before the question is seen; the question then opens
            the future. Prompt and future are tokenised apart, so that the cut is a token boundary.
        split: splits never share an episode.
    """

    tasks: list[str] = field(default_factory=lambda: list(ruler.TASKS))
    prompting: Literal["aware", "agnostic"] = "aware"
    split: Literal["train", "validation", "test"] = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise KvenvError(f"no RULER tasks given: choose from {', '.join(ruler.TASKS)}")
        for task in self.tasks:
            tokens.check_choice("RULER task", task, ruler.TASKS)
        tokens.check_choice("prompting", self.prompting, ("aware", "agnostic"))
        tokens.check_choice("split", self.split, tokens.SPLITS)

    def sample(
        self,
        index: int,
        *,
        tokenizer: PreTrainedTokenizerBase,
        rng: np.random.Generator,
        prompt_tokens: int,
        future_tokens: int,
        seed: int,
    ) -> Sample:
        """Episode ``index``: see `kvenv.recording.workload.Workload.sample`.

        The metadata hold task, question, answers (for `kvenv.recording.ruler.score`), prompting,
        answer_prefix, and question_tokens: how much of the future comes before the reply.
        """
        task = self.tasks[index % len(self.tasks)]
        draw = [tokens.SPLITS.index(self.split), *rng.integers(2**32, size=4).tolist()]
        problem, prompt, query = self._fill(task, draw, tokenizer, prompt_tokens)
        if len(query) >= future_tokens:
            raise KvenvError(
                f"future_tokens {future_tokens} leaves no room for an answer to {task}: its "
                f"question takes {len(query)}; give more, or prompting aware"
            )
        reply = tokens.reply_tokens(tokenizer, problem.reply, future_tokens - len(query))
        return Sample(
            prompt=prompt,
            future=query + reply,
            document=f"{self.split}/{task}/{seed}/{index}",
            metadata={
                "task": task,
                "question": problem.question.strip(),
                "answers": list(problem.answers),
                "prompting": self.prompting,
                "answer_prefix": problem.prefix,
                "question_tokens": len(query),
            },
        )

    def _fill(
        self, task: str, draw: list[int], tokenizer: PreTrainedTokenizerBase, room: int
    ) -> tuple[ruler.Problem, list[int], list[int]]:
        """The problem with the largest haystack whose prompt fits in ``room`` tokens."""

        def attempt(size: int) -> tuple[ruler.Problem, list[int], list[int]]:
            problem = ruler.problem(task, size, draw, self, room)
            return problem, *self._parts(problem, tokenizer)

        def length(size: int) -> int:
            return len(attempt(size)[1])

        least = ruler.smallest(task)
        if length(least) > room:
            raise KvenvError(
                f"prompt_tokens {room} is too small for {task}: give at least {length(least)}"
            )
        beyond = 2 * least
        while beyond < 2 * room and length(beyond) <= room:
            beyond *= 2
        sizes = range(least, beyond)
        return attempt(sizes[bisect_right(sizes, room, key=length) - 1])

    def _parts(
        self, problem: ruler.Problem, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[int], list[int]]:
        """Prompt ids, and the ids between them and the reply: none where the question is known."""
        content = problem.before + problem.context + problem.question
        text = tokens.render(tokenizer, [{"role": "user", "content": content}])
        start = [] if tokenizer.chat_template else tokens.opening(tokenizer)
        if self.prompting == "aware":
            return start + tokens.encode(tokenizer, text), []
        cut = text.rfind(problem.question)
        if cut < 0:
            raise KvenvError(
                "the tokenizer's chat template rewrites the question: give prompting aware"
            )
        return start + tokens.encode(tokenizer, text[:cut]), tokens.encode(tokenizer, text[cut:])
