"""Decode attention over ragged slots in plain torch: the torch backend, and `attend`'s measure."""

import math

import torch
from torch import Tensor

from kvenv.cache.kernels.layout import indices


def attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
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
    index, used = indices(starts, lengths, largest, keys.shape[1])
    row = torch.arange(rows, device=keys.device).view(-1, 1, 1)
    k = keys[row, index]
    v = values[row, index].masked_fill(~used.unsqueeze(-1), 0)
    q = query.reshape(rows, heads, query_heads // heads, D)
    wide = torch.promote_types(query.dtype, torch.float32)
    unused = ~used.unsqueeze(-2)
    scores = (q @ k.mT).to(wide) * scale
    weights = scores.masked_fill(unused, -math.inf).softmax(-1)
    weights = weights.masked_fill(unused, 0)  # of no slots in use: not a number
    return (weights.to(query.dtype) @ v).reshape(rows, query_heads, v.shape[-1])
