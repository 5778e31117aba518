"""The token policy: one small network scores every row of an observation, in any environment."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from kvenv.errors import KvenvError
from kvenv.learning.sb3.distributions import PlackettLuce, TokenGaussian
from kvenv.scorers.base import Head
from kvenv.scorers.network import INPUTS, Activation, Architecture, Input, PerHeadMLP
from kvenv.trace import TraceSet, same_model
from kvenv.trace.batches import Index, Reader, choose_heads, deviation, moments

Numbers = Sequence[float] | np.ndarray | torch.Tensor

BESIDES = 2
"""Columns of an observation after key and value: log2(1 + age) / 16, and validity."""


def standardise(
    traces: Sequence[TraceSet],
    heads: Sequence[Head] | None = None,
    inputs: Sequence[Input] = INPUTS,
    episodes: Sequence[Index] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of prompt tokens' inputs over episodes and heads, (F,) each.

    Args:
        traces: trace sets of one model.
        heads: which heads; None means every recorded one.
        inputs: what of a token the policy scores: key in the frame of now, value.
        episodes: which ones, as (trace set, episode within it); None means all.
    """
    same_model(traces)
    if episodes is None:
        episodes = [(where, i) for where, one in enumerate(traces) for i in range(len(one))]
    architecture = Architecture(tuple(inputs))
    mean, square = moments(
        architecture.read(one.framed(), one.values).flatten(0, 1)[None]
        for one in Reader(traces, choose_heads(traces, heads)).stream(episodes)
    )
    return mean.flatten().float().numpy(), deviation(mean, square).flatten().float().numpy()


