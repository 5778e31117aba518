"""StreamingLLM: the first tokens and the newest ones (Xiao et al. 2023, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvenv.learning.agent import Heuristic


@dataclass
class Streaming(Heuristic):
    """Score = minus the age, position - now; the sinks score above all.

    Args:
        sinks: how many first tokens are kept before anything else.
    """

    sinks: int = 4

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
        return (
            (positions - now.view(-1, 1, 1))
            .float()
            .masked_fill(positions < self.sinks, float("inf"))
        )
