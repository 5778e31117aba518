"""KVP: a Plackett-Luce ranking agent per head, trained with REINFORCE.

Moschella, Manduchi, Sener: Learning to Evict from Key-Value Cache, ICML 2026 (arXiv 2602.10238).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from kvenv.errors import KvenvError
from kvenv.learning.fit import Optimisation, fit
from kvenv.learning.plackett_luce import Credit, policy_gradient
from kvenv.learning.run import Run
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.network import Architecture, Feature
from kvenv.trace import TraceSet
from kvenv.utility import emphasise


@dataclass
class KVP:
    """Learn to rank tokens by their future attention, from keys and values alone.

    Args:
        steps: optimiser steps.
        samples: rankings drawn for each head and step (K of the leave-one-out baseline).
        credit: reward_to_go credits the choice at rank j with the budgets b >= j; plain credits
            every choice with the whole reward.
        sink_free: share of the reward that leaves the first 4 tokens out of the utility; attention
            sinks hold most of it and hide what sets the other tokens apart.
        lr: AdamW's learning rate, falling to zero along a cosine.
        weight_decay: AdamW's weight decay.
        batch: episodes a step.
        hidden: widths of the hidden layers.
        features: what of a token the agent sees.
        seed: of initial weights, episode order and sampled rankings.
    """

    steps: int = 1000
    samples: int = 8
    credit: Credit = "reward_to_go"
    sink_free: float = 0.8
    lr: float = 8e-3
    weight_decay: float = 0.1
    batch: int = 1
    hidden: list[int] = field(default_factory=lambda: [128, 128])
    features: list[Feature] = field(default_factory=lambda: ["key", "value"])
    seed: int = 0

    trains = True

    def __post_init__(self) -> None:
        if not 0 <= self.sink_free <= 1:
            raise KvenvError(f"sink_free is {self.sink_free}: it is a share, from 0 to 1")

    def fit(
        self,
        traces: Sequence[TraceSet],
        heads: Sequence[Head] | None = None,
        run: Run | None = None,
    ) -> NetworkScorer:
        """Train one agent per head; see `kvenv.learning.fit.fit`."""

        def gradient(
            scores: torch.Tensor, utility: torch.Tensor, noise: torch.Generator
        ) -> torch.Tensor:
            reward = emphasise(utility, self.sink_free)
            return policy_gradient(scores, reward, self.samples, self.credit, noise)

        return fit(
            agent="kvp",
            objective=gradient,
            traces=traces,
            heads=heads,
            architecture=Architecture(tuple(self.features), tuple(self.hidden)),
            optimisation=Optimisation(
                self.steps, self.lr, self.weight_decay, self.batch, self.seed
            ),
            options=asdict(self),
            run=run,
        )
