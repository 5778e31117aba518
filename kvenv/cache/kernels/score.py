"""Scores of a layer's tokens by its heads' networks: a grouped MLP in one launch.

score[b, h, i] = w_out . act(w2 act(w1 (x - mean) / std + b1) + b2) + b_out of head h, where x are
the features of token i; see `kvenv.cache.kernels.network.Packed`. One program per block of
tokens, row and head. The second layer's sums stay in registers while the first is made in pieces
of BLOCK_W units, each from the tokens' numbers in pieces of up to BLOCK_D; nothing between is
written. Bytes: keys and values once from memory (again from the caches for every further piece),
the weights once a program from the L2 cache; FLOPs: `Packed.flops_per_token`. See `cost`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from kvenv.cache.kernels.network import (
    Packed,
    activate,
    fill_input,
    hidden_and_output,
    norm_input,
    position_input,
    scalar_input,
)
from kvenv.errors import KvenvError

BLOCK_M = 64  # tokens a program: one warp group's matrix product; half of it for wide layers,
# whose sums and their split into two tf32 numbers would not stay in registers
BLOCK_W = 32  # first-layer units at a time: w2's piece (256 wide) and its rounding take 64 KiB
BLOCK_D = 32  # of a token's numbers at a time

SCHEMA = (
    "(Tensor keys, Tensor values, Tensor positions, Tensor[] network, str activation, "
    "int scalars, int budget) -> Tensor"
)


@triton.jit
def _products(
    total: tl.tensor, x: tl.tensor, offset: tl.tensor, inside: tl.tensor, weights: tl.tensor,
    affine: tl.tensor, columns: tl.tensor, D: tl.constexpr, W1: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add (tokens, D) numbers times the head's weights at ``columns`` to ``total``."""
    for start in range(0, D, BLOCK_D):
        part = start + tl.arange(0, BLOCK_D)
        real = part < D
        mean = tl.load(affine + part, mask=real, other=0.0)
        scale = tl.load(affine + D + part, mask=real, other=0.0)
        given = tl.load(
            x + offset[:, None] + part[None, :], mask=inside[:, None] & real[None, :], other=0.0
        )
        given = (given.to(tl.float32) - mean[None, :]) * scale[None, :]
        w = tl.load(weights + part[:, None] * W1 + columns[None, :], mask=real[:, None], other=0.0)
        total = tl.dot(given, w.to(tl.float32), total, input_precision="tf32x3")
    return total


