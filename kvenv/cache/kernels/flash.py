"""The causal attention of torch's own fused kernels, with the log-sum-exp that they keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from kvenv.errors import KvenvError


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention over a whole sequence, by the kernel that torch itself would choose.

    Args:
        query: (B, H * G, S, D) or (H * G, S, D); query heads of one KV head are adjacent. On CUDA
            float16 or bfloat16, D a multiple of 8 up to 256.
        key: (B, H, S, D) or (H, S, D).
        value: as ``key``.
        scale: factor on the logits.

    Returns:
        The output, of the query's shape and dtype, and the natural log-sum-exp of the logits,
        (B, H * G, S) or (H * G, S) float32.

    Raises:
        KvenvError: if none of torch's fused kernels serves these tensors.
    """
    if query.ndim == 3:
        output, lse = flash(query[None], key[None], value[None], scale)
        return output[0], lse[0]
    length = query.shape[2]
    if key.shape[2] != length:
        raise KvenvError(f"{length} queries of {key.shape[2]} keys: flash serves whole sequences")
    aten: Any = torch.ops.aten
    if not query.is_cuda:
        forward = aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = forward(query, key, value, 0.0, True, scale=scale)
        return output, lse
    group = query.shape[1] // key.shape[1]
    chosen = aten._fused_sdp_choice(
        query, key, value, None, 0.0, True, scale=scale, enable_gqa=group > 1
    )
    if query.shape[-1] % 8 or chosen == SDPBackend.MATH.value:
        raise KvenvError(
            f"no fused attention of torch serves {query.dtype} with head size {query.shape[-1]} "
            "here: use float16 or bfloat16, a head size that 8 divides, and leave torch's fused "
            "attention enabled"
        )
    if chosen == SDPBackend.FLASH_ATTENTION.value:
        forward = aten._scaled_dot_product_flash_attention
        output, lse = forward(query, key, value, 0.0, True, False, scale=scale)[:2]
    elif chosen == SDPBackend.CUDNN_ATTENTION.value:
        forward = aten._scaled_dot_product_cudnn_attention
        output, lse = forward(query, key, value, None, True, 0.0, True, False, scale=scale)[:2]
    else:  # memory-efficient attention takes as many key heads as query heads, and pads the lse
        forward = aten._scaled_dot_product_efficient_attention
        key, value = (part.repeat_interleave(group, 1) for part in (key, value))
        output, lse = forward(query, key, value, None, True, 0.0, True, scale=scale)[:2]
    return output, lse.reshape(*query.shape[:2], -1)[..., :length]
