"""Selection: the best of each head's tokens stay, moved together in place.

With L = lengths[b, h], s = starts[b, h] and k = min(L, keep[b, h]), for each row b and head h

    kept    = the first k of 0..L-1 sorted by (-worth[s + i], i)
    slots[s + j] = slots[s + (the j-th smallest of kept)],  j < k;    lengths[b, h] = k

Two launches. `_choose`, one program per row and head, finds the k-th best worth by bisection of
its 32 bits, two a pass, and lists in order the slots that stay. `_compact`, one program per row,
head and piece of the channels, moves them from the left. A token never moves to the right, so
once a block is read, writing it overwrites nothing that is still to be read.

Bytes: worth once from memory (from the L2 cache up to 17 times), each token that moves in and
out. FLOPs: none. See `cost`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from kvenv.cache.kernels.layout import check
from kvenv.cache.kernels.select_reference import select_reference as select_reference

BLOCK = 4096  # slots a step of `_choose`: 8 a thread keep enough loads in flight
ROWS = 128  # tokens a step of `_compact`
PIECE = 128  # bytes of a token that a program of `_compact` moves: a line of the cache. On an H100
# 64 take 1.5 times as long at batch 64, 256 longer at batch 1

LOWEST = tl.constexpr(-(2**31))  # below the order of every float32: what is no candidate


@triton.jit
def _order(worth: tl.tensor, place: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Integers in the order of worth; LOWEST where no slot is in use."""
    inside = place < length
    bits = tl.load(worth + place, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)  # -0.0 equals 0.0
    return tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)


