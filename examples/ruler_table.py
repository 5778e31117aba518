"""RULER under eviction: accuracy of every agent by task, length and budget, as one table.

python examples/ruler_table.py --agents kvp-smollm2-135m,knorm,snapkv,oracle    # --help lists more

The prompts are question-agnostic: the cache is cut before the question is seen. Each task and
length is recorded and evaluated by commands of their own, several at a time; what an earlier run
has finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvenv.commands import write_json
from kvenv.display import console
from kvenv.evaluation.show import print_tasks
from kvenv.evaluation.statistics import provenance

NEEDLES = "niah_single,niah_multikey,niah_multivalue,niah_multiquery"


def main() -> None:
    """Record and evaluate what is missing, then put it together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--agents", required=True, help="as for kvenv evaluate")
    parser.add_argument("--tasks", default=NEEDLES)
    parser.add_argument("--lengths", default="1024,2048", help="prompt tokens")
    parser.add_argument("--prompts", type=int, default=48, help="of each task and length")
    parser.add_argument("--budgets", default="0.5,0.25,0.125")
    parser.add_argument("--work", type=Path, default=Path("runs/ruler"))
    parser.add_argument("--jobs", type=int, default=1, help="commands at the same time")
    parser.add_argument("--json", type=Path, default=Path("ruler.json"))
    args = parser.parse_args()

    def measure(pair: tuple[str, int]) -> Path:
        task, length = pair
        traces = args.work / args.model / f"{task}-{length}"
        figures = traces.with_suffix(".json")
        what = f"--agents {args.agents} --tasks accuracy --budgets {args.budgets}"
        evaluate = f"evaluate --traces {traces} {what} --json {figures}"
        if not done(figures, evaluate, args.prompts):
            recipe = f"--tasks {task} --prompting agnostic --split test --stats"
            size = f"--episodes {args.prompts} --prompt-tokens {length} --future-tokens 192"
            run(f"record ruler {recipe} {size} --model {args.model} --out {traces}")
            run(evaluate)
        return figures

    pairs = [(t, int(n)) for n in args.lengths.split(",") for t in args.tasks.split(",")]
    with ThreadPoolExecutor(args.jobs) as pool:
        parts = [json.loads(path.read_text()) for path in pool.map(measure, pairs)]
    result = {**provenance(), "model": args.model, "accuracy": joined(parts)}
    print_tasks(result)
    write_json(args.json, result)


def done(figures: Path, evaluate: str, prompts: int) -> bool:
    """Whether an earlier run has measured just this: the same agents, budgets and prompts."""
    if not figures.exists():
        return False
    found = json.loads(figures.read_text())
    groups = found["accuracy"]["groups"]
    return found["command"].endswith(evaluate) and groups[0]["prompts"] == prompts


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The accuracy sections of several evaluations as one."""
    groups = [group for part in parts for group in part["accuracy"]["groups"]]
    return {**parts[0]["accuracy"], "groups": groups}


def run(line: str) -> None:
    """Print a command and run it in a process of its own."""
    console.print(f"$ kvenv {line}", markup=False, soft_wrap=True)
    if status := subprocess.call([sys.executable, "-m", "kvenv.cli", *line.split()]):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
