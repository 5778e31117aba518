"""The contract between what was learned and what uses it: evaluation, environments and cache."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

Head = tuple[int, int]
"""(layer, KV head), in the model's own layer numbers."""

NEEDS = frozenset(
    {"queries", "past_attention", "recent_attention", "query_mean", "query_cov", "utility"}
)
"""What a scorer may ask for beyond keys, values, positions and now (utility: offline only)."""

RECENT_QUERIES = 32
"""The last queries whose attention is ``recent_attention``."""


@runtime_checkable
class Scorer(Protocol):
    """Gives every token that a head holds one number; higher = keep.

    Scores are made anew at every selection, of all tokens held, as they look from now.

    Attributes:
        needs: what `score` wants beyond keys, values, positions and now, a subset of `NEEDS`:
            ``queries`` (B, Hq, Q, d) the last queries, scaled so that logits are q . k / sqrt(d);
            ``past_attention`` (B, H, n) the attention each token got so far, summed over queries
            and the group's query heads; ``recent_attention`` (B, H, n) that of the last
            `RECENT_QUERIES` queries; ``query_mean`` (B, Hq, d) and ``query_cov`` (B, Hq, d, d)
            what is expected of the queries to come, see `kvenv.scorers.query_stats`;
            ``utility`` (B, H, n) the future attention, known only in recorded traces.
        heads: the heads it has scores for; None means every head of any model.
    """

    needs: frozenset[str]
    heads: frozenset[Head] | None

    def score(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        now: torch.Tensor,
        **needs: torch.Tensor,
    ) -> torch.Tensor:
        """Score the tokens that one layer holds, given in order of position.

        Args:
            layer: the model's own layer number.
            keys: (B, H, n, d) as the cache holds them, after RoPE; H is all KV heads of the layer.
            values: (B, H, n, d).
            positions: (B, H, n) int64, true positions in the sequence, ascending.
            now: (B,) int64, the position of each row's newest token.
            **needs: what the `needs` attribute names.

        Returns:
            (B, H, n) float32. Rows of heads outside `heads` are NaN.
        """
        ...
