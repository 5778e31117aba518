"""Tokens a second, peak memory and bytes of an 8B-shaped model's decoding, by cache and length."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kvenv.cache.bench.contenders import (
    LARGE,
    DecodeStep,
    contender,
    random_model,
    random_scorer,
    token_bytes,
)
from kvenv.cache.bench.inputs import RECENT, SINKS
from kvenv.cache.bench.session import Session, free, require, wait
from kvenv.cache.eviction import EvictionCache
from kvenv.cache.static import SlotLayer
from kvenv.scorers.bundle import NetworkScorer

WARMUP = 4
"""Steps before any is timed: two run, one is captured."""


class Point(NamedTuple):
    """What decodes, after how many tokens, for how many rows."""

    way: str
    context: int
    batch: int
    budget: int | None = None


@dataclass(frozen=True)
class Grid:
    """Which points are measured.

    Attributes:
        shape: of the model.
        contexts: tokens of text before the first step.
        batches: rows.
        budgets: of ours; those above a context are left out there.
        goal: context, batch and budget that come first.
        compiled: contexts and batches at which the StaticCache is compiled, a minute each.
        prompts: prompts that are read, one row each.
        steps: timed steps; the median counts.
        long: steps of the memory check.
    """

    shape: dict[str, Any] = field(default_factory=lambda: dict(LARGE))
    contexts: Sequence[int] = (1024, 4096, 8192, 32768, 131072)
    batches: Sequence[int] = (1, 4, 16)
    budgets: Sequence[int] = (512, 2048, 8192)
    goal: tuple[int, int, int] = (32768, 16, 2048)
    compiled: Sequence[tuple[int, int]] = ((32768, 16), (4096, 1))
    prompts: Sequence[int] = (8192, 32768)
    steps: int = 64
    long: int = 10_000

    def first(self) -> list[Point]:
        """What the goals need: ours and full caches at one point, ours over all contexts."""
        context, batch, budget = self.goal
        points = [Point("ours", context, batch, budget)]
        points += [Point(way, context, batch) for way in ("compiled", "unmasked", "dynamic")]
        for rows in (self.batches[0], self.batches[-1]):
            for held in self.budgets[:2]:
                points += [Point("ours", c, rows, held) for c in self.contexts if c > held]
        return self._known(points)

    def rest(self) -> list[Point]:
        """All others, large batches first; what takes a minute to compile last."""
        points: list[Point] = []
        for batch in sorted(self.batches, reverse=True):
            for context in self.contexts:
                points += [Point("ours", context, batch, b) for b in self.budgets if b <= context]
                points += [Point(way, context, batch) for way in ("unmasked", "dynamic")]
        points += [Point("compiled", *at) for at in self.compiled]
        first = self.first()
        return [point for point in self._known(points) if point not in first]

    def _known(self, points: list[Point]) -> list[Point]:
        """Those of the grid, once; compiled ones only where that was asked for."""
        return [
            point
            for point in dict.fromkeys(points)
            if point.context in self.contexts
            and point.batch in self.batches
            and (point.budget is None or point.budget in self.budgets)
            and (point.way != "compiled" or (point.context, point.batch) in self.compiled)
        ]


class Decoding:
    """The model, made once, and everything that it measures.

    Args:
        session: where results go.
        grid: what is measured.
    """

    def __init__(self, session: Session, grid: Grid) -> None:
        self._session, self._grid = session, grid
        self._model = random_model(grid.shape, session.device)
        self._scorer = random_scorer(self._model)
        self._rows: list[dict[str, Any]] = []
        weights = sum(p.numel() * p.element_size() for p in self._model.parameters())
        session.results["decoding"] = {
            "model": {**grid.shape, "dtype": str(self._model.dtype), "bytes": weights},
            "token_bytes": token_bytes(self._model),
            "rows": self._rows,
        }

    @torch.no_grad()
    def decode(self, points: Sequence[Point]) -> None:
        """Time the points, and keep each as it is there."""
        for point in points:
            asked = ", ".join(f"{k} {v}" for k, v in point._asdict().items() if v is not None)
            found = self._session.measure(asked, lambda point=point: self._point(point))
            self._rows.append({**point._asdict(), **found})
            if point.way == "compiled" and "skipped" not in found:
                torch.compiler.reset()  # else it holds the cache
                free(self._session.device)
                self._session.save(self._session.results)

    def _point(self, point: Point) -> dict[str, Any]:
        device, weights = self._session.device, self._weights()
        began = time.perf_counter()
        cache, step = contender(point.way, self._model, self._scorer, *point[1:])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = step_seconds(step, point.batch, self._grid.steps, device)
        row: dict[str, Any] = {
            "step_seconds": seconds,
            "tokens_per_second": point.batch / seconds,
            "cache_bytes": cache_bytes(cache),
            "setup_seconds": time.perf_counter() - began,
        }
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            row |= {"peak_bytes": peak, "peak_beside_weights": peak - weights}
        if point.budget is not None:
            due = point.batch * min(point.budget, point.context) * token_bytes(self._model)
            row |= {"budget_bytes": due, "cache_of_budget": row["cache_bytes"] / due}
        return row

    def _weights(self) -> int:
        device = self._session.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    @torch.no_grad()
    def prefill(self) -> None:
        """Read prompts of random tokens, one row each: seconds and peak memory."""
        rows = self._session.results["decoding"]["prefill"] = []
        budget = self._grid.goal[2]
        for tokens in self._grid.prompts:
            for way in ("dynamic", "ours"):
                found = self._session.measure(
                    f"prompt of {tokens}, {way}", lambda t=tokens, w=way: self._prompt(w, t, budget)
                )
                held = budget if way == "ours" else None
                rows.append({"way": way, "tokens": tokens, "budget": held, **found})

    def _prompt(self, way: str, tokens: int, budget: int) -> dict[str, Any]:
        model, device = self._model, self._session.device
        require(device, 2 * tokens * token_bytes(model))
        model.config._attn_implementation = "sdpa"
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
        times, peak, held = [], 0, 0
        for _ in range(4):  # the first compiles kernels
            cache: Cache = DynamicCache(config=model.config)
            if way == "ours":
                cache = self._empty(budget, tokens)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            wait(device)
            began = time.perf_counter()
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            wait(device)
            times.append(time.perf_counter() - began)
            held = cache_bytes(cache)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device) - self._allocated(model)
        return {
            "seconds": statistics.median(times[1:]),
            "peak_beside_weights": peak,
            "cache_bytes": held,
        }

    def _allocated(self, model: PreTrainedModel) -> int:
        return sum(p.numel() * p.element_size() for p in model.parameters())

    def _empty(self, budget: int, tokens: int) -> EvictionCache:
        on_gpu = self._session.device.type == "cuda"
        return EvictionCache(
            self._model.config,
            self._scorer,
            budget=budget,
            sinks=SINKS,
            recent=RECENT,
            backend="triton" if on_gpu else "torch",
            block=None if on_gpu else tokens,
        )


def step_seconds(step: DecodeStep, batch: int, steps: int, device: torch.device) -> float:
    """Median seconds of a decoding step, the choice of the likeliest token included."""
    token = torch.zeros(batch, dtype=torch.long, device=device)
    for _ in range(WARMUP):
        token = step(token).argmax(-1)
    wait(device)
    if device.type != "cuda":
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            token = step(token).argmax(-1)
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        token = step(token).argmax(-1)
        mark.record()
    wait(device)
    spent = (a.elapsed_time(b) for a, b in pairwise(marks))
    return statistics.median(spent) / 1000


def cache_bytes(cache: Cache) -> int:
    """Everything that a cache has allocated: keys, values and what ours keeps beside them."""
    return sum(t.numel() * t.element_size() for t in _tensors(cache))


def _tensors(cache: Cache) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        owner: Any = layer.slots if isinstance(layer, SlotLayer) else layer
        yield from (one for one in vars(owner).values() if isinstance(one, torch.Tensor))


def memory_over_time(session: Session, grid: Grid) -> dict[str, Any]:
    """The cache's bytes, its budget's, and the device's, before and after many decoded tokens.

    Args:
        session: the device, among others.
        grid: of its shape two layers are used, with a small vocabulary.
    """
    device, (context, batch, budget) = session.device, grid.goal
    shape = {**grid.shape, "num_hidden_layers": 2, "vocab_size": 1024}
    model = random_model(shape, device)
    scorer: NetworkScorer = random_scorer(model)
    with torch.no_grad():
        cache, step = contender("ours", model, scorer, context, batch, budget)
        token = torch.zeros(batch, dtype=torch.long, device=device)
        for _ in range(WARMUP):
            token = step(token).argmax(-1)
        before = _state(cache, device)
        for _ in range(grid.long):
            token = step(token).argmax(-1)
        wait(device)
        after = _state(cache, device)
    due = batch * min(budget, context) * token_bytes(model)
    return {
        "context": context,
        "batch": batch,
        "budget": budget,
        "tokens": grid.long,
        "budget_bytes": due,
        "before": before,
        "after": after,
        "cache_of_budget": after["cache_bytes"] / due,
        "grew_by": after["allocated_bytes"] - before["allocated_bytes"],
    }


def _state(cache: Cache, device: torch.device) -> dict[str, int]:
    wait(device)
    on_gpu = device.type == "cuda"
    return {
        "cache_bytes": cache_bytes(cache),
        "allocated_bytes": torch.cuda.memory_allocated(device) if on_gpu else 0,
        "seen": int(cache.get_seq_length()),
    }
