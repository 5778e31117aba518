"""SnapKV: tokens that the prompt's last queries attend to (Li et al. 2024, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvenv.errors import KvenvError
from kvenv.learning.agent import Heuristic
from kvenv.scorers.attention import window_attention


@dataclass
class SnapKV(Heuristic):
    """Score = attention from the last ``window`` queries, smoothed over neighbouring tokens.

    As in kvpress: the mean over the window's queries, average pooling, then the mean over the
    query heads that share a KV head; the window itself stays. The paper sums where this takes the
    mean, and lets every query head choose for itself. kvpress gives the whole window one score
    and refuses prompts within it; here its newest tokens come first, so that budgets below the
    window are defined too.

    Args:
        window: the last queries, whose own tokens are kept before all others; fewer if the prompt
            or the recording has fewer.
        kernel: neighbours that are averaged, odd.
    """

    window: int = 64
    kernel: int = 5

    needs = frozenset({"queries"})

    def __post_init__(self) -> None:
        if self.window < 1:
            raise KvenvError(f"window is {self.window}: give at least 1 query")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise KvenvError(f"kernel is {self.kernel}: give an odd number of tokens")

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
        weights, own = window_attention(needs["queries"], keys, positions, self.window)
        votes = weights.mean(3).masked_fill(own.unsqueeze(2), 0).flatten(0, 1)
        pooled = avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        attention = pooled.mean(1).view_as(own)
        return attention.where(~own, 1 + positions.float())  # attention is at most 1
