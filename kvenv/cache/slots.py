"""One layer of the cache: a fixed number of slots per head, written in place once they are full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from kvenv.cache.padding import LeftPadding
from kvenv.cache.scoring import CacheScorer
from kvenv.cache.worth import Limits, worth
from kvenv.errors import KvenvError
from kvenv.utility import ranking


class EvictionLayer(DynamicLayer):
    """Keys and values of one full-attention layer, at most ``budget`` tokens per head.

    A step of several tokens attends to everything held and to itself; then each row and head
    keeps the ``budget`` tokens with the highest scores, in order of position. A step of one token
    takes, once all slots are full, the slot of the lowest score *before* attending, so attention
    is always over exactly the tokens held. Sinks and the last ``recent`` tokens, the newcomer
    among them, stay; of equal scores the later token goes. Pads go before any token, the last
    one first: they stay in front, where the model's own padding mask expects them.

    Args:
        layer: the model's own layer number.
        limits: budget, sinks and recent.
        scorer: scores for this layer.
        padding: the batch's left padding, shared with the other layers.
    """

    is_croppable = False  # what was evicted cannot come back, and a cache may evict at any step

    def __init__(
        self, layer: int, limits: Limits, scorer: CacheScorer, padding: LeftPadding
    ) -> None:
        super().__init__()
        self._layer, self._limits = layer, limits
        self._scorer, self._padding = scorer, padding
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self._positions = torch.empty(0, 0, 0, dtype=torch.int64)  # (B, H, held); pads negative
        self._scores = torch.empty(0, 0, 0)  # (B, H, held) if they are fixed, else (B, H, 0)
        self._seen = 0

    def __repr__(self) -> str:
        return f"EvictionLayer(layer={self._layer}, seen={self._seen}, held={self.held})"

    @property
    def held(self) -> int:
        """Tokens held now, per row and head."""
        return self._positions.shape[-1]

    @property
    def positions(self) -> torch.Tensor:
        """True positions of the tokens held, (B, H, held) int64; -1 for pads."""
        return self._positions.clamp(min=-1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take shape, type and device from the first keys and values (B, H, n, d)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads = key_states.shape[:2]
        self.keys = key_states.new_empty(rows, heads, 0, key_states.shape[-1])
        self.values = value_states.new_empty(rows, heads, 0, value_states.shape[-1])
        self._positions = torch.empty(rows, heads, 0, dtype=torch.int64, device=self.device)
        self._scores = torch.empty(rows, heads, 0, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add this step's tokens and give the keys and values that it attends to.

        Args:
            key_states: (B, H, q, d), after RoPE.
            value_states: (B, H, q, d).
            *args: what the library passes beside them; not used.
            **kwargs: likewise.

        Returns:
            Keys and values (B, H, m, d). A step of one token that finds the slots full gets the
            buffers themselves (m = budget), written in one slot per head; any other step all that
            was held followed by its own tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, heads, q, _ = key_states.shape
        offset = self._padding.offset(rows, q, key_states.device)
        index = torch.arange(self._seen, self._seen + q, device=key_states.device)
        positions = (index - offset).expand(rows, heads, q)
        newest = self._seen + q - 1 - offset
        if q == 1 and self.held == self._limits.budget:
            step = self._overwrite(key_states, value_states, positions, newest)
        else:
            step = self._append(key_states, value_states, positions, newest)
        self._seen += q
        return step

    def _append(
        self,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        new_positions: torch.Tensor,
        newest: torch.Tensor | int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        budget, q = self._limits.budget, new_positions.shape[-1]
        keys, values, positions, scores = new_keys, new_values, new_positions, self._scores
        if self._scorer.pointwise:
            arrived = self._scorer.score(self._layer, new_keys, new_values, new_positions, None)
            if q > 1:
                self._scorer.check(self._layer, arrived, new_positions)
            scores = torch.cat([self._scores, arrived], dim=-1)
        if self.held or q <= budget:  # else a long prompt: spare it the copy
            keys, values, positions = self._with(new_keys, new_values, new_positions)
        if positions.shape[-1] <= budget:
            self.keys, self.values = keys, values
            self._positions, self._scores = positions, scores
            return keys, values
        if not self._scorer.pointwise:
            scores = self._score_all(keys, values, positions, self._seen + q)
            self._scorer.check(self._layer, scores, positions)
        by_position = positions.argsort(dim=-1)
        ordered = self._worth(scores, positions, newest).gather(-1, by_position)
        kept = by_position.gather(-1, ranking(ordered)[..., :budget].sort(dim=-1).values)
        self.keys, self.values = _gather(keys, kept), _gather(values, kept)
        self._positions = positions.gather(-1, kept)
        if self._scorer.pointwise:
            self._scores = scores.gather(-1, kept)
        return keys, values

    def _overwrite(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        position: torch.Tensor,
        newest: torch.Tensor | int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._positions.is_inference() and not torch.is_inference_mode_enabled():
            self._each(torch.clone)  # torch allows no writing to such tensors out here
        own_keys, own_values = self._own()
        if self._scorer.pointwise:
            scores = self._scores
        else:
            everything = self._with(key, value, position)
            scores = self._score_all(*everything, self._seen + 1)[..., :-1]
        held = self._worth(scores, self._positions, newest)
        lowest = held.amin(dim=-1, keepdim=True)
        before_all = torch.iinfo(torch.int64).min
        slot = self._positions.masked_fill(held > lowest, before_all).argmax(-1, keepdim=True)
        own_keys.scatter_(2, _over(slot, key), key)
        own_values.scatter_(2, _over(slot, value), value)
        self._positions.scatter_(-1, slot, position)
        if self._scorer.pointwise:
            score = self._scorer.score(self._layer, key, value, position, None)
            self._scores.scatter_(-1, slot, score)
        return own_keys, own_values

    def _worth(
        self, scores: torch.Tensor, positions: torch.Tensor, newest: torch.Tensor | int
    ) -> torch.Tensor:
        age = self._scorer.age(self._layer, newest - positions)
        return worth(scores, age, positions, newest, self._limits)

    def _score_all(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, seen: int
    ) -> torch.Tensor:
        pads = self._padding.leading(seen, positions.shape[-1])
        return self._scorer.score(self._layer, keys, values, positions, pads)

    def _own(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None or self.values is None:
            raise KvenvError("the cache layer is empty: run the model with it first")
        return self.keys, self.values

    def _with(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own_keys, own_values = self._own()
        return (
            torch.cat([own_keys, keys], dim=-2),
            torch.cat([own_values, values], dim=-2),
            torch.cat([self._positions, positions], dim=-1),
        )

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the keys that a step of ``query_length`` tokens attends to.

        They stand for the last ``length`` positions, so that the causal mask and the model's 2D
        padding mask fall on the right slots. Older transformers give the step's positions
        instead of their number.
        """
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        full = q == 1 and self.held == self._limits.budget
        length = self.held + (0 if full else q)
        return length, self._seen + q - length

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: the index of the next one."""
        return self._seen

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, as a plain cache would.

        Args:
            tokens_to_remove: minus the number of tokens to drop, or (as older transformers have
                it) the length to keep.

        Raises:
            KvenvError: if tokens have been evicted: those that made room cannot come back.
        """
        drop = -tokens_to_remove if tokens_to_remove <= 0 else self._seen - tokens_to_remove
        if drop <= 0 or not self.is_initialized:
            return
        if self._seen > self.held:
            raise KvenvError(
                f"cannot drop {drop} tokens: {self._seen - self.held} of {self._seen} are evicted "
                "and cannot come back; use a budget that holds the whole sequence (assisted "
                "decoding needs it) or start from a copy.deepcopy of an earlier cache"
            )
        own_keys, own_values = self._own()
        self._seen = left = max(0, self._seen - drop)
        self.keys, self.values = own_keys[:, :, :left], own_values[:, :, :left]
        self._positions, self._scores = self._positions[..., :left], self._scores[..., :left]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows ``beam_idx`` (B,), for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows ``indices``."""
        self._each(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            own_keys, own_values = self._own()
            self.keys, self.values = change(own_keys), change(own_values)
            self._positions, self._scores = change(self._positions), change(self._scores)


def _over(slots: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Slot numbers (B, H, m) spread over the head dimension of ``like``, (B, H, m, d)."""
    return slots.unsqueeze(-1).expand(-1, -1, -1, like.shape[-1])


def _gather(states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return states.gather(2, _over(slots, states))
