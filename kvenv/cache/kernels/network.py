"""The per-head networks as the kernels read them: one layer's weights, packed; one token's score.

score = w_out . act(w2 act(w1 (x - mean) / std + b1) + b2) + b_out, with one or two hidden layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvenv.errors import KvenvError
from kvenv.scorers.network import ACTIVATIONS, Architecture, PerHeadMLP

WIDEST = 256
"""Hidden widths and head sizes up to this; wider ones would not fit a multiprocessor's memory."""
SCALARS = ("position", "fill", "key_norm", "value_norm")
"""Features of one number, in the order of their weights; feature i is bit i of `Packed.scalars`."""


@dataclass(frozen=True)
class Packed:
    """The networks of one layer's H heads on a device; hidden widths W padded with zeros.

    Zeros change nothing: every activation maps 0 to 0. The large weights are float16 where that
    is exact, as in bundles stored so, else float32; all the rest is float32.

    Attributes:
        w_key: of the feature key (H, D, W1), or None.
        w_value: of the feature value (H, D, W1), or None.
        w_scalar: of the features `SCALARS` (H, 4, W1), zeros for those not used.
        b1: (H, W1).
        w2: (H, W2, W1), outputs first: a token's product then needs no exchange between warps;
            None with one hidden layer.
        b2: (H, W2) or None.
        w_out: (H, W2), or (H, W1) with one hidden layer.
        b_out: (H,).
        key_affine: mean and 1 / std of the keys' numbers (H, 2, D), or None.
        value_affine: likewise of the values', or None.
        scalar_affine: likewise of the `SCALARS` (H, 2, 4).
        age: what is learned of ages (H, 17), see `kvenv.scorers.network.age_term`, or None.
        activation: what stands between the layers.
        scalars: which of `SCALARS` are used, a bit each.
        budget: of the feature fill, in tokens; 1 without it.
    """

    w_key: torch.Tensor | None
    w_value: torch.Tensor | None
    w_scalar: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor | None
    b2: torch.Tensor | None
    w_out: torch.Tensor
    b_out: torch.Tensor
    key_affine: torch.Tensor | None
    value_affine: torch.Tensor | None
    scalar_affine: torch.Tensor
    age: torch.Tensor | None
    activation: str
    scalars: int
    budget: int

    def tensors(self) -> list[torch.Tensor]:
        """What a custom op takes: the eleven tensors up to `scalar_affine`, empty for None."""
        every = (
            *(self.w_key, self.w_value, self.w_scalar, self.b1, self.w2, self.b2),
            *(self.w_out, self.b_out, self.key_affine, self.value_affine, self.scalar_affine),
        )
        return [self.b1.new_empty(0) if one is None else one for one in every]

    def bytes_per_head(self) -> int:
        """What the weights of one head take."""
        return sum(one.numel() * one.element_size() for one in self.tensors()) // len(self.b_out)

    def flops_per_token(self) -> int:
        """Multiplications and additions of one score; the activations are not counted."""
        every = (self.w_key, self.w_value, self.w2, self.w_out)
        return 2 * sum(one[0].numel() for one in every if one is not None)


def pack(
    network: PerHeadMLP, architecture: Architecture, head_dim: int, device: torch.device | str
) -> Packed | None:
    """The networks of one layer for the kernels, or None where no kernel serves them.

    That is: the feature mean_key, no or more than two hidden layers, hidden widths above 256,
    head sizes above 256 or no multiple of 8.

    Args:
        network: of the layer's KV heads, all of them in order.
        architecture: what it was built from.
        head_dim: D.
        device: where the kernels run.

    Raises:
        KvenvError: if the network is not of the architecture.
    """
    hidden = architecture.hidden
    if not architecture.pointwise or len(hidden) not in (1, 2) or max(hidden) > WIDEST:
        return None
    if head_dim > WIDEST or head_dim % 8:
        return None
    weights = [one.detach().to(device, torch.float32) for one in network.weights]
    biases = [one.detach().to(device, torch.float32) for one in network.biases]
    inputs = architecture.inputs(head_dim)
    if [w.shape[1] for w in weights] != [inputs, *hidden]:
        raise KvenvError(
            f"networks of widths {[w.shape[1] for w in weights]} are not of the architecture's "
            f"{[inputs, *hidden]}: pass the one that they were built from"
        )
    sizes = [head_dim if name in ("key", "value") else 1 for name in architecture.features]
    padded = [max(16, triton.next_power_of_2(width)) for width in hidden]
    first = dict(
        zip(architecture.features, _pad(weights[0], padded[0]).split(sizes, dim=1), strict=True)
    )
    mean, std = network.mean.detach().to(device), network.std.detach().to(device)
    affine = torch.cat([mean, 1 / std], dim=1).float()
    moments = dict(zip(architecture.features, affine.split(sizes, dim=2), strict=True))
    heads = len(network.heads)
    no_rows, no_moment = affine.new_zeros(heads, 1, padded[0]), affine.new_zeros(heads, 2, 1)
    second = len(hidden) == 2
    last = _pad(weights[-1].squeeze(-1), padded[-1])
    return Packed(
        w_key=_smallest(first.get("key")),
        w_value=_smallest(first.get("value")),
        w_scalar=torch.cat([first.get(name, no_rows) for name in SCALARS], dim=1).contiguous(),
        b1=_pad(biases[0].squeeze(1), padded[0]).contiguous(),
        w2=_smallest(_pad(_pad(weights[1], padded[1]).mT, padded[0])) if second else None,
        b2=_pad(biases[1].squeeze(1), padded[1]).contiguous() if second else None,
        w_out=last.contiguous(),
        b_out=biases[-1].flatten().contiguous(),
        key_affine=_dense(moments.get("key")),
        value_affine=_dense(moments.get("value")),
        scalar_affine=torch.cat([moments.get(name, no_moment) for name in SCALARS], 2).contiguous(),
        age=None if network.age is None else network.age.detach().to(device).float().contiguous(),
        activation=architecture.activation,
        scalars=sum(1 << i for i, name in enumerate(SCALARS) if name in architecture.features),
        budget=architecture.budget or 1,
    )


