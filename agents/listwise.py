"""Listwise: a softmax over the prompt should match where the attention goes (ListNet).

Cao et al. 2007, Learning to Rank: From Pairwise Approach to Listwise Approach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvenv.learning import objectives
from kvenv.learning.ranking import RankingAgent


@dataclass(kw_only=True)
class Listwise(RankingAgent):
    """Learn the distribution of future attention over a prompt."""

    def gradient(
        self, scores: torch.Tensor, utility: torch.Tensor, noise: torch.Generator, step: int
    ) -> torch.Tensor:
        """See `RankingAgent.gradient`."""
        return objectives.listwise(scores, utility)
