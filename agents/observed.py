"""Observed attention: what the prompt's queries gave a token on average, as kvpress has it."""

from __future__ import annotations

from torch import Tensor

from kvenv.learning.agent import Heuristic


class Observed(Heuristic):
    """Score = the mean attention from the token's own query and all later ones of the prompt.

    kvpress's ObservedAttentionPress, which it relates to H2O (arXiv 2306.14048): the mean, unlike
    H2O's sum, does not favour tokens that were there longer. Summed over the query heads of a KV
    head where kvpress takes their mean, a constant factor.
    """

    needs = frozenset({"past_attention"})

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
        asked = now.view(-1, 1, 1) - positions + 1
        return needs["past_attention"].float() / asked
