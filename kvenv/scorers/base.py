"""The contract between what was learned and what uses it: evaluation and cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

Head = tuple[int, int]
"""(layer, KV head), in the model's own layer numbers."""

NEEDS = frozenset({"queries", "past_attention", "query_mean", "query_cov", "utility"})
"""What a scorer may ask for beyond keys, values and positions (utility: offline only)."""


@runtime_checkable
class Scorer(Protocol):
    """Gives every cached token one number; higher = keep.

    Attributes:
        needs: what `score` wants beyond keys, values and positions, a subset of `NEEDS`:
            ``queries`` (B, Hq, Q, d) the last prompt queries, scaled so that logits are
            q . k / sqrt(d); ``past_attention`` (B, H, n) the attention each token got from the
            prompt, summed over its queries and the group's query heads; ``query_mean`` (B, Hq, d)
            and ``query_cov`` (B, Hq, d, d) what is expected of the queries to come, see
            `kvenv.recording.query_stats`; ``utility`` (B, H, n) the future attention, known only
            in recorded traces.
        pointwise: True if a token's score depends on its own key, value and position alone. It is
            then fixed when the token arrives, and streaming eviction is exact at O(budget) a
            step; otherwise a cache scores its slots anew at every step.
        age_term: None, or a function of (layer, age (B, H, n) int64 = now - position) added to
            the score at decision time, (B, H, n) float32.
        heads: the heads it has scores for; None means every head of any model.
    """

    needs: frozenset[str]
    pointwise: bool
    age_term: Callable[[int, torch.Tensor], torch.Tensor] | None
    heads: frozenset[Head] | None

    def score(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        **needs: torch.Tensor,
    ) -> torch.Tensor:
        """Score the cached tokens of one layer.

        Args:
            layer: the model's own layer number.
            keys: (B, H, n, d) as the cache holds them, after RoPE; H is all KV heads of the layer.
            values: (B, H, n, d).
            positions: (B, H, n) int64, true positions in the sequence.
            **needs: what the `needs` attribute names.

        Returns:
            (B, H, n) float32. Rows of heads outside `heads` are NaN.
        """
        ...


class Pointwise:
    """Base for scorers whose score is fixed when a token arrives; a subclass writes `score`."""

    needs: frozenset[str] = frozenset()
    pointwise: bool = True
    age_term: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    heads: frozenset[Head] | None = None

    def score(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        **needs: torch.Tensor,
    ) -> torch.Tensor:
        """See `Scorer.score`."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")
