"""Use 1: make an environment, rank a prompt's tokens, look at what the ranking keeps.

python examples/rank_env.py                       # the oracle, on the packaged sample
python examples/rank_env.py --agent demo/kvp      # an agent that `kvenv train` exported
"""

from __future__ import annotations

import argparse

import gymnasium as gym
from PIL import Image

import kvenv  # noqa: F401  (registers the environments)
from kvenv.evaluation.play import ScorerPolicy
from kvenv.scorers import load_scorer


def main() -> None:
    """Play one episode and save its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", default="sample")
    parser.add_argument("--agent", default="oracle", help="a heuristic's name or a bundle's folder")
    parser.add_argument("--episode", type=int, default=1)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--head", type=int, default=1)
    parser.add_argument("--picture", default="rank.png")
    args = parser.parse_args()

    env = gym.make("kvenv/Rank-v1", traces=args.traces, render_mode="rgb_array")
    choice = {"episode": args.episode, "layer": args.layer, "head": args.head}
    observation, info = env.reset(seed=0, options=choice)

    policy = ScorerPolicy(load_scorer(args.agent), env)
    _, reward, _, _, info = env.step(policy(observation, info))
    print(f"{args.agent}: reward {reward:.3f}, normalized score {info['normalized_score']:.3f}")
    Image.fromarray(env.render()).save(args.picture)
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
