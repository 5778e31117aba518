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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kvenv.errors import KvenvError
from kvenv.identity import describe
from kvenv.recording import models
from kvenv.recording.capture import attention_of, capture, fused
from kvenv.recording.recorder import WriteBehind, episode
from kvenv.recording.workload import Sample
from kvenv.trace import Manifest, ModelInfo, TraceWriter

FUTURE = 64
"""Tokens of an episode that are the future."""

EPISODES = 4
"""Recorded in a row, so that writing one overlaps with computing the next, as in a recording."""

RANDOM: dict[str, dict[str, Any]] = {
    "random-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "random-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32768,
    },
    "random-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Llamas of random weights in the shapes of SmolLM2-135M, of a model of 1 and of 8 billion weights:
time does not depend on the numbers, and there is nothing to download."""

CONTEXT = 2**17
"""Of random models, tokens."""

WAYS = {
    "forward": "model(ids), the plain forward pass",
    "last_logits": "the same without the logits that nobody reads (logits_to_keep=1)",
    "capture": "kvenv: captured and brought to the host, nothing written (on a GPU)",
    "record": "kvenv: captured, converted, written to disk, synced and hashed",
    "output_attentions": "transformers' own way to get at attention, where memory allows",
}


BASES = ("forward", "last_logits")
"""The ways that the others are compared with."""


def run(
    name: str,
    lengths: Sequence[int],
    repeats: int,
    console: Console,
    *,
    device: str = "cpu",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Time and memory of the ways to run a model over an episode, interleaved.

    Args:
        name: the model, or one of `RANDOM`.
        lengths: episode lengths S; the last `FUTURE` tokens are the future.
        repeats: timed runs of each; the median counts.
        console: where the table goes.
        device: cpu, or cuda: there memory is the GPU's, and ``parts`` says what the attention and
            the columns of all layers take.
        dtype: of the weights; auto is bfloat16 on cuda, and elsewhere the checkpoint's own.

    Raises:
        KvenvError: on no repeats, or a length too short to have a prompt or beyond the context.
    """
    if repeats < 1:
        raise KvenvError(f"repeats is {repeats}: it must be at least 1")
    model, tokenizer = _load(name, device, dtype)
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if wrong := [n for n in lengths if n <= FUTURE or n > (limit or n)]:
        raise KvenvError(
            f"tokens {wrong} do not fit: give lengths above {FUTURE} within the context of {name}, "
            f"{limit or 'any'}"
        )
    info = describe(model, tokenizer)
    manifest = Manifest(info, "bench", {}, 0, 10**6, "future", {}, ())
    cuda = model.device.type == "cuda"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for length in lengths:
            random = torch.Generator().manual_seed(length)
            tokens = torch.randint(5, config.vocab_size, (length,), generator=random)
            with TraceWriter(Path(scratch) / str(length), manifest) as writer:
                ways: dict[str, Callable[[], object]] = {
                    "forward": partial(_forward, model, tokens),
                    "last_logits": partial(_forward, model, tokens, logits_to_keep=1),
                    "capture": partial(capture, model, tokens, length - FUTURE),
                    "record": partial(_record, model, tokens, writer),
                    "output_attentions": partial(_attentions, model, tokens),
                }
                if not cuda:
                    del ways["capture"]
                rows.append({"tokens": length, **_measure(ways, repeats, model.device)})
            if cuda:
                rows[-1]["parts"] = _parts(model, info, length)
    _show(rows, name, console)
    hardware = torch.cuda.get_device_name(model.device) if cuda else "cpu"
    facts = {"model": name, "device": hardware, "dtype": str(model.dtype).removeprefix("torch.")}
    return {"bench": "record", **facts, "repeats": repeats, "ways": WAYS, "rows": rows}


