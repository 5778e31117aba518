"""KeyDiff: keep keys that point away from the mean key (Park et al. 2025, arXiv 2504.15364)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvenv.learning.agent import Heuristic


class KeyDiff(Heuristic):
    """Score = -cos(k, mean of the normalised keys)."""

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
        anchor = normalize(keys.float(), dim=-1).mean(dim=-2, keepdim=True)
        return -cosine_similarity(keys.float(), anchor, dim=-1)
