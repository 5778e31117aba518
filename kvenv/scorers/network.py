"""One small network per attention head, all heads in one batch of matrices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from kvenv.errors import KvenvError
from kvenv.scorers.base import Head

Feature = Literal["key", "value", "position"]


@dataclass(frozen=True)
class Architecture:
    """What a per-head network looks like.

    Attributes:
        features: what of a token goes in: its key (after RoPE), its value, its position
            (log2(1 + position) / 16).
        hidden: widths of the hidden layers.
    """

    features: tuple[Feature, ...] = ("key", "value")
    hidden: tuple[int, ...] = (128, 128)

    def __post_init__(self) -> None:
        unknown = set(self.features) - {"key", "value", "position"}
        if unknown or not self.features or len(set(self.features)) != len(self.features):
            raise KvenvError(
                f"features {list(self.features)} must be distinct names out of key, value, position"
            )
        if any(width < 1 for width in self.hidden):
            raise KvenvError(f"hidden widths {list(self.hidden)} must be positive")

    def inputs(self, head_dim: int) -> int:
        """Input width for a head size."""
        return sum(1 if feature == "position" else head_dim for feature in self.features)


def features(
    keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, names: Sequence[Feature]
) -> torch.Tensor:
    """A token's inputs, (..., n, F) float32.

    Args:
        keys: (..., n, d).
        values: (..., n, d).
        positions: (..., n) int64.
        names: which features, in order.
    """
    parts = {"key": keys, "value": values}
    columns = [
        torch.log2(1.0 + positions.float()).unsqueeze(-1) / 16
        if name == "position"
        else parts[name].float()
        for name in names
    ]
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


class PerHeadMLP(nn.Module):
    """A multi-layer perceptron (GELU) for each of H heads: (H, n, F) -> (H, n).

    Inputs are standardised per head with `mean` and `std`, (H, 1, F), set before training.

    Args:
        heads: the (layer, KV head) pairs, in the order of the batch.
        inputs: F.
        hidden: widths of the hidden layers.
        generator: initialises the weights (uniform, +-1/sqrt(fan-in), as torch's Linear does);
            None leaves zeros, for weights that are loaded.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        heads: Sequence[Head],
        inputs: int,
        hidden: Sequence[int],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.heads = tuple(heads)
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
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            x = torch.baddbmm(bias, nn.functional.gelu(x), weight)
        return x.squeeze(-1)
