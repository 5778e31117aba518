"""Watch a cache forget: an agent plays kvenv/Stream-v1, as a GIF and as RecordVideo's MP4.

python examples/watch_stream.py                          # knorm on the packaged sample
python examples/watch_stream.py --agent my-kvp --mp4     # needs pip install 'kvenv[video]'
"""

from __future__ import annotations

import argparse

import gymnasium as gym
from PIL import Image

import kvenv  # noqa: F401  (registers the environments)
from kvenv.evaluation.play import ScorerPolicy
from kvenv.scorers import load_scorer


def main() -> None:
    """Play one episode and save it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--traces", default="sample")
    parser.add_argument("--agent", default="knorm", help="a heuristic's name or a bundle's folder")
    parser.add_argument("--episode", type=int, default=0)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--head", type=int, default=1)
    parser.add_argument("--budget", type=int, default=48)
    parser.add_argument("--every", type=int, default=4, help="steps between the GIF's frames")
    parser.add_argument("--out", default="stream.gif")
    parser.add_argument("--mp4", action="store_true", help="write every frame as a film, too")
    args = parser.parse_args()

    env = gym.make(
        "kvenv/Stream-v1",
        traces=args.traces,
        budget=args.budget,
        sinks=4,
        recent=16,
        render_mode="rgb_array",
    )
    if args.mp4:
        env = gym.wrappers.RecordVideo(env, "videos", episode_trigger=lambda _: True)
    policy = ScorerPolicy(load_scorer(args.agent), env)
    choice = {"episode": args.episode, "layer": args.layer, "head": args.head}
    observation, info = env.reset(seed=0, options=choice)
    frames, over = [], False
    while not over:
        observation, _, over, _, info = env.step(policy(observation, info))
        if over or info["position"] % args.every == 0:
            frames.append(Image.fromarray(env.render()).quantize(64))
    env.close()
    first, *rest = frames
    durations = [60] * len(rest) + [3000]  # ms; the end stays in sight
    first.save(args.out, save_all=True, append_images=rest, duration=durations, loop=0)
    print(f"{args.agent}: retention {info['retention']:.3f}; wrote {args.out}")


if __name__ == "__main__":
    main()
