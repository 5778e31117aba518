"""Where heads lie in a row's T slots, and the check of what a kernel is given."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from kvenv.errors import KvenvError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Expected = tuple[Tensor, tuple[int, ...], torch.dtype]
"""A tensor, and the shape and dtype that it must have."""


def indices(starts: Tensor, lengths: Tensor, largest: int, slots: int) -> tuple[Tensor, Tensor]:
    """Slots of each head, (B, H, largest) int64 within the row, and whether each is in use.

    Args:
        starts: (B, H) first slots of the heads.
        lengths: (B, H) slots in use.
        largest: at least every length.
        slots: T; what is not in use is clamped to the last slot.
    """
    place = torch.arange(largest, device=starts.device)
    index = (starts.unsqueeze(-1) + place).clamp(max=slots - 1)
    return index, place < lengths.unsqueeze(-1)


def check(kernel: str, expected: Mapping[str, Expected], largest: int, slots: int) -> None:
    """Refuse tensors that a kernel cannot read.

    Args:
        kernel: its name.
        expected: the tensors by name; all on the device of the first one, and contiguous.
        largest: the host's bound on lengths.
        slots: T.

    Raises:
        KvenvError: naming the tensor, what it has and what it must have.
    """
    device = next(iter(expected.values()))[0].device
    if device.type != "cuda" and not INTERPRETED:
        raise KvenvError(f"{kernel} runs on CUDA, not on {device}: use backend='torch' there")
    if not 1 <= largest <= slots:
        raise KvenvError(
            f"{kernel}: largest is {largest}: give a bound on all lengths, from 1 to {slots}"
        )
    for name, (tensor, shape, dtype) in expected.items():
        has = (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.is_contiguous())
        needs = (shape, dtype, device, True)
        if has != needs:
            raise KvenvError(
                f"{kernel}: {name}: (shape, dtype, device, contiguous) {has} must be {needs}"
            )
