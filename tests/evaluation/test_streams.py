"""Streams of recorded tokens, against a loop over tokens with plain attention."""

from __future__ import annotations

import pytest
import torch

from kvenv.errors import KvenvError
from kvenv.evaluation.calibrating import calibrate
from kvenv.evaluation.streams import Stream, measure_streams
from kvenv.scorers import load_scorer


def by_hand(traces, index: int, scorer, budget: int, every: int) -> float:
    """Sink-free retention of uniform budgets, head by head and token by token."""
    length, shares = traces.info(index).S, []
    for layer, head in traces.heads:
        one = traces.head(index, layer, head)
        keys, values = (torch.from_numpy(x).float() for x in (one.keys, one.values))
        queries, held = torch.from_numpy(one.queries).float(), list(range(budget))
        for now in range(budget, length):
            if len(held) == budget:
                at = torch.tensor(held).view(1, 1, -1)
                given = keys[held][None, None], values[held][None, None], at
                scores = scorer.score(layer, *given, torch.tensor([now - 1]))[0, 0]
                scores[[t < 2 or t > now - 4 for t in held]] = torch.inf
                best = scores.argsort(descending=True, stable=True)[: budget - every]
                held = sorted(held[i] for i in best)
            held.append(now)
            logits = queries[:, now] @ keys[: now + 1].T * keys.shape[1] ** -0.5
            mass = logits.softmax(-1).sum(0)
            free = [t for t in held if t >= 4]
            shares.append((mass[free].sum() / mass[4:].sum()).item())
    return sum(shares) / len(shares)


def test_uniform_budgets_are_those_of_a_plain_loop(recorded) -> None:
    traces = recorded("llama", [(50, 14), (40, 12)], queries="all")
    limits = {"sinks": 2, "recent": 3, "refresh": 4}
    scorers = {"knorm": load_scorer("knorm"), "oracle": load_scorer("oracle")}
    found = measure_streams([traces], scorers, [16, 24], **limits)
    assert found["left_out"] == {"oracle": "needs utility"}
    for budget in (16, 24):
        each = [by_hand(traces, i, scorers["knorm"], budget, 4) for i in (0, 1)]
        mean = found["agents"]["knorm"][str(budget)]["mean"]
        assert mean == pytest.approx(sum(each) / 2, rel=1e-5)


def test_attention_heuristics_see_what_queries_gave(recorded) -> None:
    traces = recorded("llama", [(50, 14)], queries="all")
    stream = Stream(traces, 0)
    stream.read(0, 20)
    stream.read(20, 50)
    for layer in (0, 1):
        for name, ours in (("past/sum", stream.past), ("past/window", stream.recent)):
            expected = torch.from_numpy(traces.read(0, name, layer))
            torch.testing.assert_close(ours[layer, :, :50], expected, rtol=5e-3, atol=5e-3)


def test_heads_compete_in_streams(recorded) -> None:
    traces = recorded("llama", [(50, 14)], queries="all")
    scorers = {"recent": load_scorer("recent")}
    tables = {"recent": calibrate(scorers["recent"], [traces])}
    options = {"allocations": ["uniform", "layerwise", "adaptive"], "calibrations": tables}
    found = measure_streams([traces], scorers, [24], sinks=2, recent=3, refresh=4, **options)
    figures = [entry["24"]["mean"] for entry in found["agents"].values()]
    assert list(found["agents"]) == ["recent", "recent (layerwise)", "recent (adaptive)"]
    assert len(set(figures)) == 3
    assert all(0 < figure <= 1 for figure in figures)


def test_streams_need_all_queries(sets) -> None:
    with pytest.raises(KvenvError, match="record it with --queries all"):
        measure_streams([sets("llama")], {"knorm": load_scorer("knorm")}, [24])
