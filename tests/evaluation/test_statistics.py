from __future__ import annotations

import datetime
import json
import sys

import numpy as np
import pytest
from scipy import stats

import kvenv
from kvenv.errors import KvenvError
from kvenv.evaluation import statistics
from kvenv.evaluation.statistics import bounds, by_document, interval, paired, provenance

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
    apart = [str(i) for i in range(60)]
    honest, naive = interval(values, documents), interval(np.repeat(rows, 3), apart)
    assert naive["high"] > naive["low"]
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


def test_columns_have_the_intervals_they_have_alone(monkeypatch: pytest.MonkeyPatch):
    rows = np.random.default_rng(5).random((12, 7))
    together = bounds(rows)
    alone = [interval(column, list("abcdefghijkl")) for column in rows.T]
    for figures, name in zip(together, ("mean", "low", "high"), strict=True):
        np.testing.assert_allclose(figures, [each[name] for each in alone], rtol=1e-12)
    monkeypatch.setattr(statistics, "_NUMBERS", 100)  # one resample at a time
    for figures, again in zip(together, bounds(rows), strict=True):
        np.testing.assert_allclose(figures, again, rtol=1e-12)


def test_a_paired_difference_leaves_out_what_a_document_does_to_both():
    rng = np.random.default_rng(0)
    documents = [f"d{i // 2}" for i in range(60)]
    ease = np.repeat(rng.normal(0, 10, 30), 2)
    a, b = ease + rng.normal(1, 0.1, 60), ease + rng.normal(0, 0.1, 60)
    figures = paired(a, b, documents)
    assert figures["difference"] == pytest.approx((a - b).mean())
    assert 0.9 < figures["low"] < figures["difference"] < figures["high"] < 1.1
    assert interval(a, documents)["low"] < interval(b, documents)["high"]  # unpaired: no verdict
    turned = paired(b, a, documents)
    assert turned["difference"] == pytest.approx(-figures["difference"])
    assert turned["low"] == pytest.approx(-figures["high"], abs=5e-3)


def test_a_paired_difference_is_scipys_paired_bootstrap_of_document_means():
    rng = np.random.default_rng(1)
    a, b = rng.exponential(size=(2, 60))
    documents = [f"d{i // 3}" for i in range(60)]
    means = [by_document(values, documents) for values in (a, b)]
    theirs = stats.bootstrap(
        means,
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(7),
    )
    figures, noise = paired(a, b, documents), 0.1 * theirs.standard_error
    assert figures["low"] == pytest.approx(theirs.confidence_interval.low, abs=noise)
    assert figures["high"] == pytest.approx(theirs.confidence_interval.high, abs=noise)


def test_paired_intervals_cover_the_truth_about_as_often_as_they_say(
    monkeypatch: pytest.MonkeyPatch,
):
    """Three episodes a document, of which each has its own difference about the true 0.3."""
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    rng = np.random.default_rng(0)
    documents = [str(i // 3) for i in range(120)]
    hits = naive = 0
    for _ in range(300):
        ease, gain = (np.repeat(rng.normal(mean, sd, 40), 3) for mean, sd in ((0, 5), (0.3, 1)))
        a, b = ease + gain + rng.normal(0, 0.3, 120), ease + rng.normal(0, 0.3, 120)
        figures = paired(a, b, documents)
        hits += figures["low"] <= 0.3 <= figures["high"]
        apart = paired(a, b, list(map(str, range(120))))  # as if episodes were independent
        naive += apart["low"] <= 0.3 <= apart["high"]
    assert 0.90 <= hits / 300 <= 0.98
    assert naive / 300 < 0.85


def test_figures_that_do_not_match_are_an_error():
    with pytest.raises(KvenvError, match=r"shapes \(3,\) and \(2,\): measure both on the same"):
        paired(np.ones(3), np.ones(2), list("abc"))
    for count, documents in ((3, "ab"), (2, "abc"), (0, "")):
        with pytest.raises(KvenvError, match=f"{count} figures for {len(documents)} episodes"):
            interval(np.ones(count), list(documents))


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
