"""KVP: a Plackett-Luce ranking agent per head, trained by policy gradient.

Moschella, Manduchi, Sener: Learning to Evict from Key-Value Cache, ICML 2026 (arXiv 2602.10238).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from kvenv.errors import KvenvError
from kvenv.learning import objectives
from kvenv.learning.plackett_luce import Credit, policy_gradient
from kvenv.learning.ranking import RankingAgent

Signal = Literal["pairwise", "listwise", "regression"]


@dataclass(kw_only=True)
class KVP(RankingAgent):
    """Learn to rank tokens by their future attention, from keys and values alone.

    Args:
        credit: expected follows the exact gradient of the policy's mean reward, which has a closed
            form; the other two estimate it from sampled rankings (REINFORCE, leave-one-out):
            reward_to_go credits the choice at rank j with the budgets b >= j, plain credits every
            choice with the whole reward, as the paper does.
        samples: rankings drawn for each head and step (not by expected).
        warm_start: share of the steps, from the first on, that follow another signal.
        warm_signal: that signal; see the agents of these names.
    """

    credit: Credit = "expected"
    samples: int = 8
    warm_start: float = 0.5
    warm_signal: Signal = "pairwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.warm_start <= 1:
            raise KvenvError(f"warm_start is {self.warm_start}: it is a share, from 0 to 1")
        for name, known in (("credit", get_args(Credit)), ("warm_signal", get_args(Signal))):
            if getattr(self, name) not in known:
                raise KvenvError(
                    f"{name} is {getattr(self, name)!r}: give one of {', '.join(known)}"
                )
        if self.credit != "expected" and self.samples < 2:
            raise KvenvError(
                f"samples is {self.samples}: credit {self.credit} compares rankings with each "
                "other, give 2 or more, or credit expected, which draws none"
            )

    def gradient(
        self, scores: torch.Tensor, utility: torch.Tensor, noise: torch.Generator, step: int
    ) -> torch.Tensor:
        """See `RankingAgent.gradient`."""
        if step >= self.warm_start * self.steps:
            return policy_gradient(scores, utility, self.samples, self.credit, noise)
        if self.warm_signal == "pairwise":
            return objectives.pairwise(scores, utility, objectives.PAIRS, noise)
        if self.warm_signal == "listwise":
            return objectives.listwise(scores, utility)
        return objectives.regression(scores, utility, objectives.FLOOR)
