"""The per-head networks as the kernels read them: one layer's weights, packed.

score = w_out . act(w2 act(w1 x + b1) + b2) + b_out, where x are a token's key in the frame of now
and its value; one or two hidden layers. The means and deviations of x are folded into w1 and b1.

A rotation of the keys is a rotation of the weights: R(-now) k . w = k . R(now) w. Each plane turns
by the angle a = now * frequency, so R(now) w = cos(a) w + sin(a) q, where q is w with every plane
turned by 90 degrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvenv.errors import KvenvError
from kvenv.rotation import Rotation
from kvenv.scorers.network import ACTIVATIONS, Architecture, PerHeadMLP

WIDEST = 256
"""Hidden widths and head sizes up to this; wider ones would not fit a multiprocessor's memory."""


@dataclass(frozen=True)
class Packed:
    """The networks of one layer's H heads on a device; hidden widths W padded with zeros.

    Zeros change nothing: every activation maps 0 to 0. All are float32 but `speed`.

    Attributes:
        w_key: first-layer weights of the framed key (H, D, W1), or None.
        w_turned: `w_key` with every plane turned by 90 degrees, or None.
        speed: (D,) float64 radians a token of each channel's plane; 0 where none is rotated.
        w_value: first-layer weights of the value (H, D, W1), or None.
        b1: (H, W1).
        w2: (H, W2, W1), outputs first; None with one hidden layer.
        b2: (H, W2) or None.
        w_out: (H, W2), or (H, W1) with one hidden layer.
        b_out: (H,).
        activation: what stands between the layers.
    """

    w_key: Tensor | None
    w_turned: Tensor | None
    speed: Tensor
    w_value: Tensor | None
    b1: Tensor
    w2: Tensor | None
    b2: Tensor | None
    w_out: Tensor
    b_out: Tensor
    activation: str

    def key_weights(self, now: Tensor, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Weights (B, H, D, W1) of keys as cached, for rows whose newest token is at ``now`` (B,).

        None where the networks do not look at keys.
        """
        if self.w_key is None or self.w_turned is None:
            return None
        angle = now.to(torch.float64).view(-1, 1, 1, 1) * self.speed.view(-1, 1)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return torch.addcmul(cos * self.w_key.to(dtype), sin, self.w_turned.to(dtype))

    def bytes_per_head(self) -> int:
        """What the weights of one head take, for one row."""
        every = (self.w_key, self.w_value, self.b1, self.w2, self.b2, self.w_out, self.b_out)
        return sum(x[0].numel() * x.element_size() for x in every if x is not None)

    def flops_per_token(self) -> int:
        """Multiplications and additions of one score; the activations are not counted."""
        every = (self.w_key, self.w_value, self.w2, self.w_out)
        return 2 * sum(one[0].numel() for one in every if one is not None)


def pack(
    network: PerHeadMLP,
    architecture: Architecture,
    rotation: Rotation,
    head_dim: int,
    device: torch.device | str,
) -> Packed | None:
    """The networks of one layer for the kernels, or None where no kernel serves them.

    That is: no or more than two hidden layers, hidden widths above 256, head sizes above 256 or
    no multiple of 8.

    Args:
        network: of the layer's KV heads, all of them in order.
        architecture: what it was built from.
        rotation: how the layer rotates its keys.
        head_dim: D.
        device: where the kernels run.

    Raises:
        KvenvError: if the network is not of the architecture.
    """
    hidden = architecture.hidden
    if len(hidden) not in (1, 2) or max(hidden) > WIDEST or head_dim > WIDEST or head_dim % 8:
        return None
    weights = [one.detach().to(device, torch.float64) for one in network.weights]
    biases = [one.detach().to(device, torch.float64).squeeze(1) for one in network.biases]
    widths, expected = [w.shape[1] for w in weights], [architecture.width(head_dim), *hidden]
    if widths != expected:
        raise KvenvError(
            f"networks of widths {widths} are not of the architecture's {expected}: pass the one "
            "that they were built from"
        )
    mean, std = network.mean.to(device, torch.float64), network.std.to(device, torch.float64)
    first = weights[0] / std.mT
    padded = [max(16, triton.next_power_of_2(width)) for width in hidden]
    parts = dict(zip(architecture.inputs, first.split(head_dim, dim=1), strict=True))
    parts = {name: _pad(part, padded[0]) for name, part in parts.items()}
    key, turned = parts.get("key"), None
    if key is not None:
        quarter = replace(rotation, frequencies=(math.pi / 2,) * len(rotation.frequencies))
        turned = quarter.turn(key.mT, torch.ones((), device=device)).mT.contiguous()
    second = len(hidden) == 2
    return Packed(
        w_key=key,
        w_turned=turned,
        speed=_speed(rotation, head_dim).to(device),
        w_value=parts.get("value"),
        b1=_pad(biases[0] - (mean @ first).squeeze(1), padded[0]),
        w2=_pad(_pad(weights[1], padded[1]).mT, padded[0]) if second else None,
        b2=_pad(biases[1], padded[1]) if second else None,
        w_out=_pad(weights[-1].squeeze(-1), padded[-1]),
        b_out=biases[-1].squeeze(-1).float().contiguous(),
        activation=architecture.activation,
    )


def _pad(tensor: Tensor, width: int) -> Tensor:
    padded = torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
    return padded.float().contiguous()


def _speed(rotation: Rotation, head_dim: int) -> Tensor:
    """Radians a token of each channel's plane, (head_dim,) float64."""
    planes = torch.tensor(rotation.frequencies, dtype=torch.float64)
    halves = rotation.layout == "halves"
    channels = planes.repeat(2) if halves else planes.repeat_interleave(2)
    speed = torch.zeros(head_dim, dtype=torch.float64)
    speed[rotation.offset : rotation.offset + len(channels)] = channels
    return speed


def hidden_and_output(packed: Packed, x: Tensor) -> Tensor:
    """Scores (B, H, n) of first-layer sums without bias (B, H, n, W1), in their type."""
    act = ACTIVATIONS[packed.activation]
    x = act(x + packed.b1.to(x.dtype).unsqueeze(1))
    if packed.w2 is not None and packed.b2 is not None:
        x = act(x @ packed.w2.mT.to(x.dtype) + packed.b2.to(x.dtype).unsqueeze(1))
    return (x @ packed.w_out.to(x.dtype).unsqueeze(-1)).squeeze(-1) + packed.b_out.to(
        x.dtype
    ).unsqueeze(-1)


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
