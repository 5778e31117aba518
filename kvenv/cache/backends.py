"""Which functions read a cache's slots: Triton's kernels, or plain torch."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvenv.errors import KvenvError

Choice = Literal["auto", "torch", "triton"]

CHOICES: tuple[Choice, ...] = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Backend:
    """The work on slots, by whoever does it; see the files of `kvenv.cache.kernels`.

    Attributes:
        name: triton or torch.
        attend: the function of this name.
        select: likewise; None where sorting and gathering do it.
        networks: how to pack a layer's networks, and to score with them; None where scorers score
            for themselves.
    """

    name: str
    attend: Callable[..., torch.Tensor]
    select: Callable[..., None] | None = None
    networks: tuple[Callable[..., Any], Callable[..., torch.Tensor]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self  # functions, of which torch's own operators cannot be copied


def has_triton() -> bool:
    """Whether Triton is installed (it is for Linux only)."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(asked: Choice, states: torch.Tensor, same_size: bool) -> Backend:
    """The backend for a layer.

    Args:
        asked: what the user asked for.
        states: the first keys, (B, H, q, d).
        same_size: whether values are of the same size d.

    Raises:
        KvenvError: if triton is asked for and cannot run on the tensors' device.
    """
    on_gpu = states.device.type == "cuda"
    if asked == "torch" or (asked == "auto" and not (on_gpu and has_triton())):
        return _torch()
    if not has_triton():
        raise KvenvError(
            "backend='triton' and Triton is not installed (it comes for Linux only): use "
            "backend='torch'"
        )
    if not on_gpu and not interpreted():
        raise KvenvError(
            f"backend='triton' and the model runs on {states.device}: move it to an NVIDIA GPU "
            "(model.to('cuda')), or use backend='torch'"
        )
    from kvenv.cache.kernels.attend import attend, serves

    if not (same_size and serves(states.shape[-1], states.dtype)):
        warnings.warn(
            f"no kernel serves heads of size {states.shape[-1]} in {states.dtype}: the cache "
            "runs on plain torch",
            stacklevel=2,
        )
        return _torch()
    from kvenv.cache.kernels.network import pack
    from kvenv.cache.kernels.score import score
    from kvenv.cache.kernels.select import select

    return Backend("triton", attend, select, (pack, score))


def _torch() -> Backend:
    from kvenv.cache.kernels.attend_reference import attend_reference

    return Backend("torch", attend_reference)
