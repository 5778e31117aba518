"""A cut cache's layers, and the masks that those need whose heads hold different numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvenv.errors import KvenvError


class CutLayer(DynamicLayer):
    """A full-attention layer that was cut to some of its tokens and grows from there.

    What was kept takes the last places before the first new token, so that the library's causal
    mask shows it to every new token and orders the new ones among themselves.

    Args:
        keys: (B, H, b, d), after RoPE; heads may hold different tokens.
        values: (B, H, b, d).
        evicted: how many tokens each head gave up; where heads differ, the least.
        absent: (B, H, b) bool, places that hold nothing, in a cache whose layers or heads differ.
            The library's mask is the same for all of them, so that such a layer works with
            `forward` alone.
    """

    is_croppable = False

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        evicted: int,
        absent: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._evicted = evicted
        self.absent, self.masked = absent, absent is None

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a step's keys and values; see transformers."""
        if not self.masked:
            raise KvenvError(
                "this cut gives heads different budgets, which a plain forward pass would not "
                "mask: feed it with kvenv.evaluation.cut.forward"
            )
        return super().update(*args, **kwargs)

    def bias(self, length: int, group: int) -> torch.Tensor:
        """What to add to the logits of ``length`` new tokens, (B, H * group, length, all)."""
        if self.absent is None or self.keys is None:
            raise KvenvError("a cut whose heads are alike needs no mask of its own")
        rows, heads, _, _ = self.keys.shape
        held = self.keys.shape[2]
        bias = self.keys.new_zeros(rows, heads, length, held + length)
        least = torch.finfo(bias.dtype).min
        bias[..., : self.absent.shape[-1]].masked_fill_(self.absent.unsqueeze(2), least)
        bias[..., held:] = bias.new_full((length, length), least).triu(1)
        return bias.repeat_interleave(group, 1)

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: the position of the next one."""
        return super().get_seq_length() + self._evicted

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the keys that ``query_length`` tokens attend to.

        Older transformers give the tokens' positions instead of their number.
        """
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        return super().get_seq_length() + q, self._evicted


@contextlib.contextmanager
def own_masks(model: PreTrainedModel, cache: Cache, length: int) -> Iterator[None]:
    """Show each attention layer whose heads hold different numbers of tokens a mask of its own."""
    ragged = {
        number: layer
        for number, layer in enumerate(cache.layers)
        if isinstance(layer, CutLayer) and layer.absent is not None
    }
    # An EvictionCache leaves its own attention, which passes on what is not its cache's.
    kind = str(model.config._attn_implementation).removeprefix("kvenv|")
    if ragged and kind not in ("sdpa", "eager"):
        raise KvenvError(
            f"attention {model.config._attn_implementation!r} takes no mask for each head: load "
            'the model with attn_implementation="sdpa"'
        )
    text = model.config.get_text_config()
    group = text.num_attention_heads // (text.num_key_value_heads or text.num_attention_heads)
    masks = {i: layer.bias(length, group) for i, layer in ragged.items()}

    def show(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = getattr(module, "layer_idx", -1)
        if "attention_mask" in kwargs:
            ragged[layer].masked = True
            kwargs = {**kwargs, "attention_mask": masks[layer]}
        return args, kwargs

    with contextlib.ExitStack() as stack:
        for module in model.modules() if ragged else ():
            if getattr(module, "layer_idx", None) in ragged:
                stack.enter_context(module.register_forward_pre_hook(show, with_kwargs=True))
        try:
            yield
        finally:
            for layer in ragged.values():
                layer.masked = False
