"""Decode attention over ragged slots: one query per row and query head, split over the slots.

    out[b, h*G + g] = sum_i softmax_i(scale * query[b, h*G + g] . key[i]) * value[i],
    i over the used slots of row b and head h; zeros where no slot is used

Every used key and value is read once, for all G query heads of its head; `cost` counts bytes and
FLOPs. At G = 4 in bfloat16 these are 4 FLOPs a byte, so memory bandwidth is the bound.

Two launches. `_attend` gives each program one share of a head's slots (flash-decoding, Dao et al.
2023): an online softmax in float32, base 2, whose result goes to scratch with its log-sum-exp.
`_combine` adds the shares up. Where one share holds the whole head the second launch falls away.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from kvenv.cache.kernels.attend_reference import attend_reference as attend_reference
from kvenv.cache.kernels.layout import INTERPRETED, check
from kvenv.errors import KvenvError

HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Tiles(NamedTuple):
    """How a program of `_attend` walks its slots: slots at a time, warps, pipeline stages."""

    block: int
    warps: int
    stages: int


TILES = {128: Tiles(128, 4, 3), 256: Tiles(128, 4, 3), 512: Tiles(64, 4, 3), 1024: Tiles(32, 4, 3)}
"""By bytes of a key in a tile. At D = 128 in bfloat16 on an H200 these were within 3 % of the best
of some 40 variants at batches 1, 4, 16 and 64: 32 KiB of keys and of values a step, two steps
ahead, so that one program keeps a multiprocessor's loads in flight."""

PROGRAMS = 1  # per multiprocessor, so that no second wave is left half empty
LEAST_BLOCKS = 1  # per program
MOST_SPLITS = 128  # shares that one program of `_combine` holds in its registers
PART = 64  # elements of the head size per program of `_combine`

INTERPRETED_MULTIPROCESSORS = 4  # pretended, so that the interpreter meets several splits

LOG2_E = math.log2(math.e)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite: the maximum of no slots at all


