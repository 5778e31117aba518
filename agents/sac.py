"""SAC from stable-baselines3: an agent per head, in kvenv/Rank-v0.

Haarnoja, Zhou, Abbeel, Levine: Soft Actor-Critic, ICML 2018 (arXiv 1801.01290).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import stable_baselines3

from kvenv.errors import KvenvError
from kvenv.learning.run import Run
from kvenv.learning.sb3 import KvenvVecEnv, TokenSACPolicy
from kvenv.learning.sb3.fit import Scale, Task, check_options, fit
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer
from kvenv.trace import TraceSet


@dataclass
class SAC:
    """Learn to rank prompts with SAC: a critic of rankings teaches a score for each token.

    Args:
        steps: timesteps (rankings) for each head.
        num_envs: environments side by side.
        buffer: rankings to learn from; each holds a prompt's observation twice.
        start: rankings before learning starts.
        batch: rankings of a gradient step.
        updates: gradient steps after each step of all environments.
        lr: Adam's learning rate.
        entropy: weight of the policy's entropy.
        hidden: widths of the actor's hidden layers.
        critic_hidden: width of the critics' layers.
        sink_free: attention to the first 4 tokens does not count in the reward.
        seed: of initial weights, episodes and exploration.
    """

    steps: int = 3072
    num_envs: int = 16
    buffer: int = 1024
    start: int = 256
    batch: int = 32
    updates: int = 2
    lr: float = 1e-3
    entropy: float = 1e-3
    hidden: list[int] = field(default_factory=lambda: [128, 128])
    critic_hidden: int = 64
    sink_free: bool = False
    seed: int = 0

    trains = True

    def __post_init__(self) -> None:
        least = {"steps": 1, "num_envs": 1, "buffer": 1, "start": 0, "batch": 1, "updates": 1}
        check_options(self, {**least, "seed": 0, "critic_hidden": 1}, positive=("lr", "entropy"))
        if self.start >= self.steps:
            raise KvenvError(
                f"start is {self.start} and steps {self.steps}: nothing would be learned, so give "
                "more steps or start earlier"
            )

    def fit(
        self,
        traces: Sequence[TraceSet],
        heads: Sequence[Head] | None = None,
        run: Run | None = None,
    ) -> NetworkScorer:
        """Train one agent per head; see `kvenv.learning.sb3.fit.fit`."""
        task = Task(
            env_id="kvenv/Rank-v0",
            arguments={"sink_free": self.sink_free},
            features=("key", "value"),
            steps=self.steps,
            num_envs=self.num_envs,
            seed=self.seed,
            held_out={"sink_free": False},
        )

        def make_model(env: KvenvVecEnv, scale: Scale) -> stable_baselines3.SAC:
            mean, std = scale
            return stable_baselines3.SAC(
                TokenSACPolicy,
                env,
                learning_rate=self.lr,
                buffer_size=self.buffer,
                learning_starts=self.start,
                batch_size=self.batch,
                gradient_steps=self.updates,
                gamma=0.0,  # an episode is one step
                ent_coef=self.entropy,
                policy_kwargs={
                    "mean": mean,
                    "std": std,
                    "hidden": self.hidden,
                    "critic_hidden": self.critic_hidden,
                },
                device="cpu",
            )

        return fit("sac", task, make_model, traces, heads, asdict(self), run)
