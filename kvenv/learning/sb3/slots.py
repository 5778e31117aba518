"""MaskablePPO's policy for kvenv/Evict-v1; needs sb3-contrib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from kvenv.errors import KvenvError
from kvenv.learning.sb3.policies import Numbers, TokenNetwork, mlp
from kvenv.scorers.network import INPUTS, Activation, Architecture, Input, PerHeadMLP

try:
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
except ImportError as error:
    raise KvenvError(
        "MaskablePPO needs the sb3-contrib package: pip install 'kvenv[sb3]'"
    ) from error

__all__ = ["MaskablePPO", "SlotPolicy"]


class SlotPolicy(MaskableActorCriticPolicy):
    """`kvenv.learning.sb3.TokenPolicy` for MaskablePPO: a slot's token of low score goes.

    The logit of "this slot goes" is minus the score of the token in it, so that the scores are
    what an eviction cache keeps by.

    Args:
        observation_space, action_space, lr_schedule: given by SB3.
        inputs, mean, std, hidden, value_hidden, activation: as for
            `kvenv.learning.sb3.TokenPolicy`.
        **kwargs: `MaskableActorCriticPolicy`'s others.
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
        **kwargs: Any,
    ) -> None:
        if not isinstance(action_space, spaces.Discrete):
            raise KvenvError(
                f"SlotPolicy chooses a slot, and the action space is {action_space}: "
                "use it on kvenv/Evict-v1"
            )
        self._slots = int(action_space.n)
        self._own = {
            "inputs": tuple(inputs),
            "mean": mean,
            "std": std,
            "hidden": tuple(hidden),
            "value_hidden": tuple(value_hidden),
            "activation": activation,
        }
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        own = self._own
        self.mlp_extractor = TokenNetwork(
            self.observation_space,
            self._slots,
            Architecture(own["inputs"], own["hidden"], own["activation"]),
            own["mean"],
            own["std"],
        )
        self.action_net = nn.Identity()
        self.value_net = mlp(self.mlp_extractor.latent_dim_vf, own["value_hidden"], 1)
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # pyright: ignore[reportCallIssue]
            **self.optimizer_kwargs,
        )

    def _get_action_dist_from_latent(self, latent_pi: Any) -> Any:
        scores, _ = latent_pi  # which slots may go, the environment's action mask says
        return self.action_dist.proba_distribution(action_logits=-scores)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self._own

    def scorer_network(self) -> tuple[PerHeadMLP, Architecture]:
        """The network that scores a slot's token, one head, and what it is made of."""
        return self.mlp_extractor.scorer, self.mlp_extractor.architecture
