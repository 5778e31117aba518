"""Action distributions over the scores of M tokens of which only some are there."""

from __future__ import annotations

import math
from typing import Any

import torch
from stable_baselines3.common.distributions import Distribution
from typing_extensions import Self

from kvenv.learning.plackett_luce import log_probabilities

NOTHING = -1e30
"""A score that no token has: finite, for the gradients' sake, yet beyond what log M changes."""


def places(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Actions that sort as the scores do, evenly spread: 1 for the best token, -1 for the worst.

    Args:
        scores: (B, M).
        valid: (B, M) bool; other tokens get -1.
    """
    order = _order(scores, valid)
    steps = torch.arange(scores.shape[-1], device=scores.device).expand(order.shape)
    place = torch.empty_like(order).scatter_(-1, order, steps)
    last = (valid.sum(-1, keepdim=True) - 1).clamp_min(1)
    return torch.where(valid, 1 - 2 * place / last, -1.0)


def _order(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Best token first, (B, M) int64; ties keep the earlier token, padding comes last."""
    masked = torch.where(valid, scores, -torch.inf)
    return masked.argsort(dim=-1, descending=True, stable=True)


class TokenDistribution(Distribution):
    """Base: what SB3 asks of a distribution beyond `sample`, `mode` and `log_prob`."""

    def proba_distribution_net(self, *args: Any, **kwargs: Any) -> Any:
        """The policy makes its networks itself."""
        raise NotImplementedError

    def actions_from_params(self, *args: Any, deterministic: bool = False) -> torch.Tensor:
        """Actions of the distribution with these parameters."""
        return self.proba_distribution(*args).get_actions(deterministic)

    def log_prob_from_params(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions of the distribution with these parameters, and their log-probabilities."""
        actions = self.actions_from_params(*args)
        return actions, self.log_prob(actions)

    def entropy(self) -> torch.Tensor | None:
        """None: SB3 then takes minus the log-probability."""
        return None


class PlackettLuce(TokenDistribution):
    """Rankings of the valid tokens, sent as `places`; see `kvenv.learning.plackett_luce`."""

    def proba_distribution(self, scores: torch.Tensor, valid: torch.Tensor) -> Self:
        """Set scores (B, M) and validity (B, M)."""
        self.scores, self.valid = scores, valid
        return self

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """The log-probability (B,) of the ranking that actions (B, M) sort into."""
        order = _order(actions, self.valid)
        # Padding is chosen last, from padding alone: its terms are NOTHING - NOTHING.
        scores = torch.where(self.valid, self.scores, NOTHING)
        return log_probabilities(scores, order).sum(-1)

    def sample(self) -> torch.Tensor:
        """A ranking drawn by Gumbel noise, as `places` (B, M)."""
        gumbel = -torch.empty_like(self.scores).exponential_().log()
        return places(self.scores + gumbel, self.valid)

    def mode(self) -> torch.Tensor:
        """The ranking by the scores themselves, as `places` (B, M)."""
        return places(self.scores, self.valid)


class TokenGaussian(TokenDistribution):
    """Independent Gaussians of one width around the scores of valid tokens, 0 for the others."""

    def proba_distribution(
        self, scores: torch.Tensor, valid: torch.Tensor, log_std: torch.Tensor
    ) -> Self:
        """Set means (B, M), validity (B, M) and the logarithm of the standard deviation, ()."""
        self.scores, self.valid, self.log_std = scores, valid, log_std
        return self

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-density (B,) of the valid tokens' actions."""
        z = (actions - self.scores) * (-self.log_std).exp()
        density = -0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return torch.where(self.valid, density, 0.0).sum(-1)

    def entropy(self) -> torch.Tensor | None:
        """(B,), that of the valid tokens."""
        return self.valid.sum(-1) * (self.log_std + 0.5 * math.log(2 * math.pi * math.e))

    def sample(self) -> torch.Tensor:
        """(B, M), differentiable in scores and log_std."""
        drawn = self.scores + self.log_std.exp() * torch.randn_like(self.scores)
        return torch.where(self.valid, drawn, 0.0)

    def mode(self) -> torch.Tensor:
        """The scores of valid tokens, (B, M)."""
        return torch.where(self.valid, self.scores, 0.0)
