"""What a cache asks of scorers: sane answers, and the fallback's where the first has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvenv.errors import KvenvError
from kvenv.rotation import Rotation
from kvenv.scorers.base import NEEDS, Head, Scorer
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.network import Architecture, PerHeadMLP

LISTED = 5

SERVED = NEEDS - {"utility"}
"""What a cache can tell a scorer of the attention that it serves."""


Networks = tuple[PerHeadMLP, Architecture, Rotation]


class CacheScorer:
    """A scorer and its fallback as one, checked once for a model and then for every answer.

    Args:
        scorer: gives the scores.
        fallback: gives those of the heads that ``scorer`` does not know.
        kv_heads: the KV heads of every layer that evicts, by the model's own layer number.

    Raises:
        KvenvError: if a scorer is none, needs what a cache cannot give, or leaves heads without
            scores.
    """

    def __init__(
        self, scorer: Scorer, fallback: Scorer | None, kv_heads: Mapping[int, int]
    ) -> None:
        for one in (scorer,) if fallback is None else (scorer, fallback):
            _check_usable(one)
        self._scorer, self._fallback = scorer, fallback
        heads = [(layer, head) for layer, count in kv_heads.items() for head in range(count)]
        missing = _not_covered(scorer, heads)
        if missing and fallback is None:
            raise KvenvError(
                f"{_name(scorer)} has no scores for {_listed(missing, heads)}: pass fallback= a "
                "scorer that has them, such as the knorm agent's"
            )
        if fallback is not None and (left := _not_covered(fallback, missing)):
            raise KvenvError(
                f"neither {_name(scorer)} nor the fallback {_name(fallback)} has scores for "
                f"{_listed(left, heads)}: pass a fallback= for every head, such as the knorm "
                "agent's"
            )
        self._missing = {
            layer: torch.tensor([[(layer, head) in missing] for head in range(count)])
            for layer, count in kv_heads.items()
            if any((layer, head) in missing for head in range(count))
        }
        asked = [scorer] if fallback is None or not missing else [scorer, fallback]
        self.kv_heads = dict(kv_heads)
        """KV heads of every layer that evicts."""
        self.needs = frozenset[str]().union(*(one.needs for one in asked))
        """What it wants beyond keys, values and positions."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheScorer:
        # A copied cache (a prompt used again) needs its own slots, not a copy of the weights.
        return self

    def __repr__(self) -> str:
        if self._fallback is None or not self._missing:
            return _name(self._scorer)
        return f"{_name(self._scorer)} or {_name(self._fallback)}"

    @torch.no_grad()
    def score(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        now: torch.Tensor,
        **needs: torch.Tensor,
    ) -> torch.Tensor:
        """Scores (B, H, n) float32; as `kvenv.scorers.base.Scorer.score`, for every head."""
        scores = _ask(self._scorer, layer, keys, values, positions, now, needs)
        missing = self._missing_at(layer, keys.device)
        if missing is None or self._fallback is None:
            return scores
        filler = _ask(self._fallback, layer, keys, values, positions, now, needs)
        return torch.where(missing, filler, scores)

    def pointwise(self, layer: int) -> bool:
        """Whether a token's score is known not to depend on the others that are there."""
        return isinstance(self._scorer, NetworkScorer) and layer not in self._missing

    def networks(self, layer: int, device: torch.device) -> Networks | None:
        """The networks that score every KV head of a layer, if that is all there is."""
        scorer = self._scorer
        if not self.pointwise(layer) or not isinstance(scorer, NetworkScorer):
            return None
        network = scorer.layer_networks(layer, device)
        return network, scorer.architecture, scorer.model.rotation(layer)

    def check(self, layer: int, scores: torch.Tensor, present: torch.Tensor) -> None:
        """Raise KvenvError naming layer and head if a token's score is NaN (synchronises)."""
        broken = (scores.isnan() & present).any(-1).any(0)
        if broken.any():
            head = int(broken.nonzero()[0])
            raise KvenvError(
                f"{self!r} gave NaN in layer {layer}, KV head {head}: check the model's keys and "
                "values for overflow (run it in bfloat16 or float32) and the scorer's weights"
            )

    def _missing_at(self, layer: int, device: torch.device) -> torch.Tensor | None:
        missing = self._missing.get(layer)
        if missing is not None and missing.device != device:
            missing = self._missing[layer] = missing.to(device)
        return missing


def _name(scorer: Scorer) -> str:
    """How messages call a scorer."""
    return type(scorer).__name__


def _check_usable(scorer: Scorer) -> None:
    if not isinstance(scorer, Scorer):
        raise KvenvError(
            f"{scorer!r} is not a scorer: give an agent's scorer (needs, heads and score)"
        )
    if unknown := scorer.needs - SERVED:
        raise KvenvError(
            f"{_name(scorer)} needs {', '.join(sorted(unknown))}, which no cache can know: use a "
            f"scorer of keys, values, positions and {', '.join(sorted(SERVED))}"
        )


def _not_covered(scorer: Scorer, heads: list[Head]) -> list[Head]:
    known = scorer.heads
    return [] if known is None else [head for head in heads if head not in known]


def _listed(missing: list[Head], heads: list[Head]) -> str:
    more = ", ..." if len(missing) > LISTED else ""
    first = ", ".join(map(str, missing[:LISTED]))
    return f"{len(missing)} of the {len(heads)} heads (layer, KV head) {first}{more}"


def _ask(
    scorer: Scorer,
    layer: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    now: torch.Tensor,
    needs: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    wanted = {name: needs[name] for name in scorer.needs}
    scores = scorer.score(layer, keys, values, positions, now, **wanted)
    if scores.shape != positions.shape:
        raise KvenvError(
            f"{_name(scorer)}.score gave shape {tuple(scores.shape)} in layer {layer}: it must "
            f"be (batch, KV heads, tokens) = {tuple(positions.shape)}"
        )
    return scores.to(keys.device, torch.float32)
