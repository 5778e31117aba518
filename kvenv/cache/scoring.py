"""What a cache asks of scorers: sane answers, and the fallback's where the first has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvenv.errors import KvenvError
from kvenv.scorers.base import NEEDS, Head, Scorer
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.network import Architecture, PerHeadMLP

LISTED = 5

SERVED = NEEDS - {"utility"}
"""What a cache can tell a scorer of the attention that it serves."""

Networks = tuple[PerHeadMLP, Architecture]


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
        self.pointwise = all(one.pointwise and not one.needs for one in asked)
        """Whether every head's scores are fixed when a token arrives."""
        self.needs = frozenset[str]().union(*(one.needs for one in asked))
        """What it wants beyond keys, values and positions."""
        self.ages = any(one.age_term is not None for one in asked)
        """Whether a token's age adds to its score."""

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
        pads: list[int] | None = None,
        **needs: torch.Tensor,
    ) -> torch.Tensor:
        """Scores (B, H, n) float32; what pad tokens get is not meant to be used.

        Args:
            layer: the model's own layer number.
            keys: (B, H, n, d).
            values: (B, H, n, d).
            positions: (B, H, n) int64, negative for pads.
            pads: leading pad tokens per row, or None.
            **needs: what `needs` names, as for `kvenv.scorers.base.Scorer.score`.
        """
        scores = _ask(self._scorer, layer, keys, values, positions, pads, needs)
        missing = self._missing_at(layer, keys.device)
        if missing is None or self._fallback is None:
            return scores
        filler = _ask(self._fallback, layer, keys, values, positions, pads, needs)
        return torch.where(missing, filler, scores)

    def networks(self, layer: int, device: torch.device) -> Networks | None:
        """The networks that score every KV head of a layer, in order, if that is all there is."""
        scorer = self._scorer
        if layer in self._missing or not self.pointwise or not isinstance(scorer, NetworkScorer):
            return None
        return scorer.layer_networks(layer, device), scorer.architecture

    @torch.no_grad()
    def age(self, layer: int, age: torch.Tensor) -> torch.Tensor | None:
        """What to add to scores at decision time for ages (B, H, n) int64, or None."""
        missing = self._missing_at(layer, age.device)
        term = self._scorer.age_term
        if missing is None or self._fallback is None:
            return None if term is None else term(layer, age)
        other = self._fallback.age_term
        if term is None and other is None:
            return None
        none = torch.zeros(age.shape, device=age.device)
        added = (none if one is None else one(layer, age) for one in (other, term))
        return torch.where(missing, *added)

    def check(self, layer: int, scores: torch.Tensor, positions: torch.Tensor) -> None:
        """Raise KvenvError naming layer and head if a true token's score is NaN (synchronises)."""
        broken = (scores.isnan() & (positions >= 0)).any(-1).any(0)
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
            f"{scorer!r} is not a scorer: give an agent's scorer (needs, pointwise, age_term, "
            "heads and score)"
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
    pads: list[int] | None,
    needs: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    if pads is None or scorer.pointwise:
        wanted = {name: needs[name] for name in scorer.needs}
        scores = scorer.score(layer, keys, values, positions.clamp(min=0), **wanted)
        if scores.shape != positions.shape:
            raise KvenvError(
                f"{_name(scorer)}.score gave shape {tuple(scores.shape)} in layer {layer}: it must "
                f"be (batch, KV heads, tokens) = {tuple(positions.shape)}"
            )
        return scores.to(keys.device, torch.float32)
    # Here a token's score depends on the others, and pads must not be among them.
    scores = torch.zeros(positions.shape, device=keys.device)
    for row, pad in enumerate(pads):
        if pad < positions.shape[-1]:
            part = (slice(row, row + 1), slice(None), slice(pad, None))
            scores[part] = _ask(scorer, layer, keys[part], values[part], positions[part], None, {})
    return scores
