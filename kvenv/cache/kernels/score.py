"""Scores of what heads hold by their networks, in the frame of now: a grouped MLP in one launch.

    score[b, s + i] = w_out . act(w2 act(w1 [R(-now) key; value] + b1) + b2) + b_out,
    i over the used slots of row b and head h, s = starts[b, h], with the weights of head h

Keys are left alone: the rows' first-layer weights are turned once a call, in torch; see
`kvenv.cache.kernels.network`. One program per block of slots, row and head. The second layer's
sums stay in registers while the first is made in pieces of BLOCK_W units, each from the tokens'
numbers in pieces of up to BLOCK_D; nothing between is written. Bytes: used keys and values once
from memory (again from the caches for every further piece), the weights once a program from the
L2 cache; FLOPs: `Packed.flops_per_token`. See `cost`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from kvenv.cache.kernels.layout import check, indices
from kvenv.cache.kernels.network import Packed, activate, hidden_and_output
from kvenv.errors import KvenvError

BLOCK_M = 64  # tokens a program: one warp group's matrix product; half of it for wide layers,
# whose sums and their split into two tf32 numbers would not stay in registers
BLOCK_W = 32  # first-layer units at a time: w2's piece (256 wide) and its rounding take 64 KiB
BLOCK_D = 32  # of a token's numbers at a time
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

SCHEMA = (
    "(Tensor keys, Tensor values, Tensor starts, Tensor lengths, Tensor[] network, "
    "str activation, int largest) -> Tensor"
)


@triton.jit
def _products(
    total: tl.tensor, x: tl.tensor, token: tl.tensor, inside: tl.tensor, weights: tl.tensor,
    columns: tl.tensor, D: tl.constexpr, W1: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add (tokens, D) numbers times the head's weights at ``columns`` to ``total``."""
    for start in range(0, D, BLOCK_D):
        part = start + tl.arange(0, BLOCK_D)
        real = part < D
        given = tl.load(
            x + token[:, None] * D + part[None, :], mask=inside[:, None] & real[None, :], other=0.0
        )
        w = tl.load(weights + part[:, None] * W1 + columns[None, :], mask=real[:, None], other=0.0)
        total = tl.dot(given.to(tl.float32), w, total, input_precision="tf32x3")
    return total


