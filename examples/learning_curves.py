"""How stable-baselines3's agents learn: held-out curves, and a comparison on test episodes.

kvenv record text --split train --out runs/seq-train --episodes 64 --prompt-tokens 384 \
    --future-tokens 128 --layers 5,10,15,20 --queries all
    (and the same with --split validation --out runs/seq-val --episodes 12, and with
    --split test --out runs/seq-test --episodes 24)
python examples/learning_curves.py
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch

import kvenv  # noqa: F401  (registers the environments)
from kvenv import plugins
from kvenv.commands import parse_heads, write_json
from kvenv.display import console
from kvenv.evaluation.play import play_all
from kvenv.evaluation.statistics import interval, provenance
from kvenv.learning.run import Run
from kvenv.scorers import load_scorer
from kvenv.trace import TraceSet

CACHE = {"budget": 64, "sinks": 4, "recent": 16}
EXPERIMENTS = {
    "PPO on Rank-v1": ("ppo", {"env": "rank", "steps": 6144}, "normalized_score"),
    "PPO on Stream-v1": ("ppo", {"env": "stream", "steps": 40_000, **CACHE}, "retention"),
    "MaskablePPO on Evict-v1": ("maskable_ppo", {"steps": 24_000, **CACHE}, "retention"),
}
"""Title -> agent, its options, and what is measured."""


def main() -> None:
    """Train, compare, and write figures and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--train", default="runs/seq-train")
    parser.add_argument("--validation", default="runs/seq-val")
    parser.add_argument("--test", default="runs/seq-test")
    parser.add_argument("--heads", default="5:0,10:1,15:2,20:0")
    parser.add_argument("--share", type=float, default=1.0, help="of the usual training steps")
    parser.add_argument("--json", type=Path, default=Path("learning_curves.json"))
    parser.add_argument("--picture", default="learning_curves.png")
    args = parser.parse_args()
    heads = parse_heads(args.heads)
    train, test = [TraceSet(args.train)], TraceSet(args.test)
    run = Run(validation=[TraceSet(args.validation)], progress=True)

    learned, results = {}, {}
    for title, (name, options, figure) in EXPERIMENTS.items():
        lengths = {key: options[key] for key in ("steps",) if key in options}
        scaled = {key: max(12, round(args.share * value)) for key, value in lengths.items()}
        steps = scaled["steps"]
        agent = plugins.load("agent", name)(**{**options, **scaled})
        console.print(title)
        watched = replace(run, evaluate_every=steps // 12)
        scorer = learned[title] = agent.fit(train, heads, watched)
        results[title] = {
            "agent": name,
            "options": scorer.training["options"],
            "seconds": scorer.training["seconds"],
            "seconds_per_head": scorer.training["seconds"] / len(heads),
            "figure": figure,
            "curves": scorer.training["curves"],
        }

    others = {name: load_scorer(name) for name in ("random", "streaming", "knorm", "oracle")}
    for title, result in results.items():
        env_id = f"kvenv/{title.split()[-1]}"
        figure = result["figure"]
        arguments = CACHE if figure == "retention" else {}
        result["test"] = {}
        for name, scorer in {"learned": learned[title], **others}.items():
            columns = []
            for layer, head in heads:
                where = {"layer": layer, "head": head}
                env = gym.make(env_id, traces=str(test.path), **where, **arguments)
                columns.append(play_all(env, scorer, figure)[:, 0])
                env.close()
            result["test"][name] = figures(np.stack(columns, 1), heads, test)
    facts = {**provenance(), "cache": CACHE, "traces": train[0].manifest.origin}
    write_json(args.json, {"format": "kvenv-learning-curves", "version": 1, **facts, **results})
    draw(results, args.picture)
    for title, result in results.items():
        console.print(f"{title}: {result['figure']} on {len(test)} test episodes, by head")
        for name, row in result["test"].items():
            console.print(f"  {name:<10}", *(f"{k} {v['mean']:.3f}" for k, v in row.items()))


def figures(table: np.ndarray, heads: list[tuple[int, int]], test: TraceSet) -> dict:
    """Mean and 95 % interval over documents for each head, from (episodes, heads)."""
    documents = [test.info(i).document for i in range(len(test))]
    names = [f"{layer}:{head}" for layer, head in heads]
    return {name: interval(column, documents) for name, column in zip(names, table.T, strict=True)}


def draw(results: dict, picture: str) -> None:
    """Held-out figures by training time, a line a head."""
    figure, axes = plt.subplots(1, len(results), figsize=(12, 3.5), layout="constrained")
    for axis, (title, result) in zip(axes.flat, results.items(), strict=True):
        for head, curve in result["curves"].items():
            points = [(one["seconds"], one[result["figure"]]) for one in curve]
            axis.plot(*zip(*points, strict=True), marker=".", label=f"head {head}")
        axis.set(title=title, xlabel="training, s (2 CPU cores)")
        axis.set_ylabel(f"held-out {result['figure']}")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(picture, dpi=110)
    print(f"wrote {picture}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
