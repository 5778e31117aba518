"""PPO from stable-baselines3: an agent per head, in kvenv/Rank-v0 or kvenv/Stream-v0.

Schulman, Wolski, Dhariwal, Radford, Klimov: Proximal Policy Optimization Algorithms, 2017
(arXiv 1707.06347).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import stable_baselines3

from kvenv.learning.run import Run
from kvenv.learning.sb3 import KvenvVecEnv, Standardise, TokenPolicy
from kvenv.learning.sb3.fit import Scale, Task, check_ppo, fit
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer
from kvenv.trace import TraceSet


@dataclass
class PPO:
    """Learn scores with PPO, by ranking prompts or by scoring tokens as they arrive.

    In rank, the policy is one network for every token, which draws whole rankings. In stream it is
    SB3's own MlpPolicy, and the scores are those of a cache of `budget` tokens.

    Args:
        env: rank or stream; stream needs traces with all queries.
        steps: timesteps for each head (rank: rankings; stream: tokens); by default 6144 and
            600000.
        num_envs: environments side by side; by default 32 and 64.
        rollout: timesteps of each environment between updates; by default 4 and 128.
        batch: timesteps of a gradient step; by default 32 and 2048.
        epochs: passes over the timesteps between two updates.
        lr: Adam's learning rate, falling to zero along a line; by default 1e-3 and 5e-4.
        clip: how far a probability may move in an update.
        gamma: discount (stream; a ranking has no later).
        gae_lambda: of generalised advantage estimation (stream).
        hidden: widths of the hidden layers; by default 128,128 and 64,64.
        budget: tokens that the cache keeps (stream).
        sinks: first tokens that are always kept (stream).
        recent: last tokens that are always kept (stream).
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
    gamma: float = 0.99
    gae_lambda: float = 0.97
    hidden: list[int] = field(default_factory=list)
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
        """Train one agent per head; see `kvenv.learning.sb3.fit.fit`."""
        rank = self.env == "rank"
        usual = (6144, 32, 4, 32, 1e-3) if rank else (600_000, 64, 128, 2048, 5e-4)
        given = (self.steps, self.num_envs, self.rollout, self.batch, self.lr)
        steps, num_envs, rollout, batch, lr = (
            default if one is None else one for one, default in zip(given, usual, strict=True)
        )
        cache = {"budget": self.budget, "sinks": self.sinks, "recent": self.recent}
        task = Task(
            env_id="kvenv/Rank-v0" if rank else "kvenv/Stream-v0",
            arguments={"sink_free": self.sink_free, **({} if rank else cache)},
            features=("key", "value") if rank else ("key", "value", "position", "fill"),
            steps=steps,
            num_envs=num_envs,
            seed=self.seed,
            held_out={"sink_free": False},
        )

        def make_model(env: KvenvVecEnv, scale: Scale) -> stable_baselines3.PPO:
            mean, std = scale
            policy: Any = TokenPolicy
            extra: dict[str, Any] = {"mean": mean, "std": std, "hidden": self.hidden or [128, 128]}
            if not rank:
                policy = "MlpPolicy"
                extra = {
                    "features_extractor_class": Standardise,
                    "features_extractor_kwargs": {"mean": mean, "std": std},
                    "net_arch": self.hidden or [64, 64],
                    "log_std_init": -1.0,
                }
            return stable_baselines3.PPO(
                policy,
                env,
                learning_rate=lambda left: lr * left,
                n_steps=rollout,
                batch_size=batch,
                n_epochs=self.epochs,
                gamma=self.gamma,
                gae_lambda=self.gae_lambda,
                clip_range=self.clip,
                policy_kwargs=extra,
                device="cpu",
            )

        return fit("ppo", task, make_model, traces, heads, asdict(self), run)
