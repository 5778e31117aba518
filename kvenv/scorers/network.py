"""One small network per attention head, all heads in one batch of matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from kvenv.errors import KvenvError
from kvenv.scorers.base import Head

Feature = Literal["key", "value", "position", "fill"]
Activation = Literal["gelu", "relu", "tanh", "elu", "silu"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "tanh": torch.tanh,
    "elu": nn.functional.elu,
    "silu": nn.functional.silu,
}
"""What stands between the layers, by name; each with torch's default arguments."""


@dataclass(frozen=True)
class Architecture:
    """What a per-head network looks like.

    Attributes:
        features: what of a token goes in: its key (after RoPE), its value, its position
            (log2(1 + position) / 16), or how full a cache of `budget` tokens is when it arrives
            (min(position, budget) / budget, the last column of kvenv/Stream-v0).
        hidden: widths of the hidden layers.
        activation: what stands between the layers.
        budget: of the feature "fill", in tokens; None without it.
    """

    features: tuple[Feature, ...] = ("key", "value")
    hidden: tuple[int, ...] = (128, 128)
    activation: Activation = "gelu"
    budget: int | None = None

    def __post_init__(self) -> None:
        unknown = set(self.features) - {"key", "value", "position", "fill"}
        if unknown or not self.features or len(set(self.features)) != len(self.features):
            raise KvenvError(
                f"features {list(self.features)} must be distinct names out of key, value, "
                "position, fill"
            )
        if any(width < 1 for width in self.hidden):
            raise KvenvError(f"hidden widths {list(self.hidden)} must be positive")
        if self.activation not in ACTIVATIONS:
            raise KvenvError(
                f"unknown activation {self.activation!r}: choose from {', '.join(ACTIVATIONS)}"
            )
        if (self.budget is None) == ("fill" in self.features):
            raise KvenvError(
                f"budget={self.budget} with features {list(self.features)}: the feature fill "
                "needs a budget, and nothing else does"
            )
        if self.budget is not None and self.budget < 1:
            raise KvenvError(f"budget={self.budget} is less than one token: give 1 or more")

    def inputs(self, head_dim: int) -> int:
        """Input width for a head size."""
        return sum(head_dim if name in ("key", "value") else 1 for name in self.features)

    def build(
        self, heads: Sequence[Head], head_dim: int, generator: torch.Generator | None = None
    ) -> PerHeadMLP:
        """The networks of these heads; see `PerHeadMLP` for the generator."""
        return PerHeadMLP(heads, self.inputs(head_dim), self.hidden, generator, self.activation)

    def read(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """The networks' inputs (..., n, F) of tokens; see `features`."""
        return features(keys, values, positions, self.features, self.budget)


def features(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    names: Sequence[Feature],
    budget: int | None = None,
) -> torch.Tensor:
    """A token's inputs, (..., n, F) float32.

    Args:
        keys: (..., n, d).
        values: (..., n, d).
        positions: (..., n) int64.
        names: which features, in order.
        budget: of the feature "fill", in tokens.
    """

    def column(name: Feature) -> torch.Tensor:
        if name == "position":
            return torch.log2(1.0 + positions.float()).unsqueeze(-1) / 16
        if name == "fill":
            if budget is None:
                raise KvenvError("the feature fill needs a budget: give it in tokens")
            return positions.clamp_max(budget).float().unsqueeze(-1) / budget
        return (keys if name == "key" else values).float()

    columns = [column(name) for name in names]
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


class PerHeadMLP(nn.Module):
    """A multi-layer perceptron for each of H heads: (H, n, F) -> (H, n).

    Inputs are standardised per head with `mean` and `std`, (H, 1, F), set before training.

    Args:
        heads: the (layer, KV head) pairs, in the order of the batch.
        inputs: F.
        hidden: widths of the hidden layers.
        generator: initialises the weights (uniform, +-1/sqrt(fan-in), as torch's Linear does);
            None leaves zeros, for weights that are loaded.
        activation: what stands between the layers.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        heads: Sequence[Head],
        inputs: int,
        hidden: Sequence[int],
        generator: torch.Generator | None = None,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.heads = tuple(heads)
        self.activation: Activation = activation
        widths = [inputs, *hidden, 1]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(widths):
            bound = fan_in**-0.5
            for shape, into in (((fan_in, fan_out), self.weights), ((1, fan_out), self.biases)):
                tensor = torch.zeros(len(self.heads), *shape)
                if generator is not None:
                    tensor.uniform_(-bound, bound, generator=generator)
                into.append(nn.Parameter(tensor))
        self.register_buffer("mean", torch.zeros(len(self.heads), 1, inputs))
        self.register_buffer("std", torch.ones(len(self.heads), 1, inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (H, n) of features (H, n, F)."""
        # Standardising the first layer's weights instead of the inputs saves a pass over them.
        first = self.weights[0] / self.std.transpose(1, 2)
        x = torch.baddbmm(self.biases[0] - self.mean @ first, x, first)
        activate = ACTIVATIONS[self.activation]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            x = torch.baddbmm(bias, activate(x), weight)
        return x.squeeze(-1)
