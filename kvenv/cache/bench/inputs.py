"""Random inputs for the kernels: slots that are full or ragged, and networks to score with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvenv.scorers.network import Architecture, PerHeadMLP

ARCHITECTURE = Architecture(("key", "value"), (128, 128))
"""What the shipped agents are made of."""

SINKS, RECENT = 4, 16


@dataclass
class State:
    """One layer's slots, laid out as `kvenv.cache.storage.Slots` has them."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor
    clock: torch.Tensor
    pending: torch.Tensor
    largest: int

    def copy(self) -> State:
        """The same in memory of its own."""
        tensors = {k: v.clone() for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)

    def double(self) -> State:
        """The same, its numbers in float64."""
        names = ("keys", "values", "scores")
        return replace(self.copy(), **{name: getattr(self, name).double() for name in names})


def normal(draw: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers where ``draw`` lives."""
    return torch.randn(*shape, generator=draw, device=draw.device, dtype=dtype)


def full_positions(rows: int, heads: int, slots: int, clock: int) -> torch.Tensor:
    """Positions (rows, heads * slots) int32 of tokens spread over a text of ``clock`` tokens."""
    spread = torch.arange(slots, dtype=torch.float64) * (clock / slots)
    return spread.int().repeat(rows, heads)


def full_state(
    draw: torch.Generator, rows: int, heads: int, slots: int, size: int, dtype: torch.dtype
) -> State:
    """Slots that are all in use, ``slots`` for each head, on the generator's device."""
    total, clock, device = heads * slots, 8 * slots, draw.device
    return State(
        keys=normal(draw, rows, total, size, dtype=dtype),
        values=normal(draw, rows, total, size, dtype=dtype),
        positions=full_positions(rows, heads, slots, clock).to(device),
        scores=normal(draw, rows, total),
        offsets=torch.arange(heads + 1, dtype=torch.int32, device=device) * slots,
        lengths=torch.full((rows, heads), slots, dtype=torch.int32, device=device),
        clock=torch.full((rows, heads), clock, dtype=torch.int32, device=device),
        pending=torch.full((rows, heads, 4), -1, dtype=torch.int32, device=device),
        largest=slots,
    )


def ragged_state(
    draw: torch.Generator, rows: int, capacities: Sequence[int], size: int, dtype: torch.dtype
) -> State:
    """Slots of different numbers, some of them unused and then NaN; drawn on the CPU."""
    heads, total, largest = len(capacities), sum(capacities), max(capacities)
    counts = torch.tensor(capacities)
    lengths = (torch.rand(rows, heads, generator=draw) * (counts + 1)).int().clamp(max=counts)
    lengths[0] = counts  # one row is full
    offsets = torch.tensor([0, *counts.cumsum(0)], dtype=torch.int32)
    clock = 4 * largest + 64
    positions = torch.cat(
        [torch.rand(rows, clock, generator=draw).argsort(-1)[:, :c] for c in capacities], 1
    )
    state = State(
        keys=normal(draw, rows, total, size).to(dtype),
        values=normal(draw, rows, total, size).to(dtype),
        positions=positions.int(),
        scores=normal(draw, rows, total),
        offsets=offsets,
        lengths=lengths.int(),
        clock=torch.full((rows, heads), clock, dtype=torch.int32),
        pending=torch.full((rows, heads, 4), -1, dtype=torch.int32),
        largest=largest,
    )
    for row, used in enumerate(lengths.tolist()):
        for head, count in enumerate(used):
            unused = slice(int(offsets[head]) + count, int(offsets[head + 1]))
            for tensor in (state.keys, state.values, state.scores):
                tensor[row, unused] = torch.nan
    return state


def moved(state: State, device: torch.device) -> State:
    """The same on a device."""
    tensors = {k: v.to(device) for k, v in vars(state).items() if isinstance(v, torch.Tensor)}
    return replace(state, **tensors)


def networks(
    draw: torch.Generator, heads: Sequence[tuple[int, int]], size: int, architecture: Architecture
) -> PerHeadMLP:
    """Random networks whose weights float16 holds exactly, as bundles do; drawn on the CPU."""
    built = architecture.build(heads, size, draw)
    for weight in built.weights:
        weight.data = weight.data.half().float()
    if built.age is not None:
        built.age.data.normal_(generator=draw)
    return built.requires_grad_(False)
