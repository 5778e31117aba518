"""What a stream's queries still find of their attention, under selection every R tokens.

Simulated on recorded traces with all queries: no model runs, and attention is the full cache's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kvenv.errors import KvenvError
from kvenv.evaluation.cut import Allocation, calibrations_of, row_name
from kvenv.evaluation.retention import shared_heads
from kvenv.evaluation.statistics import interval
from kvenv.rules import (
    SINKS,
    compete,
    competition_floor,
    protected,
    ranking,
    refresh_interval,
    worth,
)
from kvenv.scorers.base import RECENT_QUERIES, Scorer
from kvenv.scorers.calibration import Calibration
from kvenv.trace import TraceSet

SERVED = frozenset({"queries", "past_attention", "recent_attention"})
"""What scorers may need here."""


class Stream:
    """One recorded text, read token by token; all recorded layers at once.

    Attributes:
        length: S tokens.
        layers: recorded layers, in the model's own numbers.
        past: (L, H, S) attention so far; recent: that of the last `RECENT_QUERIES` queries.
    """

    def __init__(self, traces: TraceSet, index: int, device: str | torch.device = "cpu") -> None:
        if traces.manifest.queries != "all":
            raise KvenvError(
                f"{traces.path} was recorded without all queries, which streams need: record it "
                "with --queries all"
            )
        self.length, self.layers = traces.info(index).S, traces.model.layers
        self.keys, self.values, self.queries = (
            torch.from_numpy(traces.read(index, name)).to(device)
            for name in ("keys", "values", "queries")
        )
        self.past = torch.zeros(self.keys.shape[:3], device=device)
        self._last: list[torch.Tensor] = []

    @property
    def recent(self) -> torch.Tensor:
        """(L, H, S) attention of the last queries."""
        return sum(self._last, torch.zeros_like(self.past))

    def read(self, begin: int, end: int) -> torch.Tensor:
        """The attention of queries ``begin`` to ``end``, summed over groups, (L, H, R, S)."""
        heads, d = self.keys.shape[1], self.keys.shape[-1]
        queries = self.queries[:, :, begin:end].float().unflatten(1, (heads, -1))
        logits = queries @ self.keys[:, :, :end].float().unsqueeze(2).mT * d**-0.5
        future = torch.ones(end - begin, end, device=logits.device).triu(begin + 1).bool()
        weights = logits.masked_fill_(future, -torch.inf).softmax(-1).sum(2)
        rows = torch.nn.functional.pad(weights, (0, self.length - end))
        self.past += rows.sum(2)
        self._last = [*self._last, *rows[:, :, -RECENT_QUERIES:].unbind(2)][-RECENT_QUERIES:]
        return rows

    def scores(self, scorer: Scorer, held: torch.Tensor, now: int) -> torch.Tensor:
        """Scores (L, H, S) of the tokens ``held`` (L, H, S) bool; NaN elsewhere."""
        found = torch.full_like(self.past, torch.nan)
        moment = torch.tensor([now], device=held.device)
        recent = self.recent if "recent_attention" in scorer.needs else self.past
        for at, layer in enumerate(self.layers):
            counts = held[at].sum(-1)
            alike = bool((counts == counts[0]).all())
            heads = [slice(None)] if alike else [slice(h, h + 1) for h in range(len(counts))]
            for rows in heads:  # a scorer sees as many tokens of each head
                positions = held[at, rows].nonzero()[:, 1].view(len(counts[rows]), -1)
                positions = positions.expand(len(counts), -1)
                where = positions.unsqueeze(-1).expand(-1, -1, self.keys.shape[-1])
                keys, values = (
                    x[at].gather(1, where).unsqueeze(0) for x in (self.keys, self.values)
                )
                needs = {
                    "queries": self.queries[at : at + 1, :, : now + 1],
                    "past_attention": self.past[at].gather(1, positions).unsqueeze(0),
                    "recent_attention": recent[at].gather(1, positions).unsqueeze(0),
                }
                given = scorer.score(
                    *(layer, keys, values, positions.unsqueeze(0), moment),
                    **{name: needs[name] for name in scorer.needs},
                )[0]
                found[at, rows] = found[at, rows].scatter(1, positions[rows], given[rows].float())
        return found


def select(
    scores: torch.Tensor,
    held: torch.Tensor,
    now: int,
    kept: int,
    *,
    sinks: int,
    recent: int,
    allocation: Allocation = "uniform",
    calibration: Calibration | None = None,
    layers: Sequence[int] = (),
) -> torch.Tensor:
    """Which of the tokens ``held`` stay, (L, H, S) bool.

    Args:
        scores: (L, H, S).
        held: (L, H, S) bool.
        now: position of the newest token.
        kept: tokens a head keeps, on average where heads compete.
        sinks: first tokens, always kept.
        recent: last tokens, always kept.
        allocation: how heads share the total.
        calibration: what they compete by.
        layers: the layers' numbers, for the calibration.
    """
    depth, heads, n = held.shape
    positions = torch.arange(n, device=held.device).expand_as(held)
    guarded = protected(positions, torch.full_like(positions, now), sinks, recent) & held
    order = ranking(worth(scores, guarded, held))
    if allocation == "uniform" or calibration is None:
        counts = torch.full((depth, heads, 1), kept, device=held.device)
    else:
        masses = torch.stack(
            [
                calibration.masses_of(layer, one.nan_to_num(0).unsqueeze(0))[0]
                for layer, one in zip(layers, scores, strict=True)
            ]
        )
        masses = worth(masses, guarded, held).view(depth if allocation == "layerwise" else 1, -1, n)
        floor = competition_floor(kept, sinks + recent)
        counts = compete(masses, kept * masses.shape[1], floor).view(depth, heads, 1)
    first = torch.arange(n, device=held.device) < counts
    return torch.zeros_like(held).scatter(-1, order, first) & held


@torch.inference_mode()
def measure_streams(
    sets: Sequence[TraceSet],
    scorers: Mapping[str, Scorer],
    budgets: Sequence[int],
    *,
    sinks: int = 4,
    recent: int = 16,
    refresh: int | None = None,
    allocations: Sequence[Allocation] = ("uniform",),
    calibrations: Mapping[str, Calibration] | None = None,
    tick: Callable[[], None] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Sink-free retention in streams: of each query's attention, the share on tokens held.

    The first 4 tokens are left out of both sides. Averaged over heads and over all queries after
    the cache was full for the first time.

    Args:
        sets: recorded with all queries.
        scorers: agent -> scorer of every recorded head.
        budgets: tokens a head.
        sinks: first tokens, always kept.
        recent: last tokens, always kept.
        refresh: tokens between two selections; None: the cache's rule.
        allocations: how heads share the budget, each measured for every agent.
        calibrations: agent -> what heads compete by; of those not named, the scorer's own.
        tick: called after every episode and budget.
        device: where to compute.

    Returns:
        A "streams" section of an evaluation.

    Raises:
        KvenvError: on sets without all queries, a budget that no text fills, or scorers that need
            what a stream does not have.
    """
    left_out = {
        name: f"needs {', '.join(sorted(one.needs - SERVED))}"
        for name, one in scorers.items()
        if one.needs - SERVED
    }
    able = {name: one for name, one in scorers.items() if name not in left_out}
    if not able:
        raise KvenvError(f"none of the agents {', '.join(scorers)} can be streamed")
    missing = set(sets[0].heads) - set(shared_heads(sets, able))
    if missing:
        raise KvenvError(f"streams need every recorded head, and agents lack {sorted(missing)}")
    tables = dict(calibrations or {})
    if set(allocations) - {"uniform"}:
        tables = calibrations_of(able, calibrations)
    rows: dict[str, tuple[str, Allocation]] = {
        row_name(n, how): (n, how) for how in dict.fromkeys(allocations) for n in able
    }
    found: dict[tuple[str, int], list[float]] = {(r, b): [] for r in rows for b in budgets}
    documents, tokens = [], 0
    for traces in sets:
        for index in range(len(traces)):
            info = traces.info(index)
            if max(budgets) >= info.S:
                raise KvenvError(
                    f"episode {index} of {traces.path} has {info.S} tokens, none after the first "
                    f"{max(budgets)}: give smaller token budgets, or record longer episodes"
                )
            documents.append(info.document)
            tokens += info.S - max(budgets)
            for budget in dict.fromkeys(budgets):
                every = refresh_interval(budget, refresh, sinks + recent)
                stream = Stream(traces, index, device)
                stream.read(0, budget)
                held = torch.zeros_like(stream.past, dtype=torch.bool)
                held[..., :budget] = True
                state = dict.fromkeys(rows, held)
                sums = dict.fromkeys(rows, 0.0)
                for begin in range(budget, info.S, every):
                    end = min(begin + every, info.S)
                    for row, (name, how) in rows.items():
                        scores = stream.scores(able[name], state[row], begin - 1)
                        state[row] = select(
                            *(scores, state[row], begin - 1, budget - every),
                            sinks=sinks,
                            recent=recent,
                            allocation=how,
                            calibration=tables.get(name),
                            layers=stream.layers,
                        )
                        state[row][..., begin:end] = True
                    mass = stream.read(begin, end)[..., SINKS:]
                    whole = mass.sum(-1).clamp_min(1e-30)
                    for row in rows:
                        share = (mass * state[row][:, :, None, SINKS:]).sum(-1) / whole
                        sums[row] += share.mean((0, 1)).sum().item()
                for row, total in sums.items():
                    found[row, budget].append(total / (info.S - budget))
                if tick is not None:
                    tick()
    return {
        "sinks": sinks,
        "recent": recent,
        "refresh": refresh,
        "documents": len(set(documents)),
        "tokens": tokens,
        "agents": {
            row: {str(b): interval(np.array(found[row, b]), documents) for b in budgets}
            for row in rows
        },
        "left_out": left_out,
    }
