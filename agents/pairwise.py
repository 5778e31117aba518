"""Pairwise: the heavier of two tokens should score higher (RankNet).

Burges et al. 2005, Learning to Rank using Gradient Descent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvenv.errors import KvenvError
from kvenv.learning import objectives
from kvenv.learning.ranking import RankingAgent


@dataclass(kw_only=True)
class Pairwise(RankingAgent):
    """Learn to order pairs of tokens by their future attention.

    Args:
        pairs: partners drawn for each token and step.
    """

    pairs: int = objectives.PAIRS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1:
            raise KvenvError(f"pairs is {self.pairs}: it must be at least 1")

    def gradient(
        self, scores: torch.Tensor, utility: torch.Tensor, noise: torch.Generator, step: int
    ) -> torch.Tensor:
        """See `RankingAgent.gradient`."""
        return objectives.pairwise(scores, utility, self.pairs, noise)
