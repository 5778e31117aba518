"""TOVA: tokens that the newest query attends to (Oren et al. 2024, arXiv 2401.06104)."""

from __future__ import annotations

from torch import Tensor

from kvenv.learning.agent import Heuristic
from kvenv.scorers.attention import window_attention


class TOVA(Heuristic):
    """Score = the last query's attention, averaged over all query heads of the layer.

    So all KV heads of a layer keep the same tokens, as in the paper. As in kvpress, the newest
    token always stays, which the paper leaves to its attention; and the prompt is cut once, by
    its last query, where the paper evicts one token a step.
    """

    needs = frozenset({"queries"})

    def score(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        now: Tensor,
        **needs: Tensor,
    ) -> Tensor:
        """(B, H, n) float32."""
        weights, newest = window_attention(needs["queries"], keys, positions, 1)
        attention = weights.mean((1, 2, 3)).unsqueeze(1).expand(positions.shape)
        return attention.masked_fill(newest, 2)  # attention is at most 1
