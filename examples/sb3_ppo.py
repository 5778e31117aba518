"""Train PPO from stable-baselines3 on one attention head, and export what a cache decodes with."""

from __future__ import annotations

import argparse

from stable_baselines3 import PPO

from kvenv.learning.sb3 import HeldOut, TokenPolicy, export, make_vec, standardise
from kvenv.trace import TraceSet


def main() -> None:
    """Learn to rank prompts, one shared network for every token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", default="sample")
    parser.add_argument("--held-out", default="sample", help="use another set for honest figures")
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--head", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2048)
    parser.add_argument("--out", default="ppo")
    args = parser.parse_args()

    where = {"layer": args.layer, "head": args.head}
    mean, std = standardise([TraceSet(args.traces)], [(args.layer, args.head)])
    held_out = HeldOut(make_vec("kvenv/Rank-v1", 4, traces=args.held_out, **where), every=1024)
    model = PPO(
        TokenPolicy,
        make_vec("kvenv/Rank-v1", 16, traces=args.traces, **where),
        learning_rate=1e-3,
        n_steps=4,
        batch_size=32,
        n_epochs=4,
        policy_kwargs={"mean": mean, "std": std},
        seed=0,
        device="cpu",
    )
    model.learn(args.steps, callback=held_out)
    for figures in held_out.history:
        score = figures["normalized_score"]
        print(f"{figures['steps']:6.0f} rankings: held-out normalized score {score:.3f}")
    export(model).save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
