"""What the layers of one static cache share: capacities, scorer and backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvenv.cache.backends import Backend, Choice, choose
from kvenv.cache.padding import LeftPadding
from kvenv.cache.scoring import CacheScorer
from kvenv.cache.storage import BESIDE
from kvenv.cache.worth import Limits
from kvenv.errors import KvenvError


@dataclass
class Plan:
    """What the layers of one static cache share.

    Attributes:
        capacities: slots of every KV head, by layer.
        limits: budget, sinks and recent.
        scorer: scores for every layer.
        padding: the batch's left padding.
        backend: the one asked for.
        block: tokens of a prompt that are read at a time; None reads it at once.
        spread: whether layers are on several devices, so that none takes all slots.
    """

    capacities: dict[int, tuple[int, ...]]
    limits: Limits
    scorer: CacheScorer
    padding: LeftPadding
    backend: Choice
    block: int | None
    spread: bool = False
    chosen: dict[tuple[object, ...], Backend] = field(default_factory=dict, repr=False)

    def begin(self, keys: torch.Tensor, values: torch.Tensor) -> Backend:
        """Choose the backend, once for a kind of states, and see that the slots fit the device."""
        kind = (keys.device.type, keys.dtype, keys.shape[-1], values.shape[-1])
        if kind not in self.chosen:
            chosen = choose(self.backend, keys, keys.shape[-1] == values.shape[-1])
            if not (self.chosen or self.spread):
                self._check_memory(keys, values)
            self.chosen[kind] = chosen
        return self.chosen[kind]

    def _check_memory(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if keys.device.type != "cuda":
            return
        slot = keys.element_size() * (keys.shape[-1] + values.shape[-1]) + BESIDE
        asked = keys.shape[0] * slot * sum(map(sum, self.capacities.values()))
        device = keys.device
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reusable
        if asked > free:
            raise KvenvError(
                f"the cache's slots take {asked:,} bytes and {device} has {free:,} free: "
                f"{asked - free:,} bytes are missing; lower budget or the batch's rows"
            )
