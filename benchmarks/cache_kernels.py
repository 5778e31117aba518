"""What each kernel takes on an NVIDIA GPU, beside what it is to be measured against.

    python benchmarks/cache_kernels.py [--batches 1 16 64] [--budget 2048] [--json FILE]

For each batch, one layer of an 8B model (8 KV heads of 128, 4 query heads each, bfloat16) with
full slots:

    attend   share of the device's copy bandwidth that it reaches
    score    TFLOP/s, and its time against plain torch
    select   against torch.topk and gather
    both     score and select a layer, over R steps, against R times attend: the most that
             selections can add to a decoding step
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvenv.cache.kernels import attend as attending
from kvenv.cache.kernels import score as scoring
from kvenv.cache.kernels import select as selecting
from kvenv.cache.kernels.network import Packed, pack
from kvenv.errors import KvenvError
from kvenv.rotation import Rotation
from kvenv.rules import refresh_interval
from kvenv.scorers.network import Architecture

HEADS, GROUP, SIZE, DTYPE = 8, 4, 128, torch.bfloat16
DEVICE = "cuda"
MOST = 2**33
"""Bytes of slots; more is skipped."""


@dataclass
class Slots:
    """One layer's full slots, heads one after another."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


def make_slots(batch: int, budget: int) -> Slots:
    """Random states in slots that are all in use."""
    total = HEADS * budget
    keys, values = torch.randn(2, batch, total, SIZE, device=DEVICE, dtype=DTYPE)
    whole = {"device": DEVICE, "dtype": torch.int32}
    positions = torch.arange(budget, **whole).repeat(batch, HEADS)
    starts = (torch.arange(HEADS, **whole) * budget).repeat(batch, 1)
    return Slots(keys, values, positions, starts, torch.full((batch, HEADS), budget, **whole))


def make_networks() -> Packed:
    """A layer's random networks of the default architecture, keys rotated as in Llama 3."""
    draw = torch.Generator().manual_seed(0)
    architecture = Architecture()
    network = architecture.build([(0, head) for head in range(HEADS)], SIZE, draw)
    speeds = tuple(500_000.0 ** (-2 * i / SIZE) for i in range(SIZE // 2))
    packed = pack(network, architecture, Rotation(speeds), SIZE, DEVICE)
    if packed is None:
        raise KvenvError(f"no kernel serves {architecture}")
    return packed


def seconds(call: Callable[[], object], captured: bool = True) -> float:
    """Median time of a call, the L2 cache cleared before it; in a CUDA graph, as decoding does."""
    from triton.testing import do_bench

    if captured:
        call()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    milliseconds: Any = do_bench(call, warmup=50, rep=200, return_mode="median")
    return milliseconds / 1000


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), captured=False)


def measure(batch: int, budget: int, copy: float) -> dict[str, Any]:
    """Times and ratios for one batch and budget."""
    slots, packed = make_slots(batch, budget), make_networks()
    states = slots.keys, slots.values
    where = slots.starts, slots.lengths
    interval = refresh_interval(budget)
    kept = budget - interval
    query = torch.randn(batch, HEADS * GROUP, SIZE, device=DEVICE, dtype=DTYPE)
    now = torch.full((batch,), 32_000, device=DEVICE)
    keep = torch.full_like(slots.lengths, kept)
    worth = torch.randn(slots.positions.shape, device=DEVICE)

    def select() -> None:
        slots.lengths.fill_(budget)  # the last call shortened them
        selecting.select(worth, keep, *states, slots.positions, None, *where, budget)

    def topk() -> None:
        best = worth.view(batch, HEADS, budget).topk(kept, sorted=False).indices
        best = best.sort(-1).values
        wide = best.unsqueeze(-1).expand(-1, -1, -1, SIZE)
        for held in states:
            held.view(batch, HEADS, budget, SIZE).gather(2, wide)
        slots.positions.view(batch, HEADS, budget).gather(2, best)

    attend = seconds(lambda: attending.attend(query, *states, *where, SIZE**-0.5, budget))
    score = seconds(lambda: scoring.score(*states, *where, now, packed, budget))
    plain = seconds(lambda: scoring.score_reference(*states, *where, now, packed, budget))
    selection = seconds(select)
    baseline = seconds(topk)
    moved, _ = attending.cost(
        batch, HEADS * GROUP, HEADS, HEADS * budget, SIZE, slots.keys.element_size()
    )
    _, flops = scoring.cost(slots.keys, HEADS * budget, packed)
    return {
        "batch": batch,
        "budget": budget,
        "interval": interval,
        "attend_seconds": attend,
        "attend_share_of_copy": moved / attend / copy,
        "score_seconds": score,
        "score_tflops": flops / score / 1e12,
        "score_share_of_torch": score / plain,
        "select_seconds": selection,
        "select_share_of_topk": selection / baseline,
        "selection_share_of_attend": (score + selection) / (interval * attend),
    }


def main() -> None:
    """Print a row for each batch, and write all with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--budget", type=int, default=2048, help="slots of each head")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the kernels are measured on an NVIDIA GPU, and torch finds none here")
    copy = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}, copy {copy / 1e12:.2f} TB/s, torch {torch.__version__}")
    rows = []
    for batch in options.batches:
        size = 2 * batch * HEADS * options.budget * SIZE * DTYPE.itemsize
        if size > MOST:
            print(f"batch {batch}: skipped, its slots would take {size:,} bytes")
            continue
        rows.append(measure(batch, options.budget, copy))
        print("  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()))
    if options.json:
        from kvenv import files

        facts = {"device": name, "torch": torch.__version__, "copy_bytes_per_second": copy}
        files.write(options.json, json.dumps({**facts, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
