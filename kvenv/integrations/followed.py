"""True positions beside the slots of a cache that keeps none itself, followed over every cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvenv.errors import KvenvError

ATTRIBUTE = "kvenv_slots"
"""Where a cache layer carries its `Slots`; a deep copy of the cache has a copy of them."""


@dataclass(frozen=True)
class Slots:
    """The slots of a cache layer when they were last seen.

    Attributes:
        positions: true positions (B, H, m) int64, ascending; None if they are lost.
        marks: the first channel of the slots' keys, (B, H, m), which tells whether slots are
            still where they were.
        seen: tokens of the text so far, held or not.
    """

    positions: Tensor | None
    marks: Tensor
    seen: int

    @classmethod
    def of(cls, keys: Tensor, positions: Tensor | None, seen: int) -> Slots:
        """Slots of keys (B, H, m, d)."""
        return cls(positions, keys.detach()[..., 0].clone(), seen)

    def continued(self, keys: Tensor, masked: Tensor | None = None) -> Slots:
        """The slots of a later moment: those of before, followed by tokens that came since.

        Args:
            keys: all keys of the layer, (B, H, n, d).
            masked: slots (B, H, n) bool whose keys somebody else may have overwritten, or None.

        Returns:
            Its positions are None if the slots of before are no longer the first ones.
        """
        m, n = self.marks.shape[-1], keys.shape[2]
        lost = Slots.of(keys, None, 0)
        if self.positions is None or n < m or self.marks.shape[:2] != keys.shape[:2]:
            return lost
        same = self.marks.to(keys.device) == keys[:, :, :m, 0]
        if masked is not None:
            same = same | masked[:, :, :m]
        if not bool(same.all()):
            return lost
        later = torch.arange(self.seen, self.seen + n - m, device=keys.device)
        added = later.expand(*keys.shape[:2], -1)
        positions = torch.cat([self.positions.to(keys.device), added], dim=-1)
        return Slots.of(keys, positions, self.seen + n - m)


def follow(
    layer: Any,
    keys: Tensor,
    *,
    fresh: bool,
    told: int | None,
    masked: Tensor | None = None,
) -> Slots:
    """What the slots of a cache layer hold now; remembered for the next time.

    Args:
        layer: the cache layer, which carries what was last known.
        keys: all its keys, (B, H, n, d).
        fresh: whether they are all of this forward pass, which began with an empty cache.
        told: tokens of the text so far, as the model's position ids have it; None if unknown.
            Needed only for a cache that was not followed from its start.
        masked: slots (B, H, n) bool whose keys are no longer their own, or None.
    """
    before, n = getattr(layer, ATTRIBUTE, None), keys.shape[2]
    if fresh or (before is None and told == n):
        positions = torch.arange(n, device=keys.device).expand(keys.shape[:3])
        now = Slots.of(keys, positions, n)
    elif before is None:
        now = Slots.of(keys, None, 0)
    else:
        now = before.continued(keys, masked)
    remember(layer, now)
    return now


def remember(layer: Any, slots: Slots) -> None:
    """Let a cache layer carry what its slots hold."""
    setattr(layer, ATTRIBUTE, slots)


def part_of(whole: Tensor | None, part: Tensor) -> int | None:
    """The slot that a view of keys (B, H, n, d) starts at; None if it is no run of their slots."""
    if whole is None or not whole.numel():
        return None
    if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    start, rest = divmod(int(part.storage_offset() - whole.storage_offset()), whole.stride(2))
    alike = part.shape[:2] == whole.shape[:2] and part.shape[3:] == whole.shape[3:]
    inside = not rest and start >= 0 and start + part.shape[2] <= whole.shape[2]
    return start if alike and inside and part.stride() == whole.stride() else None


class Unknown(torch.Tensor):
    """Stands in for positions that are not known: it has a shape, and its numbers cannot be used.

    So whatever does not look at positions works, and whatever does gets the reason.
    """

    ABOUT = frozenset(
        # An attribute is read through its descriptor's __get__.
        {getattr(torch.Tensor, name).__get__ for name in ("shape", "device", "dtype", "ndim")}
        | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.index_select, torch.Tensor.expand}
    )

    @classmethod
    def like(cls, keys: Tensor) -> Tensor:
        """For keys (B, H, n, d): (B, H, n) int64."""
        return torch.zeros(keys.shape[:3], dtype=torch.int64, device=keys.device).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in cls.ABOUT:
            refuse_unknown()
        return super().__torch_function__(func, types, args, kwargs or {})


def refuse_unknown() -> NoReturn:
    """Say why positions are not known.

    Raises:
        KvenvError: always.
    """
    raise KvenvError(
        "the tokens' true positions are needed here (by the scorer, its age term, sinks or recent) "
        "and are not known: another press moved this cache's slots or showed only copies of them, "
        "or the cache was cropped, reordered or quantised. Use KvenvPress by itself or in a "
        "DecodingPress, or a scorer that reads keys and values alone"
    )