def _load(name: str, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    cuda = torch.device(device).type == "cuda"
    if dtype == "auto" and (cuda or name in RANDOM):
        dtype = "bfloat16" if cuda else "float32"
    if name not in RANDOM:
        return models.load(name, dtype=dtype, device=device)
    config = LlamaConfig(max_position_embeddings=CONTEXT, **RANDOM[name])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.config._name_or_path = name
    one_word = Tokenizer(WordLevel({"a": 0}, unk_token="a"))  # nothing is tokenized
    return model.eval(), PreTrainedTokenizerFast(tokenizer_object=one_word)


def _parts(model: PreTrainedModel, info: ModelInfo, length: int) -> dict[str, float]:
    """Seconds of the fused attention and of both column passes, over all recorded layers."""
    n, scale = length - FUTURE, info.head_dim**-0.5
    q, k, v = (
        torch.randn(heads, length, info.head_dim, device=model.device, dtype=model.dtype)
        for heads in (info.query_heads, info.kv_heads, info.kv_heads)
    )
    if not fused(q):
        return {}
    # Here, since Triton is not everywhere.
    from kvenv.cache.kernels.columns import column_sums, columns
    from kvenv.cache.kernels.flash import flash

    _, lse = flash(q, k, v, scale)
    calls: dict[str, Callable[[], object]] = {
        "attention": lambda: flash(q, k, v, scale),
        "past_sum": lambda: column_sums(q[:, :n], k, lse[:, :n], 0, n, scale),
        "utility": lambda: columns(q[:, n:], k, lse[:, n:], n, n, scale),
    }

    def layers(call: Callable[[], object]) -> None:
        for _ in info.layers:
            call()

    return {part: _seconds(partial(layers, call), model.device) for part, call in calls.items()}


def _show(rows: Sequence[dict[str, Any]], name: str, console: Console) -> None:
    table = Table(title=f"recording {name}, an episode")
    for column in ("tokens", "way", "seconds", "x forward", "x last_logits", "peak memory"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        for way in filter(row.__contains__, WAYS):
            seconds = row[way]["seconds"]
            ratios = [seconds / row[base]["seconds"] for base in BASES]
            peak = f"{row[way]['peak_bytes'] / 2**20:,.0f} MiB"
            cells = [f"{number:.3f}" for number in (seconds, *ratios)]
            table.add_row(str(row["tokens"]), way, *cells, peak)
        for part, seconds in row.get("parts", {}).items():
            cells = [seconds, *(seconds / row[base]["seconds"] for base in BASES)]
            table.add_row("", f"  {part}", *(f"{number:.4f}" for number in cells), "")
    console.print(table)


def _forward(model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> None:
    with torch.inference_mode():
        model(tokens.unsqueeze(0).to(model.device), use_cache=False, **options)


def _attentions(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with attention_of(model, "eager"):  # the only one that returns attention weights
        _forward(model, tokens, output_attentions=True)


def _record(model: PreTrainedModel, tokens: torch.Tensor, writer: TraceWriter) -> None:
    sample = Sample(tokens[:-FUTURE].tolist(), tokens[-FUTURE:].tolist(), "bench")
    layers = writer.manifest.model.layers
    with WriteBehind(writer) as behind:
        for _ in range(EPISODES):
            behind.add(episode(model, sample, layers, "future", 0))


def _measure(
    ways: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Median seconds an episode, and peak bytes above the start; the runs interleave.

    A way that the GPU's memory does not allow is left out.
    """
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    peak = _peak if device.type == "cpu" else partial(_device_peak, device)
    for way, call in ways.items():  # warm up, and watch memory apart from the timed runs
        with contextlib.suppress(torch.OutOfMemoryError):
            call()
            peaks[way] = peak(call)
            times[way] = []
    for _ in range(repeats):
        for way in times:
            gc.collect()
            spent = _seconds(ways[way], device, warm=True)
            times[way].append(spent / EPISODES if way == "record" else spent)
    return {
        way: {"seconds": statistics.median(spent), "peak_bytes": peaks[way]}
        for way, spent in times.items()
    }


def _seconds(call: Callable[[], object], device: torch.device, warm: bool = False) -> float:
    """How long a call takes, with all that it began on the device; run before unless ``warm``."""
    if not warm:
        call()
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else bool
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def _device_peak(device: torch.device, call: Callable[[], object]) -> int:
    """Peak GPU memory during a call, above what it was before, in bytes."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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
