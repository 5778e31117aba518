"""What a step's tokens see of the tokens held and of each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvenv.cache.slots import Tokens
from kvenv.errors import KvenvError

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query, keys, values, additive mask) -> output (B, q, Hq, d)."""


def joined(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    held: Tokens,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is held followed by a step's own, (B, H, m, d), and the mask to add to its logits.

    Args:
        query: (B, Hq, q, d).
        keys: (B, H, q, d), the step's own.
        values: (B, H, q, d).
        positions: (B, q) of the step's tokens, negative for pads.
        held: earlier tokens.
        mask: which of its own tokens the step's see, (B, 1, q, q) as the model gives it.
    """
    # A NaN in a slot that no token uses would come through any mask.
    unused = ~held.present.unsqueeze(-1)
    first = torch.cat([held.keys.masked_fill(unused, 0), keys], 2)
    second = torch.cat([held.values.masked_fill(unused, 0), values], 2)
    seen = visible(held.present, positions.unsqueeze(1), mask)
    return first, second, additive(seen, query)


def visible(used: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """What each new token sees of slots and of its own step.

    Args:
        used: (B, H, L) bool: the slots in use, all of them earlier tokens.
        positions: (B, 1, q) of the new tokens, negative for pads.
        mask: (B, 1, q, q), True or 0 where a token is seen; None is causal.

    Returns:
        (B, H, q, L + q) bool.
    """
    q = positions.shape[-1]
    real = (positions >= 0).unsqueeze(-2)
    if mask is None:
        own = torch.ones(q, q, dtype=torch.bool, device=used.device).tril() & real
    else:
        own = (mask if mask.dtype == torch.bool else mask > MASKED) & real
    own = own.expand(*used.shape[:2], q, q)
    return torch.cat([used.unsqueeze(2).expand(-1, -1, q, -1), own], -1)


MASKED = -1e4
"""Numbers of a mask below it hide; models take the lowest of their dtype."""


def additive(visible: Tensor, query: Tensor) -> Tensor:
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


def check(mask: Tensor | None, positions: Tensor, block: int) -> None:
    """Refuse masks that a cache cannot honour in the steps to come.

    Args:
        mask: as a model gives it for a step of several tokens; None is causal.
        positions: (B, q) of the step's tokens, negative for pads.
        block: tokens that are read at a time.

    Raises:
        KvenvError: naming what the mask hides or shows.
    """
    if mask is None or mask.ndim != 4:
        return
    q = positions.shape[1]
    if tuple(mask.shape[-2:]) != (q, q):
        raise KvenvError(
            f"a 4D mask of {mask.shape[-2]} x {mask.shape[-1]} tokens for a step of {q}: give the "
            "tokenizer's 2D mask (batch, tokens), of which an EvictionCache makes its own"
        )
    seen = mask if mask.dtype == torch.bool else mask > MASKED
    if mask.dtype != torch.bool and bool((mask.masked_fill(~seen, 0) != 0).any()):
        raise KvenvError(
            "the model adds a bias to its attention (ALiBi or relative positions) by its mask, "
            "which an EvictionCache cannot move with the tokens: generate without it"
        )
    real = positions >= 0
    hidden = (~seen[..., -1, :].any(1) & real).nonzero()
    if len(hidden):
        row, column = hidden[0].tolist()
        raise KvenvError(
            f"the mask hides token {column} of row {row} from the tokens to come: an EvictionCache "
            "knows padding on the left alone; give it the batch's mask as attention_mask=, and "
            'pad on the left (tokenizer.padding_side = "left")'
        )
    for start in range(0, q - block, block):
        if bool(seen[..., start : start + block, start + block :].any()):
            raise KvenvError(
                f"the mask lets tokens see later ones, beyond a block of {block}: raise block to "
                "the prompt, or leave it out"
            )
