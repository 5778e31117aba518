"""What learning costs: seconds of training a head until learners rank equally well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.learning.episodes import choose_heads, hold_out
from kvenv.learning.run import Run
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer
from kvenv.trace import TraceSet, same_model

LEARNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "kvp": ("kvp", {}),
    "kvp-sampled": ("kvp", {"credit": "reward_to_go", "samples": 8, "warm_start": 0.0}),
    "kvp-plain": ("kvp", {"credit": "plain", "samples": 8, "warm_start": 0.0}),
    "pairwise": ("pairwise", {}),
    "listwise": ("listwise", {}),
    "regression": ("regression", {}),
    "ppo": ("ppo", {"env": "rank"}),
}
"""Name -> agent, and where its options differ from the usual ones; kvp-plain is the paper's."""

OURS, PPO = "kvp", "ppo"
METRICS = {"closure": "closure", "sink_free": "sink-free closure"}
EVALUATIONS = 50
"""How many times a run is measured on held-out documents: how finely a crossing is seen."""

Curve = list[dict[str, Any]]
"""A dict for each measurement: step, seconds_per_head, closure, sink_free (None: unknown)."""


@dataclass(frozen=True)
class Settings:
    """What is compared, and until when.

    Attributes:
        learners: names from `LEARNERS`.
        steps: optimiser steps of those that train all heads at once.
        ppo_steps: timesteps of ppo for each head.
        targets: metric -> the value to reach. Of a metric that is not here, it is what the weakest
            learner other than ppo has at its end, so that all reach it.
        device: what all but ppo compute on; ppo takes the CPU.
    """

    learners: Sequence[str] = tuple(LEARNERS)
    steps: int = 1000
    ppo_steps: int = 6144
    targets: Mapping[str, float] | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.learners:
            raise KvenvError(f"no learners: name some of {', '.join(LEARNERS)}")
        if unknown := [name for name in self.learners if name not in LEARNERS]:
            raise KvenvError(f"unknown learner {unknown[0]!r}: choose from {', '.join(LEARNERS)}")
        for name, steps in (("steps", self.steps), ("ppo-steps", self.ppo_steps)):
            if steps < 1:
                raise KvenvError(f"{name} is {steps}: it must be at least 1")
        for metric, value in (self.targets or {}).items():
            if not 0 < value <= 1:
                raise KvenvError(
                    f"a target of {value} for {METRICS[metric]}: give one above 0, "
                    "which is chance, and at most 1, which is perfect"
                )


