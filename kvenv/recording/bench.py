"""What recording costs: episodes recorded to disk, against plain forward passes over them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from kvenv.errors import KvenvError
from kvenv.identity import describe
from kvenv.recording import models
from kvenv.recording.capture import attention_of
from kvenv.recording.recorder import WriteBehind, episode
from kvenv.recording.workload import Sample
from kvenv.trace import Manifest, TraceWriter

FUTURE = 64
"""Tokens of an episode that are the future."""

EPISODES = 4
"""Recorded in a row, so that writing one overlaps with computing the next, as in a recording."""

WAYS = {
    "forward": "model(ids), the plain forward pass",
    "last_logits": "the same without the logits that nobody reads (logits_to_keep=1)",
    "record": "kvenv: captured, converted, written to disk, synced and hashed",
    "output_attentions": "transformers' own way to get at attention",
}


def run(name: str, lengths: Sequence[int], repeats: int, console: Console) -> dict[str, Any]:
    """Time and memory of four ways to run a model over an episode, interleaved.

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
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if wrong := [n for n in lengths if n <= FUTURE or n > (limit or n)]:
        raise KvenvError(
            f"tokens {wrong} do not fit: give lengths above {FUTURE} within the context of {name}, "
            f"{limit or 'any'}"
        )
    info = describe(model, tokenizer)
    manifest = Manifest(info, "bench", {}, 0, 10**6, "future", {}, ())
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for length in lengths:
            random = torch.Generator().manual_seed(length)
            tokens = torch.randint(5, config.vocab_size, (length,), generator=random)
            with TraceWriter(Path(scratch) / str(length), manifest) as writer:
                ways: dict[str, Callable[[], object]] = {
                    "forward": partial(_forward, model, tokens),
                    "last_logits": partial(_forward, model, tokens, logits_to_keep=1),
                    "record": partial(_record, model, tokens, writer),
                    "output_attentions": partial(_attentions, model, tokens),
                }
                rows.append({"tokens": length, **_measure(ways, repeats)})
    _show(rows, name, console)
    return {"bench": "record", "model": name, "repeats": repeats, "ways": WAYS, "rows": rows}


def _show(rows: Sequence[dict[str, Any]], name: str, console: Console) -> None:
    table = Table(title=f"recording {name}, an episode")
    for column in ("tokens", "way", "seconds", "x forward", "x last_logits", "peak memory"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        for way in WAYS:
            seconds = row[way]["seconds"]
            ratios = [seconds / row[base]["seconds"] for base in ("forward", "last_logits")]
            peak = f"{row[way]['peak_bytes'] / 2**20:,.0f} MiB"
            cells = [f"{number:.3f}" for number in (seconds, *ratios)]
            table.add_row(str(row["tokens"]), way, *cells, peak)
    console.print(table)


def _forward(model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> None:
    with torch.inference_mode():
        model(tokens.unsqueeze(0), use_cache=False, **options)


def _attentions(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with attention_of(model, "eager"):  # the only one that returns attention weights
        _forward(model, tokens, output_attentions=True)


def _record(model: PreTrainedModel, tokens: torch.Tensor, writer: TraceWriter) -> None:
    sample = Sample(tokens[:-FUTURE].tolist(), tokens[-FUTURE:].tolist(), "bench")
    layers = writer.manifest.model.layers
    with WriteBehind(writer) as behind:
        for _ in range(EPISODES):
            behind.add(episode(model, sample, layers, "future", 0))


def _measure(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds an episode, and peak resident bytes above the start; the runs interleave."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int] = {}
    for way, call in ways.items():  # warm up, and watch memory apart from the timed runs
        call()
        peaks[way] = _peak(call)
    for _ in range(repeats):
        for way, call in ways.items():
            gc.collect()
            began = time.perf_counter()
            call()
            spent = time.perf_counter() - began
            times[way].append(spent / EPISODES if way == "record" else spent)
    return {
        way: {"seconds": statistics.median(times[way]), "peak_bytes": peaks[way]} for way in ways
    }


def _peak(call: Callable[[], object]) -> int:
    """Peak resident memory during a call, above what it was before, in bytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only: give freed pages back first
        ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    before = highest = process.memory_info().rss
    stop = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        stop.set()
        watcher.join()
    return highest - before
