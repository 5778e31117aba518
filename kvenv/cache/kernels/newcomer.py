"""Scores of newcomers inside `insert`: a program's own, or those that the last launch stored.

A program that scores its own token reads all of its head's weights for it, and its slot waits.
One that scores a head's last tokens of GROUP rows reads them once for all, while others find the
slots to overwrite; see `kvenv.cache.kernels.insert`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvenv.cache.kernels.network import (
    activate,
    fill_input,
    norm_input,
    position_input,
    scalar_input,
    token_products,
)

GROUP = tl.constexpr(8)  # with every number in two float16 parts, the 16 rows of a matrix product
PIECE = 2**15  # bytes of weights at a time: 32 registers a thread of 8 warps
HALF = tl.constexpr(65504.0)  # the largest float16


@triton.jit
def score_newcomer(
    key: tl.tensor, value: tl.tensor, head: tl.tensor, now: tl.tensor, new_key: tl.tensor,
    new_value: tl.tensor, w_key: tl.tensor, w_value: tl.tensor, w_scalar: tl.tensor,
    b1: tl.tensor, w2: tl.tensor, b2: tl.tensor, w_out: tl.tensor, b_out: tl.tensor,
    key_affine: tl.tensor, value_affine: tl.tensor, scalar_affine: tl.tensor,
    BUDGET: tl.constexpr, D: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, KEY: tl.constexpr,
    VALUE: tl.constexpr, SCALARS: tl.constexpr, ACT: tl.constexpr, INPUTS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Score of one token.

    Args:
        key: pointer to its D numbers.
        value: likewise.
        head: the head's index.
        now: the token's position.
        new_key: the numbers at ``key``.
        new_value: likewise.
        w_key: this and the next ten are those of `Packed.tensors`.
        w_value: likewise.
        w_scalar: likewise.
        b1: likewise.
        w2: likewise.
        b2: likewise.
        w_out: likewise.
        b_out: likewise.
        key_affine: likewise.
        value_affine: likewise.
        scalar_affine: likewise.
        BUDGET: of the feature fill.
        D: head size.
        W1: first hidden width.
        W2: second hidden width, or 0.
        KEY: whether keys are a feature.
        VALUE: whether values are one.
        SCALARS: which of `kvenv.cache.kernels.network.SCALARS` are, a bit each.
        ACT: the activation's name.
        INPUTS: of a token's numbers at a time.
        AHEAD: second-layer units at a time, the first of them fetched ahead.
    """
    columns = tl.arange(0, W1)
    total = tl.zeros((INPUTS, W1), tl.float32)
    if KEY:
        at = key_affine + head * 2 * D
        total = token_products(total, key, w_key + head * D * W1, at, D, W1, INPUTS)
    if VALUE:
        at = value_affine + head * 2 * D
        total = token_products(total, value, w_value + head * D * W1, at, D, W1, INPUTS)
    if W2 > 0:
        w2 += head * W2 * W1
        b2 += head * W2
        w_out += head * W2
        outer = tl.arange(0, AHEAD)
        inner = tl.load(w2 + outer[:, None] * W1 + columns[None, :])
    hidden = tl.sum(total, axis=0) + tl.load(b1 + head * W1 + columns)
    w = w_scalar + head * 4 * W1 + columns
    affine = scalar_affine + head * 8
    if SCALARS & 1:
        hidden += scalar_input(position_input(now), affine, 0) * tl.load(w)
    if SCALARS & 2:
        hidden += scalar_input(fill_input(now, BUDGET), affine, 1) * tl.load(w + W1)
    if SCALARS & 4:
        x = new_key.to(tl.float32)
        size = scalar_input(norm_input(tl.sum(x * x, axis=0)), affine, 2)
        hidden += size * tl.load(w + 2 * W1)
    if SCALARS & 8:
        x = new_value.to(tl.float32)
        size = scalar_input(norm_input(tl.sum(x * x, axis=0)), affine, 3)
        hidden += size * tl.load(w + 3 * W1)
    hidden = activate(hidden, ACT)
    if W2 > 0:
        second = tl.sum(inner.to(tl.float32) * hidden[None, :], axis=1) + tl.load(b2 + outer)
        ends = activate(second, ACT) * tl.load(w_out + outer)
        for first in tl.static_range(AHEAD, W2, AHEAD):
            outer = first + tl.arange(0, AHEAD)
            inner = tl.load(w2 + outer[:, None] * W1 + columns[None, :])
            second = tl.sum(inner.to(tl.float32) * hidden[None, :], axis=1)
            second = activate(second + tl.load(b2 + outer), ACT)
            ends += second * tl.load(w_out + outer)
    else:
        ends = hidden * tl.load(w_out + head * W1 + columns)
    return tl.load(b_out + head) + tl.sum(ends, axis=0)