def _pad(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _smallest(weights: torch.Tensor | None) -> torch.Tensor | None:
    if weights is None:
        return None
    half = weights.half()
    exact = bool((half.float() == weights).all())
    return (half if exact else weights).contiguous()


def hidden_and_output(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """Scores (B, H, n) of first-layer sums (B, H, n, W1), in their type; plain torch."""
    act = ACTIVATIONS[packed.activation]
    x = act(x + packed.b1.to(x.dtype).unsqueeze(1))
    if packed.w2 is not None and packed.b2 is not None:
        x = act(x @ packed.w2.mT.to(x.dtype) + packed.b2.to(x.dtype).unsqueeze(1))
    return (x * packed.w_out.to(x.dtype).unsqueeze(1)).sum(-1) + packed.b_out.to(x.dtype).view(
        -1, 1
    )


@triton.jit
def activate(x: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """Of torch the gelu (exact), relu, tanh, elu or silu of float32 numbers."""
    if ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "relu":
        return tl.where(x <= 0, 0.0, x)  # NaN stays NaN
    elif ACT == "tanh":
        small = tl.exp(-2.0 * tl.abs(x))
        size = (1.0 - small) / (1.0 + small)
        return tl.where(x < 0, -size, size)
    elif ACT == "elu":
        return tl.where(x > 0, x, tl.exp(tl.where(x > 0, 0.0, x)) - 1.0)
    else:
        tl.static_assert(ACT == "silu")
        return x / (1.0 + tl.exp(-x))


@triton.jit
def scalar_input(x: tl.tensor, affine: tl.tensor, WHICH: tl.constexpr) -> tl.tensor:
    """A one-number feature, standardised with the head's `Packed.scalar_affine` (2, 4)."""
    return (x - tl.load(affine + WHICH)) * tl.load(affine + 4 + WHICH)


@triton.jit
def position_input(position: tl.tensor) -> tl.tensor:
    """The feature position."""
    return tl.log2(1.0 + position.to(tl.float32)) * 0.0625


@triton.jit
def fill_input(position: tl.tensor, BUDGET: tl.constexpr) -> tl.tensor:
    """The feature fill."""
    return tl.minimum(position, BUDGET).to(tl.float32) / BUDGET


@triton.jit
def norm_input(squares: tl.tensor) -> tl.tensor:
    """The features key_norm and value_norm of sums of squares."""
    return 0.5 * tl.log2(tl.where(squares < 1e-12, 1e-12, squares))  # NaN stays NaN


@triton.jit
def token_products(
    total: tl.tensor, x: tl.tensor, weights: tl.tensor, affine: tl.tensor, D: tl.constexpr,
    W1: tl.constexpr, ROWS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add one token's first-layer products to ``total`` (ROWS, W1), to be summed over the rows.

    Args:
        total: what was added so far.
        x: pointer to the token's D numbers.
        weights: pointer to the head's (D, W1).
        affine: pointer to the head's (2, D).
        D: head size.
        W1: hidden width.
        ROWS: inputs at a time.
    """
    columns = tl.arange(0, W1)
    for start in tl.static_range(0, D, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < D
        mean = tl.load(affine + rows, mask=inside, other=0.0)
        scale = tl.load(affine + D + rows, mask=inside, other=0.0)
        given = (tl.load(x + rows, mask=inside, other=0.0).to(tl.float32) - mean) * scale
        w = tl.load(
            weights + rows[:, None] * W1 + columns[None, :], mask=inside[:, None], other=0.0
        )
        total += given[:, None] * w.to(tl.float32)
    return total
