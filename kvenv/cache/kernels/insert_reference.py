"""`kvenv.cache.kernels.insert.insert` in plain torch: its reference, and the torch backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvenv.errors import KvenvError
from kvenv.scorers.network import age_term

if TYPE_CHECKING:  # it needs Triton, and here there may be none
    from kvenv.cache.kernels.network import Packed

FLOAT32 = torch.finfo(torch.float32)


def insert_reference(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    clock: Tensor,
    pending: Tensor | None = None,
    *,
    sinks: int,
    recent: int,
    largest: int,
    packed: Packed | None = None,
    arrived: Tensor | None = None,
    worth: Tensor | None = None,
    age: Tensor | None = None,
) -> None:
    """`insert` in plain torch, on any device and without waiting for it; float64 too."""
    per_slot, per_head = (positions, scores, worth), (lengths, clock, arrived)
    check_shapes(key, value, keys, values, offsets, per_slot, per_head)
    check_pending(pending, lengths, recent, packed)
    if packed is not None:
        from kvenv.cache.kernels.score import score_reference

        if arrived is not None:
            raise KvenvError("insert got packed and arrived: give the newcomers' scores one way")
        age = packed.age if age is None else age
        if pending is None:
            token = (x.unsqueeze(2) for x in (key, value, clock))
            arrived = score_reference(*token, packed).squeeze(2)
        else:
            _score_latest(
                keys, values, positions, scores, offsets, pending, packed, score_reference
            )
    (B, H, _), T = key.shape, keys.shape[1]
    index = torch.arange(largest, device=keys.device)
    slots = (offsets[:-1, None] + index).clamp(max=T - 1).expand(B, H, largest).flatten(1)
    now, length = clock.unsqueeze(-1), lengths.unsqueeze(-1)
    position = positions.gather(1, slots).view(B, H, largest)
    number = (scores if worth is None else worth).gather(1, slots).view(B, H, largest)
    if age is not None and worth is None:
        number = number + age_term(age, now - position)
    number = number.nan_to_num(nan=FLOAT32.min, posinf=FLOAT32.max, neginf=FLOAT32.min)
    stays = (index >= length) | (position < sinks) | (position > now - recent)
    number = number.masked_fill(stays, torch.inf)
    lowest = number.amin(-1, keepdim=True)
    slot = position.masked_fill(stays | (number > lowest), -1).argmax(-1)
    free = lengths < offsets.diff()
    writes = free | (lowest.squeeze(-1) < torch.inf)
    target = offsets[:-1] + torch.where(free, lengths.long(), slot)
    for slots, new in ((keys, key), (values, value)):
        at = target.unsqueeze(-1).expand_as(new)
        new = torch.where(writes.unsqueeze(-1), new.to(slots.dtype), slots.gather(1, at))
        slots.scatter_(1, at, new)
    for slots, new in ((positions, clock), (scores, arrived)):
        if new is not None:
            new = torch.where(writes, new.to(slots.dtype), slots.gather(1, target))
            slots.scatter_(1, target, new)
    if pending is not None:
        odd = (pending[..., 2:3] & 1).bool()
        latest = torch.where(writes, target, -1).int().unsqueeze(-1)
        now_odd = torch.cat([~odd, odd], -1)
        pending[..., :2] = torch.where(now_odd, latest, pending[..., :2])
        pending[..., 2:] += 1
    lengths += free
    clock += 1


def settle(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor,
    offsets: Tensor,
    pending: Tensor,
    packed: Packed,
    score: Callable[..., Tensor],
) -> None:
    """Score the newcomers that are pending after `insert`, in place; then there are none.

    Whatever reads scores between two calls of `insert` needs it, and whatever moves slots.

    Args:
        keys: slots (B, T, D).
        values: (B, T, D).
        positions: (B, T) int32.
        scores: (B, T) float32. Written.
        offsets: (H + 1,) int32.
        pending: (B, H, 4) int32. Written.
        packed: the layer's networks.
        score: `kvenv.cache.kernels.score.score`, or its reference.
    """
    _score_latest(keys, values, positions, scores, offsets, pending, packed, score)
    pending.fill_(-1)


def _score_latest(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor,
    offsets: Tensor,
    pending: Tensor,
    packed: Packed,
    score: Callable[..., Tensor],
) -> None:
    turn = pending[..., 3]
    slot = torch.where((turn & 1).bool(), pending[..., 0], pending[..., 1])
    none = slot < 0
    slot = torch.where(none, offsets[:-1], slot).long()  # one of the head's own in any case
    at = slot.unsqueeze(-1).expand(*slot.shape, keys.shape[-1])
    states = (one.gather(1, at).unsqueeze(2) for one in (keys, values))
    found = score(*states, positions.gather(1, slot).unsqueeze(2), packed).squeeze(2)
    scores.scatter_(1, slot, torch.where(none, scores.gather(1, slot), found.to(scores.dtype)))


def check_shapes(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    per_slot: tuple[Tensor | None, ...],
    per_head: tuple[Tensor | None, ...],
) -> None:
    """Refuse what does not fit together.

    Args:
        key: (B, H, D).
        value: (B, H, Dv).
        keys: (B, T, D), contiguous.
        values: (B, T, Dv), contiguous.
        offsets: (H + 1,).
        per_slot: each (B, T), contiguous, or None.
        per_head: each (B, H), contiguous, or None.

    Raises:
        KvenvError: naming the shapes.
    """
    B, H, D = key.shape if key.ndim == 3 else (0, 0, 0)
    T = keys.shape[1]
    fits = (
        value.shape == (B, H, values.shape[-1]),
        keys.shape == (B, T, D) and values.shape[:2] == (B, T),
        *(one.is_contiguous() for one in (keys, values)),
        *(one.shape == (B, T) and one.is_contiguous() for one in per_slot if one is not None),
        *(one.shape == (B, H) and one.is_contiguous() for one in per_head if one is not None),
        offsets.shape == (H + 1,),
    )
    if not all(fits):
        raise KvenvError(
            f"key {tuple(key.shape)}, slots {tuple(keys.shape)} and offsets "
            f"{tuple(offsets.shape)} do not fit each other or the rest: give (B, H, D), contiguous "
            "(B, T, D), (B, T) and (B, H), and offsets (H + 1,)"
        )


def check_pending(
    pending: Tensor | None, lengths: Tensor, recent: int, packed: Packed | None
) -> None:
    """Refuse to leave scores for later where they are needed before, or nobody makes them.

    Args:
        pending: (B, H, 4), contiguous, or None.
        lengths: (B, H).
        recent: the last tokens that stay.
        packed: networks, or None.

    Raises:
        KvenvError: naming what is wrong.
    """
    if pending is None:
        return
    if packed is None or recent < 2:
        raise KvenvError(
            f"insert got pending, recent={recent} and {'no' if packed is None else 'the'} packed "
            "networks: scores can wait for networks that make them, and where at least 2 tokens "
            "are recent; leave pending out"
        )
    if pending.shape != (*lengths.shape, 4) or not pending.is_contiguous():
        raise KvenvError(
            f"pending {tuple(pending.shape)} does not fit lengths {tuple(lengths.shape)}: give "
            "four numbers for each of them, contiguous"
        )
