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

Feature = Literal["key", "value", "position", "fill", "key_norm", "value_norm", "mean_key"]
Activation = Literal["gelu", "relu", "tanh", "elu", "silu"]

FEATURES: tuple[Feature, ...] = get_args(Feature)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "tanh": torch.tanh,
    "elu": nn.functional.elu,
    "silu": nn.functional.silu,
}
"""What stands between the layers, by name; each with torch's default arguments."""

KNOTS = 17
"""Where the age term has its numbers: at log2(1 + age) = 0, 1, ..., 16."""


@dataclass(frozen=True)
class Architecture:
    """What a per-head network looks like.

    Attributes:
        features: what of a token goes in; see `features`.
        hidden: widths of the hidden layers.
        activation: what stands between the layers.
        budget: of the feature "fill", in tokens; None without it.
        age: whether each head also learns a function of a token's age, which a cache adds at
            decision time; see `age_term`.
    """

    features: tuple[Feature, ...] = ("key", "value")
    hidden: tuple[int, ...] = (128, 128)
    activation: Activation = "gelu"
    budget: int | None = None
    age: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.features) - set(FEATURES)
        if unknown or not self.features or len(set(self.features)) != len(self.features):
            raise KvenvError(
                f"features {list(self.features)} must be distinct names out of "
                f"{', '.join(FEATURES)}"
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
        if not isinstance(self.age, bool):
            raise KvenvError(f"age={self.age!r} is neither True nor False: give one of them")

    @property
    def pointwise(self) -> bool:
        """Whether a token's inputs come from that token alone; see `kvenv.scorers.base.Scorer`."""
        return "mean_key" not in self.features

    def inputs(self, head_dim: int) -> int:
        """Input width for a head size."""
        return sum(head_dim if name in ("key", "value") else 1 for name in self.features)

    def build(
        self, heads: Sequence[Head], head_dim: int, generator: torch.Generator | None = None
    ) -> PerHeadMLP:
        """The networks of these heads; see `PerHeadMLP` for the generator."""
        width = self.inputs(head_dim)
        return PerHeadMLP(heads, width, self.hidden, generator, self.activation, self.age)

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

    - ``key`` (after RoPE) and ``value``: the d numbers themselves.
    - ``position``: log2(1 + position) / 16.
    - ``fill``: how full a cache of `budget` tokens is when the token arrives, min(position,
      budget) / budget, the last column of kvenv/Stream-v0.
    - ``key_norm``, ``value_norm``: log2 of the Euclidean norm, which spans orders of magnitude;
      of norms below 1e-6, that of 1e-6.
    - ``mean_key``: the cosine between the key and the mean of the keys, among the tokens given,
      at positions up to its own; see `mean_key`.

    Args:
        keys: (..., n, d).
        values: (..., n, d).
        positions: (..., n) int64, in any order.
        names: which features, in order.
        budget: of the feature "fill", in tokens.
    """

    def column(name: Feature) -> torch.Tensor:
        if name in ("key", "value"):
            return (keys if name == "key" else values).float()
        if name == "position":
            one = torch.log2(1.0 + positions.float()) / 16
        elif name == "fill":
            if budget is None:
                raise KvenvError("the feature fill needs a budget: give it in tokens")
            one = positions.clamp_max(budget).float() / budget
        elif name == "mean_key":
            one = mean_key(keys.float(), positions)
        else:
            states = keys if name == "key_norm" else values
            one = states.float().norm(dim=-1).clamp_min(1e-6).log2()
        return one.unsqueeze(-1)

    columns = [column(name) for name in names]
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def mean_key(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The cosine between each key and the mean of the keys at positions up to its own.

    Args:
        keys: (..., n, d) float32.
        positions: (..., n) int64, in any order.

    Returns:
        (..., n) float32; 0 for a key of zeros.
    """
    positions = positions.expand(keys.shape[:-1]).contiguous()
    order = positions.argsort(-1)
    # A mean points where the sum does.
    sums = keys.gather(-2, order.unsqueeze(-1).expand_as(keys)).cumsum(-2)
    last = torch.searchsorted(positions.gather(-1, order), positions, right=True) - 1
    upto = sums.gather(-2, last.unsqueeze(-1).expand_as(keys))
    return nn.functional.cosine_similarity(keys, upto, dim=-1)


def age_term(table: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """A function of age for each of H heads, piecewise linear in log2(1 + age).

    Args:
        table: (H, 17), its values at log2(1 + age) = 0, 1, ..., 16; constant beyond.
        ages: (..., H, n), now - position in tokens.

    Returns:
        (..., H, n) float32.
    """
    place = torch.log2(1.0 + ages.clamp_min(0).float()).clamp_max(KNOTS - 1)
    knots = torch.arange(KNOTS, device=place.device)
    # Hat functions, not look-ups: their gradient is a sum of fixed order on any device.
    near = (1 - (place.unsqueeze(-1) - knots).abs()).clamp_min(0)
    return (near * table.float().unsqueeze(-2)).sum(-1)


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
        age: whether there is an age term, `age` (H, 17) of `age_term`, zeros at first.
    """

    mean: torch.Tensor
    std: torch.Tensor
    age: nn.Parameter | None

    def __init__(
        self,
        heads: Sequence[Head],
        inputs: int,
        hidden: Sequence[int],
        generator: torch.Generator | None = None,
        activation: Activation = "gelu",
        age: bool = False,
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
        table = nn.Parameter(torch.zeros(len(self.heads), KNOTS)) if age else None
        self.register_parameter("age", table)
        self.register_buffer("mean", torch.zeros(len(self.heads), 1, inputs))
        self.register_buffer("std", torch.ones(len(self.heads), 1, inputs))

    def forward(self, x: torch.Tensor, ages: torch.Tensor | None = None) -> torch.Tensor:
        """Scores (H, n) of features (H, n, F).

        Args:
            x: the features.
            ages: (H, n), now - position; at the end of a prompt of n tokens n - 1 - position.
                Where they are given, what the heads learned of them is added.
        """
        # Standardising the first layer's weights instead of the inputs saves a pass over them.
        first = self.weights[0] / self.std.transpose(1, 2)
        x = torch.baddbmm(self.biases[0] - self.mean @ first, x, first)
        activate = ACTIVATIONS[self.activation]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            x = torch.baddbmm(bias, activate(x), weight)
        scores = x.squeeze(-1)
        return scores if self.age is None or ages is None else scores + age_term(self.age, ages)
