"""`EvictionCache`: a transformers cache that keeps the best `budget` tokens of every head."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kvenv.cache import attention
from kvenv.cache.backends import Choice
from kvenv.cache.layer import EvictionLayer
from kvenv.cache.needs import Needs
from kvenv.cache.padding import LeftPadding
from kvenv.cache.policy import Allocation, Policy
from kvenv.cache.pool import Pool
from kvenv.cache.scoring import CacheScorer
from kvenv.errors import KvenvError
from kvenv.identity import full_attention_layers
from kvenv.rules import Budget
from kvenv.scorers.base import Scorer
from kvenv.scorers.calibration import Calibration

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class EvictionCache(Cache):
    """Holds at most ``budget`` tokens per head, whatever the length of the context.

    ``model.generate(**inputs, past_key_values=cache)`` works unmodified: greedy, sampled, with
    beams, in batches, and again with a longer text and the same cache; `kvenv.cache.generate`
    runs its steps as a CUDA graph.

    A prompt is attended to in full, or in blocks of budget + ``block`` tokens. One that is longer
    than the budget is cut at its end to the best budget - R tokens of each head. Then tokens are
    appended. When a head's slots are full, all that it holds is scored as it looks from now, and
    the best budget - R stay. So no step but one in R evicts anything, and no head ever holds more
    than the budget between steps.

    Full-attention layers evict; sliding-window, linear and hybrid layers stay the library's own.
    Evicted tokens do not come back: `crop`, and with it assisted decoding, works only while
    nothing has been evicted.

    The cache sets the config's attention implementation to ``kvenv|`` and what it was before,
    which treats any other cache as before.

    Args:
        config: ``model.config``, or the model itself, which lets a trained scorer compare
            weights and not only the configuration.
        scorer: ranks the tokens held. One that asks for queries gets the last 64, one that asks
            for past or recent attention that of the tokens held.
        budget: tokens per head, the current one included, on average where heads compete: an int,
            or a share in (0, 1] of the first prompt. At a budget of at least the whole sequence,
            tokens are those of the default cache.
        sinks: the first tokens of a row, always kept.
        recent: the last tokens, the newest included, always kept. What they will be worth shows
            only once later tokens have asked, and the next few do attend mostly to them; 16 is
            that neighbourhood at a small price in budget.
        refresh: R, the tokens between two selections; None takes budget / 16, within 8 and 128.
        allocation: "uniform" gives every head the budget. "adaptive" has the tokens of all heads
            compete for budget x heads by the attention that they are expected to get, each head
            keeping at least a fifth of the budget; "layerwise" those of each layer.
        threshold: keeps no token that is expected to get less attention than this (what one
            future query gives it, summed over the group), whatever the budget.
        calibration: from scores to expected attention; None takes the scorer's own.
        backend: "triton" (kernels; an NVIDIA GPU), "torch" (anywhere) or "auto": triton where it
            runs.
        block: read prompts in blocks of so many tokens, so that a layer never holds more than
            its budget and a block; None reads them at once. Where all heads compete the whole
            model reads in blocks, which `kvenv.cache.generate` does by itself.
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
        budget: Budget,
        sinks: int = 4,
        recent: int = 16,
        refresh: int | None = None,
        allocation: Allocation = "uniform",
        threshold: float | None = None,
        calibration: Calibration | None = None,
        backend: Choice = "auto",
        block: int | None = None,
        fallback: Scorer | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        settings = _config(config)
        layers = DynamicCache(config=settings).layers
        text = settings.get_text_config(decoder=True)
        heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        # Layers that read another's keys have no cache of their own.
        evicting = [i for i in full_attention_layers(settings) if i < len(layers)]
        if not evicting:
            raise KvenvError(
                f"model type {settings.model_type} has no full-attention layer, so there is "
                "nothing to evict: generate without an EvictionCache"
            )
        for one in (scorer, fallback):
            if (check_model := getattr(one, "check_model", None)) is not None:
                check_model(config)
        self._padding = LeftPadding(attention_mask)
        if calibration is None:
            calibration = getattr(scorer, "calibration", None)
        policy = Policy(
            *(budget, sinks, recent, refresh, allocation, threshold, calibration),
            *(CacheScorer(scorer, fallback, dict.fromkeys(evicting, heads)), self._padding),
            *(backend, block),
            shared=bool(getattr(text, "num_kv_shared_layers", None)),
            interface=_uses_interface(config, text),
            ordered=_ordered(text),
        )
        if policy.competes and calibration is not None:
            for i in evicting:
                calibration.rows(i, heads)
        asked = policy.scorer.needs or policy.competes or block is not None
        if not policy.interface and asked:
            raise KvenvError(
                f"the attention of model type {text.model_type} passes by transformers' attention "
                "interface: use a scorer without needs, allocation='uniform' and no block"
            )
        self._policy, self._pools = policy, list[Pool]()
        model = config if isinstance(config, PreTrainedModel) else None
        if allocation == "adaptive":
            self._check_one_device(config)
            self._pools = [Pool(policy, evicting[-1], {})]
        for i in evicting:
            if allocation != "adaptive":
                self._pools.append(Pool(policy, i, {}))
            if policy.scorer.needs:
                self._pools[-1].needs[i] = Needs(policy.scorer.needs, model)
            layers[i] = EvictionLayer(i, self._pools[-1])
        if policy.interface:
            attention.serve(text)
        super().__init__(layers=layers)

    @staticmethod
    def _check_one_device(config: PretrainedConfig | PreTrainedModel) -> None:
        devices = set((getattr(config, "hf_device_map", None) or {}).values())
        if len(devices) > 1:
            raise KvenvError(
                f"allocation='adaptive' and a model on {len(devices)} devices: heads compete on "
                "one; use allocation='layerwise'"
            )

    @property
    def policy(self) -> Policy:
        """What was asked for."""
        return self._policy

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The slots, one pool for the heads that are decided on together."""
        return tuple(self._pools)

    @property
    def budget(self) -> int:
        """Most tokens that a head holds between steps, on average over heads that compete.

        0 while it is a share of a prompt that is yet to come.
        """
        return self._policy.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' keys and values, free slots included.

        Positions, 4 bytes per slot, come on top.
        """
        for pool in self._pools:
            pool.settle()
        own = sum(pool.slots.nbytes for pool in self._pools if pool.slots is not None)
        others = [one for one in self.layers if not isinstance(one, EvictionLayer)]
        held = [getattr(one, part, None) for one in others for part in ("keys", "values")]
        return own + sum(t.numel() * t.element_size() for t in held if t is not None)

    def positions(self, layer: int) -> torch.Tensor:
        """True positions of the tokens that a layer holds, in order.

        Args:
            layer: the model's own layer number.

        Returns:
            (B, H, held) int64; -1 where a head holds fewer than others; (0, 0, 0) before the
            first step.

        Raises:
            KvenvError: if the layer is not one that evicts.
        """
        known = dict(self._evicting())
        if layer not in known:
            raise KvenvError(
                f"layer {layer} does not evict: choose one of {', '.join(map(str, known))}"
            )
        return known[layer].positions

    def __repr__(self) -> str:
        evicting = [layer for _, layer in self._evicting()]
        policy = self._policy
        sizes = f"budget={policy.budget}, sinks={policy.sinks}, recent={policy.recent}"
        return (
            f"EvictionCache({policy.scorer!r}, {sizes}: {len(evicting)} of {len(self.layers)} "
            f"layers evict, {evicting[0].held} of {evicting[0].get_seq_length()} tokens held, "
            f"{self.nbytes:,} bytes)"
        )

    def _evicting(self) -> Iterator[tuple[int, EvictionLayer]]:
        for i, layer in enumerate(self.layers):
            if isinstance(layer, EvictionLayer):
                yield i, layer

    def reset(self, attention_mask: torch.Tensor | None = None) -> None:
        """Forget everything, to start on another batch.

        Args:
            attention_mask: the next batch's, as for the constructor.
        """
        super().reset()
        self._padding.restart(attention_mask)
        self._policy.restart()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, while nothing has been evicted.

        Args:
            tokens_to_remove: minus their number.

        Raises:
            KvenvError: if tokens have been evicted; the cache is then as before.
        """
        # Those that may refuse come first: a refusal leaves the others whole.
        evicting = dict(self._evicting())
        others: list[Any] = [one for i, one in enumerate(self.layers) if i not in evicting]
        for layer in [*evicting.values(), *others]:
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


ORDERED = {
    "bloom": "attention in bloom adds ALiBi, which goes by the order of the slots",
    "mpt": "attention in mpt adds ALiBi, which goes by the order of the slots",
    "gpt_neo": "local layers of gpt_neo see a window of the slots",
}
"""Model types whose attention depends on where tokens lie, and why."""


def _ordered(text: PretrainedConfig) -> str | None:
    if text.model_type == "falcon" and getattr(text, "alibi", False):
        return "attention in falcon adds ALiBi, which goes by the order of the slots"
    if text.model_type == "gpt_neo" and "local" not in getattr(text, "attention_layers", ["local"]):
        return None
    return ORDERED.get(text.model_type)


def _uses_interface(config: PretrainedConfig | PreTrainedModel, text: PretrainedConfig) -> bool:
    """Whether a model's attention passes through transformers' attention interface."""
    if isinstance(config, torch.nn.Module):
        module = sys.modules[type(config).__module__]
    else:
        name = type(text).__module__.replace(".configuration_", ".modeling_")
        try:
            module = importlib.import_module(name)
        except ImportError:  # a model's own code: taken to be like the library's
            return True
    return hasattr(module, "ALL_ATTENTION_FUNCTIONS")
