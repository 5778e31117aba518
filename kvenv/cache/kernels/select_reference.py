"""What `kvenv.cache.kernels.select` computes, in plain torch: needs no Triton and no GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kvenv.cache.kernels.layout import indices


def select_reference(
    worth: Tensor,
    keep: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    extra: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    largest: int,
) -> None:
    """The same as `select` by sorting, on any device and for keys and values of any dtype.

    All T slots are copied once, so it needs memory for them.
    """
    rows, slots = positions.shape
    index, used = indices(starts, lengths, largest, slots)
    number = worth.gather(1, index.flatten(1)).view(index.shape) + 0.0  # no -0.0
    number = number.masked_fill(~used, -torch.inf)
    best = number.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(largest, device=worth.device).expand(best.shape)
    count = torch.minimum(keep.clamp(min=0), lengths).unsqueeze(-1)
    stays = torch.zeros_like(used).scatter(-1, best, place < count)
    order = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)
    target = index.where(place < count, slots).flatten(1)  # the last place takes what goes
    source = torch.arange(slots + 1, device=worth.device).repeat(rows, 1)
    source = source.scatter(1, target, index.gather(-1, order).flatten(1))[:, :slots]
    row = torch.arange(rows, device=worth.device).unsqueeze(-1)
    for held in (keys, values, positions, extra):
        if held is not None:
            held.copy_(held[row, source])
    lengths.copy_(count.squeeze(-1))
