"""Regression on each token's log utility: what reinforcement learning has to beat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvenv.errors import KvenvError
from kvenv.learning import objectives
from kvenv.learning.ranking import RankingAgent


@dataclass(kw_only=True)
class Regression(RankingAgent):
    """Learn to predict the logarithm of future attention.

    Args:
        floor: future attention, in shares of the mean, below which differences hardly count.
    """

    floor: float = objectives.FLOOR

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.floor < math.inf:
            raise KvenvError(f"floor is {self.floor}: it must be positive")

    def gradient(
        self, scores: torch.Tensor, utility: torch.Tensor, noise: torch.Generator, step: int
    ) -> torch.Tensor:
        """See `RankingAgent.gradient`."""
        return objectives.regression(scores, utility, self.floor)
