"""Which slot goes first, for kernels: the lowest worth, and of equals the later position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvenv.scorers.network import KNOTS

FLOAT32 = torch.finfo(torch.float32)
LOWEST, HIGHEST = tl.constexpr(FLOAT32.min), tl.constexpr(FLOAT32.max)
STAYS = tl.constexpr(float("inf"))  # the worth of a slot that may not go
LAST_KNOT = tl.constexpr(KNOTS - 1)


@triton.jit
def age_term(table: tl.tensor, ages: tl.tensor) -> tl.tensor:
    """`kvenv.scorers.network.age_term` of one head's table (17,)."""
    place = tl.log2(1.0 + tl.maximum(ages, 0).to(tl.float32))
    place = tl.minimum(place, LAST_KNOT * 1.0)
    below = tl.minimum(place.to(tl.int32), LAST_KNOT - 1)
    part = place - below.to(tl.float32)
    return (1.0 - part) * tl.load(table + below) + part * tl.load(table + below + 1)


@triton.jit
def worth_of(
    worth: tl.tensor, positions: tl.tensor, table: tl.tensor, slot: tl.tensor, slots: tl.tensor,
    now: tl.tensor, sinks: tl.tensor, last: tl.tensor, AGE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Worth of a block of one head's slots, STAYS for those that may not go, and positions.

    Args:
        worth: pointer to the head's numbers.
        positions: pointer to its positions.
        table: pointer to its age table (17,).
        slot: which slots.
        slots: how many the head has; if not all are in use, what the others hold may go too.
        now: the newcomer's position.
        sinks: see `kvenv.cache.kernels.insert.insert`.
        last: the last position that may go.
        AGE: whether the table is used.
    """
    inside = slot < slots
    position = tl.load(positions + slot, mask=inside, other=-1)
    number = tl.load(worth + slot, mask=inside, other=0.0)
    if AGE:
        number += age_term(table, now - position)
    number = tl.minimum(tl.where(number >= LOWEST, number, LOWEST), HIGHEST)  # NaN is lowest
    goes = (position >= tl.maximum(sinks, 0)) & (position <= last)
    return tl.where(goes, number, STAYS), position


@triton.jit
def lower(
    number: tl.tensor, position: tl.tensor, slot: tl.tensor, other_number: tl.tensor,
    other_position: tl.tensor, other_slot: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of two slots, or of two blocks' pairs, the one to go first: its worth, position and slot."""
    equal = (other_number == number) & (other_position > position)
    better = (other_number < number) | equal
    return (
        tl.where(better, other_number, number),
        tl.where(better, other_position, position),
        tl.where(better, other_slot, slot),
    )
