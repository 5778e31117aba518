"""transformers' attention, with a way in for slots that no library function can read.

`serve` registers ``kvenv|sdpa`` (or whatever a model runs with) beside the library's own and sets
it in the config. With any other cache, and without one, it is the library's function unchanged.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFIX = "kvenv|"

LAYER = "kvenv_layer"
"""Where keys carry the `Origin` that leads to their cache layer."""

UNSERVED = ("softcap", "s_aux", "position_bias")
"""What some models add to attention and no kernel of ours does."""


class Origin(weakref.ref[Any]):
    """The cache layer that keys come from; copies and pickles of keys have none.

    A reference that counts would keep a dropped cache's memory until Python collects garbage.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def marked(keys: torch.Tensor, layer: Any) -> torch.Tensor:
    """A view of keys that leads attention to a cache layer."""
    view = keys.view_as(keys)
    setattr(view, LAYER, Origin(layer))
    return view


def serve(config: PretrainedConfig) -> None:
    """Let the model of this text config run with eviction caches."""
    base = config._attn_implementation or "sdpa"
    if base.startswith(PREFIX):
        return
    # Names with these in them are ones that transformers would look for to load.
    name = PREFIX + base.replace("flash", "fa").replace("/", "-")
    AttentionInterface.register(name, functools.partial(_attention, base))
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    config._attn_implementation = name


def _attention(
    base: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers calls in place of its function ``base``."""
    library = functools.partial(_library(base, module), module, dropout=dropout, scaling=scaling)
    reference = getattr(key, LAYER, None)
    layer = None if reference is None else reference()
    if layer is None:
        return library(query, key, value, attention_mask, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if key.ndim == 3 and all(kwargs.get(name) is None for name in UNSERVED):
        return layer.attend(query[:, :, 0], scale).unsqueeze(1), None

    def own() -> torch.Tensor:
        return library(query, key, value, attention_mask, **kwargs)[0]

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        if base == "eager":
            return library(query, key, value, mask, **kwargs)[0]
        # Of the others only sdpa is sure to take a mask of any shape.
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]

    if key.ndim == 3:
        return layer.attend_by(query, scale, attend), None
    return layer.read(query, key, value, scale, module, attention_mask, own, attend), None


def _library(base: str, module: torch.nn.Module) -> Callable[..., Any]:
    if base == "eager":  # each model family brings its own
        return sys.modules[type(module).__module__].eager_attention_forward
    function = ALL_ATTENTION_FUNCTIONS[base]
    return functools.partial(_named, base, function) if "flash" in base else function


def _named(
    base: str, function: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Call a function that goes by the name in the module's config under its own name."""
    config: Any = module.config
    name = config._attn_implementation
    config._attn_implementation = base
    try:
        return function(module, *args, **kwargs)
    finally:
        config._attn_implementation = name
