"""What a token is worth at the moment of deciding, the one rule of every cache layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Limits:
    """How many tokens a head keeps, and which of them always."""

    budget: int
    sinks: int
    recent: int


def worth(
    scores: torch.Tensor,
    age: torch.Tensor | None,
    positions: torch.Tensor,
    newest: torch.Tensor | int,
    limits: Limits,
) -> torch.Tensor:
    """Scores with what age adds, sinks and recent tokens at +inf and pads at -inf.

    Whatever a scorer says lies between; a NaN (checked only at prefill) counts as lowest.

    Args:
        scores: (...) float32.
        age: what a token's age adds, (...), or None.
        positions: (...) true positions; negative for pads.
        newest: the newest token's position, broadcast to (...).
        limits: how many of the first and the last tokens stay.
    """
    total = scores if age is None else scores + age
    total = total.nan_to_num(nan=FLOAT32.min, posinf=FLOAT32.max, neginf=FLOAT32.min)
    protected = (positions < limits.sinks) | (positions > newest - limits.recent)
    return total.masked_fill(protected, torch.inf).masked_fill(positions < 0, -torch.inf)
