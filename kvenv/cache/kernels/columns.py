"""What every token receives from a range of queries: column sums and maxima of attention.

With p[g, t, i] = exp(scale * q[g, t] . k[i] - lse[g, t]) for i <= start + t, else 0, over the T
queries t and the G query heads g of a KV head: sums[i] = sum of p, maxima[i] = max of p. The
log-sum-exp of a flash forward makes p the softmax weights, with no second softmax.

A program owns a block of keys and walks the queries that can see them, so nothing is added
atomically and results repeat bit for bit. FLOPs: 2 D for each visible pair of query and key, half
of a flash forward's. Bytes, each number once: q, the n keys, lse and the results (`cost`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from triton import knobs

from kvenv.errors import KvenvError

TILES = {2: (128, 64), 4: (64, 32)}
"""Bytes of an element -> keys of a program, queries of a step. The products then take 64 float32
registers a thread, and two programs fit a multiprocessor: one's exponentials run beside the other's
products. Tiles of float32 take twice the shared memory."""

PROGRAMS = 4 * 132
"""Programs wanted: some for each multiprocessor of an H200, since early keys are seen by more
queries than late ones. A constant, so that results do not depend on the device."""

STEPS = 8
"""Steps left to a program, at least, where the queries are split among several."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _weights(
    step: tl.tensor, first: tl.tensor, count: tl.tensor, i: tl.tensor, keys: tl.tensor,
    query: tl.tensor, lse: tl.tensor, query_head: tl.tensor, query_step: tl.tensor,
    lse_head: tl.tensor, lse_step: tl.tensor, start: tl.tensor, length: tl.tensor, scale: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Weights (BLOCK_K, BLOCK_Q) of a step; a head has ``count`` query tiles from ``first``."""
    group = (step // tl.maximum(count, 1)).to(tl.int64)
    origin = (first + step % tl.maximum(count, 1)) * BLOCK_Q
    t = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    there = origin + t < length
    tile = query + group * query_head + origin.to(tl.int64) * query_step
    mask = there[:, None] & (d[None, :] < D)
    q = tl.load(tile + t[:, None] * query_step + d[None, :], mask=mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    row = lse + group * lse_head + origin.to(tl.int64) * lse_step
    level = tl.load(row + t * lse_step, mask=there, other=float("inf"))  # p is 0 past the end
    logits = tl.dot(keys, tl.trans(q), input_precision=PRECISION)
    p = tl.exp2(logits * (scale * LOG2E) - (level * LOG2E)[None, :])
    if MASKED:
        p = tl.where(i[:, None] <= (start + origin + t)[None, :], p, 0.0)
    return p


@triton.jit(do_not_specialize=["start", "n", "length", "splits"])
def _columns(
    query: tl.tensor, key: tl.tensor, lse: tl.tensor, sums: tl.tensor, maxima: tl.tensor,
    query_row: tl.tensor, query_head: tl.tensor, query_step: tl.tensor, key_row: tl.tensor,
    key_head: tl.tensor, key_step: tl.tensor, lse_row: tl.tensor, lse_head: tl.tensor,
    lse_step: tl.tensor, start: tl.tensor, n: tl.tensor, length: tl.tensor, splits: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, PEAKS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # The key block is the slow axis: the first keys, which most queries see, are begun first.
    part = tl.program_id(0) % splits
    pair = tl.program_id(0) // splits
    begin = tl.program_id(1) * BLOCK_K
    row = (pair // H).to(tl.int64)
    head = (pair % H).to(tl.int64)
    local = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    i = begin + local
    corner = key + row * key_row + head * key_head + begin.to(tl.int64) * key_step
    mask = (i < n)[:, None] & (d[None, :] < D)
    keys = tl.load(corner + local[:, None] * key_step + d[None, :], mask=mask, other=0.0)
    if UPCAST:
        keys = keys.to(tl.float32)
    query += row * query_row + head * G * query_head
    lse += row * lse_row + head * G * lse_head

    # Of each head's tiles of queries, `edge` see a part of the block, then `whole` see all of it.
    tiles = tl.cdiv(length, BLOCK_Q)
    first = tl.minimum(tl.maximum(begin - start, 0) // BLOCK_Q, tiles)
    last = tl.cdiv(tl.maximum(begin + BLOCK_K - 1 - start, 0), BLOCK_Q)
    last = tl.minimum(tl.maximum(last, first), tiles)
    edge = last - first
    whole = tiles - last
    share = tl.cdiv(G * (edge + whole), splits)
    low = part * share
    high = tl.minimum(low + share, G * (edge + whole))

    total = tl.zeros([BLOCK_K], tl.float32)
    peak = tl.zeros([BLOCK_K], tl.float32)
    for step in range(low, tl.minimum(high, G * edge)):
        p = _weights(
            step, first, edge, i, keys, query, lse, query_head, query_step, lse_head, lse_step,
            start, length, scale, D, BLOCK_D, BLOCK_Q, True, UPCAST, PRECISION,
        )  # fmt: skip
        total += tl.sum(p, 1)
        if PEAKS:
            peak = tl.maximum(peak, tl.max(p, 1))
    for step in range(tl.maximum(low, G * edge), high):
        p = _weights(
            step - G * edge, last, whole, i, keys, query, lse, query_head, query_step, lse_head,
            lse_step, start, length, scale, D, BLOCK_D, BLOCK_Q, False, UPCAST, PRECISION,
        )  # fmt: skip
        total += tl.sum(p, 1)
        if PEAKS:
            peak = tl.maximum(peak, tl.max(p, 1))

    pairs = tl.num_programs(0) // splits
    place = (part * pairs + pair).to(tl.int64) * n + i
    tl.store(sums + place, total, mask=i < n)
    if PEAKS:
        tl.store(maxima + place, peak, mask=i < n)


@library.custom_op("kvenv::columns", mutates_args=())
def _launch(
    query: Tensor, key: Tensor, lse: Tensor, start: int, n: int, scale: float, peaks: bool
) -> tuple[Tensor, Tensor]:
    (rows, heads, length, d), kv_heads = query.shape, key.shape[1]
    keys, queries = TILES[max(2, query.element_size())]
    blocks = -(-n // keys)
    steps = heads // kv_heads * -(-length // queries)
    splits = max(1, min(-(-PROGRAMS // (rows * kv_heads * blocks)), steps // STEPS))
    sums = query.new_empty(splits, rows, kv_heads, n, dtype=torch.float32)
    maxima = torch.empty_like(sums) if peaks else sums.new_empty(0)
    launch: Any = _columns[(rows * kv_heads * splits, blocks)]
    with torch.cuda.device_of(query):
        launch(
            *(query, key, lse, sums, maxima),
            *(*query.stride()[:3], *key.stride()[:3], *lse.stride()),
            *(start, n, length, splits, scale),
            H=kv_heads,
            G=heads // kv_heads,
            D=d,
            BLOCK_D=max(16, triton.next_power_of_2(d)),
            BLOCK_K=keys,
            BLOCK_Q=queries,
            PEAKS=peaks,
            # The interpreter's products of bfloat16 are wrong.
            UPCAST=knobs.runtime.interpret and query.dtype == torch.bfloat16,
            PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
            num_warps=4,
            num_stages=3 if d <= 128 else 2,
        )
    if splits == 1:
        return sums[0], maxima[0] if peaks else maxima
    return sums.sum(0), maxima.amax(0) if peaks else maxima


@_launch.register_fake
def _(
    query: Tensor, key: Tensor, lse: Tensor, start: int, n: int, scale: float, peaks: bool
) -> tuple[Tensor, Tensor]:
    sums = query.new_empty(query.shape[0], key.shape[1], n, dtype=torch.float32)
    return sums, torch.empty_like(sums) if peaks else sums.new_empty(0)


def columns(
    query: Tensor, key: Tensor, lse: Tensor, start: int, n: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Sum and maximum of the attention that each of the first n tokens receives.

    Args:
        query: (B, H * G, T, D) or (H * G, T, D) float16, bfloat16 or float32 at the positions
            start..start+T-1; query heads of one KV head are adjacent.
        key: (B, H, S, D) or (H, S, D), S >= n, of the same dtype; key i is at position i.
        lse: (B, H * G, T) or (H * G, T) float32, natural log-sum-exp of each query's logits.
        start: position of the first query.
        n: tokens whose attention is wanted.
        scale: factor on the logits.

    Returns:
        Sums and maxima over the T queries of the G heads, (B, H, n) or (H, n) float32.

    Raises:
        KvenvError: if shapes, dtypes, strides or the device do not fit.
    """
    sums, maxima = _columns_of(query, key, lse, start, n, scale, True)
    return sums, maxima