@triton.jit
def _squares(
    x: tl.tensor, offset: tl.tensor, inside: tl.tensor, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sums of squares of tokens' numbers."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, D, BLOCK_D):
        part = start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (part < D)[None, :]
        given = tl.load(x + offset[:, None] + part[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(given * given, axis=1)
    return total


@triton.jit
def _score(
    keys: tl.tensor, values: tl.tensor, positions: tl.tensor, out: tl.tensor, w_key: tl.tensor,
    w_value: tl.tensor, w_scalar: tl.tensor, b1: tl.tensor, w2: tl.tensor, b2: tl.tensor,
    w_out: tl.tensor, b_out: tl.tensor, key_affine: tl.tensor, value_affine: tl.tensor,
    scalar_affine: tl.tensor, n: tl.tensor, H: tl.tensor, key_b: tl.tensor, key_h: tl.tensor,
    key_n: tl.tensor, value_b: tl.tensor, value_h: tl.tensor, value_n: tl.tensor,
    position_b: tl.tensor, position_h: tl.tensor, position_n: tl.tensor,
    BUDGET: tl.constexpr, D: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, KEY: tl.constexpr,
    VALUE: tl.constexpr, SCALARS: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    inside = token < n
    keys += row * key_b + head * key_h
    values += row * value_b + head * value_h
    affine = scalar_affine + head * 8
    in_key, in_value = token * key_n, token * value_n
    position = tl.load(
        positions + row * position_b + head * position_h + token * position_n,
        mask=inside,
        other=0,
    )
    position = tl.maximum(position, 0)
    if SCALARS & 1:
        place = scalar_input(position_input(position), affine, 0)
    if SCALARS & 2:
        full = scalar_input(fill_input(position, BUDGET), affine, 1)
    if SCALARS & 4:
        key_size = norm_input(_squares(keys, in_key, inside, D, BLOCK_M, BLOCK_D))
        key_size = scalar_input(key_size, affine, 2)
    if SCALARS & 8:
        value_size = norm_input(_squares(values, in_value, inside, D, BLOCK_M, BLOCK_D))
        value_size = scalar_input(value_size, affine, 3)

    score = tl.zeros((BLOCK_M,), tl.float32) + tl.load(b_out + head)
    if W2 > 0:
        outer = tl.arange(0, W2)
        second = tl.zeros((BLOCK_M, W2), tl.float32) + tl.load(b2 + head * W2 + outer)[None, :]
    for start in range(0, W1, BLOCK_W):
        columns = start + tl.arange(0, BLOCK_W)
        total = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
        total += tl.load(b1 + head * W1 + columns)[None, :]
        w = w_scalar + head * 4 * W1 + columns
        if SCALARS & 1:
            total += place[:, None] * tl.load(w)[None, :]
        if SCALARS & 2:
            total += full[:, None] * tl.load(w + W1)[None, :]
        if SCALARS & 4:
            total += key_size[:, None] * tl.load(w + 2 * W1)[None, :]
        if SCALARS & 8:
            total += value_size[:, None] * tl.load(w + 3 * W1)[None, :]
        if KEY:
            w = w_key + head * D * W1
            at = key_affine + head * 2 * D
            total = _products(total, keys, in_key, inside, w, at, columns, D, W1, BLOCK_D)
        if VALUE:
            w = w_value + head * D * W1
            at = value_affine + head * 2 * D
            total = _products(total, values, in_value, inside, w, at, columns, D, W1, BLOCK_D)
        hidden = activate(total, ACT)
        if W2 > 0:
            w = tl.load(w2 + head * W2 * W1 + outer[None, :] * W1 + columns[:, None])
            second = tl.dot(hidden, w.to(tl.float32), second, input_precision="tf32x3")
        else:
            score += tl.sum(hidden * tl.load(w_out + head * W1 + columns)[None, :], axis=1)
    if W2 > 0:
        hidden = activate(second, ACT)
        score += tl.sum(hidden * tl.load(w_out + head * W2 + outer)[None, :], axis=1)
    tl.store(out + (row * H + head) * n + token, score, mask=inside)


def _launch(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    network: list[Tensor],
    activation: str,
    scalars: int,
    budget: int,
) -> Tensor:
    B, H, n, D = keys.shape
    out = torch.empty(B, H, n, dtype=torch.float32, device=keys.device)
    if not out.numel():
        return out
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    w_key, w_value, _, b1, w2, b2 = network[:6]
    W1, W2 = b1.shape[-1], b2.shape[-1] if w2.numel() else 0
    wide = max(W1, W2) > 128
    block = BLOCK_M // 2 if wide else BLOCK_M
    piece = max(16, min(BLOCK_D, D & -D))  # whole pieces where D allows them
    launch: Any = _score[(triton.cdiv(n, block), B, H)]
    with torch.cuda.device_of(keys):
        launch(
            *(keys, values, positions, out, *network, n, H),
            *(*keys.stride()[:3], *values.stride()[:3], *positions.stride()),
            BUDGET=budget,
            D=D,
            W1=W1,
            W2=W2,
            KEY=w_key.numel() > 0,
            VALUE=w_value.numel() > 0,
            SCALARS=scalars,
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
def _fake(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    network: list[Tensor],
    activation: str,
    scalars: int,
    budget: int,
) -> Tensor:
    return keys.new_empty(keys.shape[:3], dtype=torch.float32)


def score(keys: Tensor, values: Tensor, positions: Tensor, packed: Packed) -> Tensor:
    """Scores (B, H, n) float32 of a layer's tokens, without what is learned of ages.

    Args:
        keys: (B, H, n, D) float16, bfloat16 or float32, as the cache holds them; any strides.
        values: (B, H, n, D).
        positions: (B, H, n) int32 or int64, any strides; negative ones (pads) count as 0.
        packed: the layer's networks, on the same device.

    Raises:
        KvenvError: if shapes do not fit each other or the networks.
    """
    _check(keys, values, positions, packed)
    return _op(
        *(keys, values, positions, packed.tensors()),
        *(packed.activation, packed.scalars, packed.budget),
    )


def score_reference(keys: Tensor, values: Tensor, positions: Tensor, packed: Packed) -> Tensor:
    """`score` in plain torch, on any device: float64 of float64 keys, else float32."""
    _check(keys, values, positions, packed)
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    keys, values, p = keys.to(dtype), values.to(dtype), positions.clamp(min=0).to(dtype)
    x = torch.zeros((), dtype=dtype, device=keys.device)
    for given, w, affine in (
        (keys, packed.w_key, packed.key_affine),
        (values, packed.w_value, packed.value_affine),
    ):
        if w is not None and affine is not None:
            mean, scale = affine.to(dtype).unsqueeze(2).unbind(1)
            x = x + ((given - mean) * scale) @ w.to(dtype)
    columns = (
        lambda: torch.log2(1 + p) / 16,
        lambda: p.clamp(max=packed.budget) / packed.budget,
        lambda: keys.norm(dim=-1).clamp(min=1e-6).log2(),
        lambda: values.norm(dim=-1).clamp(min=1e-6).log2(),
    )
    for i, column in enumerate(columns):
        if packed.scalars >> i & 1:
            mean, scale = packed.scalar_affine[..., i].to(dtype).unsqueeze(2).unbind(1)
            x = x + ((column() - mean) * scale).unsqueeze(-1) * packed.w_scalar[:, i : i + 1].to(
                dtype
            )
    return hidden_and_output(packed, x)


def cost(keys: Tensor, packed: Packed) -> tuple[int, int]:
    """Bytes that `score` must move for keys (B, H, n, D), and its FLOPs."""
    B, H, n, D = keys.shape
    states = 1 + (packed.w_value is not None or bool(packed.scalars & 8))
    moved = B * H * n * (states * D * keys.element_size() + 4) + H * packed.bytes_per_head()
    return moved, B * H * n * packed.flops_per_token()


def _check(keys: Tensor, values: Tensor, positions: Tensor, packed: Packed) -> None:
    heads, D = len(packed.b_out), keys.shape[-1]
    known = [one.shape[1] for one in (packed.w_key, packed.w_value) if one is not None]
    if keys.ndim != 4 or keys.shape[1] != heads or any(width != D for width in known):
        raise KvenvError(
            f"keys {tuple(keys.shape)} are not (batch, {heads} KV heads, tokens, "
            f"{known[0] if known else 'head size'}): pack the networks of this layer"
        )
    if values.shape != keys.shape or positions.shape != keys.shape[:3]:
        raise KvenvError(
            f"values {tuple(values.shape)} and positions {tuple(positions.shape)} do not fit keys "
            f"{tuple(keys.shape)}: give (B, H, n, D) twice and (B, H, n)"
        )
