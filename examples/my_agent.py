"""An agent of your own is one file: `kvenv evaluate --agents examples/my_agent.py,knorm ...`."""

from __future__ import annotations

from torch import Tensor

from kvenv.learning.agent import Heuristic


class ValueNorm(Heuristic):
    """Keep the tokens whose values are large: they move the attention's output most."""

    def score(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        now: Tensor,
        **needs: Tensor,
    ) -> Tensor:
        """(B, H, n) float32, higher = keep."""
        return values.float().norm(dim=-1)
