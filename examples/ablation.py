"""What raises the held-out normalized score: signals, rewards, inputs, sizes, steps and data.

kvenv record text --split train --out runs/train --episodes 400 --prompt-tokens 768 \
    --future-tokens 128    (and the same with --split validation --out runs/validation)
python examples/ablation.py --train runs/train --validation runs/validation

Every variant differs from the base in what its name says, and is measured on the validation set.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kvenv import plugins
from kvenv.commands import parse_heads, write_json
from kvenv.display import console
from kvenv.evaluation.retention import measure
from kvenv.evaluation.statistics import interval, provenance
from kvenv.learning.run import Run
from kvenv.trace import TraceSet

BASE = "kvp"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "signal: pairwise, then expected reward": (BASE, {}),
    "signal: expected reward alone": (BASE, {"warm_start": 0}),
    "signal: regression, then expected reward": (BASE, {"warm_signal": "regression"}),
    "signal: listwise, then expected reward": (BASE, {"warm_signal": "listwise"}),
    "signal: sampled, reward to go, K=8": (BASE, {"credit": "reward_to_go", "warm_start": 0}),
    "signal: sampled, plain, K=8": (BASE, {"credit": "plain", "warm_start": 0}),
    "signal: sampled, reward to go, K=32": (
        BASE,
        {"credit": "reward_to_go", "samples": 32, "warm_start": 0},
    ),
    "signal: pairwise": ("pairwise", {}),
    "signal: pairwise, 64 pairs": ("pairwise", {"pairs": 64}),
    "signal: listwise": ("listwise", {}),
    "signal: regression": ("regression", {}),
    "sink_free: 0": (BASE, {"sink_free": 0.0}),
    "sink_free: 0.8": (BASE, {"sink_free": 0.8}),
    "sink_free: 0.95": (BASE, {"sink_free": 0.95}),
    "inputs: key": (BASE, {"inputs": ["key"]}),
    "inputs: value": (BASE, {"inputs": ["value"]}),
    "size: linear": (BASE, {"hidden": []}),
    "size: 64": (BASE, {"hidden": [64]}),
    "size: 256": (BASE, {"hidden": [256]}),
    "size: 128, 128": (BASE, {"hidden": [128, 128]}),
    "size: 256, 256": (BASE, {"hidden": [256, 256]}),
    "size: 512, 512": (BASE, {"hidden": [512, 512]}),
    "size: 128, 128, 128": (BASE, {"hidden": [128, 128, 128]}),
    "steps: quarter": (BASE, {"steps": 0.25}),
    "steps: double": (BASE, {"steps": 2.0}),
    "steps: four times": (BASE, {"steps": 4.0}),
    "batch: 4": (BASE, {"batch": 4}),
    "lr: half": (BASE, {"lr": 0.5}),
    "lr: double": (BASE, {"lr": 2.0}),
    "weight decay: 0.01": (BASE, {"weight_decay": 0.01}),
    "weight decay: 0.5": (BASE, {"weight_decay": 0.5}),
}
"""Name -> agent, and options; steps and lr are factors."""


def main() -> None:
    """Train every variant, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--train", default="runs/train", help="trace sets, separated by commas")
    parser.add_argument("--validation", default="runs/validation")
    parser.add_argument("--heads", help="layer:head,layer:head; all by default")
    parser.add_argument("--only", default="*", help="names, as a shell pattern")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="variants trained at the same time")
    parser.add_argument("--json", type=Path, default=Path("ablation.json"))
    args = parser.parse_args()
    chosen = [name for name in VARIANTS if fnmatch(name, args.only)]
    if not chosen:
        parser.error(f"--only {args.only!r} matches none of: {'; '.join(VARIANTS)}")
    results = {}
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        for name, figures in zip(
            chosen, pool.map(run, chosen, [vars(args)] * len(chosen)), strict=True
        ):
            results[name] = figures
            normalized_score, free = (
                figures[kind]["mean"] for kind in ("normalized_score", "sink_free")
            )
            console.print(
                f"{name:40} {normalized_score:.4f}, sink-free {free:.4f}, "
                f"{figures['seconds']:.0f} s"
            )
            write_json(args.json, {**provenance(), "variants": results})


def run(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Train one variant and measure it: normalized scores with intervals, seconds of training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, validation = (
        [TraceSet(path) for path in args[part].split(",")] for part in ("train", "validation")
    )
    agent, options = VARIANTS[name]
    plugin = plugins.load("agent", agent)
    options = {**options, "lr": options.get("lr", 1.0) * plugin().lr}
    options["steps"] = round(args["steps"] * options.get("steps", 1.0))
    heads = parse_heads(args["heads"]) if args["heads"] else None
    # Validation sets, so that nothing is held out of the training documents; measured below.
    scorer = plugin(**options).fit(
        train, heads, Run(validation=validation, evaluate_every=10**9, device=device)
    )
    (measured,) = measure(validation, {name: scorer}, heads, device=device)
    return {
        "agent": agent,
        "options": options,
        "seconds": scorer.training["seconds"],
        "normalized_score": interval(measured.full["normalized_score"].mean(1), measured.documents),
        "sink_free": interval(measured.sink_free["normalized_score"].mean(1), measured.documents),
    }


if __name__ == "__main__":
    main()
