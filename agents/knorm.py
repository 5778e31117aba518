"""Key norm: keys of small norm attract attention (Devoto et al. 2024, arXiv 2406.11430)."""

from __future__ import annotations

from torch import Tensor

from kvenv.learning.agent import Heuristic


class KNorm(Heuristic):
    """Score = -||k||."""

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
        return -keys.float().norm(dim=-1)
