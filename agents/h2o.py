"""H2O: heavy hitters and the newest tokens, half and half (Zhang et al. 2023, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvenv.errors import KvenvError
from kvenv.learning.agent import Heuristic


@dataclass
class H2O(Heuristic):
    """Ranks by turns the newest token and the one with most attention so far.

    A cache of any budget then holds the newest x and the heaviest x tokens, for the largest x
    that fits. The paper fixes the two halves at budget / 2; a token in both halves counts once
    here, and the room goes to both. Attention is summed over the prompt's queries and the query
    heads of a KV head, as if nothing had been evicted while the prompt was read; the paper's sums
    come from its evicting cache. kvpress 0.5.5 has no H2O, only the mean of the ``observed`` agent.

    Args:
        recent: share of the budget for the newest tokens, between 0 and 1.
    """

    recent: float = 0.5

    needs = frozenset({"past_attention"})

    def __post_init__(self) -> None:
        if not 0 < self.recent < 1:
            raise KvenvError(
                f"recent is {self.recent}: give a share between 0 and 1, such as 0.5 (the agent "
                "streaming keeps the newest tokens alone)"
            )

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
        newest, heaviest = (_places(x) for x in (positions, needs["past_attention"]))
        return -torch.minimum(newest / self.recent, (heaviest + 0.5) / (1 - self.recent))


def _places(x: Tensor) -> Tensor:
    """Each token's place in descending order, from 0 on; of equals, the earlier one first."""
    return x.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).float()
