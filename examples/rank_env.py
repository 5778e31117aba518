"""Use 1: make an environment, rank a prompt's tokens, look at what the ranking keeps.

python examples/rank_env.py                       # the oracle, on the packaged sample
python examples/rank_env.py --agent demo/kvp      # an agent that `kvenv train` exported
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

import kvenv  # noqa: F401  (registers the environments)
from kvenv.scorers import load_scorer
from kvenv.trace import TraceSet


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

    env = gym.make("kvenv/Rank-v0", traces=args.traces, render_mode="rgb_array")
    choice = {"episode": args.episode, "layer": args.layer, "head": args.head}
    _, info = env.reset(seed=0, options=choice)

    scores = score(load_scorer(args.agent), TraceSet(args.traces), **choice)
    action = np.zeros(env.action_space.shape, np.float32)
    # Scores mean only their order, which ranks carry into the action's range [-1, 1].
    action[: info["n"]] = scores.argsort().argsort() / info["n"] * 2 - 1
    _, reward, _, _, info = env.step(action)
    print(f"{args.agent}: reward {reward:.3f}, closure {info['closure']:.3f}")
    Image.fromarray(env.render()).save(args.picture)
    print(f"wrote {args.picture}")


def score(scorer: object, traces: TraceSet, episode: int, layer: int, head: int) -> np.ndarray:
    """A scorer's numbers for one head's prompt, (n,)."""
    n = traces.info(episode).n
    keys, values = (
        torch.from_numpy(traces.read(episode, field, layer)[None, :, :n])
        for field in ("keys", "values")
    )
    utility = torch.from_numpy(traces.read(episode, "utility/sum", layer)[None])
    needs = {"utility": utility} if "utility" in scorer.needs else {}
    positions = torch.arange(n).expand(1, keys.shape[1], n)
    return scorer.score(layer, keys, values, positions, **needs)[0, head].numpy()


if __name__ == "__main__":
    main()
