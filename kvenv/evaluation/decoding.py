"""Decoding a prompt with the full cache or a bounded one, and what each cost."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from kvenv.cache import EvictionCache
from kvenv.cache.allocation import Mode
from kvenv.cache.backends import Choice
from kvenv.errors import KvenvError
from kvenv.evaluation import metrics
from kvenv.identity import fingerprint
from kvenv.recording import models
from kvenv.scorers.base import Scorer
from kvenv.trace import TraceSet


@dataclass(frozen=True)
class Task:
    """What to decode.

    Attributes:
        tokens: (1, S) the whole prompt.
        cut: the first ``cut`` tokens are evicted from before the rest is seen (question-agnostic
            prompting); 0 shows the whole prompt at once.
        note: one line for the reader.
        facts: the episode's metadata; answers among them are judged by `metrics.score`.
    """

    tokens: torch.Tensor
    cut: int = 0
    note: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def judge(self, text: str) -> str:
        """How much of the expected answer a text holds, in words."""
        if not self.facts.get("answers"):
            return "-"
        return f"{metrics.score(self.facts, text):.0%} right"


@dataclass(frozen=True)
class Decoding:
    """How to decode; ``budget`` below 1 is a share of the prompt, else tokens a head.

    ``allocation``, ``backend`` and ``block`` are those of `EvictionCache`.
    """

    budget: float
    sinks: int = 4
    recent: int = 16
    max_new_tokens: int = 128
    sample: bool = False
    seed: int = 0
    allocation: Mode = "uniform"
    backend: Choice = "auto"
    block: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise KvenvError(f"max-new-tokens is {self.max_new_tokens}: it must be at least 1")

    def tokens(self, task: Task) -> int:
        """The budget in tokens a head."""
        if not 0 < self.budget < math.inf:
            raise KvenvError(
                f"budget {self.budget:g} keeps nothing or has no bound: give tokens a head, or a "
                "share of the prompt below 1"
            )
        if self.budget < 1:
            prompt = task.cut or task.tokens.shape[1]
            budget, least = round(self.budget * prompt), max(1, self.sinks + self.recent)
            if budget < least:
                raise KvenvError(
                    f"budget {self.budget:g} of {prompt} prompt tokens is {budget}, below sinks "
                    f"{self.sinks} + recent {self.recent}: raise it, or lower sinks or recent"
                )
            return budget
        if self.budget != int(self.budget):
            raise KvenvError(f"budget {self.budget:g} is neither whole tokens nor a share below 1")
        return int(self.budget)


@dataclass(frozen=True)
class Decoded:
    """A decoded answer and its cost.

    Attributes:
        text: the answer.
        kept: tokens a head held at the end (the first full-attention layer's).
        seen: tokens the model has seen.
        nbytes: bytes of keys and values held at the end.
        rate: new tokens a second, the prompt's processing included.
    """

    text: str
    kept: int
    seen: int
    nbytes: int
    rate: float


def encode(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool = True) -> Task:
    """A prompt given as text; ``chat`` puts it through the tokenizer's chat template, if any."""
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        ids = tokenizer(text, add_special_tokens=False).input_ids
    else:
        ids = tokenizer(text).input_ids
    if not ids:
        raise KvenvError("the prompt is empty: give some text")
    return Task(torch.tensor([ids]))


def from_episode(
    traces: TraceSet, index: int, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> Task:
    """The prompt of a recorded episode, with the answer that its workload expects.

    Of a question-agnostic episode the question follows the prompt, after eviction.
    """
    if fingerprint(model) != traces.model.fingerprint:
        raise KvenvError(
            f"{traces.path} was recorded from {traces.model.id}, not {model.config._name_or_path}: "
            f"give --model {traces.model.id}"
        )
    info = traces.info(index)
    ids = traces.tokens(index)[: info.n].tolist()
    facts = info.metadata
    agnostic = facts.get("prompting") == "agnostic"
    cut = len(ids) if agnostic else 0
    if agnostic:
        question = int(facts["question_tokens"])
        ids += traces.tokens(index)[info.n : info.n + question].tolist()
    note = f"{traces.manifest.workload} episode {index}, {len(ids)} prompt tokens"
    if "question" in facts:
        note += f"; question: {facts['question']}"
    if answers := facts.get("answers"):
        note += f"; expected: {', '.join(map(str, answers))}"
    return Task(torch.tensor([ids]), cut, note, dict(facts))


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: Decoding,
    scorer: Scorer | None,
    *,
    fallback: Scorer | None = None,
    stream: bool = False,
) -> Decoded:
    """Decode with `EvictionCache`, or with the full cache if there is no scorer.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        task: the prompt.
        settings: budget and generation settings.
        scorer: which tokens to keep.
        fallback: for heads that the scorer does not cover.
        stream: print the text as it comes.
    """
    if scorer is None:
        cache = DynamicCache(config=model.config)
    else:
        cache = EvictionCache(
            model,
            scorer,
            budget=settings.tokens(task),
            sinks=settings.sinks,
            recent=settings.recent,
            allocation=settings.allocation,
            context=task.tokens.shape[1],
            backend=settings.backend,
            block=settings.block,
            fallback=fallback,
        )
    tokens = task.tokens.to(model.device)
    began = time.perf_counter()
    if task.cut:
        with torch.inference_mode():
            model(tokens[:, : task.cut], past_key_values=cache, logits_to_keep=1)
    shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    new = models.generate(
        model,
        tokenizer,
        tokens,
        settings.max_new_tokens,
        sample=settings.sample,
        seed=settings.seed,
        past_key_values=cache,
        streamer=shown if stream else None,
    )
    seconds = time.perf_counter() - began
    layers: list[Any] = list(cache.layers)
    whole = next(layer for layer in layers if not getattr(layer, "is_sliding", False))
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return Decoded(
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        kept=int(getattr(whole, "held", whole.keys.shape[-2])),
        seen=int(cache.get_seq_length()),
        nbytes=sum(t.numel() * t.element_size() for t in held if t is not None),
        rate=len(new) / seconds,
    )
