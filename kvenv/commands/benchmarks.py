"""``kvenv bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kvenv.commands.common import write_json
from kvenv.display import console
from kvenv.errors import KvenvError


def bench(
    what: Literal["record", "env"],
    model: str | None = None,
    tokens: list[int] | None = None,
    sizes: list[str] | None = None,
    num_envs: list[int] | None = None,
    repeats: int = 5,
    json: Path | None = None,
) -> None:
    """Measure kvenv against its baseline, both in this process, and print the ratio.

    record: recording an episode, against a plain forward pass over the same tokens, one that skips
    the logits nobody reads (as the recorder does), and output_attentions=True; time, peak memory.
    env: stepping vector environments, against Gymnasium's SyncVectorEnv and stable-baselines3's
    DummyVecEnv over single ones, and a bare copy of the observations; steps a second.

    Args:
        what: record or env.
        model: record: smollm2-135m (default), gemma-3-270m, a checkpoint folder or a hub id.
        tokens: record: episode lengths, prompt and future together; default 1024,2048.
        sizes: env: of an observation, small (2 KiB), medium (32) or large (256); default all.
        num_envs: env: environments stepped together; default 1,8,64,256.
        repeats: timed runs of each; the median counts.
        json: write all figures, with their provenance, to this file.
    """
    from kvenv.evaluation.statistics import provenance

    foreign = (
        {"sizes": sizes, "num-envs": num_envs}
        if what == "record"
        else {"model": model, "tokens": tokens}
    )
    if given := [f"--{name}" for name, value in foreign.items() if value is not None]:
        raise KvenvError(f"bench {what} takes no {' or '.join(given)}: leave it out")
    if what == "record":
        from kvenv.recording.bench import run

        figures = run(model or "smollm2-135m", tokens or [1024, 2048], repeats, console)
    else:
        from kvenv.envs import bench

        figures = bench.run(
            sizes or list(bench.SIZES), num_envs or bench.NUM_ENVS, repeats, console
        )
    result = {**provenance(), **figures}
    if json is not None:
        write_json(json, result)
