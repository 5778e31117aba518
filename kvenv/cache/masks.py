"""What a step's tokens see of a static cache's slots and of each other."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvenv.cache.storage import Slots

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query, keys, values, additive mask) -> output (B, q, Hq, d)."""


def joined(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: Slots
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is held followed by a step's own, (B, H, m, d), and the mask to add to its logits.

    Args:
        query: (B, Hq, q, d).
        keys: (B, H, q, d), the step's own.
        values: (B, H, q, d).
        slots: what is held.
    """
    positions = slots.clock.unsqueeze(-1) + torch.arange(keys.shape[2], device=keys.device)
    held = int(slots.lengths.max())
    used = slots.used()[..., :held]
    if bool(used.all()) and bool((positions >= 0).all()):  # rows and heads are alike
        used, positions = used[:1, :1], positions[:1, :1]
    both = (
        torch.cat([slots.dense(ours)[:, :, :held], theirs], 2)
        for ours, theirs in ((slots.keys, keys), (slots.values, values))
    )
    first, second = both
    return first, second, additive(causal(used, positions), query)


def causal(used: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What each new token sees of slots and of its own step.

    Args:
        used: (B, H, L) bool: the slots in use, all of them earlier tokens.
        positions: (B, H, q) of the new tokens, negative for pads.

    Returns:
        (B, H, q, L + q) bool.
    """
    q = positions.shape[-1]
    real = (positions >= 0).unsqueeze(-2)
    own = torch.ones(q, q, dtype=torch.bool, device=used.device).tril() & real
    return torch.cat([used.unsqueeze(2).expand(-1, -1, q, -1), own], -1)


def additive(visible: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask to add to logits; finite, so that a pad that sees nothing gives no NaN.

    Args:
        visible: (B, H, q, m) bool, or B and H 1.
        query: (B, Hq, q, d).

    Returns:
        (B, Hq, q, m) of the query's dtype, or B and Hq 1.
    """
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], 1)
    mask = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
    return mask.masked_fill_(~visible, torch.finfo(query.dtype).min)
