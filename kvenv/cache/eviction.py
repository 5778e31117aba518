"""`EvictionCache`: a transformers cache that keeps the best `budget` tokens of every head."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kvenv.cache import attention
from kvenv.cache.allocation import Mode, allocate
from kvenv.cache.backends import CHOICES, Choice, has_triton
from kvenv.cache.needs import Needs
from kvenv.cache.padding import LeftPadding
from kvenv.cache.plan import Plan
from kvenv.cache.scoring import CacheScorer
from kvenv.cache.slots import EvictionLayer
from kvenv.cache.static import SlotLayer
from kvenv.cache.worth import Limits
from kvenv.errors import KvenvError
from kvenv.identity import full_attention_layers
from kvenv.scorers.base import Scorer
from kvenv.scorers.bundle import NetworkScorer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class EvictionCache(Cache):
    """Holds at most ``budget`` tokens per head, whatever the length of the context.

    ``model.generate(**inputs, past_key_values=cache)`` works unmodified: greedy, sampled, with
    beams, in batches, and again with a longer text and the same cache; `kvenv.cache.generate`
    runs its steps as a CUDA graph. Memory is bounded from the prompt's end on; the prompt itself
    is attended to in full, or in blocks of budget + ``block`` tokens.

    Full-attention layers evict; sliding-window, linear and hybrid layers stay the library's own.
    Evicted tokens do not come back: `crop`, and with it assisted decoding, works only while
    nothing has been evicted.

    On an NVIDIA GPU, and wherever heads differ in length, prompts come in blocks or scorers ask
    for queries, the slots are static: allocated once, written in place and read by kernels of
    kvenv (`kvenv.cache.static`). The cache then sets the config's attention implementation to
    ``kvenv|`` and what it was before, which treats any other cache as before. Elsewhere
    (`kvenv.cache.slots`) any attention implementation will do.

    Args:
        config: ``model.config``, or the model itself, which lets a trained scorer compare
            weights and not only the configuration.
        scorer: scores tokens from keys, values and positions. Fixed (pointwise) scores are
            computed once, as a token arrives; others anew over the slots at every step. One that
            asks for queries gets the last 64, one that asks for past attention that of the
            tokens held.
        budget: tokens per head, the current one included; on average, where heads differ. At a
            budget of at least the whole sequence, tokens are those of the default cache.
        sinks: the first tokens of a row, always kept.
        recent: the last tokens, the newest included, always kept. What they will be worth shows
            only once later tokens have asked, and the next few do attend mostly to them; 16 is
            that neighbourhood at a small price in budget.
        allocation: "uniform" gives every head the budget. "heads" divides budget x KV heads among
            the heads of each layer, and "global" budget x all heads among all, by what each gains
            of it (the scorer's retention curves; see `kvenv.cache.allocation`).
        context: tokens of text that an allocation plans for; None takes the prompts that the
            curves were measured on, or four budgets if that is more.
        backend: "triton" (kernels; an NVIDIA GPU), "torch" (anywhere) or "auto": triton where it
            runs.
        block: read prompts in blocks of so many tokens, so that a layer never holds more than
            its budget and a block; None reads them at once.
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
        allocation: Mode = "uniform",
        context: int | None = None,
        backend: Choice = "auto",
        block: int | None = None,
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
        if backend not in CHOICES:
            raise KvenvError(f"backend {backend!r}: choose one of {', '.join(CHOICES)}")
        self._limits = limits
        self._scorer = CacheScorer(scorer, fallback, dict.fromkeys(evicting, heads))
        self._padding = LeftPadding(attention_mask)
        capacities = _capacities(
            allocation, dict.fromkeys(evicting, heads), limits, scorer, context
        )
        shared = bool(getattr(text, "num_kv_shared_layers", None))  # keys read by several layers
        auto = backend == "auto" and not shared and _on_gpu(config) and has_triton()
        asked = backend == "triton" or allocation != "uniform" or block is not None
        if auto or asked or self._scorer.needs:
            if shared:
                raise KvenvError(
                    f"layers of model type {text.model_type} share keys, which static slots do "
                    "not serve: use backend='torch' and neither block, allocation nor a scorer "
                    "that needs queries"
                )
            size = None if block is None else _tokens("block", block, at_least=1, usual=512)
            spread = len(set((getattr(config, "hf_device_map", None) or {}).values())) > 1
            plan = Plan(capacities, limits, self._scorer, self._padding, backend, size, spread)
            model = config if isinstance(config, PreTrainedModel) else None
            for i in evicting:
                needs = Needs(self._scorer.needs, model) if self._scorer.needs else None
                layers[i] = SlotLayer(i, plan, needs)
            attention.serve(text)
        else:
            for i in evicting:
                layers[i] = EvictionLayer(i, limits, self._scorer, self._padding)
        self._capacities = capacities
        super().__init__(layers=layers)

    @property
    def budget(self) -> int:
        """Most tokens that a head holds between steps, on average over heads."""
        return self._limits.budget

    @property
    def capacities(self) -> dict[int, tuple[int, ...]]:
        """Most tokens that each KV head holds, by the model's own layer number."""
        return dict(self._capacities)

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
            (B, H, held) int64; -1 for pads and where a head holds fewer than others; (0, 0, 0)
            before the first step.

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
        sizes = f"budget={self.budget}, sinks={self._limits.sinks}, recent={self._limits.recent}"
        return (
            f"EvictionCache({self._scorer!r}, {sizes}: {len(evicting)} of {len(self.layers)} "
            f"layers evict, {evicting[0].held} of {self.get_seq_length()} tokens held, "
            f"{self.nbytes:,} bytes)"
        )

    def _evicting(self) -> Iterator[tuple[int, EvictionLayer | SlotLayer]]:
        for i, layer in enumerate(self.layers):
            if isinstance(layer, (EvictionLayer, SlotLayer)):
                yield i, layer

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


def _on_gpu(config: PretrainedConfig | PreTrainedModel) -> bool:
    if isinstance(config, torch.nn.Module):
        return next(config.parameters()).device.type == "cuda"
    return torch.cuda.is_available()


def _capacities(
    allocation: Mode,
    heads: Mapping[int, int],
    limits: Limits,
    scorer: Scorer,
    context: int | None,
) -> dict[int, tuple[int, ...]]:
    if allocation == "uniform":
        return {layer: (limits.budget,) * count for layer, count in heads.items()}
    curves = scorer.curves if isinstance(scorer, NetworkScorer) else None
    if context is None:
        context = max(4 * limits.budget, 0 if curves is None else round(curves.tokens))
    floor = limits.sinks + limits.recent + 1
    return allocate(allocation, heads, limits.budget, floor, curves, context)


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
