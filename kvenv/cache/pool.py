"""Layers whose heads are decided on together: their slots, and when a selection comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvenv.cache import selection
from kvenv.cache.backends import Backend, choose
from kvenv.cache.needs import Needs
from kvenv.cache.policy import Policy
from kvenv.cache.slots import Slots, Tokens, after, index_of
from kvenv.errors import KvenvError
from kvenv.rules import protected, worth


@dataclass
class Pool:
    """Slots of one layer, or of all layers whose heads compete for one total.

    What the host knows of a row it knows without waiting for the device: how many tokens were
    read, and how many slots are free, the same number for all heads of a row. A step of one token
    takes one. Before the step that finds none, rows that are full are cut to their best.

    Attributes:
        policy: the cache's.
        layers: the model's own numbers.
        last: the layer after whose attention a prompt is cut.
        slots: what is held; None before the first step.
        seen: tokens read, pads included.
        free: free slots of each row.
        extents: slots that each row's heads have.
        evicted: whether some token was.
        version: changes when buffers moved or `Slots.largest` changed, so that a CUDA graph of
            the steps before is of no use.
    """

    policy: Policy
    last: int
    needs: dict[int, Needs]
    layers: list[int] = field(default_factory=list)
    slots: Slots | None = None
    seen: int = 0
    free: list[int] = field(default_factory=list)
    extents: list[int] = field(default_factory=list)
    evicted: bool = False
    version: int = 0
    pending: dict[int, tuple[Tokens, Tensor]] = field(default_factory=dict)
    backend: Backend | None = None
    packed: dict[int, object] = field(default_factory=dict)
    started: bool = False

    def begin(self, layer: int, keys: Tensor, values: Tensor) -> bool:
        """Prepare for a layer's step (B, H, q, d); whether its token can be appended.

        Raises:
            KvenvError: if the step has another number of rows than are held, or other shapes.
        """
        if not self.started:
            self._start(layer, keys, values)
        rows, _, q, _ = keys.shape
        if rows != len(self.free):
            raise KvenvError(
                f"the cache holds {len(self.free)} rows and this step has {rows}: make a new "
                "EvictionCache for another batch"
            )
        if layer not in self.layers:
            self.layers.append(layer)
        if layer == self.layers[0]:
            self.settle()
            single = q == 1 and self.appends
            if single and not recording(keys.device):
                self.advance()
            self._single = single
        return self._single

    _single: bool = field(default=False, repr=False)

    @property
    def pads(self) -> list[int]:
        """Pads of each row, which are not held; but for attention that finds slots by itself."""
        rows = len(self.free)
        return self.policy.padding.pads(rows) if self.policy.interface else [0] * rows

    @property
    def appends(self) -> bool:
        """Whether a next step of one token is a token of every row, for slots that there are."""
        pads = self.pads
        return self.slots is not None and all(self.seen >= pad for pad in pads)

    def _start(self, layer: int, keys: Tensor, values: Tensor) -> None:
        policy, (rows, _, q, _) = self.policy, keys.shape
        policy.padding.match(rows, q)
        pads = policy.padding.pads(rows)
        policy.resolve(max(policy.padding.length, q) - min(pads))
        self.backend = choose(policy.backend, keys, keys.shape[-1] == values.shape[-1])
        self.layers, self.started, self.evicted = [layer], True, False
        self.seen, self.free = 0, [policy.tokens] * rows
        self.extents = [0] * rows

    def reset(self) -> None:
        """Forget everything; the slots stay allocated for the next batch of as many rows."""
        if not self.started:
            return
        self.started, self.evicted, self.seen = False, False, 0
        self.free, self.extents, self.pending, self.layers = [], [], {}, []
        if self.slots is not None:
            self.slots.clear()
        for needs in self.needs.values():
            needs.reset()

    def at(self, layer: int) -> int:
        """Where a layer is among the pool's."""
        return self.layers.index(layer)

    def read(self, layer: int) -> int:
        """Tokens that a layer has read."""
        waiting = self.pending.get(layer)
        return self.seen + (0 if waiting is None else waiting[0].positions.shape[-1])

    def advance(self) -> None:
        """Count a step of one token; the host calls it before the step, captured or not."""
        if not all(self.free):
            self.select([row for row, free in enumerate(self.free) if not free])
        self.free = [free - 1 for free in self.free]
        self.seen += 1

    def positions(self, q: int, device: torch.device) -> Tensor:
        """True positions of the next q tokens, (B, q) int64; negative for pads."""
        index = torch.arange(self.seen, self.seen + q, device=device)
        pads = self.pads
        return index - torch.tensor(pads, device=device).view(-1, 1)

    def held(self, layer: int, keys: Tensor, values: Tensor, past: Tensor | None = None) -> Tokens:
        """Copies of what a layer holds; before the first step nothing, shaped like a step's own."""
        if self.slots is not None and self.seen:
            i = self.at(layer)
            return self.slots.dense(i, most=int(self.slots.lengths[i].max()))
        none = torch.zeros(keys.shape[:3], dtype=torch.int64, device=keys.device)[:, :, :0]
        past = None if past is None else past[:, :, :0]
        return Tokens(keys[:, :, :0], values[:, :, :0], none, none.sum(-1), past)

    def wait(self, layer: int, tokens: Tokens, valid: Tensor) -> None:
        """Keep a layer's part of a step of several tokens until it can be decided on."""
        self.pending[layer] = tokens, valid
        if layer == self.last and not self.policy.shared:
            self.settle()

    def settle(self) -> None:
        """Store what a step of several tokens left: all of it, or each head's best."""
        if not self.pending:
            return
        pending, self.pending = self.pending, {}
        parts = [pending[layer] for layer in self.layers]
        q = parts[0][0].positions.shape[-1]
        pads = self.pads
        new = [self.seen + q - max(self.seen, min(pad, self.seen + q)) for pad in pads]
        always = self.policy.threshold is not None  # a prompt that fits may still be cut
        pairs = enumerate(zip(self.free, new, strict=True))
        full = [row for row, (free, more) in pairs if more > free or (always and more)]
        if full:
            self._cut(parts, new, full)
        else:
            slots = self._slots(parts[0][0], self._most)
            for i, (tokens, valid) in enumerate(parts):
                slots.write(i, tokens, valid.expand(tokens.positions.shape), behind=True)
            self.free = [free - more for free, more in zip(self.free, new, strict=True)]
            if not self.extents or not any(self.extents):
                self.extents = [self._most] * len(self.free)
        self.seen += q
        clock = torch.tensor([self.seen - pad for pad in pads])
        if self.slots is not None:
            self.slots.clock.copy_(clock)

    @property
    def _most(self) -> int:
        """Slots a row without a threshold."""
        return self._heads * self.policy.tokens

    @property
    def _heads(self) -> int:
        return sum(self.policy.scorer.kv_heads[layer] for layer in self.layers)

    def _slots(self, like: Tokens, total: int) -> Slots:
        """Slots of ``total`` a row for tokens like these; those that there are, if they suit."""
        layers, old = len(self.layers), self.slots
        if old is not None and (self.seen or old.suits(layers, total, like.keys, like.values)):
            return old
        return self._make(like, total)

    def _make(self, like: Tokens, total: int) -> Slots:
        past = any(needs.past for needs in self.needs.values())
        self.slots = Slots(len(self.layers), total, like.keys, like.values, past)
        self.version += 1
        return self.slots

    def _refuse(self) -> None:
        """Raise where an eviction would change what the model computes."""
        if self.policy.ordered:
            raise KvenvError(
                f"{self.policy.ordered}, so that nothing can be evicted: give a budget that holds "
                "the whole text"
            )
        if not self.policy.interface and any(self.policy.padding.pads(len(self.free))):
            raise KvenvError(
                "this model's attention passes by transformers' attention interface, so that "
                "nothing can be evicted from a padded batch: give rows of one length, or one by one"
            )

    def _score(self, layer: int, tokens: Tokens, now: Tensor, rows: Tensor | None) -> Tensor:
        """Scores (B, H, m) of what one layer holds, in these rows."""
        needs = self.needs.get(layer)
        given = {} if needs is None else needs.given()
        if rows is not None:
            given = {name: tensor.index_select(0, rows) for name, tensor in given.items()}
        return selection.scores_of(self.policy, layer, tokens, now, given)

    @torch.no_grad()
    def _decide(
        self, tokens: list[Tokens], now: Tensor, rows: Tensor | None, check: bool
    ) -> tuple[Tensor, Tensor]:
        """`selection.decide` on the tokens of every layer; ``check`` waits to find a NaN."""
        scores = [
            self._score(layer, one, now, rows)
            for layer, one in zip(self.layers, tokens, strict=True)
        ]
        if check:
            for layer, one, score in zip(self.layers, tokens, scores, strict=True):
                self.policy.scorer.check(layer, score, one.present)
        guarded = torch.cat([selection.guards(self.policy, one, now) for one in tokens], 1)
        there = torch.cat([one.present for one in tokens], 1)
        return selection.decide(self.policy, self.layers, scores, guarded, there)

    @torch.no_grad()
    def _cut(self, parts: list[tuple[Tokens, Tensor]], new: list[int], full: list[int]) -> None:
        """Of what is held and what came keep the best in rows that are full, else all."""
        policy, rows = self.policy, len(self.free)
        self._refuse()
        old = self.slots if self.seen else None
        tokens = []
        for i, (own, valid) in enumerate(parts):
            held = self.held(self.layers[i], own.keys, own.values, own.past)
            tokens.append(after(held, own, valid.expand(own.positions.shape)))
        widest = max(one.positions.shape[-1] for one in tokens)
        tokens = [_widened(one, widest) for one in tokens]
        q, device = parts[0][0].positions.shape[-1], parts[0][0].keys.device
        now = self.positions(q, device)[:, -1]
        index = index_of(full, rows, device)
        chosen = [one.rows(index) for one in tokens]
        order, counts = self._decide(chosen, now if index is None else now[index], index, True)
        to = selection.starts_of(counts, policy)
        asked = self._extents(full, counts)
        if index is not None:  # the other rows keep what they have, where it is
            all_counts = torch.cat([one.counts for one in tokens], 1)
            rest = [row for row in range(rows) if row not in full]
            width = max(order.shape[-1], int(all_counts[rest].max()))
            whole = torch.arange(width, device=device).expand(*all_counts.shape, -1).clone()
            whole[index, :, : order.shape[-1]] = order
            starts = torch.arange(self._heads, device=device).int() * policy.tokens
            starts = starts.expand(rows, -1).clone()
            if old is not None:
                starts = old.starts.transpose(0, 1).flatten(1).clone()
            starts[index], all_counts[index] = to, counts
            order, counts, to = whole, all_counts, starts
            for row in rest:
                self.extents[row] = self.extents[row] or self._most
            asked = max(self.extents)
        before = old.keys.shape[1] if old is not None else 0
        total = selection.total_of(asked, policy, before, self._most)
        slots = self.slots
        if slots is None or not slots.suits(
            len(parts), total, parts[0][0].keys, parts[0][0].values
        ):
            slots = self._make(parts[0][0], total)
        selection.place(slots, None, counts, to)
        self._bound(order.shape[-1] + (policy.interval if index is None else policy.tokens))
        heads = slots.lengths.shape[-1]
        for i, one in enumerate(tokens):
            own = slice(i * heads, (i + 1) * heads)
            taken = one.take(order[:, own], counts[:, own])
            slots.write(i, taken, taken.present, behind=False)
        cut = set(full)
        pairs = enumerate(zip(self.free, new, strict=True))
        self.free = [policy.interval if row in cut else free - more for row, (free, more) in pairs]
        self.evicted = True

    def _extents(self, full: list[int], counts: Tensor) -> int:
        """Note the slots that cut rows (rows, heads) ask for; the most that any row does."""
        if self.policy.threshold is None:
            for row in full:
                self.extents[row] = self._most
        else:
            asked = (counts + self.policy.interval).sum(-1).tolist()
            for row, one in zip(full, asked, strict=True):
                self.extents[row] = int(one)
        return max(self.extents)

    def _bound(self, largest: int) -> None:
        """Have no head hold more than the host believes; it believes round numbers."""
        if self.slots is None:
            return
        if not self.policy.competes:
            largest = self.policy.tokens
        else:
            largest = min(-(-largest // 64) * 64, self.slots.keys.shape[1])
        if largest != self.slots.largest:
            self.slots.largest = largest
            self.version += 1

    @torch.no_grad()
    def select(self, full: list[int]) -> None:
        """Cut rows that are full to their best, in place."""
        slots = self.slots
        if slots is None:
            return
        policy, rows = self.policy, len(self.free)
        self._refuse()
        index = index_of(full, rows, slots.keys.device)
        now = (slots.clock[0] if index is None else slots.clock[0, index]).long() - 1
        if self.backend is not None and self.backend.select is not None and not policy.competes:
            self._select_by(self.backend, self.backend.select, slots, index)
            for row in full:
                self.free[row] = policy.interval
            return
        tokens = [slots.dense(i, index) for i in range(len(self.layers))]
        order, counts = self._decide(tokens, now, index, False)
        del tokens
        before = slots.keys.shape[1]
        total = selection.total_of(self._extents(full, counts), policy, before, self._most)
        if total > before:
            slots.resize(total)
        selection.relocate(slots, index, order, counts, selection.starts_of(counts, policy))
        if total < before:
            slots.resize(total)
        if total != before:
            self.version += 1
        bound = order.shape[-1] + policy.interval
        self._bound(bound if index is None else max(bound, slots.largest))
        self.evicted = True
        for row in full:
            self.free[row] = policy.interval

    def _select_by(
        self, backend: Backend, select: Callable[..., None], slots: Slots, rows: Tensor | None
    ) -> None:
        """Cut some rows of one layer of equal heads by kernels; the others stay as they are."""
        starts, lengths, now = slots.starts[0], slots.lengths[0], slots.clock[0].long() - 1
        shape = (*lengths.shape, slots.largest)
        packed = self._pack(backend, slots)
        if backend.networks is not None and packed is not None:
            states = slots.keys, slots.values, starts, lengths, now
            scores = backend.networks[1](*states, packed, slots.largest).view(shape)
        else:
            scores = self._score(self.layers[0], slots.dense(0), now, None)
        positions = slots.positions.view(shape)
        present = torch.arange(slots.largest, device=now.device) < lengths.unsqueeze(-1)
        protect = self.policy.sinks, self.policy.recent
        guarded = protected(positions, now.view(-1, 1, 1), *protect) & present
        worths = worth(scores, guarded, present).flatten(1)
        counts = lengths.clamp(max=self.policy.kept)
        if rows is not None:
            counts = lengths.index_copy(0, rows, counts.index_select(0, rows))
        states = slots.keys, slots.values, slots.positions, slots.past
        select(worths, counts, *states, starts, lengths, slots.largest)
        self.evicted = True

    def _pack(self, backend: Backend, slots: Slots) -> object | None:
        """The first layer's networks for kernels, packed once; None if none can serve them."""
        layer, device = self.layers[0], slots.keys.device
        if layer not in self.packed and backend.networks is not None:
            networks = self.policy.scorer.networks(layer, device)
            pack, d = backend.networks[0], slots.keys.shape[-1]
            self.packed[layer] = None if networks is None else pack(*networks, d, device)
        return self.packed.get(layer)

    def take_rows(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.settle()
        chosen = indices.tolist()
        same = len(chosen) == len(self.free)
        self.free = [self.free[row] for row in chosen]
        self.extents = [self.extents[row] for row in chosen]
        if self.slots is not None:
            at = indices.to(self.slots.keys.device)
            self.slots.change(lambda x: x.index_select(0, at), in_place=same)
            self.version += not same
        for needs in self.needs.values():
            needs.each(lambda x: x.index_select(0, indices.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, while none was evicted; see `EvictionCache.crop`."""
        self.settle()
        drop = -tokens_to_remove if tokens_to_remove <= 0 else self.seen - tokens_to_remove
        if drop <= 0 or self.slots is None:
            return
        if self.evicted or self.needs:
            why = "some are evicted" if self.evicted else "what they asked for counts already"
            raise KvenvError(
                f"cannot drop {drop} tokens: {why} and cannot come back; use a budget that holds "
                "the whole sequence and a scorer of keys, values and positions (assisted decoding "
                "needs both) or start from a copy.deepcopy of an earlier cache"
            )
        drop = min(drop, self.seen)
        pads = self.pads
        self.seen -= drop
        real = [max(0, self.seen - pad) for pad in pads]
        self.free = [self.policy.tokens - n for n in real]
        self.slots.clock -= drop
        self.slots.lengths.copy_(torch.tensor(real).view(1, -1, 1).expand(self.slots.lengths.shape))


def recording(device: torch.device) -> bool:
    """Whether steps are being captured in a CUDA graph: the host then counts replays instead."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _widened(tokens: Tokens, m: int) -> Tokens:
    """Tokens (B, H, m, ...), filled up to m."""
    more = m - tokens.positions.shape[-1]
    if not more:
        return tokens

    def widened(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(*x.shape[:2], more, *x.shape[3:])], 2)

    return tokens.change(widened)