def column_sums(
    query: Tensor, key: Tensor, lse: Tensor, start: int, n: int, scale: float
) -> Tensor:
    """The sums of `columns` alone, without the work for the maxima."""
    return _columns_of(query, key, lse, start, n, scale, False)[0]


def _columns_of(
    query: Tensor, key: Tensor, lse: Tensor, start: int, n: int, scale: float, peaks: bool
) -> tuple[Tensor, Tensor]:
    _check(query, key, lse, start, n)
    if query.ndim == 4:
        return torch.ops.kvenv.columns(query, key, lse, start, n, scale, peaks)
    sums, maxima = torch.ops.kvenv.columns(
        query[None], key[None], lse[None], start, n, scale, peaks
    )
    return sums[0], maxima[0] if peaks else maxima


def _check(query: Tensor, key: Tensor, lse: Tensor, start: int, n: int) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, lse {tuple(lse.shape)}"
    if query.ndim not in (3, 4) or key.ndim != query.ndim or lse.shape != query.shape[:-1]:
        raise KvenvError(f"{shapes} do not fit: give (B, H * G, T, D), (B, H, S, D), (B, H * G, T)")
    if (
        query.shape[:-3] != key.shape[:-3]
        or query.shape[-1] != key.shape[-1]
        or query.shape[-3] % key.shape[-3]
    ):
        raise KvenvError(f"{shapes} differ in batch or head size, or query heads do not divide")
    if not 1 <= n <= key.shape[-2] or start < 0:
        raise KvenvError(
            f"n = {n} and start = {start} do not fit {key.shape[-2]} keys: need 1 <= n <= S and "
            "start >= 0"
        )
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise KvenvError(f"dtype {query.dtype} has no kernel: use columns_reference")
    if key.dtype != query.dtype or lse.dtype != torch.float32:
        raise KvenvError(
            f"query {query.dtype}, key {key.dtype} and lse {lse.dtype}: keys must have the "
            "queries' dtype and lse be float32"
        )
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        raise KvenvError("the head size must be the contiguous axis: call contiguous() before")
    if not (query.is_cuda or knobs.runtime.interpret):
        raise KvenvError(f"tensors on {query.device} have no kernel: use columns_reference")


