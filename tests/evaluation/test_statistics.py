from __future__ import annotations

import datetime
import json
import sys

import numpy as np
import pytest
from scipy import stats

import kvenv
from kvenv.evaluation import statistics
from kvenv.evaluation.retention import METRICS, Measurement
from kvenv.evaluation.statistics import by_document, interval, provenance, summarise

VALUES = np.array([1.0, 3.0, 10.0, 0.0, 4.0, 6.0])
DOCUMENTS = ["b", "b", "a", "c", "b", "c"]  # means: a 10, b 8/3, c 3


def test_rows_of_one_document_are_averaged_first():
    np.testing.assert_allclose(by_document(VALUES, DOCUMENTS), [10, 8 / 3, 3])
    table = np.stack([VALUES, -VALUES], axis=1)
    np.testing.assert_allclose(by_document(table, DOCUMENTS)[:, 1], [-10, -8 / 3, -3])


def test_the_mean_is_over_documents_and_not_over_episodes():
    figures = interval(VALUES, DOCUMENTS)
    assert figures["mean"] == pytest.approx((10 + 8 / 3 + 3) / 3)
    assert figures["mean"] != pytest.approx(VALUES.mean())
    assert figures["low"] == pytest.approx(8 / 3)  # of 27 resamples, one has the least thrice
    assert figures["high"] == pytest.approx(10)


def test_the_interval_is_scipys_percentile_bootstrap_over_documents():
    rng = np.random.default_rng(3)
    values = rng.exponential(size=60)
    documents = [f"d{i // 3}" for i in range(60)]
    rows = values.reshape(20, 3).mean(1)
    figures = interval(values, documents)
    theirs = stats.bootstrap((rows,), np.mean, method="percentile", rng=np.random.default_rng(1))
    spread = theirs.standard_error
    assert figures["mean"] == pytest.approx(rows.mean())
    # Another seed: equal but for the noise of 9,999 resamples.
    assert figures["low"] == pytest.approx(theirs.confidence_interval.low, abs=0.1 * spread)
    assert figures["high"] == pytest.approx(theirs.confidence_interval.high, abs=0.1 * spread)
    assert interval(values, documents) == figures
    # Episodes of one document are not independent: ignoring that would claim too much.
    honest, naive = interval(values, documents), interval(np.repeat(rows, 3), map(str, range(60)))
    assert honest["high"] - honest["low"] > 1.4 * (naive["high"] - naive["low"])


def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    rng = np.random.default_rng(0)
    documents = [str(i) for i in range(40)]
    hits = 0
    for _ in range(200):
        figures = interval(rng.normal(5, 2, 40), documents)
        assert figures["low"] < figures["mean"] < figures["high"]
        hits += figures["low"] <= 5 <= figures["high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_one_document_says_nothing_of_the_spread():
    figures = interval(np.array([1.0, 2.0]), ["only", "only"])
    assert figures == {"mean": 1.5, "low": 1.5, "high": 1.5}


def test_equal_documents_have_no_spread():
    figures = interval(np.full(5, 0.25), list("abcde"))
    assert figures == {"mean": 0.25, "low": 0.25, "high": 0.25}


def measurement(agent: str, shift: float = 0.0) -> Measurement:
    rng = np.random.default_rng(0)
    full, free = (
        {metric: rng.random((6, 2)).astype(np.float64) + shift for metric in METRICS}
        for _ in range(2)
    )
    return Measurement(agent, [(1, 0), (3, 1)], DOCUMENTS, full, free)


def test_a_summary_holds_every_agents_figures_and_survives_json():
    knorm, kvp = measurement("knorm"), measurement("kvp", 1.0)
    result = summarise([knorm, kvp])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["episodes"], result["documents"]) == (6, 3)
    assert result["heads"] == [[1, 0], [3, 1]]
    assert list(result["agents"]) == ["knorm", "kvp"]
    for measured in (knorm, kvp):
        figures = result["agents"][measured.agent]
        for kind in ("full", "sink_free"):
            table = getattr(measured, kind)
            assert figures[kind].keys() == set(METRICS)
            for metric in METRICS:
                assert figures[kind][metric] == interval(table[metric].mean(1), DOCUMENTS)
            heads = by_document(table["closure"], DOCUMENTS).mean(0)
            np.testing.assert_allclose(figures["per_head"][kind], heads, atol=1e-6)
    assert result["agents"]["kvp"]["full"] != result["agents"]["knorm"]["full"]


def test_provenance_says_how_a_number_came_about(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/kvenv", "evaluate", "my traces", "--x=1"])
    before = datetime.date.today()
    record = provenance()
    assert json.loads(json.dumps(record)) == record
    assert record["command"] == "kvenv evaluate 'my traces' --x=1"
    assert before <= datetime.date.fromisoformat(record["date"]) <= datetime.date.today()
    assert record["versions"]["kvenv"] == kvenv.__version__
    assert record["versions"]["numpy"] == np.__version__
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "gymnasium", "stable-baselines3"} <= set(record["versions"])
    assert record["machine"]["cores"] >= 1
    assert record["machine"].keys() == {"system", "processor", "cores"}
    assert all(record["machine"].values())


def test_provenance_names_a_script(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / "examples" / "curves.py"), "--share", "1"])
    assert provenance()["command"] == "python examples/curves.py --share 1"