@triton.jit
def _half(x: tl.tensor) -> tl.tensor:
    """To float16, at most the largest; NaN stays NaN."""
    return tl.where(x > HALF, HALF, tl.where(x < -HALF, -HALF, x)).to(tl.float16)


@triton.jit
def _product(
    total: tl.tensor, x: tl.tensor, rest: tl.tensor, weights: tl.tensor
) -> tl.tensor:  # fmt: skip
    """Add ``x`` (2 GROUP, n), each number there twice, times (n, W) to ``total``, in two parts.

    With float16 weights the first half of the rows is of x rounded to float16, and the second
    (``rest``) of what that leaves: 22 bits of it, up to 2^17 in size, at the price of float16.
    Else all of x is in the first half.
    """
    if weights.dtype == tl.float16:
        x = _half(tl.where(rest, x - _half(x).to(tl.float32), x))
        return tl.dot(x, weights, total)
    else:
        return tl.dot(tl.where(rest, 0.0, x), weights, total, input_precision="tf32x3")


@triton.jit
def _folded(total: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """(2 GROUP, W) to (GROUP, W), the sums of both parts."""
    return tl.sum(tl.reshape(total, (2, GROUP, WIDTH)), axis=0)


@triton.jit
def _twice(x: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """(GROUP, W) to (2 GROUP, W)."""
    return tl.reshape(tl.broadcast_to(x[None, :, :], (2, GROUP, WIDTH)), (2 * GROUP, WIDTH))


@triton.jit
def _weights(
    w: tl.tensor, start: tl.constexpr, INPUTS: tl.constexpr, D: tl.constexpr, W1: tl.constexpr
) -> tl.tensor:
    """First-layer weights of INPUTS numbers."""
    part = start + tl.arange(0, INPUTS)
    return tl.load(
        w + part[:, None] * W1 + tl.arange(0, W1)[None, :], mask=(part < D)[:, None], other=0.0
    )


@triton.jit
def _numbers(
    x: tl.tensor, at: tl.tensor, inside: tl.tensor, start: tl.constexpr, INPUTS: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """INPUTS numbers of each token."""
    part = start + tl.arange(0, INPUTS)
    return tl.load(
        x + at[:, None] + part[None, :], mask=inside[:, None] & (part < D)[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def _standard(
    x: tl.tensor, affine: tl.tensor, start: tl.constexpr, INPUTS: tl.constexpr, D: tl.constexpr
) -> tl.tensor:
    """INPUTS numbers of each token, standardised."""
    part = start + tl.arange(0, INPUTS)
    mean = tl.load(affine + part, mask=part < D, other=0.0)
    scale = tl.load(affine + D + part, mask=part < D, other=0.0)
    return (x - mean[None, :]) * scale[None, :]


@triton.jit
def _squares(
    x: tl.tensor, at: tl.tensor, inside: tl.tensor, PADDED_D: tl.constexpr, D: tl.constexpr
) -> tl.tensor:
    """Sums of squares of tokens' numbers."""
    x = _numbers(x, at, inside, 0, PADDED_D, D)
    return tl.sum(x * x, axis=1)


@triton.jit
def latest_slot(
    pending: tl.tensor, row: tl.tensor, head: tl.tensor, B: tl.tensor, H: tl.tensor
) -> tl.tensor:
    """Slots that the last launch wrote in ``row``, by the scoring programs' own turn; else -1."""
    at = pending + (row * H + head) * 4
    real = row < B
    even = tl.load(at, mask=real, other=-1)
    odd = tl.load(at + 1, mask=real, other=-1)
    turn = tl.load(at + 3, mask=real, other=0)
    return tl.where((turn & 1) == 1, even, odd)


@triton.jit
def score_latest(
    head: tl.tensor, first: tl.tensor, pending: tl.tensor, keys: tl.tensor, values: tl.tensor,
    positions: tl.tensor, scores: tl.tensor, w_key: tl.tensor, w_value: tl.tensor,
    w_scalar: tl.tensor, b1: tl.tensor, w2: tl.tensor, b2: tl.tensor, w_out: tl.tensor,
    b_out: tl.tensor, key_affine: tl.tensor, value_affine: tl.tensor, scalar_affine: tl.tensor,
    B: tl.tensor, H: tl.tensor, T: tl.tensor,
    BUDGET: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, W1: tl.constexpr,
    W2: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SCALARS: tl.constexpr,
    ACT: tl.constexpr, INPUTS: tl.constexpr, UNITS: tl.constexpr,
) -> None:  # fmt: skip
    """Write the scores of the tokens that the last launch stored, of one head and GROUP rows."""
    columns = tl.arange(0, W1)
    outer = tl.arange(0, UNITS)
    # Loads come first, and before all those that hang on no other one.
    if KEY:
        w_key += head * D * W1
        for_key = _weights(w_key, 0, INPUTS, D, W1)
    if VALUE:
        w_value += head * D * W1
        for_value = _weights(w_value, 0, INPUTS, D, W1)
    lane = tl.arange(0, 2 * GROUP)
    rest = (lane >= GROUP)[:, None]
    once = tl.where(lane < GROUP, 1.0, 0.0)  # what is no product goes into one part
    row = first + lane % GROUP
    slot = latest_slot(pending, row, head, B, H)
    given = slot >= 0
    token = row.to(tl.int64) * T + tl.maximum(slot, 0)
    at = token * D
    if KEY:
        key = _numbers(keys, at, given, 0, INPUTS, D)
    if VALUE:
        value = _numbers(values, at, given, 0, INPUTS, D)
    row = first + tl.arange(0, GROUP)
    slot = latest_slot(pending, row, head, B, H)
    turn = pending + (row * H + head) * 4 + 3
    turns = tl.load(turn, mask=row < B, other=0)
    total = once[:, None] * tl.load(b1 + head * W1 + columns)[None, :]
    end = tl.load(b_out + head)
    if W2 > 0:
        w2 += head * W2 * W1
        b2 += head * W2
        w_out += head * W2
        for_second = tl.load(w2 + outer[None, :] * W1 + columns[:, None])
        bias = tl.load(b2 + outer)
        last = tl.load(w_out + outer)
    else:
        last = tl.load(w_out + head * W1 + columns)

    w = w_scalar + head * 4 * W1 + columns
    affine = scalar_affine + head * 8
    if SCALARS & 3:
        position = tl.load(positions + token, mask=given, other=0)
    if SCALARS & 1:
        x = scalar_input(position_input(position), affine, 0) * once
        total += x[:, None] * tl.load(w)[None, :]
    if SCALARS & 2:
        x = scalar_input(fill_input(position, BUDGET), affine, 1) * once
        total += x[:, None] * tl.load(w + W1)[None, :]
    if SCALARS & 4:
        x = norm_input(_squares(keys, at, given, PADDED_D, D))
        x = scalar_input(x, affine, 2) * once
        total += x[:, None] * tl.load(w + 2 * W1)[None, :]
    if SCALARS & 8:
        x = norm_input(_squares(values, at, given, PADDED_D, D))
        x = scalar_input(x, affine, 3) * once
        total += x[:, None] * tl.load(w + 3 * W1)[None, :]
    if KEY:
        at_key = key_affine + head * 2 * D
        total = _product(total, _standard(key, at_key, 0, INPUTS, D), rest, for_key)
        for start in tl.static_range(INPUTS, PADDED_D, INPUTS):
            key = _numbers(keys, at, given, start, INPUTS, D)
            for_key = _weights(w_key, start, INPUTS, D, W1)
            total = _product(total, _standard(key, at_key, start, INPUTS, D), rest, for_key)
    if VALUE:
        at_value = value_affine + head * 2 * D
        total = _product(total, _standard(value, at_value, 0, INPUTS, D), rest, for_value)
        for start in tl.static_range(INPUTS, PADDED_D, INPUTS):
            value = _numbers(values, at, given, start, INPUTS, D)
            for_value = _weights(w_value, start, INPUTS, D, W1)
            total = _product(total, _standard(value, at_value, start, INPUTS, D), rest, for_value)
    hidden = activate(_folded(total, W1), ACT)
    if W2 > 0:
        hidden = _twice(hidden, W1)
        zeros = tl.zeros((2 * GROUP, UNITS), tl.float32)
        second = _folded(_product(zeros, hidden, rest, for_second), UNITS)
        score = tl.sum(activate(second + bias[None, :], ACT) * last[None, :], axis=1)
        for unit in tl.static_range(UNITS, W2, UNITS):
            for_second = tl.load(w2 + (unit + outer)[None, :] * W1 + columns[:, None])
            second = _folded(_product(zeros, hidden, rest, for_second), UNITS)
            second = activate(second + tl.load(b2 + unit + outer)[None, :], ACT)
            score += tl.sum(second * tl.load(w_out + unit + outer)[None, :], axis=1)
    else:
        score = tl.sum(hidden * last[None, :], axis=1)
    tl.store(scores + row.to(tl.int64) * T + slot, score + end, mask=slot >= 0)
    tl.debug_barrier()  # every warp has read its turn
    tl.store(turn, turns + 1, mask=row < B)
