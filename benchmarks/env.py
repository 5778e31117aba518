"""Steps a second of a vector environment, over Gymnasium's loop of single environments.

python benchmarks/env.py [--env kvenv/Stream-v1] [--num-envs 64] [--steps 200] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
from harness import compare, parser, write

import kvenv  # noqa: F401  (registers the environments)

BASELINE = "gymnasium's SyncVectorEnv"


def main() -> None:
    """Time random actions in both."""
    options = parser(__doc__ or "")
    options.add_argument("--env", default="kvenv/Stream-v1")
    options.add_argument("--traces", default="sample")
    options.add_argument("--num-envs", type=int, default=64)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--budget", type=int, default=64, help="of Stream-v1 and Evict-v1")
    args = options.parse_args()
    cache = {} if "Rank" in args.env else {"budget": args.budget, "sinks": 4, "recent": 16}
    arguments = {"traces": args.traces, "layer": 10, "head": 1, **cache}

    def steps(envs: gym.vector.VectorEnv) -> Callable[[], None]:
        envs.action_space.seed(0)

        def way() -> None:
            _, infos = envs.reset(seed=0)
            for _ in range(args.steps):
                masks = infos.get("action_mask")
                actions = envs.action_space.sample() if masks is None else masks.argmax(-1)
                infos = envs.step(actions)[-1]

        return way

    def made(mode: str) -> gym.vector.VectorEnv:
        return gym.make_vec(args.env, args.num_envs, vectorization_mode=mode, **arguments)

    loop, vector = made("sync"), made("vector_entry_point")
    ways = {BASELINE: steps(loop), "kvenv": steps(vector)}
    rows = compare(ways, args.num_envs * args.steps, "steps", args.repeats)
    loop.close()
    vector.close()
    write(args.json, args, rows)


if __name__ == "__main__":
    main()
