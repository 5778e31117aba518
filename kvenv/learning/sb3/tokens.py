"""One network for every token of an observation, and a value of all of them together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from kvenv.errors import KvenvError
from kvenv.learning.episodes import (
    Index,
    Reader,
    choose_heads,
    deviation,
    moments,
)
from kvenv.scorers.base import Head
from kvenv.scorers.network import Architecture, Feature, PerHeadMLP, features
from kvenv.trace import TraceSet, same_model

Numbers = Sequence[float] | np.ndarray | torch.Tensor


def standardise(
    traces: Sequence[TraceSet],
    heads: Sequence[Head] | None = None,
    names: Sequence[Feature] = ("key", "value"),
    budget: int | None = None,
    episodes: Sequence[Index] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of prompt tokens' features over episodes and heads, (F,) each.

    Args:
        traces: trace sets of one model.
        heads: which heads; None means every recorded one.
        names: which features, in order.
        budget: of the feature "fill", in tokens.
        episodes: which ones, as (trace set, episode within it); None means all.
    """
    same_model(traces)
    if episodes is None:
        episodes = [(where, i) for where, one in enumerate(traces) for i in range(len(one))]
    mean, square = moments(
        features(one.keys, one.values, one.positions, names, budget).flatten(0, 1)[None]
        for one in Reader(traces, choose_heads(traces, heads)).stream(episodes)
    )
    return mean.flatten().float().numpy(), deviation(mean, square).flatten().float().numpy()


def mlp(inputs: int, hidden: Sequence[int], outputs: int, activation: type[nn.Module]) -> nn.Module:
    """A plain multi-layer perceptron."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise([inputs, *hidden]):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers, nn.Linear([inputs, *hidden][-1], outputs))


class TokenView(nn.Module):
    """Sees an observation (B, M * F) as M tokens: their features, and which rows are tokens.

    F = 2d + 3 columns: key (d), value (d) and three more. A row that is all zero is padding.
    No parameter or buffer depends on M.

    Args:
        size: M * F, the observation's.
        tokens: M.
        names: which features a token is scored by.
        position: column of log2(1 + position) / 16 among the last three.
        mean, std: of the features, (F,); None leaves them as they are.
        hidden: widths of the scoring network's hidden layers.
        activation: the scoring network's.

    Attributes:
        scorer: the network that scores a token, a `PerHeadMLP` of one head.
    """

    def __init__(
        self,
        size: int,
        tokens: int,
        names: Sequence[Feature],
        position: int,
        mean: Numbers | None,
        std: Numbers | None,
        hidden: Sequence[int],
        activation: str,
    ) -> None:
        super().__init__()
        columns, rest = divmod(size, tokens)
        d, odd = divmod(columns - 3, 2)
        if rest or odd or d < 1:
            raise KvenvError(
                f"an observation of {size} numbers is not {tokens} tokens of 2d + 3 columns: "
                "use this policy on kvenv/Rank-v0 or kvenv/Evict-v0"
            )
        place = 2 * d + position
        at = {"key": slice(d), "value": slice(d, 2 * d), "position": slice(place, place + 1)}
        if odd := sorted(set(names) - set(at)):
            raise KvenvError(
                f"a ranking has no feature {', '.join(odd)}: choose from {', '.join(at)}"
            )
        self.tokens = tokens
        self.architecture = Architecture(tuple(names), tuple(hidden), activation)  # pyright: ignore[reportArgumentType]
        self._columns = [at[name] for name in names]
        # SB3 seeds the global generator before it makes a policy.
        self.scorer = self.architecture.build([(0, 0)], d, torch.default_generator)
        for buffer, given in ((self.scorer.mean, mean), (self.scorer.std, std)):
            if given is not None:
                values = torch.as_tensor(given, dtype=torch.float32)
                if values.shape != buffer.shape[-1:]:
                    raise KvenvError(
                        f"mean and std have shape {tuple(values.shape)}, not ({buffer.shape[-1]},):"
                        f" give those of the features {', '.join(names)}"
                    )
                buffer.copy_(values)

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, M, F) and validity (B, M) bool of observations (B, M * F)."""
        rows = observations.reshape(len(observations), self.tokens, -1)
        x = torch.cat([rows[..., columns] for columns in self._columns], -1)
        return x, (rows != 0).any(-1)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (B, M) of features (B, M, F)."""
        return self.scorer(x.reshape(1, -1, x.shape[-1])).view(x.shape[:-1])

    def standard(self, x: torch.Tensor) -> torch.Tensor:
        """Features as the scoring network standardises them."""
        return (x - self.scorer.mean) / self.scorer.std


def masked_mean(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean over tokens, and log2 of their number: (B, M, F), (B, M) -> (B, F + 1)."""
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    total = torch.where(valid.unsqueeze(-1), x, 0).sum(-2)
    return torch.cat([total / count, torch.log2(count.float())], -1)


class TokenExtractor(nn.Module):
    """What SB3 calls the mlp_extractor: the actor's and the critic's latents of an observation.

    The actor's is (scores (B, M), validity (B, M)); the critic's is the mean of the standardised
    features over the tokens and log2 of their number, (B, F + 1).
    """

    def __init__(self, view: TokenView) -> None:
        super().__init__()
        self.view = view
        self.latent_dim_vf = view.scorer.mean.shape[-1] + 1

    def forward(self, observations: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Both latents."""
        return self.forward_actor(observations), self.forward_critic(observations)

    def forward_actor(self, observations: torch.Tensor) -> Any:
        """Scores and validity."""
        x, valid = self.view(observations)
        return self.view.scores(x), valid

    def forward_critic(self, observations: torch.Tensor) -> torch.Tensor:
        """The pooled features."""
        x, valid = self.view(observations)
        return masked_mean(self.view.standard(x), valid)


def scorer_network(view: TokenView) -> tuple[PerHeadMLP, Architecture]:
    """What `kvenv.learning.sb3.export` copies."""
    return view.scorer, view.architecture
