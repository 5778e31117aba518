"""Means over documents with bootstrap intervals, and the record that a published number needs."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from scipy import stats

import kvenv
from kvenv.evaluation.retention import METRICS, Measurement

RESAMPLES = 9999


def by_document(values: np.ndarray, documents: Sequence[str]) -> np.ndarray:
    """Average the rows of ``values`` (E, ...) that belong to one document, (D, ...)."""
    names, which = np.unique(np.asarray(documents), return_inverse=True)
    return np.stack([values[which == row].mean(0) for row in range(len(names))])


def interval(values: np.ndarray, documents: Sequence[str]) -> dict[str, float]:
    """Mean over documents and its 95 % percentile-bootstrap interval.

    Args:
        values: (E,) one number for each episode.
        documents: the document of each.

    Returns:
        "mean", "low" and "high"; of a single document all three are its value, since it says
        nothing of the spread.
    """
    rows = by_document(values, documents)
    mean = float(rows.mean())
    if len(rows) < 2:
        return {"mean": mean, "low": mean, "high": mean}
    result = stats.bootstrap(
        (rows,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    low, high = result.confidence_interval
    return {"mean": mean, "low": float(low), "high": float(high)}


def summarise(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """The figures of an evaluation, JSON-safe.

    Returns:
        "heads", "episodes", "documents", and for every agent "full" and "sink_free" (metric ->
        mean, low, high over documents) and "per_head" (closure of each head, both ways).
    """
    first = measurements[0]
    agents: dict[str, Any] = {}
    for m in measurements:
        agents[m.agent] = {
            kind: {metric: interval(table[metric].mean(axis=1), m.documents) for metric in METRICS}
            for kind, table in (("full", m.full), ("sink_free", m.sink_free))
        }
        agents[m.agent]["per_head"] = {
            kind: by_document(table["closure"], m.documents).mean(0).round(6).tolist()
            for kind, table in (("full", m.full), ("sink_free", m.sink_free))
        }
    return {
        "heads": [list(head) for head in first.heads],
        "episodes": len(first.documents),
        "documents": len(set(first.documents)),
        "agents": agents,
    }


def provenance() -> dict[str, Any]:
    """What a published number carries: command, date, versions, machine."""
    versions = {"kvenv": kvenv.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "gymnasium", "stable-baselines3", "numpy", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    script = sys.argv[0].endswith(".py") and not sys.argv[0].endswith("__main__.py")
    program = ["python", os.path.relpath(sys.argv[0])] if script else ["kvenv"]
    return {
        "command": shlex.join([*program, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "cores": os.cpu_count(),
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
