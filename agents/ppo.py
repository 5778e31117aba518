"""PPO from stable-baselines3: an agent per head, in kvenv/Rank-v1 or kvenv/Stream-v1.

Schulman, Wolski, Dhariwal, Radford, Klimov: Proximal Policy Optimization Algorithms, 2017
(arXiv 1707.06347).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import stable_baselines3

from kvenv.errors import KvenvError
from kvenv.learning.run import Run
from kvenv.learning.sb3 import KvenvVecEnv, TokenPolicy
from kvenv.learning.sb3.fit import Scale, Setting, check_ppo, fit_heads
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer
from kvenv.trace import TraceSet

USUAL = {
    "rank": {"steps": 6144, "num_envs": 32, "rollout": 4, "batch": 32, "lr": 1e-3},
    "stream": {"steps": 40_000, "num_envs": 32, "rollout": 32, "batch": 256, "lr": 3e-3},
}
"""Options that differ between environments, where none are given."""


@dataclass
class PPO:
    """Learn scores with PPO, by ranking prompts or what a cache holds as a text goes on.

    The policy is one network for every token, which draws whole rankings.

    Args:
        env: rank or stream; stream needs traces with all queries.
        steps: timesteps for each head (rank: prompts; stream: selections); by default 6144 and
            40000.
        num_envs: environments side by side; by default 32.
        rollout: timesteps of each environment between updates; by default 4 and 32.
        batch: timesteps of a gradient step; by default 32 and 256.
        epochs: passes over the timesteps between two updates.
        lr: Adam's learning rate, falling to zero along a line; by default 1e-3 and 3e-3.
        clip: how far a probability may move in an update.
        gamma: discount for each selection (stream; a ranking has no later).
        gae_lambda: of generalised advantage estimation (stream).
        hidden: widths of the hidden layers.
        budget: tokens that the cache keeps (stream).
        sinks: first tokens that are always kept (stream).
        recent: last tokens that are always kept (stream).
        interval: tokens between two selections (stream); by default budget / 16, at least 8.
        sink_free: attention to the first 4 tokens does not count in the reward.
        seed: of initial weights, episodes and exploration.
    """

    env: Literal["rank", "stream"] = "rank"
    steps: int | None = None
    num_envs: int | None = None
    rollout: int | None = None
    batch: int | None = None
    epochs: int = 4
    lr: float | None = None
    clip: float = 0.2
    gamma: float = 0.8
    gae_lambda: float = 0.95
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    budget: int = 64
    sinks: int = 4
    recent: int = 16
    interval: int | None = None
    sink_free: bool = False
    seed: int = 0

    trains = True

    def __post_init__(self) -> None:
        if self.env not in USUAL:
            raise KvenvError(f"env is {self.env!r}: give one of {', '.join(USUAL)}")
        check_ppo(self)

    def fit(
        self,
        traces: Sequence[TraceSet],
        heads: Sequence[Head] | None = None,
        run: Run | None = None,
    ) -> NetworkScorer:
        """Train one agent per head; see `kvenv.learning.sb3.fit.fit_heads`."""
        given = {name: getattr(self, name) for name in USUAL[self.env]}
        chosen = USUAL[self.env] | {k: v for k, v in given.items() if v is not None}
        cache = {name: getattr(self, name) for name in ("budget", "sinks", "recent", "interval")}
        setting = Setting(
            env_id=f"kvenv/{self.env.capitalize()}-v1",
            arguments={"sink_free": self.sink_free, **({} if self.env == "rank" else cache)},
            steps=int(chosen["steps"]),
            num_envs=int(chosen["num_envs"]),
            held_out={"sink_free": False},
        )

        def make_model(env: KvenvVecEnv, scale: Scale) -> stable_baselines3.PPO:
            mean, std = scale
            return stable_baselines3.PPO(
                TokenPolicy,
                env,
                learning_rate=lambda left: chosen["lr"] * left,
                n_steps=int(chosen["rollout"]),
                batch_size=int(chosen["batch"]),
                n_epochs=self.epochs,
                gamma=self.gamma,
                gae_lambda=self.gae_lambda,
                clip_range=self.clip,
                policy_kwargs={"mean": mean, "std": std, "hidden": self.hidden},
                seed=self.seed,
                device="cpu",
            )

        return fit_heads("ppo", setting, make_model, traces, heads, asdict(self), run)
