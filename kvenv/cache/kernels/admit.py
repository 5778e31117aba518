"""Admission of a block of tokens: the best ``capacity`` of slots and newcomers, kept in place.

With C the tokens that row b and head h hold together with its newcomers, and c its capacity,

    kept = C if len(C) <= c else the first c of C sorted by (-worth, position)
    slots[free[i]] = arrivals[i]

where arrivals are the newcomers in kept, in order of their index, and free are the slots that
hold nothing of kept, in ascending order. What stays does not move.

Two launches. `_select`, one program per row and head, finds the c-th best worth by bisection of
its 32 bits, two a pass, and of its equals the last position that stays; then it lists free slots
and arrivals for `_copy`, so no thread reads what another one of its own launch wrote. Bytes:
worth and position of each candidate once from memory (from the L2 cache up to 16 times, and log2
of the newest position more where the last worth is shared), each arrival in and out. FLOPs: none.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from kvenv.cache.kernels.admit_reference import admit_reference, check_shapes
from kvenv.errors import KvenvError

__all__ = ["admit", "admit_reference", "cost"]

BLOCK = 4096  # candidates a step of `_select`: 8 a thread keep enough loads in flight
ROWS = 32  # arrivals a program of `_copy`: at d = 128 a thread moves 32 elements of keys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOWEST = tl.constexpr(-(2**31))  # below the order of every float32: what is no candidate


@triton.jit
def _position(
    new_positions: tl.tensor, positions: tl.tensor, stride: tl.tensor, q: tl.tensor,
    used: tl.tensor, place: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Positions of the candidates, newcomers before slots; negative for pads and past the end."""
    slot = place - q
    offset = place.to(tl.int64) * stride
    fresh = tl.load(new_positions + offset, mask=place < q, other=-1)
    held = tl.load(positions + slot, mask=(slot >= 0) & (slot < used), other=-1)
    return tl.maximum(fresh, held)


