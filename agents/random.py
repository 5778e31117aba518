"""Random scores: what chance gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvenv.learning.agent import Heuristic


@dataclass
class Random(Heuristic):
    """A uniform number in [0, 1) for each token of each head, fixed by its position.

    Args:
        seed: another seed gives other numbers.
    """

    seed: int = 0

    def score(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        now: Tensor,
        **needs: Tensor,
    ) -> Tensor:
        """(B, H, n) float32."""
        heads = torch.arange(keys.shape[1], device=positions.device).unsqueeze(-1)
        x = torch.zeros_like(heads)
        for word in (self.seed, layer, heads, positions):
            x = x + word
            for multiplier in (-0x61C8864680B583EB, -0x40A7B892E31B1A47):  # a 64-bit mixing hash
                x = x * multiplier
                x = x ^ ((x >> 32) & 0xFFFFFFFF)
        return (x & 0xFFFFFF).float() / (1 << 24)
