"""What an evaluation says of agents, and of how they compare."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kvenv.evaluation import statistics
from kvenv.evaluation.retention import BUDGETS, METRICS, Kind, Measurement
from kvenv.evaluation.statistics import by_document, interval, paired, summarise

DOCUMENTS = ["b", "b", "a", "c", "b", "c"]
HEADS = [(1, 0), (3, 1)]
TABLES = ("full", "sink_free")


def measurement(
    agent: str, kind: Kind = "heuristic", seed: int = 0, shift: float = 0.0
) -> Measurement:
    rng = np.random.default_rng(seed)
    full, free = ({metric: rng.random((6, 2)) + shift for metric in METRICS} for _ in range(2))
    curves = {t: rng.random((6, 2, len(BUDGETS))).astype(np.float32) for t in TABLES}
    return Measurement(agent, kind, HEADS, DOCUMENTS, full, free, curves)


def with_score(
    agent: str, normalized_score: Any, kind: Kind = "heuristic", heads: Any = None
) -> Measurement:
    """All metrics are this normalized_score (E, H); every episode is a document of its own."""
    table = dict.fromkeys(METRICS, np.asarray(normalized_score, float))
    episodes, count = table["normalized_score"].shape
    heads = [(0, h) for h in range(count)] if heads is None else heads
    curve = np.zeros((episodes, count, len(BUDGETS)), np.float32)
    documents = [f"{i:03}" for i in range(episodes)]
    return Measurement(agent, kind, heads, documents, table, table, dict.fromkeys(TABLES, curve))


def test_a_summary_holds_every_agents_figures_and_survives_json():
    knorm, kvp = measurement("knorm"), measurement("kvp", "learned", shift=1.0)
    result = summarise([knorm, kvp])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["episodes"], result["documents"]) == (6, 3)
    assert result["heads"] == [[1, 0], [3, 1]]
    assert result["budgets"] == list(BUDGETS)
    assert {name: agent["kind"] for name, agent in result["agents"].items()} == {
        "knorm": "heuristic",
        "kvp": "learned",
    }
    for measured in (knorm, kvp):
        figures = result["agents"][measured.agent]
        for name in TABLES:
            table = getattr(measured, name)
            assert figures[name].keys() == set(METRICS)
            for metric in METRICS:
                expected = interval(table[metric].mean(1), DOCUMENTS)
                assert figures[name][metric] == pytest.approx(expected, abs=1e-6)
            heads = by_document(table["normalized_score"], DOCUMENTS).mean(0)
            np.testing.assert_allclose(figures["per_head"][name], heads, atol=1e-6)
            curve = figures["curve"][name]
            assert {len(line) for line in curve.values()} == {len(BUDGETS)}
            for at in (0, 8, 32):
                values = measured.curves[name][..., at].astype(float).mean(1)
                expected = interval(values, DOCUMENTS)
                got = {bound: curve[bound][at] for bound in ("mean", "low", "high")}
                assert got == pytest.approx(expected, abs=1e-6)
    assert result["agents"]["kvp"]["full"] != result["agents"]["knorm"]["full"]


def test_each_metric_is_compared_with_the_heuristic_that_is_best_at_it():
    agents = [measurement(name, seed=seed) for seed, name in enumerate(("random", "knorm", "tova"))]
    kvp = measurement("kvp", "learned", seed=7, shift=0.2)
    oracle = measurement("oracle", "oracle", seed=8, shift=0.9)
    result = summarise([kvp, *agents, oracle])
    comparison = result["comparison"]
    assert comparison.keys() == {"kvp", "oracle"}
    baselines = set()
    for ours in (kvp, oracle):
        for name in TABLES:
            figures = comparison[ours.agent][name]
            assert figures.keys() == {*METRICS, "improvement", "heads"}
            for metric in METRICS:
                means = {m.agent: result["agents"][m.agent][name][metric]["mean"] for m in agents}
                best = max(means, key=means.__getitem__)
                baselines.add(best)
                theirs = next(getattr(m, name) for m in agents if m.agent == best)
                expected = paired(
                    getattr(ours, name)[metric].mean(1), theirs[metric].mean(1), DOCUMENTS
                )
                assert figures[metric].pop("baseline") == best
                assert figures[metric] == pytest.approx(expected, abs=1e-6)
    assert len(baselines) > 1, "the example is too easy"


def test_probability_of_improvement_counts_documents_and_heads_with_ties_as_half():
    rival = with_score("knorm", [[0.5, 0.5], [0.5, 0.5]])
    weak = with_score("random", [[0.0, 0.0], [0.0, 0.0]])
    ours = with_score("kvp", [[0.6, 0.5 + 1e-12], [0.4, 0.7]], "learned")
    figures = summarise([rival, ours, weak])["comparison"]["kvp"]["full"]["improvement"]
    # Document means: one win and a tie, 0.75; one win and a loss, 0.5.
    assert figures == {"mean": 0.625, "low": 0.5, "high": 0.75}


def test_heads_are_compared_with_the_best_heuristic_of_their_own():
    heads = [(0, 0), (0, 1), (7, 0), (7, 1), (9, 1)]
    one = with_score("one", [[0.9, 0.2, 0.5, 0.8, 0.3]] * 3, heads=heads)
    two = with_score("two", [[0.1, 0.8, 0.6, 0.2, 0.5]] * 3, heads=heads)
    ours = with_score("kvp", [[0.95, 0.75, 0.6, 0.5, 0.9]] * 3, "learned", heads)
    figures = summarise([one, ours, two])["comparison"]["kvp"]["sink_free"]["heads"]
    assert figures == {
        "wins": 2,
        "of": 5,
        "behind": [[7, 1, "one", -0.3], [0, 1, "two", -0.05]],  # 7:0 is level
    }


def test_without_a_heuristic_there_is_nothing_to_compare_with():
    result = summarise([measurement("kvp", "learned"), measurement("oracle", "oracle")])
    assert result["comparison"] == {}
    assert summarise([measurement("knorm")])["comparison"] == {}


def test_one_document_gives_figures_without_a_spread():
    ours, rival = with_score("kvp", [[0.5, 0.7]], "learned"), with_score("knorm", [[0.4, 0.4]])
    figures = summarise([ours, rival])["comparison"]["kvp"]["full"]
    assert figures["normalized_score"].pop("baseline") == "knorm"
    assert figures["normalized_score"] == dict.fromkeys(("difference", "low", "high"), 0.2)
    assert figures["improvement"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_intervals_of_improvement_and_difference_cover_the_truth(monkeypatch: pytest.MonkeyPatch):
    """The gain over a baseline is 0.5 + what its document adds + what its head adds to that."""
    monkeypatch.setattr(statistics, "RESAMPLES", 399)
    rng = np.random.default_rng(2)
    spread = (0.8, 0.6)
    truth = {"improvement": stats.norm.cdf(0.5 / np.hypot(*spread)), "normalized_score": 0.5}
    hits, runs = dict.fromkeys(truth, 0), 200
    for _ in range(runs):
        base = rng.normal(0, 4, (40, 1)) + rng.normal(size=(40, 6))
        gain = 0.5 + rng.normal(0, spread[0], (40, 1)) + rng.normal(0, spread[1], (40, 6))
        ours, rival = with_score("kvp", base + gain, "learned"), with_score("knorm", base)
        figures = summarise([ours, rival])["comparison"]["kvp"]["full"]
        for name, value in truth.items():
            hits[name] += figures[name]["low"] <= value <= figures[name]["high"]
    for name, count in hits.items():
        assert 0.89 <= count / runs <= 0.99, name
