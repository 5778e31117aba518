"""The slots of one layer: for every row and head as many as its capacity, never moved or grown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

BESIDE = 8
"""Bytes that a slot takes beside its key and value: position and score."""


class Slots:
    """Buffers of one layer, T = sum of the heads' capacities slots for each row of a batch.

    Used slots of a head are the first ``lengths`` of its own; what the others hold is undefined.

    Args:
        capacities: slots of every head.
        keys: gives rows, dtype, device and size, (B, H, q, d).
        values: gives their size, (B, H, q, dv).

    Attributes:
        keys: (B, T, d).
        values: (B, T, dv).
        positions: true positions, (B, T) int32.
        scores: fixed scores, or for scorers that ask for it the attention received, (B, T).
        lengths: slots in use, (B, H) int32.
        clock: the true position of the row's next token, negative while pads come, (B, H) int32:
            one for each head, for a kernel's programs to advance without waiting for each other.
        pending: what `kvenv.cache.kernels.insert` leaves for its next launch, (B, H, 4) int32.
        offsets: where the heads' slots begin and the last one's end, (H + 1,) int32.
        largest: the most slots that a head has.
    """

    @torch.inference_mode(False)  # outside of it, torch forbids writing to what is made inside
    def __init__(self, capacities: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        self._capacities = tuple(capacities)
        self.largest = max(capacities)
        self._uniform = min(capacities) == self.largest
        self._device = device = keys.device
        rows, heads, total = keys.shape[0], len(capacities), sum(capacities)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            made = torch.zeros(shape, dtype=dtype, device=device)
            if device.type == "cuda":  # compiled steps may then count on its address
                torch._dynamo.mark_static_address(made)
            return made

        self.keys = zeros(rows, total, keys.shape[-1], dtype=keys.dtype)
        self.values = zeros(rows, total, values.shape[-1], dtype=values.dtype)
        self.positions, self.scores = zeros(rows, total), zeros(rows, total, dtype=torch.float32)
        self.lengths, self.clock = zeros(rows, heads), zeros(rows, heads)
        self.pending = zeros(rows, heads, 4).fill_(-1)
        self.offsets = torch.tensor([0, *capacities]).cumsum(0).to(device, torch.int32)

    def suits(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these slots can take a batch like (B, H, q, d) keys and values."""
        return (*self.keys.shape[::2], self.values.shape[2], self.keys.dtype, self._device) == (
            *(keys.shape[0], keys.shape[-1], values.shape[-1], keys.dtype, keys.device),
        )

    def clear(self) -> None:
        """Forget what is held, NaN too, which would come through any mask."""
        self.keys.zero_()
        self.values.zero_()
        self.lengths.zero_()
        self.clock.zero_()
        self.pending.fill_(-1)

    def dense(self, slots: torch.Tensor) -> torch.Tensor:
        """What slots hold, (B, T, ...), by head: (B, H, largest, ...).

        What is beyond a head's own repeats its first slot.
        """
        chosen = slots
        if not self._uniform:  # indices are made anew: kept, they would be as large as positions
            column = torch.arange(self.largest, dtype=torch.int32, device=self._device)
            inside = column < self.offsets.diff().unsqueeze(1)
            index = column * inside + self.offsets[:-1].unsqueeze(1)
            chosen = slots.index_select(1, index.flatten())
        return chosen.unflatten(1, (len(self._capacities), self.largest))

    def flatten(self, dense: torch.Tensor) -> torch.Tensor:
        """The other way: of (B, H, largest) each head's own, (B, T)."""
        flat = dense.flatten(1)
        if self._uniform:
            return flat
        slot = torch.arange(self.keys.shape[1], dtype=torch.int32, device=self._device)
        head = torch.searchsorted(self.offsets[1:], slot, right=True, out_int32=True)
        return flat.index_select(1, head * self.largest + slot - self.offsets[head])

    def used(self) -> torch.Tensor:
        """Which slots are in use, (B, H, largest) bool."""
        return torch.arange(self.largest, device=self._device) < self.lengths.unsqueeze(-1)

    def reorder(self, rows: torch.Tensor) -> None:
        """Take these rows, as many as there are, in place."""
        for buffer in self._buffers():
            buffer.copy_(buffer.index_select(0, rows))

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Slots:
        """New slots with other rows of these."""
        new = [change(buffer) for buffer in self._buffers()]
        other = Slots(self._capacities, new[0].unsqueeze(1), new[1].unsqueeze(1))
        for buffer, content in zip(other._buffers(), new, strict=True):
            buffer.copy_(content)
        return other

    def _buffers(self) -> list[torch.Tensor]:
        return [
            *(self.keys, self.values, self.positions, self.scores),
            *(self.lengths, self.clock, self.pending),
        ]
