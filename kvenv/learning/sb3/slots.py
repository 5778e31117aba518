"""MaskablePPO's policy for kvenv/Evict-v0; needs sb3-contrib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from kvenv.errors import KvenvError
from kvenv.learning.sb3.tokens import (
    Numbers,
    TokenExtractor,
    TokenView,
    masked_mean,
    mlp,
    scorer_network,
)
from kvenv.scorers.network import Activation, Architecture, Feature, PerHeadMLP

try:
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
except ImportError as error:
    raise KvenvError(
        "MaskablePPO needs the sb3-contrib package: pip install 'kvenv[sb3]'"
    ) from error

__all__ = ["MaskablePPO", "SlotPolicy"]

LOG2_COLUMN = 0
"""Where log2(1 + position) / 16 stands in Evict-v0 among the columns after key and value."""


class SlotPolicy(MaskableActorCriticPolicy):
    """MaskablePPO's policy for kvenv/Evict-v0: a network scores each slot, a low score goes.

    The logit of "this slot goes" is minus the score of the token in it, so that the scores are
    what an eviction cache keeps by. The value function sees the mean over the slots of the
    standardised features, and of position, age and evictability. No parameter depends on the
    budget.

    Args:
        observation_space, action_space, lr_schedule: given by SB3.
        features, mean, std, hidden, value_hidden, activation: as for
            `kvenv.learning.sb3.TokenPolicy`.
        **kwargs: `MaskableActorCriticPolicy`'s others.
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
        **kwargs: Any,
    ) -> None:
        if not isinstance(action_space, spaces.Discrete) or not observation_space.shape:
            raise KvenvError(
                f"SlotPolicy chooses a slot, and the action space is {action_space}: "
                "use it on kvenv/Evict-v0"
            )
        self._own = {
            "features": tuple(features),
            "mean": mean,
            "std": std,
            "hidden": tuple(hidden),
            "value_hidden": tuple(value_hidden),
            "activation": activation,
        }
        self._size, self._slots = int(np.prod(observation_space.shape)), int(action_space.n)
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        own = self._own
        view = TokenView(
            self._size,
            self._slots,
            own["features"],
            LOG2_COLUMN,
            own["mean"],
            own["std"],
            own["hidden"],
            own["activation"],
        )
        self.mlp_extractor = _SlotExtractor(view)
        self.action_net = nn.Identity()
        self.value_net = mlp(self.mlp_extractor.latent_dim_vf, own["value_hidden"], 1, nn.Tanh)
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # pyright: ignore[reportCallIssue]
            **self.optimizer_kwargs,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self._own

    def scorer_network(self) -> tuple[PerHeadMLP, Architecture]:
        """The network that scores a slot's token, one head, and what it is made of."""
        return scorer_network(self.mlp_extractor.view)


class _SlotExtractor(TokenExtractor):
    """The actor's latent is the logits (B, M); the critic's has three columns more."""

    def __init__(self, view: TokenView) -> None:
        super().__init__(view)
        self.latent_dim_vf += 3

    def forward_actor(self, observations: torch.Tensor) -> torch.Tensor:
        x, _ = self.view(observations)
        return -self.view.scores(x)

    def forward_critic(self, observations: torch.Tensor) -> torch.Tensor:
        x, valid = self.view(observations)
        rows = observations.reshape(*valid.shape, -1)
        return masked_mean(torch.cat([self.view.standard(x), rows[..., -3:]], -1), valid)
