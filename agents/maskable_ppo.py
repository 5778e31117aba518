"""MaskablePPO from sb3-contrib: an agent per head that chooses which slot goes, kvenv/Evict-v1.

Huang, Ontanon: A Closer Look at Invalid Action Masking in Policy Gradient Algorithms, 2020
(arXiv 2006.14171). Needs `pip install 'kvenv[sb3]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvenv.learning.run import Run
from kvenv.learning.sb3 import KvenvVecEnv
from kvenv.learning.sb3.fit import Scale, Setting, check_ppo, fit_heads
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer
from kvenv.trace import TraceSet


@dataclass
class MaskablePPO:
    """Learn with PPO which slot of a full cache goes; traces need all queries.

    One network scores every slot, and the lower the score the likelier it goes: what is learned is
    a score for each token, as an eviction cache keeps by.

    Args:
        steps: timesteps (tokens) for each head.
        num_envs: environments side by side.
        rollout: timesteps of each environment between updates.
        batch: timesteps of a gradient step.
        epochs: passes over the timesteps between two updates.
        lr: Adam's learning rate, falling to zero along a line.
        clip: how far a probability may move in an update.
        gamma: discount.
        gae_lambda: of generalised advantage estimation.
        hidden: widths of the hidden layers.
        budget: tokens that the cache keeps.
        sinks: first tokens that are always kept.
        recent: last tokens that are always kept.
        sink_free: attention to the first 4 tokens does not count in the reward.
        seed: of initial weights, episodes and exploration.
    """

    steps: int = 24_000
    num_envs: int = 16
    rollout: int = 64
    batch: int = 256
    epochs: int = 3
    lr: float = 1e-3
    clip: float = 0.2
    gamma: float = 0.99
    gae_lambda: float = 0.97
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    budget: int = 64
    sinks: int = 4
    recent: int = 16
    sink_free: bool = False
    seed: int = 0

    trains = True

    def __post_init__(self) -> None:
        check_ppo(self)

    def fit(
        self,
        traces: Sequence[TraceSet],
        heads: Sequence[Head] | None = None,
        run: Run | None = None,
    ) -> NetworkScorer:
        """Train one agent per head; see `kvenv.learning.sb3.fit.fit_heads`."""
        from kvenv.learning.sb3 import MaskablePPO as Algorithm  # an extra: asked for when needed
        from kvenv.learning.sb3 import SlotPolicy

        setting = Setting(
            env_id="kvenv/Evict-v1",
            arguments={
                "budget": self.budget,
                "sinks": self.sinks,
                "recent": self.recent,
                "sink_free": self.sink_free,
            },
            steps=self.steps,
            num_envs=self.num_envs,
            held_out={"sink_free": False},
        )

        def make_model(env: KvenvVecEnv, scale: Scale) -> Any:
            mean, std = scale
            return Algorithm(
                SlotPolicy,
                env,
                learning_rate=lambda left: self.lr * left,
                n_steps=self.rollout,
                batch_size=self.batch,
                n_epochs=self.epochs,
                gamma=self.gamma,
                gae_lambda=self.gae_lambda,
                clip_range=self.clip,
                policy_kwargs={"mean": mean, "std": std, "hidden": self.hidden},
                seed=self.seed,
                device="cpu",
            )

        return fit_heads("maskable_ppo", setting, make_model, traces, heads, asdict(self), run)
