"""What a press sees of one layer at one compression, and what it can give to a scorer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvenv.errors import KvenvError
from kvenv.integrations.followed import Slots, Unknown, follow, refuse_unknown
from kvenv.integrations.kvpress.package import kvpress
from kvenv.scorers.attention import recent_attention
from kvenv.scorers.base import RECENT_QUERIES

SERVED = frozenset({"queries", "past_attention", "recent_attention", "query_mean", "query_cov"})
"""What of `kvenv.scorers.base.NEEDS` a press can give."""


@dataclass(frozen=True)
class Step:
    """One layer at one compression: the slots to be scored and what is known of them."""

    module: Any
    hidden_states: Tensor
    keys: Tensor
    values: Tensor
    attentions: Tensor | None
    kwargs: dict[str, Any]
    slots: Slots
    start: int = 0

    def own(self, of_all: Tensor) -> Tensor:
        """Of something of all the layer's slots (B, H, m), that of the slots to be scored."""
        return of_all.narrow(-1, self.start, self.keys.shape[2])

    @property
    def positions(self) -> Tensor:
        """(B, H, n) int64."""
        known = self.slots.positions
        return Unknown.like(self.keys) if known is None else self.own(known)

    @property
    def now(self) -> Tensor:
        """The position of each row's newest token, (B,) int64."""
        return torch.full((len(self.keys),), self.slots.seen - 1, device=self.keys.device)

    @property
    def age(self) -> Tensor:
        """How long ago each token came, in tokens, (B, H, n) int64."""
        return self.slots.seen - 1 - self.positions

    def needs(self, names: Iterable[str], most: int) -> dict[str, Tensor]:
        """What a scorer asks for beyond keys, values and positions."""
        served: dict[str, Tensor] = {}
        if "queries" in names:
            served["queries"] = self._queries(most)
        if "past_attention" in names:
            served["past_attention"] = self._past_attention()
        if "recent_attention" in names:
            queries = self._queries(RECENT_QUERIES)
            served["recent_attention"] = recent_attention(queries, self.keys, self.positions)
        if "query_mean" in names or "query_cov" in names:
            mean, covariance = self._query_statistics()
            served |= {"query_mean": mean, "query_cov": covariance}
        return {name: served[name] for name in names}

    def _first(self, what: str) -> None:
        n = self.slots.marks.shape[-1]
        if not self.hidden_states.shape[1] == self.keys.shape[2] == n == self.slots.seen:
            raise KvenvError(
                f"{what} can be had at a context's first compression only, with all its tokens at "
                "once: use a scorer of keys, values, positions and queries"
            )

    def _past_attention(self) -> Tensor:
        if self.attentions is None:
            raise KvenvError(
                "past_attention needs attention weights: load the model with "
                "attn_implementation='eager'"
            )
        self._first("past_attention")
        groups = self.attentions.float().sum(2).unflatten(1, (self.keys.shape[1], -1))
        return groups.sum(2)

    def _query_statistics(self) -> tuple[Tensor, Tensor]:
        self._first("the statistics of queries (query_mean, query_cov)")
        press = kvpress.ExpectedAttentionPress()
        mean, covariance = press.get_query_statistics(self.module, self.hidden_states)
        return mean.float() * self._scale, covariance.float() * self._scale**2

    @property
    def _scale(self) -> float:
        """From the model's queries to those whose logits are q . k / sqrt(d)."""
        d = self.keys.shape[-1]
        return getattr(self.module, "scaling", d**-0.5) * d**0.5

    def _queries(self, most: int) -> Tensor:
        """The last queries (B, Hq, Q, d), after RoPE."""
        if self.slots.positions is None:
            refuse_unknown()
        apply = getattr(sys.modules[type(self.module).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            raise KvenvError(
                f"queries of {type(self.module).__name__} cannot be had: kvenv knows no rotary "
                "embedding of its; use a scorer of keys, values and positions"
            )
        hidden = self.hidden_states[:, -most:]
        plain = kvpress.utils.get_prerope_query_states(self.module, hidden)
        after = self.slots.marks.shape[-1] - self.start - self.keys.shape[2]
        cos, sin = self._turns(hidden, after)
        return apply(plain, plain, cos, sin)[0] * self._scale

    def _turns(self, hidden: Tensor, after: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for hidden states (B, Q, ...) that ``after`` more tokens follow."""
        count = hidden.shape[1]
        cos, sin = self.kwargs["position_embeddings"]
        first = cos.shape[1] - after - count
        if first >= 0:
            return cos[:, first : first + count], sin[:, first : first + count]
        # A DecodingPress kept hidden states of earlier steps, whose turns are gone.
        last = self.kwargs["position_ids"][:, -1:]
        ids = last - torch.arange(after + count - 1, after - 1, -1, device=last.device)
        kind: dict[str, Any] = {}
        if "layer_type" in inspect.signature(self.module.rotary_emb.forward).parameters:
            kind["layer_type"] = self.module.config.layer_types[self.module.layer_idx]
        return self.module.rotary_emb(hidden, ids, **kind)


def look(layer: Any, module: Any, keys: Tensor, kwargs: dict[str, Any]) -> Slots:
    """What the slots of a cache layer with these keys (B, H, n, d) hold, remembered there."""
    q, ids = kwargs["hidden_states"].shape[1], kwargs.get("position_ids")
    prefilling = kvpress.presses.base_press.is_prefilling(kwargs["cache_position"], q)
    fresh = prefilling and keys.shape[2] == q
    if fresh and _padded(kwargs.get("attention_mask")):
        raise KvenvError(
            "the batch is padded, and a press takes pads for tokens: compress rows of one length, "
            "or use kvenv's EvictionCache with attention_mask="
        )
    told = None if ids is None else int(ids.max()) + 1
    return follow(layer, keys, fresh=fresh, told=told, masked=masked_slots(module, keys))


def _padded(mask: Any) -> bool:
    """Whether the last token of a prompt is kept from attending to any other."""
    if not isinstance(mask, Tensor):
        return False
    if mask.ndim != 4:
        return bool((mask == 0).any())
    last = mask[:, 0, -1]
    return bool((~last if last.dtype == torch.bool else last < 0).any())


def masked_slots(module: Any, keys: Tensor) -> Tensor | None:
    """The slots (B, H, n) whose keys AdaKVPress or its like replaced by unattended ones."""
    where = getattr(module, "masked_key_indices", None)
    if where is None or not len(where[0]):
        return None
    masked = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
    masked[tuple(index.to(keys.device) for index in where)] = True
    return masked