@triton.jit
def _attend(
    query: tl.tensor,  # (B, Hq, D)
    keys: tl.tensor,  # (B, T, D)
    values: tl.tensor,  # (B, T, D)
    starts: tl.tensor,  # (B, H)
    lengths: tl.tensor,  # (B, H)
    out: tl.tensor,  # (B, Hq, splits, D): float32 scratch, or the output where splits = 1
    sums: tl.tensor,  # (B, Hq, splits): log2 of the sum of exp2; not written where splits = 1
    scale: tl.tensor,  # times log2(e)
    slots: tl.tensor,
    heads: tl.tensor,
    splits: tl.tensor,
    share: tl.tensor,  # slots per program, a multiple of BLOCK
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # G and D rounded up to what a tile can have
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIAL: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    split = tl.program_id(1)
    length = tl.load(lengths + program)
    begin = split * share
    if (split == 0) | (begin < length):  # a head without slots writes zeros by its first program
        end = tl.minimum(begin + share, length)
        first = (program // heads).to(tl.int64) * slots + tl.load(starts + program)
        key = keys + first * D
        value = values + first * D
        g = tl.arange(0, ROWS)
        d = tl.arange(0, WIDTH)
        i = tl.arange(0, BLOCK)
        at = program.to(tl.int64) * G + g
        inside = d < D
        real = (g < G)[:, None] & inside[None, :]
        q = tl.load(query + at[:, None] * D + d[None, :], real, 0.0)

        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mean = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(begin, end, BLOCK):
            slot = start + i
            across, down = slot[None, :], slot[:, None]
            k = tl.load(key + across * D + d[:, None], (across < end) & inside[:, None], 0.0)
            v = tl.load(value + down * D + d[None, :], (down < end) & inside[None, :], 0.0)
            score = tl.dot(q, k, input_precision="ieee") * scale
            score = tl.where(across < end, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            shrink = tl.exp2(top - higher)
            weight = tl.exp2(score - higher[:, None])
            total = total * shrink + tl.sum(weight, 1)
            mean = mean * shrink[:, None]
            mean = tl.dot(weight.to(v.dtype), v, mean, input_precision="ieee")
            top = higher

        total = tl.where(total == 0, 1.0, total)
        place = at * splits + split
        tl.store(out + place[:, None] * D + d[None, :], mean / total[:, None], real)
        if PARTIAL:
            tl.store(sums + place, top + tl.log2(total), g < G)


@triton.jit
def _combine(
    partial: tl.tensor,  # (B, Hq, splits, D)
    sums: tl.tensor,  # (B, Hq, splits)
    lengths: tl.tensor,  # (B, H)
    out: tl.tensor,  # (B, Hq, D)
    splits: tl.tensor,
    share: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    SPLITS: tl.constexpr,  # `splits` rounded up to a power of two
) -> None:
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * PART + tl.arange(0, PART)
    split = tl.arange(0, SPLITS)
    length = tl.load(lengths + row // G)
    written = (split == 0) | ((split < splits) & (split * share < length))
    place = row * splits + split
    log = tl.load(sums + place, written, float("-inf"))
    weight = tl.exp2(log - tl.max(log, 0))
    inside = d < D
    at = place[:, None] * D + d[None, :]
    part = tl.load(partial + at, written[:, None] & inside[None, :], 0.0)
    mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * D + d, mean, inside)


def serves(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `attend` has a kernel for this head size and type."""
    return head_dim in HEAD_SIZES and dtype in DTYPES


def cost(
    batch: int, query_heads: int, heads: int, slots_per_row: int, head_dim: int, itemsize: int
) -> tuple[int, int]:
    """Bytes that a call of `attend` has to move and FLOPs that it has to do.

    ``slots_per_row`` are the used slots of a row, all its heads together, and ``itemsize`` the
    bytes of an element. Keys and values in use, queries, outputs, starts and lengths count once;
    each query head multiplies and adds each element of its keys and values once.
    """
    elements = batch * slots_per_row * head_dim
    tokens = 2 * (elements + batch * query_heads * head_dim) * itemsize
    return tokens + 8 * batch * heads, 4 * elements * (query_heads // heads)


def splits_for(programs: int, largest: int, multiprocessors: int, block: int = 128) -> int:
    """Shares into which to cut each of ``programs`` heads of ``largest`` slots.

    1 to `MOST_SPLITS`: as many as the device's multiprocessors have room for, but none of fewer
    than `LEAST_BLOCKS` times ``block`` slots.
    """
    wanted = PROGRAMS * multiprocessors // programs
    return max(1, min(wanted, largest // (LEAST_BLOCKS * block), MOST_SPLITS))


def launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    largest: int,
    *,
    block: int | None = None,
    splits: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """`attend` without its checks and with a choice of tiles, for measurements.

    ``block`` (a power of two, at least 16), ``warps`` and ``stages`` are fields of `Tiles`, by
    default those of `TILES`; a head is cut into at most ``splits`` shares, by default those of
    `splits_for`, at most `MOST_SPLITS`. The others are `attend`'s.
    """
    rows, query_heads, D = query.shape
    heads, slots = lengths.shape[1], keys.shape[1]
    G, width = query_heads // heads, 1 << (D - 1).bit_length()
    tiles = TILES[width * keys.element_size()]
    block = block or tiles.block
    full = min(rows * heads, math.ceil(rows * slots / largest))  # as many of the largest size fit
    splits = splits or splits_for(full, largest, _multiprocessors(query.device), block)
    share = block * math.ceil(math.ceil(largest / block) / splits)
    splits = math.ceil(largest / share)
    out = query.new_empty(query.shape)
    if INTERPRETED and query.dtype is torch.bfloat16:  # whose products are wrong there
        query, keys, values = query.float(), keys.float(), values.float()
    partial, sums = out, out
    if splits > 1:
        partial = query.new_empty((rows, query_heads, splits, D), dtype=torch.float32)
        sums = query.new_empty((rows, query_heads, splits), dtype=torch.float32)
    attend: Any = _attend[(rows * heads, splits)]
    combine: Any = _combine[(rows * query_heads, math.ceil(D / PART))]
    with torch.cuda.device_of(query):
        attend(
            *(query.contiguous(), keys, values, starts, lengths, partial, sums),
            *(scale * LOG2_E, slots, heads, splits, share, G, D),
            *(max(16, 1 << (G - 1).bit_length()), width, block, splits > 1),
            num_warps=warps or tiles.warps,
            num_stages=stages or tiles.stages,
        )
        if splits > 1:
            padded = 1 << (splits - 1).bit_length()
            inputs = (partial, sums, lengths, out, splits, share, G, D, PART, padded)
            combine(*inputs, num_warps=min(8, max(1, padded // 4)))
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@library.custom_op("kvenv::attend", mutates_args=())
def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    largest: int,
) -> Tensor:
    """Attention of one query per row and query head over the slots in use.

    Of row b, KV head h uses the lengths[b, h] slots from starts[b, h] on. Heads may lie anywhere
    and in any order; the content of the other slots does not matter. Nothing waits for the device.

    Args:
        query: (B, Hq, D); the Hq/H query heads of a KV head are adjacent.
        keys: (B, T, D), contiguous, in query's dtype.
        values: (B, T, D), contiguous, in query's dtype.
        starts: (B, H) int32, contiguous: the first slot of each head.
        lengths: (B, H) int32, contiguous: slots in use.
        scale: what scores are multiplied by, usually D**-0.5.
        largest: no length is above it.

    Returns:
        (B, Hq, D) in query's dtype, accumulated in float32; zeros where no slot is in use.

    Raises:
        KvenvError: shapes, dtypes, devices or layouts that do not fit, with what would.
    """
    rows, query_heads, D = query.shape
    if not serves(D, query.dtype):
        raise KvenvError(
            f"attend serves head sizes {HEAD_SIZES} in {DTYPES}, not {D} in {query.dtype}: use "
            "backend='torch' for these"
        )
    heads, slots = lengths.shape[-1], keys.shape[1]
    if query_heads % heads:
        raise KvenvError(f"{query_heads} query heads do not divide among {heads} KV heads")
    expected = {
        "keys": (keys, (rows, slots, D), query.dtype),
        "values": (values, (rows, slots, D), query.dtype),
        "starts": (starts, (rows, heads), torch.int32),
        "lengths": (lengths, (rows, heads), torch.int32),
    }
    check("attend", expected, largest, slots)
    return launch(query, keys, values, starts, lengths, scale, largest)


@attend.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    return query.new_empty(query.shape)
