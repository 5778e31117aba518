"""Oracle: sort by the future attention itself, which only a recorded trace knows."""

from __future__ import annotations

from torch import Tensor

from kvenv.learning.agent import Heuristic


class Oracle(Heuristic):
    """Score = utility: the best any ranking can do, and no policy for decoding."""

    needs = frozenset({"utility"})

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
        return needs["utility"].float()
