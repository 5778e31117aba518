"""Slots: where a cache keeps the tokens of the heads of one layer, or of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvenv.errors import KvenvError

CHANNELS = 16
"""Channels of keys or values that move at once, so that moving needs no second pool."""


@dataclass
class Tokens:
    """Tokens of one layer, head by head, in order of position from the left.

    Attributes:
        keys: (B, H, m, d).
        values: (B, H, m, dv).
        positions: (B, H, m) int64.
        counts: (B, H) tokens of each head; what is beyond them is undefined.
        past: (B, H, m) attention received so far, if it is kept.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    counts: Tensor
    past: Tensor | None = None

    @property
    def present(self) -> Tensor:
        """Which of them are tokens, (B, H, m) bool."""
        m = self.positions.shape[-1]
        return torch.arange(m, device=self.counts.device) < self.counts.unsqueeze(-1)

    def change(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply a function to every tensor (B, H, m, ...)."""
        past = None if self.past is None else change(self.past)
        keys, values, positions = (change(x) for x in (self.keys, self.values, self.positions))
        return Tokens(keys, values, positions, self.counts, past)

    def take(self, index: Tensor, counts: Tensor) -> Tokens:
        """The tokens ``index`` (B, H, k) of each head, of which the first ``counts`` count."""

        def chosen(x: Tensor) -> Tensor:
            wide = index if x.ndim == 3 else index.unsqueeze(-1).expand(*index.shape, x.shape[-1])
            return x.gather(2, wide)

        taken = self.change(chosen)
        taken.counts = counts
        return taken

    def rows(self, rows: Tensor | None) -> Tokens:
        """Some rows of the batch; None for all."""
        if rows is None:
            return self
        part = self.change(lambda x: x.index_select(0, rows))
        part.counts = self.counts.index_select(0, rows)
        return part


def after(held: Tokens, new: Tokens, valid: Tensor) -> Tokens:
    """Held tokens followed by a step's own, of which ``valid`` (B, H, q) are tokens."""
    past = None
    if held.past is not None and new.past is not None:
        past = torch.cat([held.past, new.past], 2)
    keys, values, positions = (
        torch.cat([getattr(held, name), getattr(new, name)], 2)
        for name in ("keys", "values", "positions")
    )
    both = Tokens(keys, values, positions, held.counts, past)
    there = torch.cat([held.present, valid], -1)
    counts = there.sum(-1)
    if not bool(there.all()):
        both = both.take((~there).to(torch.uint8).argsort(dim=-1, stable=True), counts)
    both.counts = counts
    return both


class Slots:
    """Buffers of L layers of H heads each: T slots for every row of a batch.

    Head h of layer i has the slots from ``starts[i, b, h]`` on; the first ``lengths[i, b, h]`` of
    them hold tokens, in order of position.

    Args:
        layers: L.
        total: T.
        keys: gives rows, heads, dtype, device and size, (B, H, q, d).
        values: gives their size, (B, H, q, dv).
        past: whether attention received is kept.

    Attributes:
        keys: (B, T, d).
        values: (B, T, dv).
        positions: (B, T) int32, true positions.
        past: (B, T) float32, or None.
        starts, lengths: (L, B, H) int32.
        clock: (L, B) int32, the true position of each row's next token.
        largest: at least the slots of any head, known to the host.
    """

    @torch.inference_mode(False)  # outside of it, torch forbids writing to what is made inside
    def __init__(self, layers: int, total: int, keys: Tensor, values: Tensor, past: bool) -> None:
        rows, heads, _, d = keys.shape
        self._check_memory(rows * total, keys, values)
        whole = {"dtype": torch.int32, "device": keys.device}
        self.keys = torch.zeros(rows, total, d, dtype=keys.dtype, device=keys.device)
        self.values = torch.zeros(
            rows, total, values.shape[-1], dtype=values.dtype, device=keys.device
        )
        self.positions = torch.zeros(rows, total, **whole)
        self.past = torch.zeros(rows, total, device=keys.device) if past else None
        self.lengths = torch.zeros(layers, rows, heads, **whole)
        self.clock = torch.zeros(layers, rows, **whole)
        size = total // (layers * heads)
        first = torch.arange(layers * heads, **whole) * size
        self.starts = first.view(layers, 1, heads).repeat(1, rows, 1)
        self.largest = size

    @staticmethod
    def _check_memory(slots: int, keys: Tensor, values: Tensor) -> None:
        device = keys.device
        if device.type != "cuda":
            return
        asked = slots * (keys.element_size() * (keys.shape[-1] + values.shape[-1]) + 4)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reusable
        if asked > free:
            raise KvenvError(
                f"the cache's slots take {asked:,} bytes and {device} has {free:,} free: lower "
                "budget or the batch's rows"
            )

    def suits(self, layers: int, total: int, keys: Tensor, values: Tensor) -> bool:
        """Whether these slots can take a batch like (B, H, q, d) keys and values."""
        own = (*self.keys.shape, self.values.shape[-1], self.keys.dtype, self.keys.device)
        wanted = (keys.shape[0], total, keys.shape[-1], values.shape[-1], keys.dtype, keys.device)
        return own == wanted and self.lengths.shape[::2] == (layers, keys.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values))

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put one token (B, H, d) of every row behind those that layer ``layer`` holds."""
        lengths, clock = self.lengths[layer], self.clock[layer]
        at = (self.starts[layer] + lengths).long()
        self.keys.scatter_(1, at.unsqueeze(-1).expand_as(key), key)
        self.values.scatter_(1, at.unsqueeze(-1).expand_as(value), value)
        self.positions.scatter_(1, at, clock.unsqueeze(1).expand_as(at))
        if self.past is not None:
            self.past.scatter_(1, at, torch.zeros(at.shape, device=at.device))
        lengths += 1
        clock += 1

    def write(self, layer: int, tokens: Tokens, present: Tensor, behind: bool) -> None:
        """Store tokens of a layer: in place of what it holds, or behind that.

        Args:
            layer: index of the layer here.
            tokens: what to store, in order.
            present: (B, H, m), which of them.
            behind: whether what is held stays.
        """
        rank = present.cumsum(-1) - 1
        lengths = self.lengths[layer]
        first = self.starts[layer] + (lengths if behind else 0)
        rows = torch.arange(len(present), device=present.device).view(-1, 1, 1)
        flat = (rows.expand_as(rank)[present], (first.unsqueeze(-1) + rank)[present].long())
        self.keys[flat] = tokens.keys[present]
        self.values[flat] = tokens.values[present]
        self.positions[flat] = tokens.positions[present].int()
        if self.past is not None and tokens.past is not None:
            self.past[flat] = tokens.past[present]
        counts = present.sum(-1).int()
        lengths.copy_(lengths + counts if behind else counts)

    def dense(self, layer: int, rows: Tensor | None = None, most: int | None = None) -> Tokens:
        """Copies of what a layer holds.

        Args:
            layer: index of the layer here.
            rows: of the batch; None for all.
            most: at least the tokens of any head; None takes `largest`.
        """
        starts, counts = self.starts[layer], self.lengths[layer]
        if rows is not None:
            starts, counts = (x.index_select(0, rows) for x in (starts, counts))
        m = self.largest if most is None else most
        slot = torch.arange(m, device=starts.device)
        inside = slot < counts.unsqueeze(-1)
        index = (starts.unsqueeze(-1) + slot).where(inside, 0).long()

        def chosen(buffer: Tensor) -> Tensor:
            part = buffer if rows is None else buffer.index_select(0, rows)
            flat = index.flatten(1)
            if part.ndim == 3:
                flat = flat.unsqueeze(-1).expand(*flat.shape, part.shape[-1])
            return part.gather(1, flat).unflatten(1, index.shape[1:])

        past = None if self.past is None else chosen(self.past)
        states = chosen(self.keys), chosen(self.values), chosen(self.positions).long()
        return Tokens(*states, counts.long(), past)

    def add(self, layer: int, past: Tensor) -> None:
        """Add attention (B, H, m) to what the tokens of a layer received."""
        if self.past is None:
            return
        slot = torch.arange(past.shape[-1], device=past.device)
        inside = slot < self.lengths[layer].unsqueeze(-1)
        index = (self.starts[layer].unsqueeze(-1) + slot).where(inside, 0).long()
        self.past.scatter_add_(1, index.flatten(1), past.where(inside, 0).flatten(1))

    def move(self, rows: Tensor | None, sources: Tensor) -> None:
        """Take for every slot of some rows what the slot ``sources`` (rows, T) has, in place."""
        for buffer in (self.keys, self.values):
            for first in range(0, buffer.shape[-1], CHANNELS):
                part = buffer[..., first : first + CHANNELS]
                wide = sources.unsqueeze(-1).expand(*sources.shape, part.shape[-1])
                _put(part, rows, _of(part, rows).gather(1, wide))
        for flat in (self.positions, self.past):
            if flat is not None:
                _put(flat, rows, _of(flat, rows).gather(1, sources))

    def clear(self) -> None:
        """Forget what is held, NaN too, which would come through any mask."""
        for buffer in (self.keys, self.values, self.past, self.lengths, self.clock):
            if buffer is not None:
                buffer.zero_()
        layers, rows, heads = self.lengths.shape
        self.largest = size = self.keys.shape[1] // (layers * heads)
        first = torch.arange(layers * heads, device=self.keys.device) * size
        self.starts.copy_(first.view(layers, 1, heads).expand(-1, rows, -1))

    @torch.inference_mode(False)
    def resize(self, total: int) -> None:
        """Have ``total`` slots a row, the first of them as before."""
        for name in ("keys", "values", "positions", "past"):
            buffer = getattr(self, name)
            if buffer is not None:
                new = buffer.new_zeros(len(buffer), total, *buffer.shape[2:])
                n = min(total, buffer.shape[1])
                new[:, :n] = buffer[:, :n]
                setattr(self, name, new)

    @torch.inference_mode(False)
    def change(self, change: Callable[[Tensor], Tensor], in_place: bool) -> None:
        """Take other rows: in place if they are as many, else in new buffers."""
        for name in ("keys", "values", "positions", "past", "starts", "lengths", "clock"):
            buffer = getattr(self, name)
            if buffer is None:
                continue
            inner = name in ("starts", "lengths", "clock")
            new = change(buffer.transpose(0, 1) if inner else buffer)
            new = new.transpose(0, 1).contiguous() if inner else new
            if in_place:
                buffer.copy_(new)
            else:
                setattr(self, name, new.clone())


def _of(buffer: Tensor, rows: Tensor | None) -> Tensor:
    return buffer if rows is None else buffer.index_select(0, rows)


def _put(buffer: Tensor, rows: Tensor | None, content: Tensor) -> None:
    if rows is None:
        buffer.copy_(content)
    else:
        buffer.index_copy_(0, rows, content)


def index_of(rows: Sequence[int], of: int, device: torch.device) -> Tensor | None:
    """Rows as an index; None if they are all."""
    return None if len(rows) == of else torch.tensor(rows, device=device)
