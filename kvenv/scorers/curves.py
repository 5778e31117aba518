"""Retention curves of heads, kept with an agent: what each budget holds, for dividing budgets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvenv import utility as ut
from kvenv.errors import KvenvError
from kvenv.scorers.base import Head, Scorer

if TYPE_CHECKING:
    from kvenv.trace import TraceSet

FORMAT, VERSION = "kvenv-curves", 1

GRID = (
    *(step / 256 for step in range(9)),
    *(step / 64 for step in range(3, 17)),
    *(step / 32 for step in range(9, 33)),
)
"""Budgets, as fractions of the prompt, at which curves are kept: densest where they are steep."""

SINK_FREE = 0.5
"""How much the sink-free part of the utility counts, as in training: `kvenv.utility.emphasise`.

Sinks hold most of the attention and next to nothing of what it moves, since their values are small.
By all tokens alike, heads with strong sinks would seem to need no others, and perplexity suffers.
"""

DIGITS = 6
"""Decimals that are kept: far more than documents agree on."""


@dataclass(frozen=True, eq=False)
class Curves:
    """The mean retention of heads under an agent's own ranking.

    Attributes:
        heads: H distinct (layer, KV head) pairs.
        fractions: (P,) float64 budgets as fractions of the prompt, ascending from 0 to 1.
        retention: (H, P) float64 in [0, 1], rising: what the best-ranked tokens hold of a head's
            utility, averaged over episodes; half of it is the retention of all tokens, half the
            sink-free one (`SINK_FREE`).
        tokens: the mean prompt length that they were measured at.

    Raises:
        KvenvError: if they are anything else.
    """

    heads: tuple[Head, ...]
    fractions: np.ndarray
    retention: np.ndarray
    tokens: float

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # frozen
        set_(self, "heads", tuple((int(layer), int(head)) for layer, head in self.heads))
        for name in ("fractions", "retention"):
            array = np.array(getattr(self, name), np.float64)
            array.setflags(write=False)
            set_(self, name, array)
        if wrong := self._wrong():
            raise KvenvError(f"retention curves {wrong}: measure them again with `kvenv curves`")

    def __repr__(self) -> str:
        heads, points = self.retention.shape
        return f"Curves({heads} heads, {points} budgets, prompts of {self.tokens:g} tokens)"

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "tokens": round(self.tokens, 1),
            "fractions": self.fractions.tolist(),
            "heads": [list(head) for head in self.heads],
            "retention": np.round(self.retention, DIGITS).tolist(),
        }

    @classmethod
    def from_json(cls, found: Any) -> Curves:
        """Curves from what a file held.

        Raises:
            KvenvError: if it is not what `to_json` gives.
        """
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise KvenvError(f"no {FORMAT} file: measure curves again with `kvenv curves`")
        if found.get("version") != VERSION:
            raise KvenvError(f"version {found.get('version')!r}, not {VERSION}: update kvenv")
        try:
            parts = (found["heads"], found["fractions"], found["retention"])
            return cls(*parts, tokens=float(found["tokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise KvenvError(
                f"damaged curves ({error!r}): measure them again with `kvenv curves`"
            ) from error

    def _wrong(self) -> str | None:
        """What is wrong with them, if anything."""
        x, r = self.fractions, self.retention
        if len(set(self.heads)) < len(self.heads) or not self.heads:
            return "are of no heads, or twice of one"
        if x.ndim != 1 or r.shape != (len(self.heads), len(x)):
            return f"of shape {r.shape} do not fit {len(self.heads)} heads and budgets {x.shape}"
        if not (len(x) > 1 and x[0] == 0 and x[-1] == 1 and (np.diff(x) > 0).all()):
            return "are not at budgets that ascend from 0 to 1"
        bad = ~((r >= 0) & (r <= 1)).all(1) | (np.diff(r, axis=1) < 0).any(1)
        if bad.any():
            layer, head = self.heads[int(bad.argmax())]
            return f"of layer {layer} head {head} do not rise from 0 to 1"
        if not 1 <= self.tokens < math.inf:
            return f"were measured at {self.tokens} tokens"
        return None


def emphasised(utility: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The retention (H, n) that curves are of, at every budget 1..n, from utility and scores."""
    return ut.retention(ut.emphasise(utility, SINK_FREE), scores)


def average(heads: Sequence[Head], retentions: Iterable[torch.Tensor]) -> Curves:
    """Curves at `GRID`, averaged over episodes.

    Args:
        heads: H (layer, KV head) pairs.
        retentions: of each episode, `emphasised` (H, n).

    Raises:
        KvenvError: if there is no episode.
    """
    total, tokens, count = np.zeros((len(heads), len(GRID))), 0, 0
    for one in retentions:
        n = one.shape[-1]
        whole = np.pad(one.detach().double().cpu().numpy(), ((0, 0), (1, 0)))  # nothing holds 0
        place = np.array(GRID) * n
        low = np.floor(place).astype(int)
        share = place - low
        total += whole[:, low] * (1 - share) + whole[:, np.minimum(low + 1, n)] * share
        tokens, count = tokens + n, count + 1
    if not count:
        raise KvenvError("no episodes to measure retention curves on: give recorded traces")
    # Rounding of sums must not make a curve fall by its last digit.
    mean = np.maximum.accumulate(np.round(total / count, DIGITS).clip(0, 1), axis=1)
    return Curves(tuple(heads), np.array(GRID), mean, tokens / count)


def measure_curves(
    scorer: Scorer,
    traces: Sequence[TraceSet],
    *,
    tick: Callable[[], None] | None = None,
    device: str | torch.device = "cpu",
) -> Curves:
    """A scorer's retention curves on recorded prompts, ages counted from the prompt's end.

    Args:
        scorer: what ranks the tokens.
        traces: sets of its model, best of documents that it was not trained on.
        tick: called after every episode.
        device: where scores are computed.

    Returns:
        Curves of the heads that are recorded in every set and that the scorer covers.

    Raises:
        KvenvError: on sets of another model, or as for `kvenv.evaluation.retention.score_prompt`.
    """
    # The evaluation reads bundles, which read this module.
    from kvenv.evaluation.retention import score_prompt, shared_heads

    if not traces:
        raise KvenvError("no trace sets to measure retention curves on: give at least one")
    heads = shared_heads(traces, {"curves": scorer})

    def retentions() -> Iterable[torch.Tensor]:
        for one in traces:
            for index in range(len(one)):
                utility, scores = score_prompt(one, index, {"curves": scorer}, heads, device)
                yield emphasised(utility, scores["curves"])
                if tick is not None:
                    tick()

    return average(heads, retentions())


def dump(curves: Curves) -> str:
    """Curves as the text of their file, a line a head."""
    told = curves.to_json()
    rows = ",\n  ".join(map(json.dumps, told.pop("retention")))
    head = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in told.items())
    return f'{{\n {head},\n "retention": [\n  {rows}\n ]\n}}\n'
