"""What scorers want of the attention that a cache serves: its queries, and what tokens received."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kvenv.errors import KvenvError

WINDOW = 64
"""Queries that are remembered, as many as the recorder keeps of a prompt."""

BLOCK = 128
"""Queries whose attention is held at once."""


class Needs:
    """The memory of one layer for scorers with `kvenv.scorers.base.Scorer.needs`.

    ``queries`` are the last `WINDOW` that asked, scaled as scorers expect them. ``query_mean`` and
    ``query_cov`` are measured once, over the first step of several tokens. ``past_attention``
    stays with the slots, and ``recent_attention`` is made of the queries at a selection.

    Args:
        names: what is wanted.
        model: whose rotary embedding statistics of queries undo.

    Raises:
        KvenvError: if statistics are wanted and there is no model.
    """

    def __init__(self, names: frozenset[str], model: PreTrainedModel | None) -> None:
        self._stats = not names.isdisjoint({"query_mean", "query_cov"})
        if self._stats and model is None:
            raise KvenvError(
                "the scorer needs query_mean and query_cov, which take the model's rotary "
                "embedding: give EvictionCache the model instead of its config"
            )
        self.past = "past_attention" in names
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._held: dict[str, torch.Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Needs:
        other = object.__new__(Needs)
        other.__dict__.update(self.__dict__)
        other.each(torch.clone)
        return other

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the batch's rows in everything that is held."""
        self._held = {name: change(tensor) for name, tensor in self._held.items()}

    def given(self) -> dict[str, torch.Tensor]:
        """What is held, by the name under which a scorer takes it.

        Raises:
            KvenvError: if statistics are wanted and the text began with a single token.
        """
        if self._stats and "query_mean" not in self._held:
            raise KvenvError(
                "the scorer needs query_mean and query_cov, measured over the first tokens read "
                "together, and only one was: give a longer prompt"
            )
        return self._held

    def push(self, queries: torch.Tensor, scale: float) -> None:
        """Remember the latest queries (B, Hq, q, d); ``scale`` is the factor on the logits."""
        latest = queries[:, :, -WINDOW:] * (scale * queries.shape[-1] ** 0.5)
        before = self._held.get("queries")
        joined = latest if before is None else torch.cat([before, latest], 2)
        self._held["queries"] = joined[:, :, -WINDOW:]

    @torch.no_grad()
    def measure(
        self,
        module: torch.nn.Module,
        layer: int,
        queries: torch.Tensor,
        pads: Sequence[int],
        scale: float,
    ) -> None:
        """Take the statistics of a first step's queries (B, Hq, q, d), without each row's pads."""
        if not self._stats or self._model is None or "query_mean" in self._held:
            return
        from kvenv.scorers.query_stats import QueryStats

        q, factor = queries.shape[2], scale * queries.shape[-1] ** 0.5
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for row, pad in enumerate(pads):
            own = max(0, q - pad)
            stats = QueryStats(self._model, own, own)
            rows.append(stats.measure(module, layer, queries[row, :, pad:]))
        means, covariances = zip(*rows, strict=True)
        self._held["query_mean"] = torch.stack(means) * factor
        self._held["query_cov"] = torch.stack(covariances) * factor**2


def received(
    queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """The attention that keys get from queries, summed over them and the group's query heads.

    Args:
        queries: (B, Hq, q, d).
        keys: (B, H, m, d).
        visible: (B, H, q, m) or broadcast to it; a query that sees nothing gives nothing.
        scale: factor on the logits.

    Returns:
        (B, H, m) float32.
    """
    rows, heads, m, d = keys.shape
    q, group = queries.shape[2], queries.shape[1] // heads
    total = torch.zeros(rows, heads, m, device=keys.device)
    visible = visible.expand(rows, heads, q, m)
    for start, end in itertools.pairwise([*range(0, q, BLOCK), q]):
        asked = queries[:, :, start:end].float().reshape(rows, heads, -1, d)
        logits = (asked @ keys.float().mT * scale).unflatten(2, (group, end - start))
        hidden = ~visible[:, :, start:end].unsqueeze(2)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        total += weights.nan_to_num(0).sum((2, 3))
    return total