def run(
    traces: Sequence[TraceSet],
    validation: Sequence[TraceSet],
    heads: Sequence[Head] | None,
    settings: Settings,
    console: Console,
) -> dict[str, Any]:
    """Train learners on the same heads of the same traces, one after another in this process.

    What counts is the time of training steps, reading the episodes included: not that of measuring
    on held-out documents, nor of the inputs' means and deviations, which are the same for all (on a
    GPU the episodes that it has room for are read then, once). All are warmed up on one head first.

    Args:
        traces: what to learn from, all of one model.
        validation: what to measure on; empty holds out a tenth of the training documents.
        heads: which heads; None means every recorded one.
        settings: which learners, for how long, until when.
        console: where the table goes.

    Returns:
        JSON-safe figures. ``learners`` has for each its ``options``, ``closure`` and ``sink_free``
        at the end, ``seconds_per_head`` of the whole run, its ``curve`` (means over heads) and
        ``reached``: metric -> step and seconds a head of the first measurement at the target or
        above, and how many times ours that is; None where it was never. ppo measures sink-free
        closure at its end alone, so its seconds until then are an upper bound.

    Raises:
        KvenvError: on sets of different models, heads not recorded, or nothing held out.
    """
    same_model([*traces, *validation])
    chosen = choose_heads(traces, heads)
    train, _, held = hold_out(traces, validation, chosen)
    if not held:
        raise KvenvError(
            "nothing is held out of a single document, so no quality can be measured: give "
            "--validation, or traces of more documents"
        )
    names = list(dict.fromkeys(settings.learners))
    for name in names:
        _fit(name, traces, validation, chosen[:1], settings, warm_up=True)
    learners: dict[str, dict[str, Any]] = {}
    # A bar that refreshes itself would take time from what is timed.
    with Progress(console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            bar.update(task, description=name, refresh=True)
            scorer = _fit(name, traces, validation, chosen, settings)
            curve = mean_curve(scorer)
            learners[name] = {
                "agent": scorer.training["agent"],
                "options": scorer.training["options"],
                "device": "cpu" if name == PPO else settings.device,
                **{metric: scorer.metrics[metric] for metric in METRICS},
                "seconds_per_head": curve[-1]["seconds_per_head"],
                "curve": curve,
            }
            bar.advance(task)
    targets = choose_targets(learners, settings.targets or {})
    compare(learners, targets)
    _show(learners, targets, len(chosen), console)
    return {
        "bench": "learners",
        "model": traces[0].model.id,
        "traces": [t.manifest.origin for t in traces],
        "validation": [t.manifest.origin for t in validation],
        "heads": [list(head) for head in chosen],
        "episodes": len(train),
        "held_out_episodes": len(held),
        "steps": settings.steps,
        "ppo_steps": settings.ppo_steps,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(settings.device) if "cuda" in settings.device else None,
        "targets": targets,
        "learners": learners,
    }


def _fit(
    name: str,
    traces: Sequence[TraceSet],
    validation: Sequence[TraceSet],
    heads: Sequence[Head],
    settings: Settings,
    warm_up: bool = False,
) -> NetworkScorer:
    agent, options = LEARNERS[name]
    steps = settings.ppo_steps if name == PPO else settings.steps
    if warm_up:
        steps = 1 if name == PPO else 2  # one for each signal of ours
    every = max(steps // EVALUATIONS, 1)
    learner = plugins.load("agent", agent)(**options, steps=steps)
    return learner.fit(
        traces, heads, Run(validation=validation, evaluate_every=every, device=settings.device)
    )


def mean_curve(scorer: NetworkScorer) -> Curve:
    """The held-out figures of a training run over its steps: means over heads, seconds a head.

    Args:
        scorer: trained on all heads at once (``training["curve"]``), or on one after another
            (``training["curves"]``, measured at the same steps).
    """
    training, heads = scorer.training, len(scorer.network.heads)
    if "curve" in training:
        return [_point(one["step"], one["seconds"] / heads, one) for one in training["curve"]]
    curve = []
    for ones in zip(*training["curves"].values(), strict=True):
        seconds, closure = (
            float(np.mean([one[k] for one in ones])) for k in ("seconds", "closure")
        )
        curve.append(_point(ones[0]["steps"], seconds, {"closure": closure}))
    curve[-1]["sink_free"] = scorer.metrics["sink_free"]
    return curve


def _point(step: int, seconds: float, figures: Mapping[str, float]) -> dict[str, Any]:
    return {"step": step, "seconds_per_head": seconds, **{m: figures.get(m) for m in METRICS}}


def choose_targets(
    learners: Mapping[str, Mapping[str, Any]], given: Mapping[str, float]
) -> dict[str, float]:
    """The targets that were given, and else what the weakest learner other than ppo ends with."""
    batch = [row for name, row in learners.items() if name != PPO] or list(learners.values())
    return {metric: given.get(metric, min(row[metric] for row in batch)) for metric in METRICS}


def first_at(curve: Curve, metric: str, target: float) -> dict[str, Any] | None:
    """Step and seconds a head of the first measurement at the target or above; None if never."""
    for one in curve:
        if one[metric] is not None and one[metric] >= target:
            return {name: one[name] for name in ("step", "seconds_per_head")}
    return None


def compare(learners: Mapping[str, dict[str, Any]], targets: Mapping[str, float]) -> None:
    """Add to each learner ``reached``: metric -> what `first_at` finds, and ``times_ours``."""
    for row in learners.values():
        row["reached"] = {m: first_at(row["curve"], m, target) for m, target in targets.items()}
    ours = learners[OURS]["reached"] if OURS in learners else {}
    base = {metric: one["seconds_per_head"] for metric, one in ours.items() if one}
    for row in learners.values():
        for metric, one in row["reached"].items():
            if one is not None:
                known = base.get(metric, 0) > 0
                one["times_ours"] = one["seconds_per_head"] / base[metric] if known else None


def _show(
    learners: Mapping[str, Mapping[str, Any]],
    targets: Mapping[str, float],
    heads: int,
    console: Console,
) -> None:
    title = f"seconds of training a head, until held-out closure is so high; heads: {heads}"
    table = Table(title=title, box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("learner", no_wrap=True)
    for heading in ("closure\nat end", "sink-free\nat end", "seconds\nin all"):
        table.add_column(heading, justify="right")
    for metric, target in targets.items():
        table.add_column(f"{METRICS[metric].split()[0]}\n≥ {target:.3f}", justify="right")
        table.add_column(f"x {OURS}", justify="right")
    for name, row in learners.items():
        cells = [f"{row[metric]:.3f}" for metric in METRICS] + [f"{row['seconds_per_head']:.3f}"]
        for one in row["reached"].values():
            ratio = one and one["times_ours"]
            cells += [f"{one['seconds_per_head']:.3f}" if one else "never"]
            cells += [f"{ratio:.1f}" if ratio else "-"]
        table.add_row(name, *cells)
    console.print(table)
    if PPO in learners:
        console.print("ppo's sink-free closure is known at its end alone", highlight=False)
