"""Recent attention: what the last queries gave a token; the strongest heuristic there is."""

from __future__ import annotations

from torch import Tensor

from kvenv.learning.agent import Heuristic


class Recent(Heuristic):
    """Score = the attention of the last 32 queries, summed over the group's query heads.

    TOVA's idea (Oren et al. 2024, arXiv 2401.06104) over a window and for each KV head by itself,
    SnapKV's (Li et al. 2024, arXiv 2404.14469) without its pooling.
    """

    needs = frozenset({"recent_attention"})

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
        return needs["recent_attention"].float()
