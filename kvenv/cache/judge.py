"""What the tokens of one layer are worth: fixed scores, or new ones at every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kvenv.cache import masks
from kvenv.cache.backends import Backend
from kvenv.cache.kernels.insert_reference import settle
from kvenv.cache.needs import Needs, received
from kvenv.cache.scoring import CacheScorer
from kvenv.cache.storage import Slots
from kvenv.cache.worth import Limits, worth


class Judge:
    """A layer's scorer, for slots and newcomers.

    Args:
        layer: the model's own layer number.
        scorer: gives the scores.
        limits: how many of the first and last tokens stay.
        needs: serves scorers that ask for more than keys, values and positions.
    """

    def __init__(
        self, layer: int, scorer: CacheScorer, limits: Limits, needs: Needs | None
    ) -> None:
        self._layer, self._scorer, self._limits, self._needs = layer, scorer, limits, needs
        self._packed: Any = None
        self._score: Callable[..., torch.Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> Judge:
        other = object.__new__(Judge)
        other.__dict__.update(self.__dict__)
        other._needs = copy.deepcopy(self._needs, memo)  # the rest, weights too, is shared
        return other

    @property
    def remembers(self) -> bool:
        """Whether earlier queries are in the scores."""
        return self._needs is not None

    def prepare(self, backend: Backend, keys: torch.Tensor) -> None:
        """Have kernels score by themselves, if they can; ``keys`` (B, H, q, d) are the first."""
        self._packed = None
        networks = self._scorer.networks(self._layer, keys.device)
        if backend.networks is not None and networks is not None:
            pack, self._score = backend.networks
            self._packed = pack(*networks, keys.shape[-1], keys.device)

    def reset(self) -> None:
        """Forget what earlier queries asked."""
        if self._needs is not None:
            self._needs.reset()

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the batch's rows in what is remembered of queries."""
        if self._needs is not None:
            self._needs.each(change)

    def measure(
        self, module: torch.nn.Module, query: torch.Tensor, slots: Slots, scale: float
    ) -> None:
        """Take statistics of a first step's queries (B, Hq, q, d), if the scorer asks for them."""
        if self._needs is not None:
            pads = -slots.clock[:, 0].clamp(max=0)
            self._needs.measure(module, self._layer, query, pads, scale)

    @torch.no_grad()
    def follow(self, query: torch.Tensor, slots: Slots, scale: float) -> None:
        """Remember what one query (B, Hq, d) asks of the slots, if the scorer wants to know."""
        if self._needs is None:
            return
        query = query.unsqueeze(2)
        self._needs.push(query, scale)
        if self._needs.past:
            keys, visible = slots.dense(slots.keys), slots.used().unsqueeze(2)
            slots.scores += slots.flatten(received(query, keys, visible, scale))

    @property
    def _later(self) -> bool:
        """Whether a token can wait for its score: it stays for another step in any case."""
        return self._packed is not None and self._limits.recent > 1

    def settle(self, slots: Slots) -> None:
        """See that the scores of all tokens held are there."""
        if self._later:
            states = slots.keys, slots.values, slots.positions, slots.scores
            settle(*states, slots.offsets, slots.pending, self._packed, self._score)

    def newcomer(self, key: torch.Tensor, value: torch.Tensor, slots: Slots) -> Mapping[str, Any]:
        """What a kernel needs to know to store one token (B, H, d) for another.

        Returns:
            ``packed``, networks that score the token where it is stored, and ``pending``, if they
            may do so at the next step; or ``arrived``, its score (B, H), or neither; and
            ``worth`` (B, T) of the slots where that is not just their scores and ``packed``'s age.
        """
        if not self._scorer.pointwise:
            nothing = torch.zeros(slots.lengths.shape, device=key.device)
            return {"arrived": nothing, "worth": slots.flatten(self._anew(key, value, slots))}
        if self._packed is not None:
            return {"packed": self._packed, "pending": slots.pending if self._later else None}
        token = key.unsqueeze(2), value.unsqueeze(2), slots.clock.long().unsqueeze(-1)
        arrived = self._scorer.score(self._layer, *token)[..., 0]
        if not self._scorer.ages:
            return {"arrived": arrived}
        return {"arrived": arrived, "worth": slots.flatten(self._fixed(slots, slots.clock))}

    def several(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        slots: Slots,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a step of several tokens and the tokens held are worth after it.

        Args:
            query: (B, Hq, q, d).
            keys: (B, H, q, d).
            values: (B, H, q, d).
            positions: (B, H, q) int32, negative for pads.
            slots: what is held.
            scale: factor on the logits.

        Returns:
            To be stored as the new tokens' score (B, H, q); their worth (B, H, q); the worth of
            the slots (B, T).

        Raises:
            KvenvError: if a score is NaN.
        """
        newest = slots.clock + (keys.shape[2] - 1)
        if not self._scorer.pointwise:
            return self._together(query, keys, values, positions, slots, scale)
        if self._packed is not None:
            self.settle(slots)
            scores = self._score(keys, values, positions, self._packed)
        else:
            scores = self._scorer.score(self._layer, keys, values, positions.long())
        self._scorer.check(self._layer, scores, positions)
        held = slots.flatten(self._fixed(slots, newest))
        return scores, self._worth(scores, positions, newest), held

    def _fixed(self, slots: Slots, newest: torch.Tensor) -> torch.Tensor:
        """Worth (B, H, L) of slots whose scores are fixed."""
        return self._worth(slots.dense(slots.scores), slots.dense(slots.positions), newest)

    def _worth(
        self, scores: torch.Tensor, positions: torch.Tensor, newest: torch.Tensor
    ) -> torch.Tensor:
        now = newest.unsqueeze(-1)
        age = self._scorer.age(self._layer, (now - positions).long())
        return worth(scores, age, positions, now, self._limits)

    def _together(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        slots: Slots,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`several` for scores that depend on which tokens are there."""
        arrived = torch.zeros(positions.shape, device=keys.device)
        states = (
            torch.cat([slots.dense(slots.keys), keys], 2),
            torch.cat([slots.dense(slots.values), values], 2),
        )
        past = None
        if self._needs is not None:
            self._needs.push(query, scale)
            if self._needs.past:
                visible = masks.causal(slots.used(), positions)
                given = received(query, states[0], visible, scale)
                slots.scores += slots.flatten(given[..., : slots.largest])
                arrived = given[..., slots.largest :].contiguous()
                past = torch.cat([slots.dense(slots.scores), arrived], -1)
        where = torch.cat([slots.dense(slots.positions), positions], -1)
        valid = torch.cat([slots.used(), positions >= 0], -1)
        scores = self._rescore(*states, where, valid, past)
        both = self._worth(scores, where, slots.clock + (keys.shape[2] - 1))
        held, new = both.split([slots.largest, keys.shape[2]], -1)
        return arrived, new, slots.flatten(held).contiguous()

    def _anew(self, key: torch.Tensor, value: torch.Tensor, slots: Slots) -> torch.Tensor:
        """Worth (B, H, L) of the slots as one more token (B, H, d) comes.

        It is there as they are scored; not for scorers that want queries: its own is yet to come.
        """
        positions, past = slots.dense(slots.positions), slots.dense(slots.scores)
        states = slots.dense(slots.keys), slots.dense(slots.values)
        if self._needs is not None:
            scores = self._rescore(*states, positions, slots.used(), past)
        else:
            now = slots.clock.unsqueeze(-1)
            scores = self._rescore(
                torch.cat([states[0], key.unsqueeze(2)], 2),
                torch.cat([states[1], value.unsqueeze(2)], 2),
                torch.cat([positions, now], -1),
                torch.cat([slots.used(), now >= 0], -1),
                None,
            )[..., :-1]
        return self._worth(scores, positions, slots.clock)

    def _rescore(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
        past: torch.Tensor | None,
    ) -> torch.Tensor:
        """Score each head's valid tokens among themselves: (B, H, m), 0 where there is none.

        A scorer sees them in the order of the text, whatever slots they are in.
        Tokens come in order of position, which scorers that look at neighbours rely on. A scorer
        is asked once for every number of tokens that a head has; where heads differ in it, one
        that averages over heads sees as many tokens of the others.
        """
        given = {} if self._needs is None else dict(self._needs.given())
        last = torch.iinfo(positions.dtype).max
        order = positions.masked_fill(~valid, last).argsort(dim=-1)  # slots are not in this order
        wide = order.unsqueeze(-1)
        keys, values = (x.gather(2, wide.expand_as(x)) for x in (keys, values))
        ordered = positions.long().gather(-1, order)
        if past is not None:
            past = past.gather(-1, order)
        counts = valid.sum(-1, keepdim=True)
        scores = torch.zeros(positions.shape, device=keys.device)
        for n in counts.unique().tolist():
            if n:
                first = (slice(None), slice(None), slice(n))
                if past is not None:
                    given["past_attention"] = past[first]
                states = keys[first], values[first], ordered[first]
                found = self._scorer.score(self._layer, *states, None, **given)
                scores[first] = torch.where(counts == n, found, scores[first])
        scores = torch.zeros_like(scores).scatter(-1, order, scores)
        self._scorer.check(self._layer, scores, positions.where(valid, -1))
        return scores
