"""One layer of a static cache: slots, for each head as many as it may have, and its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvenv.cache import attention, masks
from kvenv.cache.judge import Judge
from kvenv.cache.needs import Needs
from kvenv.cache.plan import Plan
from kvenv.cache.storage import Slots
from kvenv.errors import KvenvError


class SlotLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer in `Slots`.

    A step of one token takes an empty slot or that of the lowest worth and then attends to the
    slots in use, by `kvenv.cache.attention`: no shape depends on what was read, and nothing waits
    for the device (but for scorers that are not pointwise). A step of several tokens attends to
    all that is held and to itself, in blocks if so asked; then the best of each head stay.

    Which tokens stay is the rule of `kvenv.cache.slots.EvictionLayer`, with each head's capacity
    for the budget. Pads are never held.

    Args:
        layer: the model's own layer number.
        plan: what the layers share.
        needs: serves scorers that ask for more than keys, values and positions.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False  # generate() would compile by itself, at minutes per shape
    slots: Slots

    def __init__(self, layer: int, plan: Plan, needs: Needs | None) -> None:
        super().__init__()
        self.layer, self._plan = layer, plan
        self._judge = Judge(layer, plan.scorer, plan.limits, needs)
        self._started = False  # something was read since the start or the last reset
        self._blank = True  # nothing is held
        self._past_pads = False  # no row's next token can be a pad
        self._awaiting = False  # a step's attention has not come by yet

    def __repr__(self) -> str:
        return f"SlotLayer(layer={self.layer}, seen={self.get_seq_length()}, held={self.held})"

    @property
    def static(self) -> bool:
        """Whether a step of one token does the same on the device whatever was read before."""
        return self._past_pads and self._plan.scorer.pointwise

    @property
    def held(self) -> int:
        """Tokens that the fullest head holds now."""
        return int(self.slots.lengths.max()) if self._started else 0

    @property
    def positions(self) -> torch.Tensor:
        """True positions of the tokens held, (B, H, slots) int64; -1 where there is none."""
        if not self._started:
            return torch.empty(0, 0, 0, dtype=torch.int64)
        slots = self.slots
        return slots.dense(slots.positions).masked_fill(~slots.used(), -1).long()

    def reset(self) -> None:
        """Forget everything; the slots stay allocated for the next batch of as many rows."""
        self._started = self._awaiting = False
        self._judge.reset()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the slots, or clear those there are, for the first keys and values (B, H, q, d)."""
        rows, heads, q, _ = key_states.shape
        capacities = self._plan.capacities[self.layer]
        if heads != len(capacities):
            raise KvenvError(
                f"layer {self.layer} has {heads} KV heads here and {len(capacities)} in the "
                "configuration: make the cache with this model's own, or with backend='torch' for "
                "a model that holds something else than the keys of its heads"
            )
        self._backend = self._plan.begin(key_states, value_states)
        pads = self._plan.padding.offset(rows, q, key_states.device)
        if not (self.is_initialized and self.slots.suits(key_states, value_states)):
            self._hold(Slots(capacities, key_states, value_states))
            self._judge.prepare(self._backend, key_states)
        self.slots.clear()
        self._past_pads = not isinstance(pads, torch.Tensor)
        self.slots.clock -= pads.view(rows, 1) if isinstance(pads, torch.Tensor) else pads
        self._pads = -self.slots.clock[:, 0]
        self._started, self._blank = True, True

    def _hold(self, slots: Slots) -> None:
        self.slots, self.keys, self.values = slots, slots.keys, slots.values
        self.dtype, self.device = slots.keys.dtype, slots.keys.device
        setattr(slots.keys, attention.LAYER, attention.Origin(self))
        self.is_initialized = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.is_initialized:
            self._hold(self.slots)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take this step's keys and values, for `kvenv.cache.attention` to go on with.

        Args:
            key_states: (B, H, q, d), after RoPE.
            value_states: (B, H, q, d).
            *args: what the library passes beside them; not used.
            **kwargs: likewise.

        Returns:
            A step of one token gets the slots themselves, (B, T, d), its own token among them;
            any other step its own keys and values back.

        Raises:
            KvenvError: if the last step's attention was not this cache's.
        """
        if self._awaiting:
            raise KvenvError(
                f"the attention of layer {self.layer} did not come to the cache: the model must "
                f"run with the attention implementation {attention.PREFIX}* that EvictionCache set "
                "in its config; do not set another one while the cache is in use, reset() it after "
                "a step that failed, and use backend='torch' for models that bypass the interface"
            )
        if not self._started:
            self.lazy_initialization(key_states, value_states)
        rows = self.slots.lengths.shape[0]
        if key_states.shape[0] != rows:
            raise KvenvError(
                f"the cache holds {rows} rows and this step has {key_states.shape[0]}: make a new "
                "EvictionCache for another batch"
            )
        self._awaiting = True
        if key_states.shape[2] == 1 and self._past_pads:
            self._insert(key_states[:, :, 0], value_states[:, :, 0])
            return self.slots.keys, self.slots.values
        setattr(key_states, attention.LAYER, attention.Origin(self))
        return key_states, value_states

    def _arrive(self) -> None:
        """Note that the attention of this step has come, as it must once."""
        if not self._awaiting:
            raise KvenvError(
                f"the keys of layer {self.layer} are attended to more than once in a step, which "
                "static slots do not serve: use backend='torch' and neither block, allocation nor "
                "a scorer that needs queries"
            )
        self._awaiting = False

    def attend(self, query: torch.Tensor, scale: float) -> torch.Tensor:
        """One query token's attention to the slots in use.

        Args:
            query: (B, Hq, d).
            scale: factor on the logits.

        Returns:
            (B, Hq, d).
        """
        self._arrive()
        slots = self.slots
        self._judge.follow(query, slots, scale)
        return self._backend.attend(
            query, slots.keys, slots.values, slots.offsets, slots.lengths, scale, slots.largest
        )

    def attend_by(self, query: torch.Tensor, scale: float, attend: masks.Attend) -> torch.Tensor:
        """As `attend`, for attention that no backend knows: (B, Hq, 1, d) to (B, 1, Hq, d)."""
        self._arrive()
        slots = self.slots
        self._judge.follow(query[:, :, 0], slots, scale)
        visible = slots.used().unsqueeze(2)
        dense = slots.dense(slots.keys), slots.dense(slots.values)
        return attend(query, *dense, masks.additive(visible, query))

    def read(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        module: torch.nn.Module,
        own: Callable[[], torch.Tensor],
        attend: masks.Attend,
    ) -> torch.Tensor:
        """The attention of a step's tokens to all that is held and to themselves; the best stay.

        Args:
            query: (B, Hq, q, d).
            keys: (B, H, q, d), the step's own.
            values: (B, H, q, d).
            scale: factor on the logits.
            module: the model's attention module.
            own: the library's attention among the step's own tokens.
            attend: the library's attention to any keys under a mask.

        Returns:
            (B, q, Hq, d).
        """
        self._arrive()
        q = keys.shape[2]
        block = self._plan.block or q
        self._judge.measure(module, query, self.slots, scale)
        if self._blank and q <= block:
            output = own()
            self._admit(query, keys, values, scale)
            return output
        outputs: list[torch.Tensor] = []
        for start in range(0, q, block):
            part = (slice(None), slice(None), slice(start, start + block))
            step = query[part], keys[part], values[part]
            outputs.append(attend(query[part], *masks.joined(*step, self.slots)))
            self._admit(*step, scale)
        return torch.cat(outputs, 1)

    @torch.no_grad()
    def _insert(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store every row's next token, (B, H, d), in an empty slot or that of the lowest worth."""
        slots, limits = self.slots, self._plan.limits
        self._backend.insert(
            *(key, value, slots.keys, slots.values, slots.positions, slots.scores),
            *(slots.offsets, slots.lengths, slots.clock),
            sinks=limits.sinks,
            recent=limits.recent,
            largest=slots.largest,
            **self._judge.newcomer(key, value, slots),
        )
        self._blank = False

    @torch.no_grad()
    def _admit(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> None:
        """Of what is held and a step's own tokens (B, H, q, d), keep each head's best."""
        slots, q = self.slots, keys.shape[2]
        positions = slots.clock.unsqueeze(-1) + torch.arange(
            q, dtype=torch.int32, device=self.device
        )
        scores, worth, held = self._judge.several(query, keys, values, positions, slots, scale)
        self._backend.admit(
            *(keys, values, positions, scores, worth),
            *(slots.keys, slots.values, slots.positions, slots.scores, held),
            *(slots.offsets, slots.lengths, slots.largest),
        )
        slots.clock += q
        self._blank = False
        self._past_pads = self._past_pads or bool((slots.clock >= 0).all())

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the keys that the library's mask for this step should cover.

        They are the step's own tokens: what is held needs no mask, or gets one here. A step of
        one token needs none at all.
        """
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        return q, 0 if q == 1 and self._past_pads else int(self.get_seq_length())

    def get_seq_length(self) -> int:
        """Tokens read, kept or not: the index of the next one; on the device while compiling."""
        if not self._started:
            return 0
        seen: Any = self.slots.clock[0, 0] + self._pads[0]
        return seen if _recording(seen.device) else int(seen)

    def get_max_length(self) -> int:
        """-1: a text of any length can be read."""
        return -1

    def get_max_cache_shape(self) -> int:
        """As `get_max_length`, by the name that older transformers ask for."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, while none was evicted.

        Args:
            tokens_to_remove: minus the number of tokens to drop, or (as older transformers have
                it) the length to keep.

        Raises:
            KvenvError: if tokens have been evicted: those that made room cannot come back; or if
                scores already follow what the dropped tokens attended to.
        """
        seen = self.get_seq_length()
        drop = -tokens_to_remove if tokens_to_remove <= 0 else seen - tokens_to_remove
        if drop <= 0 or not self._started:
            return
        lengths, clock = self.slots.lengths, self.slots.clock
        evicted = int((clock.clamp(min=0) - lengths).max())
        if evicted > 0 or self._judge.remembers:
            why = f"{evicted} of {seen} are evicted and" if evicted > 0 else "what they asked for"
            raise KvenvError(
                f"cannot drop {drop} tokens: {why} cannot come back; use a budget that holds the "
                "whole sequence and a scorer of keys, values and positions (assisted decoding "
                "needs both) or start from a copy.deepcopy of an earlier cache"
            )
        clock -= min(drop, seen)
        torch.minimum(lengths, clock.clamp(min=0), out=lengths)
        self._past_pads = bool((clock >= 0).all())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows ``beam_idx``, for beam search; in place, if they are as many as before."""
        if not self._started or len(beam_idx) != len(self.slots.lengths):
            return self.batch_select_indices(beam_idx)
        rows = beam_idx.to(self.device)
        self.slots.reorder(rows)
        self._pads = self._pads.index_select(0, rows)
        return self._judge.each(lambda tensor: tensor.index_select(0, rows))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows ``indices``."""
        self._each(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._started:
            self._hold(self.slots.changed(change))
            self._pads = change(self._pads)
            self._judge.each(change)


def _recording(device: torch.device) -> bool:
    """Whether steps are being compiled or captured, when the host cannot know any number."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
