"""One layer of the cache: what transformers calls, handed on to slots and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvenv.cache import attention, masks
from kvenv.cache.needs import received
from kvenv.cache.pool import Pool
from kvenv.cache.slots import Tokens
from kvenv.errors import KvenvError


class EvictionLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, in the slots of a `Pool`.

    A step of one token appends it and attends to the slots in use: no shape depends on what was
    read, and nothing waits for the device. A step of several tokens attends to all that is held
    and to itself, in blocks if so asked; then the best of each head stay. Pads are never held.

    Args:
        layer: the model's own layer number.
        pool: whose slots it has.
    """

    is_sliding = False
    is_croppable = False  # what was evicted cannot come back, and a cache may evict at any step
    is_compileable = False  # generate() would compile by itself, at minutes per shape

    def __init__(self, layer: int, pool: Pool) -> None:
        super().__init__()
        self.layer, self.pool = layer, pool
        self._awaiting = False  # a step's attention has not come by yet

    def __repr__(self) -> str:
        return f"EvictionLayer(layer={self.layer}, seen={self.get_seq_length()}, held={self.held})"

    @property
    def held(self) -> int:
        """Tokens that the fullest head holds now."""
        self.pool.settle()
        slots = self.pool.slots
        if slots is None or not self.pool.started:
            return 0
        return int(slots.lengths[self.pool.at(self.layer)].max())

    @property
    def positions(self) -> Tensor:
        """True positions of the tokens held, (B, H, held) int64; -1 where there is none."""
        most, slots = self.held, self.pool.slots
        if slots is None or not self.pool.started:
            return torch.empty(0, 0, 0, dtype=torch.int64)
        tokens = slots.dense(self.pool.at(self.layer), most=most)
        positions = tokens.positions
        if not self.pool.policy.interface:
            pads = self.pool.policy.padding.pads(len(positions))
            positions = positions - positions.new_tensor(pads).view(-1, 1, 1)
        return positions.where(tokens.present, -1).clamp(min=-1)

    def reset(self) -> None:
        """Forget everything; the slots stay allocated for the next batch of as many rows."""
        self._awaiting = False
        self.is_initialized = False
        self.pool.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type and device from the first keys and values (B, H, q, d)."""
        policy, heads = self.pool.policy, key_states.shape[1]
        if heads != policy.scorer.kv_heads[self.layer]:
            raise KvenvError(
                f"layer {self.layer} has {heads} KV heads here and "
                f"{policy.scorer.kv_heads[self.layer]} in the configuration: a cache of a model "
                "that holds something else than the keys of its heads cannot evict"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take this step's keys and values, for `kvenv.cache.attention` to go on with.

        Args:
            key_states: (B, H, q, d), after RoPE.
            value_states: (B, H, q, d).
            *args: what the library passes beside them; not used.
            **kwargs: likewise.

        Returns:
            A step of one token gets the slots themselves, (B, T, d), its own token among them;
            any other step its own keys and values back. Where a model's attention passes by
            transformers' interface: all that is held and the step's own, (B, H, m, d).

        Raises:
            KvenvError: if the last step's attention was not this cache's.
        """
        if self._awaiting:
            raise KvenvError(
                f"the attention of layer {self.layer} did not come to the cache: the model must "
                f"run with the attention implementation {attention.PREFIX}* that EvictionCache set "
                "in its config; do not set another one while the cache is in use, and reset() it "
                "after a step that failed"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pool = self.pool
        single = pool.begin(self.layer, key_states, value_states)
        if not pool.policy.interface:
            return self._dense(key_states, value_states, single)
        self._awaiting = True
        if not single:
            return attention.marked(key_states, self), value_states
        slots = self._slots
        slots.append(pool.at(self.layer), key_states[:, :, 0], value_states[:, :, 0])
        return attention.marked(slots.keys, self), slots.values

    @property
    def _slots(self) -> Any:
        if self.pool.slots is None:
            raise KvenvError("the cache layer is empty: run the model with it first")
        return self.pool.slots

    def _dense(self, keys: Tensor, values: Tensor, single: bool) -> tuple[Tensor, Tensor]:
        """`update` for attention that reads keys by itself; pads are held, masks hide them."""
        pool = self.pool
        i, most = pool.at(self.layer), self.held
        if single:
            self._slots.append(i, keys[:, :, 0], values[:, :, 0])
            tokens = self._slots.dense(i, most=most + 1)
            return tokens.keys, tokens.values
        own, valid = self._own(keys, values)
        both = keys, values
        if most:
            held = self._slots.dense(i, most=most)
            both = torch.cat([held.keys, keys], 2), torch.cat([held.values, values], 2)
        pool.wait(self.layer, own, valid)
        return both

    def _own(self, keys: Tensor, values: Tensor) -> tuple[Tokens, Tensor]:
        """A step's tokens, and which of them are no pads, (B, 1, q)."""
        positions = self.pool.positions(keys.shape[2], keys.device)
        whole = positions.unsqueeze(1).expand(keys.shape[:3])
        counts = torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)
        return Tokens(keys, values, whole, counts), (positions >= 0).unsqueeze(1)

    def _arrive(self) -> bool:
        """Note that the attention of this step has come; whether for the first time.

        Raises:
            KvenvError: if it comes again in a model whose layers share no keys.
        """
        if not self._awaiting and not self.pool.policy.shared:
            raise KvenvError(
                f"the keys of layer {self.layer} are attended to more than once in a step, which "
                "an EvictionCache does not serve in models that do not say so in their config"
            )
        first, self._awaiting = self._awaiting, False
        return first

    @torch.no_grad()
    def _follow(self, query: Tensor, scale: float) -> None:
        """Remember what one query (B, Hq, 1, d) asks of the slots, if the scorer wants to know."""
        needs = self.pool.needs.get(self.layer)
        if needs is None:
            return
        needs.push(query, scale)
        if needs.past:
            i, slots = self.pool.at(self.layer), self._slots
            tokens = slots.dense(i)
            slots.add(i, received(query, tokens.keys, tokens.present.unsqueeze(2), scale))

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """One query token's attention (B, Hq, d) to the slots in use."""
        if self._arrive():
            self._follow(query.unsqueeze(2), scale)
        slots, i, backend = self._slots, self.pool.at(self.layer), self.pool.backend
        if backend is None:
            raise KvenvError("the cache layer is empty: run the model with it first")
        states = slots.keys, slots.values, slots.starts[i], slots.lengths[i]
        return backend.attend(query, *states, scale, slots.largest)

    def attend_by(self, query: Tensor, scale: float, attend: masks.Attend) -> Tensor:
        """As `attend`, for attention that no backend knows: (B, Hq, 1, d) to (B, 1, Hq, d)."""
        if self._arrive():
            self._follow(query, scale)
        tokens = self._slots.dense(self.pool.at(self.layer))
        visible = tokens.present.unsqueeze(2)
        values = tokens.values.masked_fill(~tokens.present.unsqueeze(-1), 0)
        return attend(query, tokens.keys, values, masks.additive(visible, query))

    def read(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        module: torch.nn.Module,
        mask: Tensor | None,
        own: Callable[[], Tensor],
        attend: masks.Attend,
    ) -> Tensor:
        """The attention of a step's tokens to all that is held and to themselves; the best stay.

        Args:
            query: (B, Hq, q, d).
            keys: (B, H, q, d), the step's own.
            values: (B, H, q, d).
            scale: factor on the logits.
            module: the model's attention module.
            mask: what the model gave for the step's own tokens, (B, 1, q, q), or None: causal.
            own: the library's attention among the step's own tokens.
            attend: the library's attention to any keys under a mask.

        Returns:
            (B, q, Hq, d).
        """
        pool = self.pool
        first = self._arrive()
        q, policy = keys.shape[2], pool.policy
        block = policy.block or q
        if q > block and (policy.allocation == "adaptive" or policy.shared):
            raise KvenvError(
                f"a step of {q} tokens and block={block}: where all heads compete, or layers share "
                "keys, the whole model reads block by block; use kvenv.cache.generate, or "
                f"model.generate with prefill_chunk_size={block}"
            )
        positions = pool.positions(q, keys.device)
        masks.check(mask, positions, block)
        needs = pool.needs.get(self.layer)
        if needs is not None and first and q > 1:
            pads = [max(0, pad - pool.seen) for pad in pool.pads]
            needs.measure(module, self.layer, query, pads, scale)
        if not pool.seen and q <= block:
            output = own()
            if first:
                self._admit(query, keys, values, scale, mask)
            return output
        outputs: list[Tensor] = []
        for start in range(0, q, block):
            part = (slice(None), slice(None), slice(start, start + block))
            within = (
                None if mask is None else mask[..., start : start + block, start : start + block]
            )
            step = query[part], keys[part], values[part]
            now = pool.positions(step[1].shape[2], keys.device)
            held = pool.held(self.layer, keys, values)
            joined = masks.joined(*step, now, held, within)
            outputs.append(attend(query[part], *joined))
            if first:
                self._admit(*step, scale, within)
        return torch.cat(outputs, 1)

    @torch.no_grad()
    def _admit(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None
    ) -> None:
        """Hand a step's tokens on to the pool, with what they asked for and received."""
        pool = self.pool
        own, valid = self._own(keys, values)
        needs = pool.needs.get(self.layer)
        if needs is not None:
            needs.push(query, scale)
            if needs.past:
                held = pool.held(self.layer, keys, values)
                m = held.positions.shape[-1]
                visible = masks.visible(held.present, own.positions[:, :1], mask)
                given = received(query, torch.cat([held.keys, keys], 2), visible, scale)
                own.past = given[..., m:]
                if m:
                    self._slots.add(pool.at(self.layer), given[..., :m])
        pool.wait(self.layer, own, valid)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys that the library's mask for this step should cover.

        They are the step's own tokens: what is held needs no mask, or gets one here. A step of
        one token needs none at all.
        """
        q = query_length if isinstance(query_length, int) else query_length.shape[0]
        pool = self.pool
        if not pool.policy.interface:
            pool.settle()
            cut = q == 1 and pool.appends and not all(pool.free)
            held = pool.policy.kept if cut else self.held
            return held + q, pool.seen - held
        appended = q == 1 and pool.started and pool.appends
        return q, 0 if appended else self.get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens read, kept or not: the index of the next one."""
        return self.pool.read(self.layer)

    def get_max_length(self) -> int:
        """-1: a text of any length can be read."""
        return -1

    def get_max_cache_shape(self) -> int:
        """As `get_max_length`, by the name that older transformers ask for."""
        return -1

    @property
    def _speaks(self) -> bool:
        """Whether this layer is the one that changes the pool's rows, for all of them."""
        return self.pool.started and self.layer == self.pool.layers[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, while none was evicted; see `EvictionCache.crop`."""
        if self._speaks:
            self.pool.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx``, for beam search; in place, if they are as many as before."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        if self._speaks:
            self.pool.take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self._speaks:
            rows = torch.arange(len(self.pool.free))
            self.pool.take_rows(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing: slots stay where their layer runs."""

    def prefetch(self) -> None:
        """Nothing: slots stay where their layer runs."""