def columns_reference(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    start: int,
    n: int,
    scale: float,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """`columns` in plain PyTorch, ``block`` queries at a time; float64 stays float64."""
    if query.ndim == 3:
        alone = (query[None], key[None], lse[None])
        sums, maxima = columns_reference(*alone, start, n, scale, block)
        return sums[0], maxima[0]
    wide = torch.promote_types(query.dtype, torch.float32)
    key = key.to(wide).unsqueeze(2)
    heads, length = key.shape[1], query.shape[2]
    sums = torch.zeros(key.shape[0], heads, n, dtype=wide, device=key.device)
    maxima = torch.zeros_like(sums)
    for t in range(0, length, block):
        rows = min(block, length - t)
        seen = min(n, start + t + rows)
        q = query[:, :, t : t + rows].to(wide).unflatten(1, (heads, -1))
        level = lse[:, :, t : t + rows].to(wide).unflatten(1, (heads, -1))
        p = (q @ key[..., :seen, :].mT * scale - level.unsqueeze(-1)).exp()
        later = torch.ones(rows, seen, dtype=torch.bool, device=p.device).triu(start + t + 1)
        p = p.masked_fill(later, 0).flatten(2, 3)
        sums[..., :seen] += p.sum(2)
        maxima[..., :seen] = maxima[..., :seen].maximum(p.amax(2))
    return sums, maxima


def cost(query: Tensor, key: Tensor, start: int, n: int) -> tuple[int, int]:
    """Bytes moved if each number moves once, and FLOPs of the products, of one call of `columns`.

    Args:
        query: (B, H * G, T, D) or (H * G, T, D), as `columns` takes it; only its shape counts.
        key: (B, H, S, D) or (H, S, D).
        start: position of the first query.
        n: tokens whose attention is wanted.
    """
    length, d = query.shape[-2:]
    heads, kv_heads = query.shape[:-2].numel(), key.shape[:-2].numel()
    growing = min(max(n - start, 0), length)  # queries that see start + 1, start + 2, ... keys
    pairs = growing * start + growing * (growing + 1) // 2 + (length - growing) * n
    moved = (heads * length * d + kv_heads * n * d) * query.element_size()
    return moved + 4 * (heads * length + 2 * kv_heads * n), 2 * d * heads * pairs
