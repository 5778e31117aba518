"""What every benchmark here does: time two ways in turn, print their ratio, write figures."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvenv.commands import write_json
from kvenv.evaluation.statistics import provenance


def parser(description: str, repeats: int = 5) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description.split("\n\n")[0])
    made.add_argument("--repeats", type=int, default=repeats, help="of each way, in turn")
    made.add_argument("--json", type=Path, help="also write the figures here")
    return made


def compare(
    ways: dict[str, Callable[[], object]], work: float, unit: str, repeats: int, device: str = "cpu"
) -> dict[str, Any]:
    """Run each way once unmeasured, then all in turn; the first is what the others are held to.

    Args:
        ways: name -> what to time; the baseline comes first.
        work: how much one call does, in units.
        unit: e.g. "tokens".
        repeats: measured calls of each.
        device: waited for before each reading of the clock.

    Returns:
        For each way its median seconds, all seconds, units a second, and its speed over the
        baseline's.
    """
    if repeats < 1:
        raise SystemExit(f"--repeats {repeats}: give at least 1")
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(timed(way, device))
    baseline = median(seconds[next(iter(ways))])
    rows = {
        name: {
            "seconds": median(taken),
            "all_seconds": taken,
            f"{unit}_per_second": work / median(taken),
            "speed_over_baseline": baseline / median(taken),
        }
        for name, taken in seconds.items()
    }
    for name, row in rows.items():
        rate, ratio = row[f"{unit}_per_second"], row["speed_over_baseline"]
        print(f"{name:32} {row['seconds']:9.4f} s  {rate:12,.1f} {unit}/s  {ratio:6.2f}x")
    return rows


def timed(way: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    wait(device)
    began = time.perf_counter()
    way()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    """Until a GPU has done what was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def write(path: Path | None, options: argparse.Namespace, rows: dict[str, Any]) -> None:
    """The figures with command, versions and machine, where a path is given."""
    if path is None:
        return
    asked = {k: v if isinstance(v, (int, float)) else str(v) for k, v in vars(options).items()}
    facts = {**provenance(), "processor": platform.processor(), "threads": torch.get_num_threads()}
    write_json(path, {"format": "kvenv-benchmark", **facts, "options": asked, "rows": rows})
