"""The attention of a prompt's last queries, from which several heuristics score."""

from __future__ import annotations

import torch
from torch import Tensor

from kvenv.scorers.base import RECENT_QUERIES


def window_attention(
    queries: Tensor, keys: Tensor, positions: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Softmax weights of the last queries over the cached tokens, each under its causal mask.

    The last query belongs to the newest token, the one before it to the position before, and so
    on. The window shrinks to what there is: the queries given, or the tokens.

    Args:
        queries: (B, Hq, Q, d), scaled so that logits are q . k / sqrt(d).
        keys: (B, H, n, d).
        positions: (B, H, n) int64.
        window: how many of the last queries count.

    Returns:
        Weights (B, H, G, window, n) float32 of the G query heads of every KV head, and which
        tokens are the window's own, (B, H, n) bool.
    """
    window = min(window, queries.shape[2], keys.shape[2])
    grouped = queries[:, :, queries.shape[2] - window :].float().unflatten(1, (keys.shape[1], -1))
    logits = grouped @ keys.float().unsqueeze(2).mT * keys.shape[-1] ** -0.5
    ago = torch.arange(window - 1, -1, -1, device=positions.device)
    asked_at = positions.amax(-1, keepdim=True) - ago
    later = positions.unsqueeze(2) > asked_at.unsqueeze(3)
    weights = logits.masked_fill(later.unsqueeze(2), -torch.inf).softmax(-1)
    return weights, positions >= asked_at[..., :1]


def recent_attention(queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """The attention of the last `RECENT_QUERIES` queries, summed over them and the group.

    Args:
        queries: (B, Hq, Q, d), the last ones, scaled so that logits are q . k / sqrt(d).
        keys: (B, H, n, d).
        positions: (B, H, n) int64.

    Returns:
        (B, H, n) float32.
    """
    weights, _ = window_attention(queries, keys, positions, RECENT_QUERIES)
    return weights.sum((2, 3))
