"""The main job on a real model: record SmolLM2, train KVP on every head, decode in a quarter.

Runs the commands that it prints; `make demo` calls it. Everything lands in ./demo, and running it
again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time


def kvenv(*arguments: str) -> None:
    """Run one kvenv command, printed as a user would type it."""
    print(f"\n$ {shlex.join(['kvenv', *arguments])}", flush=True)
    subprocess.run([sys.executable, "-m", "kvenv.cli", *arguments], check=True)


def main() -> None:
    """Record, train, evaluate, decode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="demo", help="folder for traces, agent and results")
    parser.add_argument("--episodes", type=int, default=40, help="training episodes a workload")
    parser.add_argument("--held-out", type=int, default=12, help="held-out episodes a workload")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    args = parser.parse_args()
    out, began = args.out, time.monotonic()

    length = ["--prompt-tokens", str(args.prompt_tokens), "--future-tokens", "96"]
    workloads = {
        "text": [],
        "ruler": ["--tasks", "niah_single,niah_multikey", "--prompting", "agnostic"],
    }
    for name, options in workloads.items():
        for split, count in (("train", args.episodes), ("test", args.held_out)):
            where = ["--split", split, "--out", f"{out}/{name}-{split}", "--episodes", str(count)]
            kvenv("record", name, *options, *where, *length)

    train, test = (f"{out}/text-{s},{out}/ruler-{s}" for s in ("train", "test"))
    bundle = f"{out}/kvp"
    validation = ["--validation", test, "--evaluate-every", "250"]
    steps = ["--steps", str(args.steps), "--overwrite", "--resume"]
    kvenv("train", "kvp", "--traces", train, *validation, "--out", bundle, *steps)
    agents = f"{bundle},random,streaming,knorm,keydiff,oracle"
    kvenv("evaluate", "--traces", test, "--agents", agents, "--json", f"{out}/retention.json")
    episode = ["--traces", f"{out}/ruler-test", "--episode", "0"]
    kvenv("generate", *episode, "--agent", bundle, "--budget", "0.25", "--compare")
    print(f"\nThe whole demo took {time.monotonic() - began:.0f} s; its files are in {out}/.")


if __name__ == "__main__":
    main()
