"""Means over documents with bootstrap intervals, and the record that a published number needs."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import kvenv
from kvenv.errors import KvenvError
from kvenv.evaluation.retention import BUDGETS, METRICS, Measurement
from kvenv.scorers.base import Head

RESAMPLES = 9999
"""Bootstrap resamples behind every interval, drawn with one seed."""

TABLES = ("full", "sink_free")
"""Over all tokens, and with the first 4 left out."""

TIE = 1e-9
"""Normalized scores nearer than this are equal but for rounding."""

_NUMBERS = 4_000_000
"""Resampled numbers held at once."""


def by_document(values: np.ndarray, documents: Sequence[str]) -> np.ndarray:
    """Average the rows of ``values`` (E, ...) that belong to one document, (D, ...).

    Raises:
        KvenvError: if there is not one document for each row.
    """
    names, which = np.unique(list(documents), return_inverse=True)
    if len(which) != len(values) or not len(values):
        raise KvenvError(
            f"{len(values)} figures for {len(which)} episodes: give one for each, of at least one"
        )
    return np.stack([values[which == row].mean(0) for row in range(len(names))])


def bounds(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of (D, C) columns and their 95 % percentile-bootstrap intervals over the D rows.

    The rows are resampled whole, the same for all columns.

    Returns:
        Mean, low and high, each (C,) float64. Of a single row all three are that row, since it
        says nothing of the spread.
    """
    rows = np.asarray(rows, np.float64)
    mean = rows.mean(0)
    if len(rows) < 2:
        return mean, mean, mean
    result = stats.bootstrap(
        (rows,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=min(RESAMPLES, max(1, _NUMBERS // rows.size)),
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return mean, result.confidence_interval.low, result.confidence_interval.high


def interval(values: np.ndarray, documents: Sequence[str]) -> dict[str, float]:
    """Mean over documents and its 95 % percentile-bootstrap interval.

    Args:
        values: (E,) one number for each episode.
        documents: the document of each.

    Returns:
        "mean", "low" and "high"; of a single document all three are its value.
    """
    mean, low, high = bounds(by_document(values, documents)[:, None])
    return {"mean": float(mean[0]), "low": float(low[0]), "high": float(high[0])}


def paired(a: np.ndarray, b: np.ndarray, documents: Sequence[str]) -> dict[str, float]:
    """How far ``a`` lies above ``b``: the mean over documents of their difference.

    Both were measured on the same episodes, and a resample takes the same documents of both, so
    that what makes a document easy for either cancels.

    Args:
        a: (E,) one number for each episode.
        b: (E,) the same episodes' numbers of what it is compared with.
        documents: the document of each episode.

    Returns:
        "difference", "low" and "high": the mean and its 95 % percentile-bootstrap interval.

    Raises:
        KvenvError: if the three are not of one length.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise KvenvError(
            f"paired figures of shapes {a.shape} and {b.shape}: measure both on the same episodes"
        )
    figures = interval(a - b, documents)
    return {"difference": figures["mean"], "low": figures["low"], "high": figures["high"]}


def summarise(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """The figures of an evaluation, JSON-safe, to six decimals.

    Returns:
        "heads", "episodes", "documents", "budgets" (of the curves, as fractions of the prompt),
        "agents" and "comparison".

        Of every agent: "kind", "full" and "sink_free" (metric -> mean, low, high over documents),
        "per_head" (normalized score of each head, both ways) and "curve" (both ways, retention at
        each budget: lists of mean, low and high).

        Of every agent that is no heuristic, where there is a heuristic to compare with, both ways:
        for each metric the "baseline" (the heuristic with the highest mean there, picked on these
        same documents, so in its own favour) and the paired "difference", "low" and "high";
        "improvement", the probability that on a random document and head the agent's normalized
        score is above that of the metric's baseline (a tie counts half); and "heads", how many of
        them have a normalized score above their own best heuristic's, and those "behind" it, worst
        first, as [layer, head, heuristic, margin].
    """
    first = measurements[0]
    metrics = {m.agent: _by_document(m) for m in measurements}
    return {
        "heads": [list(head) for head in first.heads],
        "episodes": len(first.documents),
        "documents": len(set(first.documents)),
        "budgets": list(BUDGETS),
        "agents": {m.agent: _own(m, metrics[m.agent]) for m in measurements},
        "comparison": _comparison(measurements, metrics),
    }


def _by_document(m: Measurement) -> dict[str, np.ndarray]:
    """Table -> (D, H, metrics)."""
    tables = {"full": m.full, "sink_free": m.sink_free}
    stacked = {t: np.stack([table[k] for k in METRICS], -1) for t, table in tables.items()}
    return {t: by_document(values, m.documents) for t, values in stacked.items()}


def _own(m: Measurement, metrics: dict[str, np.ndarray]) -> dict[str, Any]:
    """One agent's entry under "agents"."""
    figures: dict[str, Any] = {"kind": m.kind}
    curves = {}
    for table in TABLES:
        curve = by_document(m.curves[table].mean(axis=1, dtype=np.float64), m.documents)
        columns = np.stack(bounds(np.hstack([metrics[table].mean(axis=1), curve])))
        figures[table] = {metric: _named("mean", columns[:, k]) for k, metric in enumerate(METRICS)}
        curves[table] = _named("mean", columns[:, len(METRICS) :])
    normalized_score = METRICS.index("normalized_score")
    figures["per_head"] = {t: _plain(metrics[t][..., normalized_score].mean(0)) for t in TABLES}
    return {**figures, "curve": curves}


def _comparison(
    measurements: Sequence[Measurement], metrics: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Every agent that is no heuristic against those that are; empty if there are none."""
    rivals = [m.agent for m in measurements if m.kind == "heuristic"]
    others = [m.agent for m in measurements if m.kind != "heuristic"]
    heads = measurements[0].heads
    result: dict[str, Any] = {name: {} for name in others if rivals}
    for table in TABLES if rivals else ():
        theirs = np.stack([metrics[name][table] for name in rivals])  # (R, D, H, metrics)
        for name in result:
            result[name][table] = _against(metrics[name][table], theirs, rivals, heads)
    return result


def _against(
    ours: np.ndarray, theirs: np.ndarray, rivals: Sequence[str], heads: Sequence[Head]
) -> dict[str, Any]:
    """One agent's (D, H, metrics) against the rivals' (R, D, H, metrics)."""
    normalized_score = METRICS.index("normalized_score")
    best = theirs.mean(axis=(1, 2)).argmax(0)
    differences = np.stack(
        [(ours - theirs[row])[..., k].mean(1) for k, row in enumerate(best)], axis=1
    )
    gain = ours[..., normalized_score] - theirs[best[normalized_score], ..., normalized_score]
    above = np.where(np.abs(gain) <= TIE, 0.5, gain > 0).mean(1)
    columns = np.stack(bounds(np.column_stack([differences, above])))
    result: dict[str, Any] = {
        metric: {"baseline": rivals[best[k]], **_named("difference", columns[:, k])}
        for k, metric in enumerate(METRICS)
    }
    result["improvement"] = _named("mean", columns[:, -1])
    per_head = theirs[..., normalized_score].mean(1)  # (R, H)
    margins = ours[..., normalized_score].mean(0) - per_head.max(0)
    result["heads"] = {
        "wins": int((margins > TIE).sum()),
        "of": len(heads),
        "behind": [
            [*heads[h], rivals[per_head[:, h].argmax()], _plain(margins[h])]
            for h in np.argsort(margins, kind="stable")
            if margins[h] < -TIE
        ],
    }
    return result


def _named(what: str, columns: np.ndarray) -> dict[str, Any]:
    """Mean, low and high, each a number or a list of them, under their names."""
    return {name: _plain(c) for name, c in zip((what, "low", "high"), columns, strict=True)}


def _plain(values: np.ndarray) -> Any:
    return (np.round(values, 6) + 0.0).tolist()  # no -0.0


def provenance() -> dict[str, Any]:
    """What a published number carries: command, date, versions, machine."""
    versions = {"kvenv": kvenv.__version__, "python": platform.python_version()}
    for package in (
        "torch",
        "transformers",
        "gymnasium",
        "stable-baselines3",
        "numpy",
        "scipy",
        "triton",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    script = sys.argv[0].endswith(".py") and Path(sys.argv[0]).name not in ("cli.py", "__main__.py")
    program = ["python", os.path.relpath(sys.argv[0])] if script else ["kvenv"]
    return {
        "command": shlex.join([*program, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        },
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [
                line.split(":", 1)[1].strip() for line in info if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
