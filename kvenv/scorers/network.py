"""One small network per attention head, all heads in one batch of matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from kvenv.errors import KvenvError
from kvenv.scorers.base import Head

Input = Literal["key", "value"]
Activation = Literal["gelu", "relu", "tanh", "elu", "silu"]

INPUTS: tuple[Input, ...] = get_args(Input)

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
        inputs: what of a token goes in, in this order: its key in the frame of now
            (`kvenv.rotation.Rotation.frame`) and its value.
        hidden: widths of the hidden layers.
        activation: what stands between the layers.
    """

    inputs: tuple[Input, ...] = INPUTS
    hidden: tuple[int, ...] = (64, 64)
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        odd = set(self.inputs) - set(INPUTS)
        if odd or not self.inputs or len(set(self.inputs)) != len(self.inputs):
            raise KvenvError(
                f"inputs {list(self.inputs)} must be distinct names out of {', '.join(INPUTS)}"
            )
        if any(width < 1 for width in self.hidden):
            raise KvenvError(f"hidden widths {list(self.hidden)} must be positive")
        if self.activation not in ACTIVATIONS:
            raise KvenvError(
                f"unknown activation {self.activation!r}: choose from {', '.join(ACTIVATIONS)}"
            )

    def width(self, head_dim: int) -> int:
        """F, the numbers that go in for each token."""
        return len(self.inputs) * head_dim

    def build(
        self, heads: Sequence[Head], head_dim: int, generator: torch.Generator | None = None
    ) -> PerHeadMLP:
        """The networks of these heads; see `PerHeadMLP` for the generator."""
        return PerHeadMLP(heads, self.width(head_dim), self.hidden, generator, self.activation)

    def read(self, framed: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The networks' inputs (..., n, F) float32 of tokens.

        Args:
            framed: (..., n, d) keys in the frame of now.
            values: (..., n, d).
        """
        parts = [(framed if name == "key" else values).float() for name in self.inputs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


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
        """Scores (H, n) of inputs (H, n, F)."""
        # Standardising the first layer's weights instead of the inputs saves a pass over them.
        first = self.weights[0] / self.std.transpose(1, 2)
        x = torch.baddbmm(self.biases[0] - self.mean @ first, x, first)
        activate = ACTIVATIONS[self.activation]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            x = torch.baddbmm(bias, activate(x), weight)
        return x.squeeze(-1)
