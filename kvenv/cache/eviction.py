"""`EvictionCache`: a transformers cache that keeps the best `budget` tokens of every head."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from kvenv.cache.padding import LeftPadding
from kvenv.cache.scoring import CacheScorer
from kvenv.cache.slots import EvictionLayer, Limits
from kvenv.errors import KvenvError
from kvenv.identity import full_attention_layers
from kvenv.scorers.base import Scorer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class EvictionCache(Cache):
    """Holds at most ``budget`` tokens per head, whatever the length of the context.

    ``model.generate(**inputs, past_key_values=cache)`` works unmodified: greedy, sampled, with
    beams, in batches, and again with a longer text and the same cache. Memory is bounded from
    the prompt's end on; the prompt itself is attended to in full, or in blocks of budget + block
    tokens with ``prefill_chunk_size=block``.

    Full-attention layers evict; sliding-window, linear and hybrid layers stay the library's own.
    Evicted tokens do not come back: `crop`, and with it assisted decoding, works only while
    nothing has been evicted.

    Args:
        config: ``model.config``, or the model itself, which lets a trained scorer compare
            weights and not only the configuration.
        scorer: scores tokens from keys, values and positions. Fixed (pointwise) scores are
            computed once, as a token arrives; others anew over the slots at every step.
        budget: tokens per head, the current one included. At a budget of at least the whole
            sequence, tokens are those of the default cache.
        sinks: the first tokens of a row, always kept.
        recent: the last tokens, the newest included, always kept. What they will be worth shows
            only once later tokens have asked, and the next few do attend mostly to them; 16 is
            that neighbourhood at a small price in budget.
        fallback: scores the heads that ``scorer`` does not know.
        attention_mask: the batch's 2D mask (B, S), padded on the left, which a cache has no other
            way to see. Needed for more than one row, beams and return sequences included, and for
            a single padded row. Rows that ``generate`` repeats are matched.

    Raises:
        KvenvError: if an argument cannot be used, naming it and the cure.

    Example:
        ``cache = EvictionCache(model, scorer, budget=256)`` and then
        ``model.generate(**inputs, past_key_values=cache)``.
    """

    def __init__(
        self,
        config: PretrainedConfig | PreTrainedModel,
        scorer: Scorer,
        *,
        budget: int,
        sinks: int = 4,
        recent: int = 16,
        fallback: Scorer | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        limits = _limits(budget, sinks, recent)
        settings = _config(config)
        layers = DynamicCache(config=settings).layers
        text = settings.get_text_config(decoder=True)
        heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        evicting = full_attention_layers(settings)
        if not evicting:
            raise KvenvError(
                f"model type {settings.model_type} has no full-attention layer, so there is "
                "nothing to evict: generate without an EvictionCache"
            )
        for one in (scorer, fallback):
            if (check_model := getattr(one, "check_model", None)) is not None:
                check_model(config)
        self._limits = limits
        self._scorer = CacheScorer(scorer, fallback, dict.fromkeys(evicting, heads))
        self._padding = LeftPadding(attention_mask)
        for i in evicting:
            layers[i] = EvictionLayer(i, limits, self._scorer, self._padding)
        super().__init__(layers=layers)

    @property
    def budget(self) -> int:
        """Most tokens that a head holds between steps."""
        return self._limits.budget

    @property
    def nbytes(self) -> int:
        """Bytes that all layers' keys and values hold now.

        Positions and scores, 12 bytes per slot and head, come on top.
        """
        held = [getattr(layer, part, None) for layer in self.layers for part in ("keys", "values")]
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def positions(self, layer: int) -> torch.Tensor:
        """True positions of the tokens that a layer holds, slot by slot.

        Args:
            layer: the model's own layer number.

        Returns:
            (B, H, held) int64; -1 for pads; (0, 0, 0) before the first step.

        Raises:
            KvenvError: if the layer is not one that evicts.
        """
        known = {i: one for i, one in enumerate(self.layers) if isinstance(one, EvictionLayer)}
        if layer not in known:
            raise KvenvError(
                f"layer {layer} does not evict: choose one of {', '.join(map(str, known))}"
            )
        return known[layer].positions

    def __repr__(self) -> str:
        evicting = [layer for layer in self.layers if isinstance(layer, EvictionLayer)]
        sizes = f"budget={self.budget}, sinks={self._limits.sinks}, recent={self._limits.recent}"
        return (
            f"EvictionCache({self._scorer!r}, {sizes}: {len(evicting)} of {len(self.layers)} "
            f"layers evict, {evicting[0].held} of {self.get_seq_length()} tokens held, "
            f"{self.nbytes:,} bytes)"
        )

    def reset(self, attention_mask: torch.Tensor | None = None) -> None:
        """Forget everything, to start on another batch.

        Args:
            attention_mask: the next batch's, as for the constructor.
        """
        super().reset()
        self._padding.restart(attention_mask)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, while nothing has been evicted.

        Args:
            tokens_to_remove: minus their number.

        Raises:
            KvenvError: if tokens have been evicted; the cache is then as before.
        """
        # Those that may refuse come first, so that a refusal leaves the others whole.
        layers: list[Any] = sorted(self.layers, key=lambda x: not isinstance(x, EvictionLayer))
        for layer in layers:
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows ``beam_idx`` (B,), for beam search."""
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self._padding.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._padding.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows ``indices``."""
        super().batch_select_indices(indices)
        self._padding.select(indices)


def _config(config: PretrainedConfig | PreTrainedModel) -> PretrainedConfig:
    settings = config.config if isinstance(config, torch.nn.Module) else config
    if not hasattr(settings, "get_text_config"):
        raise KvenvError(
            f"config is a {type(config).__name__}: give model.config or the model itself"
        )
    if getattr(settings, "is_encoder_decoder", False):
        raise KvenvError(
            f"{settings.model_type} is an encoder-decoder model: an EvictionCache serves "
            "decoder-only ones"
        )
    return settings


def _limits(budget: int, sinks: int, recent: int) -> Limits:
    limits = Limits(
        budget=_tokens("budget", budget, at_least=1, usual=256),
        sinks=_tokens("sinks", sinks, at_least=0, usual=4),
        recent=_tokens("recent", recent, at_least=1, usual=16),  # a token attends to itself
    )
    if limits.budget < limits.sinks + limits.recent:
        raise KvenvError(
            f"budget {limits.budget} cannot hold sinks {limits.sinks} + recent {limits.recent} = "
            f"{limits.sinks + limits.recent}: raise budget to that or lower sinks or recent"
        )
    return limits


def _tokens(what: str, given: int, *, at_least: int, usual: int) -> int:
    try:
        number = operator.index(given)
    except TypeError:
        number = None
    if number is None or number < at_least:
        raise KvenvError(
            f"{what} {given!r} is not a whole number of at least {at_least}: give tokens per head, "
            f"such as {usual}"
        )
    return number