@triton.jit
def _order(
    new_worth: tl.tensor, worth: tl.tensor, q: tl.tensor, used: tl.tensor, place: tl.tensor,
    position: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Integers in the order of worth; LOWEST where the position is negative."""
    slot = place - q
    fresh = tl.load(new_worth + place, mask=place < q, other=0.0)
    held = tl.load(worth + slot, mask=(slot >= 0) & (slot < used), other=0.0)
    bits = tl.where(place < q, fresh, held).to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)  # -0.0 equals 0.0
    return tl.where(position >= 0, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)


@triton.jit
def _kept(order: tl.tensor, position: tl.tensor, worst: tl.tensor, limit: tl.tensor) -> tl.tensor:
    better = (order > worst) | ((order == worst) & (position <= limit))
    return (position >= 0) & better


@triton.jit
def _select(
    new_worth: tl.tensor, new_positions: tl.tensor, worth: tl.tensor, positions: tl.tensor,
    offsets: tl.tensor, lengths: tl.tensor, free: tl.tensor, chosen: tl.tensor, tallies: tl.tensor,
    position_b: tl.tensor, position_h: tl.tensor, position_q: tl.tensor, heads: tl.tensor,
    slots: tl.tensor, q: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    row = (program // heads).to(tl.int64)
    head = (program % heads).to(tl.int64)
    start = tl.load(offsets + head)
    capacity = tl.load(offsets + head + 1) - start
    used = tl.load(lengths + program)
    base = row * slots + start
    worth += base
    positions += base
    free += base
    chosen += base
    new_worth += program.to(tl.int64) * q
    new_positions += row * position_b + head * position_h
    lane = tl.arange(0, BLOCK)
    end = q + used

    count = tl.zeros([BLOCK], tl.int32)
    newest = tl.full([BLOCK], -1, tl.int32)
    for i in range(0, end, BLOCK):
        position = _position(new_positions, positions, position_q, q, used, i + lane)
        count += (position >= 0).to(tl.int32)
        newest = tl.maximum(newest, position)

    # Unless all fit: `reached` candidates, no fewer than `capacity`, are at or above `threshold`;
    # `over` candidates, fewer than `capacity`, are at or above `threshold + 4 * step`.
    reached = tl.sum(count, 0)
    over = tl.full((), 0, tl.int32)
    threshold = tl.full((), LOWEST, tl.int64)
    step = tl.full((), 1 << 30, tl.int64)
    while (reached > capacity) & (step > 0):
        low = (threshold + step).to(tl.int32)
        middle = (threshold + 2 * step).to(tl.int32)
        high = (threshold + 3 * step).to(tl.int32)
        lows = tl.zeros([BLOCK], tl.int32)
        middles = tl.zeros([BLOCK], tl.int32)
        highs = tl.zeros([BLOCK], tl.int32)
        for i in range(0, end, BLOCK):
            position = _position(new_positions, positions, position_q, q, used, i + lane)
            order = _order(new_worth, worth, q, used, i + lane, position)
            lows += (order >= low).to(tl.int32)
            middles += (order >= middle).to(tl.int32)
            highs += (order >= high).to(tl.int32)
        n1 = tl.sum(lows, 0)
        n2 = tl.sum(middles, 0)
        n3 = tl.sum(highs, 0)
        reached = tl.where(n1 >= capacity, n1, reached)
        reached = tl.where(n2 >= capacity, n2, reached)
        reached = tl.where(n3 >= capacity, n3, reached)
        over = tl.where(n3 < capacity, n3, over)
        over = tl.where(n2 < capacity, n2, over)
        over = tl.where(n1 < capacity, n1, over)
        moves = (n1 >= capacity).to(tl.int32) + (n2 >= capacity).to(tl.int32)
        threshold += step * (moves + (n3 >= capacity).to(tl.int32))
        step = step // 4

    # If too many remain they equal the threshold: those up to position `limit` stay, bisected.
    worst = threshold.to(tl.int32)
    before = tl.full((), -1, tl.int32)
    limit = tl.max(newest, 0)
    while (reached > capacity) & (limit - 1 > before):
        half = before + 1 + (limit - 2 - before) // 2
        counts = tl.zeros([BLOCK], tl.int32)
        for i in range(0, end, BLOCK):
            position = _position(new_positions, positions, position_q, q, used, i + lane)
            order = _order(new_worth, worth, q, used, i + lane, position)
            counts += ((order == worst) & (position <= half)).to(tl.int32)
        n = over + tl.sum(counts, 0)
        reached = tl.where(n >= capacity, n, reached)
        limit = tl.where(n >= capacity, half, limit)
        before = tl.where(n >= capacity, before, half)

    vacant = tl.full((), 0, tl.int32)
    for i in range(0, capacity, BLOCK):
        slot = i + lane
        position = _position(new_positions, positions, position_q, q, used, q + slot)
        order = _order(new_worth, worth, q, used, q + slot, position)
        empty = (slot < capacity) & (_kept(order, position, worst, limit) == 0)
        flags = empty.to(tl.int32)
        tl.store(free + vacant + tl.cumsum(flags, 0) - 1, slot, mask=empty)
        vacant += tl.sum(flags, 0)

    arrived = tl.full((), 0, tl.int32)
    for i in range(0, q, BLOCK):
        place = i + lane
        position = _position(new_positions, positions, position_q, q, used, place)
        order = _order(new_worth, worth, q, used, place, position)
        kept = (place < q) & _kept(order, position, worst, limit)
        flags = kept.to(tl.int32)
        rank = arrived + tl.cumsum(flags, 0) - 1
        tl.store(chosen + rank, place, mask=kept & (rank < vacant))  # never out of the head's slots
        arrived += tl.sum(flags, 0)
    arrived = tl.minimum(arrived, vacant)
    tl.store(tallies + 2 * program, arrived)
    tl.store(tallies + 2 * program + 1, capacity - vacant + arrived)


@triton.jit
def _copy(
    new_keys: tl.tensor, new_values: tl.tensor, new_positions: tl.tensor, new_scores: tl.tensor,
    keys: tl.tensor, values: tl.tensor, positions: tl.tensor, scores: tl.tensor, offsets: tl.tensor,
    lengths: tl.tensor, free: tl.tensor, chosen: tl.tensor, tallies: tl.tensor, key_b: tl.tensor,
    key_h: tl.tensor, key_q: tl.tensor, value_b: tl.tensor, value_h: tl.tensor, value_q: tl.tensor,
    position_b: tl.tensor, position_h: tl.tensor, position_q: tl.tensor, heads: tl.tensor,
    slots: tl.tensor, q: tl.tensor, size: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    arrived = tl.load(tallies + 2 * program)
    if first == 0:
        tl.store(lengths + program, tl.load(tallies + 2 * program + 1))
    if first < arrived:
        row = (program // heads).to(tl.int64)
        head = (program % heads).to(tl.int64)
        base = row * slots + tl.load(offsets + head)
        rank = first + tl.arange(0, ROWS)
        there = rank < arrived
        slot = base + tl.load(free + base + rank, mask=there, other=0)
        source = tl.load(chosen + base + rank, mask=there, other=0).to(tl.int64)

        new_positions += row * position_b + head * position_h
        position = tl.load(new_positions + source * position_q, mask=there, other=0)
        tl.store(positions + slot, position, mask=there)
        score = tl.load(new_scores + program.to(tl.int64) * q + source, mask=there, other=0.0)
        tl.store(scores + slot, score, mask=there)

        column = tl.arange(0, WIDTH)[None, :]
        inside = there[:, None] & (column < size)
        target = slot[:, None] * size + column
        new_keys += row * key_b + head * key_h
        key = tl.load(new_keys + source[:, None] * key_q + column, mask=inside)
        tl.store(keys + target, key, mask=inside)
        new_values += row * value_b + head * value_h
        value = tl.load(new_values + source[:, None] * value_q + column, mask=inside)
        tl.store(values + target, value, mask=inside)


CHANGED = ("keys", "values", "positions", "scores", "lengths")


@library.custom_op("kvenv::admit", mutates_args=CHANGED)
def admit(
    new_keys: Tensor, new_values: Tensor, new_positions: Tensor, new_scores: Tensor,
    new_worth: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor,
    worth: Tensor, offsets: Tensor, lengths: Tensor, largest: int,
) -> None:  # fmt: skip
    """Keep each head's best of what its slots hold and a block of newcomers, in place.

    No host synchronisation: the sizes of the launches depend on shapes and ``largest`` only.

    Args:
        new_keys: (B, H, q, D) of any strides; copied first if its last dimension is not contiguous.
        new_values: the same.
        new_positions: (B, H, q) int32 of any strides, distinct from those in use; negative for
            pads, which are never stored.
        new_scores: (B, H, q) float32, stored beside the keys.
        new_worth: (B, H, q) float32, no NaN: the higher stays, of equals the earlier position.
        keys: slots (B, T, D) of the newcomers' dtype, contiguous; changed.
        values: the same; changed.
        positions: (B, T) int32 of the used slots; changed.
        scores: (B, T) float32; changed.
        worth: (B, T) float32 of the used slots now.
        offsets: (H + 1,) int32; head h owns slots [offsets[h], offsets[h + 1]).
        lengths: (B, H) int32 slots in use, the first of each head's; changed.
        largest: most slots of one head.

    Raises:
        KvenvError: shapes, dtypes, strides or devices are not those, or the tensors on the CPU.
    """
    new = (new_keys, new_values, new_positions, new_scores, new_worth)
    check_shapes(*new, keys, values, positions, scores, worth, offsets, lengths)
    if keys.shape != values.shape:
        raise KvenvError("admit takes keys and values of one size: use admit_reference")
    if keys.device.type == "cpu" and not INTERPRETED:
        raise KvenvError("admit runs on a GPU, its tensors are on the CPU: use admit_reference")
    rows, heads, q, size = new_keys.shape
    if new_positions.numel() == 0:
        return
    new_scores, new_worth = new_scores.contiguous(), new_worth.contiguous()
    if new_keys.stride(-1) != 1 or new_values.stride(-1) != 1:
        new_keys, new_values = new_keys.contiguous(), new_values.contiguous()
    slots = keys.shape[1]
    free, chosen = torch.empty(2, rows, slots, dtype=torch.int32, device=keys.device)
    tallies = torch.empty(rows, heads, 2, dtype=torch.int32, device=keys.device)
    block = min(BLOCK, max(128, triton.next_power_of_2(q + largest)))
    select: Any = _select[(rows * heads,)]
    copy: Any = _copy[(rows * heads, triton.cdiv(min(q, largest), ROWS))]
    with torch.cuda.device_of(keys):
        select(
            *(new_worth, new_positions, worth, positions, offsets, lengths, free, chosen, tallies),
            *(*new_positions.stride(), heads, slots, q),
            BLOCK=block,
            num_warps=max(4, block // 256),
        )
        copy(
            *(new_keys, new_values, new_positions, new_scores, keys, values, positions, scores),
            *(offsets, lengths, free, chosen, tallies),
            *(*new_keys.stride()[:3], *new_values.stride()[:3], *new_positions.stride()),
            *(heads, slots, q, size),
            ROWS=ROWS,
            WIDTH=triton.next_power_of_2(size),
        )


@admit.register_fake
def _(*arguments: Tensor | int) -> None:
    return None


def cost(rows: int, heads: int, q: int, held: int, arrivals: int, row: int) -> tuple[int, int]:
    """Bytes moved and FLOPs (none) of one `admit`.

    Args:
        rows: batch size.
        heads: KV heads.
        q: newcomers.
        held: slots in use per head, before.
        arrivals: newcomers stored per head.
        row: bytes of one key.
    """
    # Keys and values, position and score in and out; free slot and index written and read.
    moved = 2 * (2 * row + 4 + 4) + 2 * (4 + 4)
    return rows * heads * (8 * (q + held) + moved * arrivals), 0
