"""Use 2: train an agent from Python and compare it with heuristics on held-out episodes."""

from __future__ import annotations

import argparse

from kvenv import plugins
from kvenv.display import print_results
from kvenv.evaluation.retention import measure
from kvenv.evaluation.statistics import summarise
from kvenv.learning.run import Run
from kvenv.scorers import load_scorer
from kvenv.trace import TraceSet


def main() -> None:
    """Train on one set, measure on another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", default="sample")
    parser.add_argument("--held-out", default="sample", help="use another set for honest figures")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="kvp")
    args = parser.parse_args()

    train, test = TraceSet(args.traces), TraceSet(args.held_out)
    agent = plugins.load("agent", "kvp")(steps=args.steps)
    scorer = agent.fit([train], run=Run(validation=[test], progress=True))
    scorer.save_pretrained(args.out)

    scorers = {name: load_scorer(name) for name in ("random", "knorm", "keydiff", "oracle")}
    print_results(summarise(measure([test], {"kvp": scorer, **scorers})))


if __name__ == "__main__":
    main()
