"""SmolLM2-135M with its shipped agent: a real model's tokens a second, by cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvenv.cache.bench.session import Session, wait
from kvenv.cache.eviction import EvictionCache
from kvenv.cache.generation import generate
from kvenv.errors import KvenvError
from kvenv.recording import models
from kvenv.scorers.base import Scorer
from kvenv.scorers.loading import load_scorer

MODEL, AGENT = "smollm2-135m", "kvp-smollm2-135m"

WAYS = {
    "dynamic": "model.generate with transformers' DynamicCache",
    "eager": "kvenv.cache.generate(graph=False) with an EvictionCache",
    "ours": "kvenv.cache.generate with an EvictionCache, its steps a CUDA graph",
}

TOKENS = (8, 136)
"""New tokens of a short and a long answer: their difference in time leaves the prompt's out."""

REPEATS = 3


def real_model(
    session: Session,
    context: int = 4096,
    budget: int = 512,
    batches: tuple[int, ...] = (1, 16),
    model: str = MODEL,
    agent: str = AGENT,
) -> None:
    """Measure greedy generation after prompts of random tokens.

    Args:
        session: where results go.
        context: tokens of a prompt.
        budget: tokens per head.
        batches: rows.
        model: see `kvenv.recording.models.load`.
        agent: see `kvenv.scorers.loading.load_scorer`.
    """
    facts = {"model": model, "agent": agent, "context": context, "budget": budget, "ways": WAYS}
    rows: list[dict[str, Any]] = []
    session.results["real"] = {**facts, "tokens": TOKENS[1] - TOKENS[0], "rows": rows}
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    try:
        lm, _ = models.load(model, dtype=dtype, device=session.device)
        scorer = load_scorer(agent)
    except KvenvError as error:  # its weights come apart from kvenv
        session.results["real"]["skipped"] = str(error)
        return
    for batch in batches:
        draw = torch.Generator().manual_seed(batch)
        ids = torch.randint(5, lm.config.vocab_size, (batch, context), generator=draw)
        ids = ids.to(session.device)
        for way in WAYS:
            found = session.measure(
                f"{model}, batch {batch}, {way}",
                lambda way=way, ids=ids: _rate(session, _writer(way, lm, scorer, ids, budget), ids),
            )
            rows.append({"way": way, "batch": batch, **found})


def _writer(
    way: str, model: PreTrainedModel, scorer: Scorer, ids: torch.Tensor, budget: int
) -> Callable[[int], object]:
    """Writes so many tokens after the prompt."""
    call: Any = model.generate
    mask = torch.ones_like(ids)

    def write(tokens: int) -> object:
        model.set_attn_implementation("sdpa")
        options = {
            "attention_mask": mask,
            "do_sample": False,
            "pad_token_id": 0,
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
        }
        if way == "dynamic":
            return call(ids, past_key_values=DynamicCache(config=model.config), **options)
        cache = EvictionCache(model, scorer, budget=budget, attention_mask=mask)
        return generate(model, ids, cache, graph=way == "ours", **options)

    return write


def _rate(session: Session, write: Callable[[int], object], ids: torch.Tensor) -> dict[str, Any]:
    spent: dict[int, float] = {}
    with torch.no_grad():
        write(TOKENS[0])
        for tokens in TOKENS:
            times = []
            for _ in range(REPEATS):
                wait(session.device)
                began = time.perf_counter()
                write(tokens)
                wait(session.device)
                times.append(time.perf_counter() - began)
            spent[tokens] = min(times)  # what disturbs only adds
    short, long = (spent[tokens] for tokens in TOKENS)
    new = len(ids) * (TOKENS[1] - TOKENS[0])
    return {
        "seconds": long,
        "prompt_seconds": short - (long - short) * TOKENS[0] / (TOKENS[1] - TOKENS[0]),
        "tokens_per_second": new / (long - short) if long > short else None,
    }