@triton.jit
def _score(
    keys: tl.tensor, values: tl.tensor, starts: tl.tensor, lengths: tl.tensor, out: tl.tensor,
    w_key: tl.tensor, w_value: tl.tensor, b1: tl.tensor, w2: tl.tensor, b2: tl.tensor,
    w_out: tl.tensor, b_out: tl.tensor, slots: tl.tensor, heads: tl.tensor, D: tl.constexpr,
    W1: tl.constexpr, W2: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(1)
    length = tl.load(lengths + program)
    begin = tl.program_id(0) * BLOCK_M
    if begin < length:
        row, head = (program // heads).to(tl.int64), program % heads
        first = row * slots + tl.load(starts + program)
        token = begin + tl.arange(0, BLOCK_M)
        inside = token < length
        keys += first * D
        values += first * D
        score = tl.zeros((BLOCK_M,), tl.float32) + tl.load(b_out + head)
        if W2 > 0:
            outer = tl.arange(0, W2)
            second = tl.zeros((BLOCK_M, W2), tl.float32) + tl.load(b2 + head * W2 + outer)[None, :]
        for start in range(0, W1, BLOCK_W):
            columns = start + tl.arange(0, BLOCK_W)
            total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
            total += tl.load(b1 + head * W1 + columns)[None, :]
            if KEY:  # turned for this row
                w = w_key + program.to(tl.int64) * D * W1
                total = _products(total, keys, token, inside, w, columns, D, W1, BLOCK_D)
            if VALUE:
                w = w_value + head * D * W1
                total = _products(total, values, token, inside, w, columns, D, W1, BLOCK_D)
            hidden = activate(total, ACT)
            if W2 > 0:
                w = tl.load(w2 + head * W2 * W1 + outer[None, :] * W1 + columns[:, None])
                second = tl.dot(hidden, w, second, input_precision="tf32x3")
            else:
                score += tl.sum(hidden * tl.load(w_out + head * W1 + columns)[None, :], axis=1)
        if W2 > 0:
            hidden = activate(second, ACT)
            score += tl.sum(hidden * tl.load(w_out + head * W2 + outer)[None, :], axis=1)
        tl.store(out + first + token, score, mask=inside)


def _launch(
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    network: list[Tensor],
    activation: str,
    largest: int,
) -> Tensor:
    (rows, slots, D), heads = keys.shape, lengths.shape[1]
    out = torch.zeros(rows, slots, dtype=torch.float32, device=keys.device)
    if not lengths.numel():
        return out
    w_key, w_value, b1, w2, b2 = network[:5]
    W1, W2 = b1.shape[-1], b2.shape[-1] if w2.numel() else 0
    wide = max(W1, W2) > 128
    block = BLOCK_M // 2 if wide else BLOCK_M
    piece = max(16, min(BLOCK_D, D & -D))  # whole pieces where D allows them
    launch: Any = _score[(triton.cdiv(largest, block), rows * heads)]
    with torch.cuda.device_of(keys):
        launch(
            *(keys, values, starts, lengths, out, *network, slots, heads),
            D=D,
            W1=W1,
            W2=W2,
            KEY=w_key.numel() > 0,
            VALUE=w_value.numel() > 0,
            ACT=activation,
            BLOCK_M=block,
            BLOCK_W=min(BLOCK_W, W1),
            BLOCK_D=piece,
            # Products of few units over 8 warps read beyond shared memory (Triton 3.6, H200).
            num_warps=8 if min(W1, W2 or W1) >= 128 else 4,
            num_stages=1 if wide or piece >= D else 2,
        )
    return out


_op = library.custom_op("kvenv::score", _launch, mutates_args=(), schema=SCHEMA)


@_op.register_fake
def _(keys: Tensor, *others: Any) -> Tensor:
    return keys.new_empty(keys.shape[:2], dtype=torch.float32)


def score(
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    now: Tensor,
    packed: Packed,
    largest: int,
) -> Tensor:
    """Scores of the used slots, as they look from now; zeros elsewhere. Waits for nothing.

    Of head h of row b, the lengths[b, h] slots from starts[b, h] on are in use.

    Args:
        keys: (B, T, D) float16, bfloat16 or float32, as the cache holds them; contiguous.
        values: (B, T, D) of the same dtype, contiguous.
        starts: (B, H) int32, contiguous.
        lengths: (B, H) int32, contiguous.
        now: (B,) int64 position of each row's newest token.
        packed: the layer's networks, on the same device.
        largest: no length is above it.

    Returns:
        (B, T) float32.

    Raises:
        KvenvError: if tensors do not fit each other or the networks.
    """
    _check_networks(keys, lengths, packed)
    (rows, slots, D), heads = keys.shape, lengths.shape[1]
    if keys.dtype not in DTYPES:
        raise KvenvError(f"score serves keys in {DTYPES}, not {keys.dtype}: use backend='torch'")
    expected = {
        "keys": (keys, (rows, slots, D), keys.dtype),
        "values": (values, (rows, slots, D), keys.dtype),
        "starts": (starts, (rows, heads), torch.int32),
        "lengths": (lengths, (rows, heads), torch.int32),
        "now": (now, (rows,), torch.int64),
        "the networks": (packed.b1, tuple(packed.b1.shape), torch.float32),
    }
    check("score", expected, largest, slots)
    network = (
        *(packed.key_weights(now), packed.w_value, packed.b1, packed.w2, packed.b2),
        *(packed.w_out, packed.b_out),
    )
    given = [packed.b1.new_empty(0) if one is None else one for one in network]
    return _op(keys, values, starts, lengths, given, packed.activation, largest)


def score_reference(
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    now: Tensor,
    packed: Packed,
    largest: int,
) -> Tensor:
    """`score` in plain torch, on any device: float64 of float64 keys, else float32."""
    _check_networks(keys, lengths, packed)
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    rows, slots, _ = keys.shape
    index, used = indices(starts, lengths, largest, slots)
    row = torch.arange(rows, device=keys.device).view(-1, 1, 1)
    x = torch.zeros((), dtype=dtype, device=keys.device)
    for states, w in ((keys, packed.key_weights(now, dtype)), (values, packed.w_value)):
        if w is not None:
            x = x + states[row, index].to(dtype) @ w.to(dtype)
    scores = hidden_and_output(packed, x)
    out = torch.zeros(rows, slots + 1, dtype=dtype, device=keys.device)
    target = index.where(used, slots)  # the last place takes what is not in use
    return out.scatter(1, target.flatten(1), scores.flatten(1))[:, :slots].contiguous()


def cost(keys: Tensor, held: int, packed: Packed) -> tuple[int, int]:
    """Bytes that `score` must move for keys (B, T, D) of which a row uses ``held``, and FLOPs."""
    rows, slots, D = keys.shape
    states = (packed.w_key is not None) + (packed.w_value is not None)
    turned = 0 if packed.w_key is None else rows * packed.w_key.numel() * 4  # written once more
    weights = rows * len(packed.b_out) * packed.bytes_per_head() + turned
    moved = rows * held * (states * D * keys.element_size() + 4) + 4 * rows * slots + weights
    return moved, rows * held * packed.flops_per_token()


def _check_networks(keys: Tensor, lengths: Tensor, packed: Packed) -> None:
    heads, D = len(packed.b_out), len(packed.speed)
    if keys.ndim != 3 or keys.shape[-1] != D or lengths.shape != (keys.shape[0], heads):
        raise KvenvError(
            f"score: keys {tuple(keys.shape)} and lengths {tuple(lengths.shape)} must be (B, T, "
            f"{D}) and (B, {heads}): pack the networks of this layer"
        )
