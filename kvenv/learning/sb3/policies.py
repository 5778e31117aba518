"""Policies of PPO and SAC that rank a prompt with one small network for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel, BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, SACPolicy
from torch import nn

from kvenv.errors import KvenvError
from kvenv.learning.sb3.distributions import PlackettLuce, SquashedTokenGaussian, TokenGaussian
from kvenv.learning.sb3.tokens import (
    Numbers,
    TokenExtractor,
    TokenView,
    masked_mean,
    mlp,
    scorer_network,
)
from kvenv.scorers.network import Activation, Architecture, Feature, PerHeadMLP

LOG2_COLUMN = 1
"""Where log2(1 + position) / 16 stands in Rank-v0 among the columns after key and value."""


class TokenPolicy(ActorCriticPolicy):
    """PPO's or A2C's policy for kvenv/Rank-v0: a network scores each token on its own.

    ``PPO(TokenPolicy, env, policy_kwargs={...})``. No parameter depends on the number of tokens:
    the state_dict of a model of 64 loads into one of 512. Padding rows count for nothing.

    Args:
        observation_space, action_space, lr_schedule: given by SB3.
        features: what of a token the network sees.
        mean, std: of these features, (F,), by which inputs are standardised; see `standardise`.
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
        features: Sequence[Feature] = ("key", "value"),
        mean: Numbers | None = None,
        std: Numbers | None = None,
        hidden: Sequence[int] = (128, 128),
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
        _refuse_sde(kwargs)
        self._own = {
            "features": tuple(features),
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
        view = _rank_view(self, own)
        self.mlp_extractor = TokenExtractor(view)
        pooled = self.mlp_extractor.latent_dim_vf
        self.value_net = mlp(pooled, own["value_hidden"], 1, nn.Tanh)
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
        return scorer_network(self.mlp_extractor.view)


class TokenSACPolicy(SACPolicy):
    """SAC's policy for kvenv/Rank-v0: a network scores each token on its own.

    The actor draws tanh of Gaussians around the scores, of one learned width. A critic takes each
    token's features and action through one network, averages over the tokens, and takes the
    average through another (Deep Sets, Zaheer et al. 2017, arXiv 1703.06114). No parameter
    depends on the number of tokens.

    SAC's automatic target entropy counts all M actions, padding too: give ``target_entropy``.

    Args:
        observation_space, action_space, lr_schedule: given by SB3.
        features, mean, std, hidden, activation: as for `TokenPolicy`.
        critic_hidden: width of the critics' layers.
        log_std_init: of the actor.
        **kwargs: `SACPolicy`'s others.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        features: Sequence[Feature] = ("key", "value"),
        mean: Numbers | None = None,
        std: Numbers | None = None,
        hidden: Sequence[int] = (128, 128),
        critic_hidden: int = 64,
        activation: Activation = "gelu",
        log_std_init: float = -1.0,
        **kwargs: Any,
    ) -> None:
        _refuse_sde(kwargs)
        self._own = {
            "features": tuple(features),
            "mean": mean,
            "std": std,
            "hidden": tuple(hidden),
            "critic_hidden": critic_hidden,
            "activation": activation,
        }
        super().__init__(
            observation_space, action_space, lr_schedule, log_std_init=log_std_init, **kwargs
        )

    def make_actor(self, features_extractor: Any = None) -> Any:
        """The actor, on this policy's device."""
        return _Actor(self, _rank_view(self, self._own)).to(self.device)

    def make_critic(self, features_extractor: Any = None) -> Any:
        """The critics, on this policy's device."""
        view = _rank_view(self, {**self._own, "hidden": ()})
        return _Critics(self, view, self.critic_kwargs["n_critics"], self._own["critic_hidden"]).to(
            self.device
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self._own

    def scorer_network(self) -> tuple[PerHeadMLP, Architecture]:
        """The network that scores a token before tanh, one head, and what it is made of."""
        return scorer_network(self.actor.view)  # pyright: ignore[reportArgumentType]


class _Actor(BasePolicy):
    def __init__(self, policy: TokenSACPolicy, view: TokenView) -> None:
        super().__init__(policy.observation_space, policy.action_space, squash_output=True)
        self.view = view
        start = float(policy.actor_kwargs["log_std_init"])
        self.log_std = nn.Parameter(torch.tensor(start))
        self.action_dist = SquashedTokenGaussian()

    def _parameters_of(self, obs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, valid = self.view(obs.float())
        return self.view.scores(x), valid, self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def forward(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        parameters = self._parameters_of(obs)
        return self.action_dist.actions_from_params(*parameters, deterministic=deterministic)

    def action_log_prob(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.action_dist.log_prob_from_params(*self._parameters_of(obs))

    def _predict(self, observation: Any, deterministic: bool = False) -> torch.Tensor:
        return self(observation, deterministic)


class _Critics(BaseModel):
    def __init__(self, policy: TokenSACPolicy, view: TokenView, count: int, width: int) -> None:
        super().__init__(policy.observation_space, policy.action_space)
        self.view = view.requires_grad_(False)  # it reads and standardises, and scores nothing
        inputs = view.scorer.mean.shape[-1] + 1
        self.each = nn.ModuleList(mlp(inputs, [width], width, nn.ReLU) for _ in range(count))
        self.whole = nn.ModuleList(mlp(width + 1, [width], 1, nn.ReLU) for _ in range(count))

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, valid = self.view(obs.float())
        x = torch.cat([self.view.standard(x), actions.unsqueeze(-1)], -1)
        return tuple(
            whole(masked_mean(torch.relu(each(x)), valid))
            for each, whole in zip(self.each, self.whole, strict=True)
        )


def _rank_view(policy: BaseModel, own: dict[str, Any]) -> TokenView:
    observation, action = policy.observation_space.shape, policy.action_space.shape
    if not observation or not action:
        raise KvenvError(
            f"{type(policy).__name__} gives each token a score, and the action space is "
            f"{policy.action_space}: use it on kvenv/Rank-v0"
        )
    return TokenView(
        int(np.prod(observation)),
        int(np.prod(action)),
        own["features"],
        LOG2_COLUMN,
        own["mean"],
        own["std"],
        own["hidden"],
        own["activation"],
    )


def _refuse_sde(kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_sde"):
        raise KvenvError("use_sde=True needs an SB3 network: leave it out with a policy of kvenv's")
