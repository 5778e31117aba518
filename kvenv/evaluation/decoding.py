"""Decoding a prompt with the full cache or a bounded one, and what each cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from kvenv import cache as bounded
from kvenv.errors import KvenvError
from kvenv.evaluation import metrics
from kvenv.evaluation.cut import check_recorded
from kvenv.identity import full_attention_layers
from kvenv.trace import TraceSet


@dataclass(frozen=True)
class Question:
    """What to answer.

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
class Answer:
    """A decoded answer and its cost.

    Attributes:
        text: the answer.
        kept: tokens a head held at the end, on average over the full-attention layers' heads.
        seen: tokens the model has seen.
        nbytes: bytes of keys and values held at the end.
        rate: new tokens a second, the prompt's processing included.
    """

    text: str
    kept: float
    seen: int
    nbytes: int
    rate: float


def encode(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool = True) -> Question:
    """A prompt given as text; ``chat`` puts it through the tokenizer's chat template, if any."""
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        ids = tokenizer(text, add_special_tokens=False).input_ids
    else:
        ids = tokenizer(text).input_ids
    if not ids:
        raise KvenvError("the prompt is empty: give some text")
    return Question(torch.tensor([ids]))


def from_episode(traces: TraceSet, index: int, model: PreTrainedModel) -> Question:
    """The prompt of a recorded episode, with the answer that its workload expects.

    Of a question-agnostic episode the question follows the prompt, after eviction.

    Raises:
        KvenvError: if it was recorded from another model.
    """
    check_recorded(model, [traces])
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
    return Question(torch.tensor([ids]), cut, note, dict(facts))


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    cache: bounded.EvictionCache | None = None,
    *,
    max_new_tokens: int = 128,
    sample: bool = False,
    seed: int = 0,
    stream: bool = False,
) -> Answer:
    """Decode with a bounded cache, or with the full one.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        question: the prompt.
        cache: an empty cache; None is the full one.
        max_new_tokens: when to stop at the latest.
        sample: draw as the model's generation settings say instead of taking the likeliest.
        seed: of the draws; torch's global generator is left as it was.
        stream: print the text as it comes.

    Raises:
        KvenvError: if no token is asked for.
    """
    if max_new_tokens < 1:
        raise KvenvError(f"max-new-tokens is {max_new_tokens}: it must be at least 1")
    tokens = question.tokens.to(model.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id,
    }
    if stream:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    held = DynamicCache(config=model.config) if cache is None else cache
    began = time.perf_counter()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        if question.cut:
            model(tokens[:, : question.cut], past_key_values=held, logits_to_keep=1)
        if cache is None:
            call: Any = model.generate  # typed as a tensor by a wrapper inside transformers
            result = call(tokens, past_key_values=held, **options)
        else:
            result = bounded.generate(model, tokens, cache, **options)
    new = result[0, tokens.shape[1] :]
    seconds = time.perf_counter() - began
    seen = int(held.get_seq_length())
    kept, nbytes = float(seen), 0
    if cache is None:
        layers: Any = held.layers
        states = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        nbytes = sum(t.numel() * t.element_size() for t in states if t is not None)
    else:
        evicting = [i for i in full_attention_layers(model.config) if i < len(cache.layers)]
        counts = [(cache.positions(i) >= 0).sum(-1).float().mean().item() for i in evicting]
        kept, nbytes = sum(counts) / len(counts), cache.nbytes
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    return Answer(text, kept, seen, nbytes, len(new) / seconds)
