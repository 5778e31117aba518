"""What agents that train per-head networks on recorded utilities share: options and `fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from kvenv.errors import KvenvError
from kvenv.learning.fit import Optimisation, fit
from kvenv.learning.run import Run
from kvenv.rules import emphasise
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.network import Architecture, Input
from kvenv.trace import TraceSet


@dataclass(kw_only=True)
class RankingAgent:
    """An agent whose learning signal is a gradient in the scores: a subclass writes `gradient`.

    Args:
        steps: optimiser steps.
        sink_free: share of the reward that leaves the first 4 tokens out of the utility; attention
            sinks hold most of it and hide what sets the other tokens apart.
        lr: AdamW's learning rate, falling to zero along a cosine.
        weight_decay: AdamW's weight decay.
        batch: episodes a step.
        hidden: widths of the hidden layers.
        inputs: what of a token the agent sees: its key in the frame of now, its value, or both.
        seed: of initial weights, episode order and the learning signal's noise.
    """

    steps: int = 1000
    sink_free: float = 0.5
    lr: float = 8e-3
    weight_decay: float = 0.1
    batch: int = 1
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    inputs: list[Input] = field(default_factory=lambda: ["key", "value"])
    seed: int = 0

    trains = True

    def __post_init__(self) -> None:
        if not 0 <= self.sink_free <= 1:
            raise KvenvError(f"sink_free is {self.sink_free}: it is a share, from 0 to 1")

    def gradient(
        self, scores: torch.Tensor, utility: torch.Tensor, noise: torch.Generator, step: int
    ) -> torch.Tensor:
        """The gradient of the loss in the scores.

        Args:
            scores: (H, n).
            utility: (H, n), whose retention is what the options `sink_free` asks for.
            noise: the step's own source of randomness.
            step: counted from 0.

        Returns:
            (H, n).
        """
        raise NotImplementedError(f"{type(self).__name__} must define gradient()")

    def fit(
        self,
        traces: Sequence[TraceSet],
        heads: Sequence[Head] | None = None,
        run: Run | None = None,
    ) -> NetworkScorer:
        """Train one network per head; see `kvenv.learning.fit.fit`."""

        def objective(
            scores: torch.Tensor, utility: torch.Tensor, noise: torch.Generator, step: int
        ) -> torch.Tensor:
            return self.gradient(scores, emphasise(utility, self.sink_free), noise, step)

        return fit(
            agent=type(self).__name__.lower(),
            objective=objective,
            traces=traces,
            heads=heads,
            architecture=Architecture(tuple(self.inputs), tuple(self.hidden)),
            optimisation=Optimisation(
                self.steps, self.lr, self.weight_decay, self.batch, self.seed
            ),
            options=asdict(self),
            run=run,
        )