@triton.jit
def _choose(
    worth: tl.tensor, keep: tl.tensor, starts: tl.tensor, lengths: tl.tensor, sources: tl.tensor,
    moves: tl.tensor, heads: tl.tensor, slots: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    base = (program // heads).to(tl.int64) * slots + tl.load(starts + program)
    length = tl.load(lengths + program)
    wanted = tl.maximum(tl.load(keep + program), 0)
    worth += base
    sources += base
    lane = tl.arange(0, BLOCK)
    if wanted >= length:
        tl.store(moves + program, 0)
    else:
        # `reached` slots, no fewer than `wanted`, are at or above `threshold`;
        # `over` slots, fewer than `wanted`, are at or above `threshold + 4 * step`.
        reached = length
        over = tl.full((), 0, tl.int32)
        threshold = tl.full((), LOWEST, tl.int64)
        step = tl.full((), 1 << 30, tl.int64)
        while (reached > wanted) & (step > 0):
            low = (threshold + step).to(tl.int32)
            middle = (threshold + 2 * step).to(tl.int32)
            high = (threshold + 3 * step).to(tl.int32)
            lows = tl.zeros([BLOCK], tl.int32)
            middles = tl.zeros([BLOCK], tl.int32)
            highs = tl.zeros([BLOCK], tl.int32)
            for i in range(0, length, BLOCK):
                order = _order(worth, i + lane, length)
                lows += (order >= low).to(tl.int32)
                middles += (order >= middle).to(tl.int32)
                highs += (order >= high).to(tl.int32)
            n1 = tl.sum(lows, 0)
            n2 = tl.sum(middles, 0)
            n3 = tl.sum(highs, 0)
            reached = tl.where(n1 >= wanted, n1, reached)
            reached = tl.where(n2 >= wanted, n2, reached)
            reached = tl.where(n3 >= wanted, n3, reached)
            over = tl.where(n3 < wanted, n3, over)
            over = tl.where(n2 < wanted, n2, over)
            over = tl.where(n1 < wanted, n1, over)
            passed = (n1 >= wanted).to(tl.int32) + (n2 >= wanted).to(tl.int32)
            threshold += step * (passed + (n3 >= wanted).to(tl.int32))
            step = step // 4

        # What reaches the threshold stays. If that is too many, the surplus equals it exactly:
        # of these the first `wanted - over` stay.
        worst = threshold.to(tl.int32)
        tied = reached > wanted
        equals = tl.full((), 0, tl.int32)
        count = tl.full((), 0, tl.int32)
        for i in range(0, length, BLOCK):
            place = i + lane
            order = _order(worth, place, length)
            equal = ((order == worst) & (place < length)).to(tl.int32)
            rank = equals + tl.cumsum(equal, 0)
            late = tied & (equal > 0) & (rank > wanted - over)
            kept = (place < length) & (order >= worst) & (late == 0)
            flags = kept.to(tl.int32)
            target = count + tl.cumsum(flags, 0) - 1
            tl.store(sources + target, place, mask=kept & (target < wanted))
            equals += tl.sum(equal, 0)
            count += tl.sum(flags, 0)
        tl.store(moves + program, wanted)
        tl.store(lengths + program, wanted)


@triton.jit
def _piece(
    held: tl.tensor, base: tl.tensor, sources: tl.tensor, count: tl.tensor, first: tl.tensor,
    size: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Move WIDTH channels from ``first`` on of a head's tokens (T, size)."""
    column = (first + tl.arange(0, WIDTH))[None, :]
    held += base * size
    for i in range(0, count, ROWS):
        target = i + tl.arange(0, ROWS)
        source = tl.load(sources + base + target, mask=target < count, other=0)
        moving = ((target < count) & (source != target))[:, None] & (column < size)
        x = tl.load(held + source[:, None].to(tl.int64) * size + column, mask=moving)
        tl.debug_barrier()  # every thread has read its part of the block
        tl.store(held + target[:, None].to(tl.int64) * size + column, x, mask=moving)


@triton.jit
def _compact(
    keys: tl.tensor, values: tl.tensor, positions: tl.tensor, extra: tl.tensor, starts: tl.tensor,
    sources: tl.tensor, moves: tl.tensor, heads: tl.tensor, slots: tl.tensor, D: tl.constexpr,
    DV: tl.constexpr, KEY_PIECES: tl.constexpr, EXTRA: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    piece = tl.program_id(1)
    base = (program // heads).to(tl.int64) * slots + tl.load(starts + program)
    count = tl.load(moves + program)
    if piece < KEY_PIECES:
        _piece(keys, base, sources, count, piece * WIDTH, D, ROWS, WIDTH)
    else:
        _piece(values, base, sources, count, (piece - KEY_PIECES) * WIDTH, DV, ROWS, WIDTH)
    if piece == 0:
        _piece(positions, base, sources, count, piece, 1, ROWS, 1)
        if EXTRA:
            _piece(extra, base, sources, count, piece, 1, ROWS, 1)


@library.custom_op(
    "kvenv::select", mutates_args=("keys", "values", "positions", "extra", "lengths")
)
def select(
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
    """Keep the best of what each head holds, in place and in order.

    Of head h of row b, the lengths[b, h] slots from starts[b, h] on are in use. The keep[b, h] of
    the highest worth stay, of equals the earlier slots; they move to the left of the head's slots
    and lengths becomes their number. Heads that hold no more than that are left as they are.
    Nothing waits for the device: the sizes of the launches depend on shapes and ``largest`` only.

    Args:
        worth: (B, T) float32 of the used slots, no NaN; +inf for what always stays.
        keep: (B, H) int32 tokens to keep.
        keys: (B, T, D); changed.
        values: (B, T, Dv); changed.
        positions: (B, T) int32; changed.
        extra: (B, T) float32 that moves along, such as past attention, or None; changed.
        starts: (B, H) int32; heads overlap nowhere.
        lengths: (B, H) int32; changed.
        largest: no length is above it.

    Raises:
        KvenvError: if shapes, dtypes or devices do not fit, or a tensor is not contiguous.
    """
    (rows, slots, D), DV, heads = keys.shape, values.shape[-1], lengths.shape[-1]
    whole, real = torch.int32, torch.float32
    expected = {
        "keys": (keys, (rows, slots, D), keys.dtype),
        "values": (values, (rows, slots, DV), keys.dtype),
        "worth": (worth, (rows, slots), real),
        "positions": (positions, (rows, slots), whole),
        "keep": (keep, (rows, heads), whole),
        "starts": (starts, (rows, heads), whole),
        "lengths": (lengths, (rows, heads), whole),
    }
    if extra is not None:
        expected["extra"] = (extra, (rows, slots), real)
    check("select", expected, largest, slots)
    if not lengths.numel():
        return
    sources = torch.empty(rows, slots, dtype=whole, device=keys.device)
    moves = torch.empty(rows, heads, dtype=whole, device=keys.device)
    block = min(BLOCK, max(128, triton.next_power_of_2(largest)))
    width = max(1, PIECE // keys.element_size())
    key_pieces, value_pieces = triton.cdiv(D, width), triton.cdiv(DV, width)
    choose: Any = _choose[(rows * heads,)]
    compact: Any = _compact[(rows * heads, key_pieces + value_pieces)]
    with torch.cuda.device_of(keys):
        choose(
            *(worth, keep, starts, lengths, sources, moves, heads, slots),
            BLOCK=block,
            num_warps=max(4, block // 256),
        )
        compact(
            *(keys, values, positions, positions if extra is None else extra),
            *(starts, sources, moves, heads, slots),
            D=D,
            DV=DV,
            KEY_PIECES=key_pieces,
            EXTRA=extra is not None,
            ROWS=ROWS,
            WIDTH=width,
            num_warps=4,
            num_stages=1,  # a load must not move before an earlier store
        )


@select.register_fake
def _(*arguments: Any) -> None:
    return None


def cost(rows: int, heads: int, held: int, moved: int, row: int) -> tuple[int, int]:
    """Bytes moved and FLOPs (none) of one `select` without ``extra``.

    Args:
        rows: batch size.
        heads: KV heads.
        held: slots in use per head, before.
        moved: tokens that change their slot, per head.
        row: bytes of one key and its value.
    """
    # Worth read; source written and read; key, value and position in and out.
    return rows * heads * (4 * held + moved * (2 * row + 2 * 4 + 2 * 4)), 0
