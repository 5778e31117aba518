"""What recording costs: an episode recorded, against a plain forward pass over the same tokens."""

from __future__ import annotations

import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from kvenv.errors import KvenvError
from kvenv.identity import describe
from kvenv.recording import models
from kvenv.recording.capture import attention_of
from kvenv.recording.recorder import episode
from kvenv.recording.workload import Sample
from kvenv.trace import Manifest, TraceWriter

FUTURE = 64
"""Tokens of an episode that are the future."""


def run(name: str, lengths: Sequence[int], repeats: int, console: Console) -> dict[str, Any]:
    """Time and memory of the three ways to run a model over an episode, interleaved.

    ``plain`` is the model's own forward pass (logits of the last position only), ``record`` the
    same pass captured, converted and written to disk, ``output_attentions`` the way transformers
    offers to get at attention.

    Args:
        name: the model.
        lengths: episode lengths S; the last `FUTURE` tokens are the future.
        repeats: timed runs of each; the median counts.
        console: where the table goes.

    Raises:
        KvenvError: on no repeats, or a length too short to have a prompt or beyond the context.
    """
    if repeats < 1:
        raise KvenvError(f"repeats is {repeats}: it must be at least 1")
    model, tokenizer = models.load(name)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if wrong := [n for n in lengths if n <= FUTURE or n > (limit or n)]:
        raise KvenvError(
            f"tokens {wrong} do not fit: give lengths above {FUTURE} within the context of {name}, "
            f"{limit or 'any'}"
        )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for length in lengths:
            generator = torch.Generator().manual_seed(length)
            tokens = torch.randint(
                5, model.config.get_text_config().vocab_size, (length,), generator=generator
            )
            sample = Sample(tokens[:-FUTURE].tolist(), tokens[-FUTURE:].tolist(), "bench")
            manifest = Manifest(
                model=describe(model, tokenizer),
                workload="bench",
                arguments={},
                seed=0,
                episodes=10**6,
                queries="future",
                libraries={},
                shards=(),
            )
            writer = TraceWriter(Path(scratch) / str(length), manifest, shard_episodes=1)
            ways: dict[str, Callable[[], object]] = {
                "plain": lambda t=tokens: _plain(model, t),
                "record": lambda s=sample, w=writer: w.add(
                    episode(model, s, w.manifest.model.layers, "future", 0)
                ),
                "output_attentions": lambda t=tokens: _attentions(model, t),
            }
            seconds, peaks = _measure(ways, repeats)
            row: dict[str, Any] = {"tokens": length}
            for way in ways:
                row[way] = {
                    "seconds": seconds[way],
                    "ratio": seconds[way] / seconds["plain"],
                    "peak_bytes": peaks[way],
                }
            rows.append(row)
    table = Table("tokens", "way", "seconds", "x plain", "peak memory", title=f"recording {name}")
    for row in rows:
        for way in ("plain", "record", "output_attentions"):
            figures = row[way]
            table.add_row(
                str(row["tokens"]),
                way,
                f"{figures['seconds']:.3f}",
                f"{figures['ratio']:.3f}",
                f"{figures['peak_bytes'] / 2**20:,.0f} MiB",
            )
    console.print(table)
    return {"bench": "record", "model": name, "repeats": repeats, "rows": rows}


def _plain(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with torch.inference_mode():
        model(tokens.unsqueeze(0), use_cache=False, logits_to_keep=1)


def _attentions(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    # eager is the only implementation that returns attention weights
    with torch.inference_mode(), attention_of(model, "eager"):
        model(tokens.unsqueeze(0), use_cache=False, logits_to_keep=1, output_attentions=True)


def _measure(
    ways: dict[str, Callable[[], object]], repeats: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds, and peak resident bytes above the start, of each way; runs interleave."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int] = {}
    for way, call in ways.items():  # warm up, and watch memory apart from the timed runs
        gc.collect()
        call()
        peaks[way] = _peak(call)
    for _ in range(repeats):
        for way, call in ways.items():
            gc.collect()
            began = time.perf_counter()
            call()
            times[way].append(time.perf_counter() - began)
    return {way: statistics.median(values) for way, values in times.items()}, peaks


def _peak(call: Callable[[], object]) -> int:
    """Peak resident memory during a call, above what it was before, in bytes."""
    before = highest = _resident()
    stop = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        stop.set()
        watcher.join()
    return highest - before


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