def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Module:
    """A plain multi-layer perceptron."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise([inputs, *hidden]):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear([inputs, *hidden][-1], outputs))


class TokenNetwork(nn.Module):
    """What SB3 calls the mlp_extractor: scores of M rows, and what the critic sees of them.

    The scores depend on key and value alone, as an exported scorer's do. The critic sees the mean
    over the tokens of standardised inputs and age, and log2 of their number. No parameter or
    buffer depends on M.

    Args:
        observation_space: of M rows of key, value, age and validity, 2d + 2 columns.
        tokens: M.
        architecture: of the scoring network.
        mean, std: of its inputs, (F,); None leaves them as they are.

    Attributes:
        scorer: the network that scores a token, of one head.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        tokens: int,
        architecture: Architecture,
        mean: Numbers | None,
        std: Numbers | None,
    ) -> None:
        super().__init__()
        size = int(np.prod(observation_space.shape or ()))
        columns, rest = divmod(size, tokens)
        d, odd = divmod(columns - BESIDES, 2)
        if rest or odd or d < 1:
            raise KvenvError(
                f"an observation of {size} numbers is not {tokens} tokens of 2d + {BESIDES} "
                "columns: use this policy on kvenv/Rank-v1, kvenv/Stream-v1 or kvenv/Evict-v1"
            )
        self.tokens, self.architecture = tokens, architecture
        # SB3 seeds the global generator before it makes a policy.
        self.scorer = architecture.build([(0, 0)], d, torch.default_generator)
        for buffer, given in ((self.scorer.mean, mean), (self.scorer.std, std)):
            if given is not None:
                values = torch.as_tensor(given, dtype=torch.float32)
                if values.shape != buffer.shape[-1:]:
                    raise KvenvError(
                        f"mean and std have shape {tuple(values.shape)}, not ({buffer.shape[-1]},):"
                        f" give those of the inputs {', '.join(architecture.inputs)}"
                    )
                buffer.copy_(values)
        self.latent_dim_vf = architecture.width(d) + 2

    def forward(
        self, observations: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """What `forward_actor` and `forward_critic` give."""
        return self.forward_actor(observations), self.forward_critic(observations)

    def forward_actor(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (B, M), and which rows are tokens, (B, M) bool."""
        x, _, valid = self._read(observations)
        return self.scorer(x.reshape(1, -1, x.shape[-1])).view(valid.shape), valid

    def forward_critic(self, observations: torch.Tensor) -> torch.Tensor:
        """Means over the tokens, and log2 of their number, (B, F + 2)."""
        x, age, valid = self._read(observations)
        x = torch.cat([(x - self.scorer.mean) / self.scorer.std, age], -1)
        count = valid.sum(-1, keepdim=True).clamp_min(1)
        total = torch.where(valid.unsqueeze(-1), x, 0).sum(-2)
        return torch.cat([total / count, torch.log2(count.float())], -1)

    def _read(self, observations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs (B, M, F), ages (B, M, 1) and validity (B, M)."""
        rows = observations.reshape(len(observations), self.tokens, -1)
        keys, values = rows[..., :-BESIDES].chunk(2, -1)
        return self.architecture.read(keys, values), rows[..., -2:-1], rows[..., -1] > 0


class TokenPolicy(ActorCriticPolicy):
    """PPO's or A2C's policy for kvenv/Rank-v1 and kvenv/Stream-v1.

    ``PPO(TokenPolicy, env, policy_kwargs={...})``. One network scores each row by its key in the
    frame of now and its value. No parameter depends on the number of rows: the state_dict of a
    model of 64 loads into one of 512. Rows without a token count for nothing.

    Args:
        observation_space, action_space, lr_schedule: given by SB3.
        inputs: what of a token the network sees.
        mean, std: of these inputs, (F,), by which they are standardised; see `standardise`.
        hidden: widths of the scoring network's hidden layers.
        value_hidden: of the value function's, which sees the mean over the tokens.
        activation: the scoring network's.
        distribution: "plackett_luce" draws rankings, and an action is a token's place spread over
            [-1, 1]; "gaussian" draws scores around the network's, with one learned width.
        log_std_init: of "gaussian".
        **kwargs: `ActorCriticPolicy`'s others.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        inputs: Sequence[Input] = INPUTS,
        mean: Numbers | None = None,
        std: Numbers | None = None,
        hidden: Sequence[int] = (64, 64),
        value_hidden: Sequence[int] = (64, 64),
        activation: Activation = "gelu",
        distribution: Literal["plackett_luce", "gaussian"] = "plackett_luce",
        log_std_init: float = -1.0,
        **kwargs: Any,
    ) -> None:
        if distribution not in ("plackett_luce", "gaussian"):
            raise KvenvError(
                f"unknown distribution {distribution!r}: choose 'plackett_luce' or 'gaussian'"
            )
        if not isinstance(action_space, spaces.Box):
            raise KvenvError(
                f"TokenPolicy gives each token a score, and the action space is {action_space}: "
                "use it on kvenv/Rank-v1 or kvenv/Stream-v1"
            )
        if kwargs.get("use_sde"):
            raise KvenvError("use_sde=True needs an SB3 network: leave it out with TokenPolicy")
        self._own = {
            "inputs": tuple(inputs),
            "mean": mean,
            "std": std,
            "hidden": tuple(hidden),
            "value_hidden": tuple(value_hidden),
            "activation": activation,
            "distribution": distribution,
        }
        super().__init__(
            observation_space, action_space, lr_schedule, log_std_init=log_std_init, **kwargs
        )

    def _build(self, lr_schedule: Schedule) -> None:
        own = self._own
        self.mlp_extractor = TokenNetwork(
            self.observation_space,
            int(np.prod(self.action_space.shape or ())),
            Architecture(own["inputs"], own["hidden"], own["activation"]),
            own["mean"],
            own["std"],
        )
        self.value_net = mlp(self.mlp_extractor.latent_dim_vf, own["value_hidden"], 1)
        self.action_dist = PlackettLuce()
        if own["distribution"] == "gaussian":
            self.action_dist = TokenGaussian()
            self.log_std = nn.Parameter(torch.tensor(float(self.log_std_init)))
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # pyright: ignore[reportCallIssue]
            **self.optimizer_kwargs,
        )

    def _get_action_dist_from_latent(self, latent_pi: Any) -> Any:
        extra = (self.log_std,) if self._own["distribution"] == "gaussian" else ()
        return self.action_dist.proba_distribution(*latent_pi, *extra)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self._own

    def scorer_network(self) -> tuple[PerHeadMLP, Architecture]:
        """The network that scores a token, one head, and what it is made of."""
        return self.mlp_extractor.scorer, self.mlp_extractor.architecture
