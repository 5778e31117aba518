"""Decode attention over ragged slots in plain torch: the torch backend, and `attend`'s measure."""

import math

import torch
from torch import Tensor


def attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    scale: float,
    largest: int,
) -> Tensor:
    """Attention of one query per row and query head over the slots in use.

    Arguments and result are those of `kvenv.cache.kernels.attend.attend`, on any device, in any
    float dtype and for any head size. Products are in the dtype of the inputs, softmax in float32
    or wider. Each head's slots are copied to (B, H, largest, D), which needs memory for that.
    """
    rows, query_heads, D = query.shape
    heads = lengths.shape[1]
    slot = torch.arange(largest, device=keys.device)
    unused = slot >= lengths.unsqueeze(-1)  # (B, H, largest)
    index = (offsets[:-1, None] + slot).clamp(max=keys.shape[1] - 1)
    k = keys[:, index]
    v = values[:, index].masked_fill(unused.unsqueeze(-1), 0)
    q = query.reshape(rows, heads, query_heads // heads, D)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (q @ k.mT).to(wide) * scale
    weights = scores.masked_fill(unused.unsqueeze(-2), -math.inf).softmax(-1)
    weights = weights.masked_fill(unused.unsqueeze(-2), 0)  # of no slots in use: not a number
    return (weights.to(query.dtype) @ v).reshape(rows, query_heads, v.shape[-1])
