"""Rebuild a trained agent of agents/trained from nothing: record, train, export, evaluate, card.

python examples/build_zoo.py kvp-smollm2-135m --work runs/zoo    # or kvp-gemma-3-270m

The agent lands in WORK/NAME. What an earlier run has recorded and trained is not done again, so an
interrupted run goes on where it was; another --share needs another --work. About an hour and a half
on 2 CPU cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import torch

from kvenv.cli import main as kvenv
from kvenv.display import console
from kvenv.scorers import NetworkScorer
from kvenv.scorers.card import write_card

SETS = {
    "text-train": "text --split train --episodes 240",
    "long-train": "text --split train --episodes 120 --seed 1",
    "ruler-train": "ruler --split train --episodes 160",
    "text-validation": "text --split validation --episodes 48",
    "ruler-validation": "ruler --split validation --episodes 49",
    "text-test": "text --split test --episodes 48 --stats",
    "ruler-test": "ruler --split test --episodes 98 --stats",
    "long-test": "text --split test --episodes 8 --stats",
}
"""What is recorded: Python's standard library at two lengths, and all of RULER's tasks."""
LENGTHS = {
    "text": "--prompt-tokens 768 --future-tokens 128",
    "long": "--prompt-tokens 2048 --future-tokens 128",
    "ruler": "--prompt-tokens 1000 --future-tokens 192 --prompting agnostic",
}
TRAIN = "text-train,long-train,ruler-train"
AGENTS = {
    "kvp-smollm2-135m": ("smollm2-135m", TRAIN, "--steps 5000"),
    "kvp-gemma-3-270m": ("gemma-3-270m", TRAIN, "--steps 5000"),
}
"""Name -> model, training sets, and the options of KVP's that are not its defaults."""
VALIDATION, TESTS = "text-validation,ruler-validation", "text-test,ruler-test,long-test"
OTHERS = "random,streaming,knorm,keydiff,lagkv,tova,snapkv,h2o,observed,expected,oracle"
LIMITS = (
    "It was trained on Python sources and synthetic retrieval prompts; measure it on your own text "
    "before relying on it.",
)


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("name", choices=AGENTS)
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--share", type=float, default=1.0, help="of the episodes and steps")
    args = parser.parse_args()
    model, train, options = AGENTS[args.name]
    work, out = args.work / model, args.work / args.name

    def recorded(names: str) -> str:
        """Record sets, or what is missing of them; their folders, separated by commas."""
        for name in names.split(","):
            line = f"{scaled(SETS[name], args.share)} {LENGTHS[name.split('-')[0]]}"
            run(f"record {line} --model {model} --out {work / name}")
        return ",".join(str(work / name) for name in names.split(","))

    if not (work / "kvp").exists():
        resume = " --resume" if (work / "kvp.checkpoint").exists() else ""
        run(
            f"train kvp --traces {recorded(train)} --validation {recorded(VALIDATION)} "
            f"--out {work / 'kvp'} {scaled(options, args.share)}{resume}"
        )
    NetworkScorer.from_pretrained(work / "kvp").save_pretrained(out, dtype=torch.float16)
    results = []
    for test in recorded(TESTS).split(","):
        figures = Path(f"{test}.json")
        run(f"evaluate --traces {test} --agents {out},{OTHERS} --json {figures}")
        results.append(json.loads(figures.read_text()))
    share = f" --share {args.share:g}" if args.share != 1 else ""
    command = f"python examples/build_zoo.py {args.name}{share}"
    write_card(out, results, command, limits=LIMITS)
    console.print(f"wrote {out}", markup=False)


def scaled(line: str, share: float) -> str:
    """A command with its numbers of episodes and steps multiplied."""
    words = shlex.split(line)
    for at, word in enumerate(words):
        if word in ("--episodes", "--steps"):
            words[at + 1] = str(max(2, round(share * int(words[at + 1]))))
    return shlex.join(words)


def run(line: str) -> None:
    """Print a command and run it."""
    console.print(f"$ kvenv {line}", style="bold", markup=False, soft_wrap=True)
    if status := kvenv(shlex.split(line)):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
