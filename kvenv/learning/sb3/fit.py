"""What the agents ppo and maskable_ppo share: one model a head, all in one bundle."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger

from kvenv.display import progress_bar
from kvenv.errors import KvenvError
from kvenv.learning.fit import calibrate, held_out_figures
from kvenv.learning.run import Run
from kvenv.learning.sb3.callbacks import HeldOut, Progress
from kvenv.learning.sb3.export import export
from kvenv.learning.sb3.policies import standardise
from kvenv.learning.sb3.vec_env import KvenvVecEnv, make_vec
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer, is_bundle
from kvenv.trace import TraceSet, same_model
from kvenv.trace.batches import Index, Reader, choose_heads, hold_out

Scale = tuple[np.ndarray, np.ndarray]
"""Mean and standard deviation of a policy's inputs."""

WIDE = 32
"""Held-out episodes played side by side."""


@dataclass(frozen=True)
class Setting:
    """Where a model learns, and for how long.

    Attributes:
        env_id: the environment.
        arguments: of the environment.
        steps: timesteps for each head.
        num_envs: environments side by side.
        held_out: arguments of the held-out environment where they differ.
    """

    env_id: str
    arguments: Mapping[str, Any]
    steps: int
    num_envs: int
    held_out: Mapping[str, Any]


def check_options(agent: Any, least: Mapping[str, int], **kinds: Sequence[str]) -> None:
    """Refuse options of an agent that no training can be made of.

    Args:
        agent: whose attributes they are; None stands for a usual value.
        least: name -> the least that it may be.
        **kinds: ``positive`` and ``shares`` (0 to 1): names.

    Raises:
        KvenvError: naming the option, its value and what it may be.
    """
    ranges = {
        **{name: (low, math.inf, f"at least {low}") for name, low in least.items()},
        **dict.fromkeys(kinds.get("positive", ()), (1e-300, math.inf, "positive")),
        **dict.fromkeys(kinds.get("shares", ()), (0, 1, "a share, from 0 to 1")),
    }
    for name, (low, high, wanted) in ranges.items():
        value = getattr(agent, name)
        if value is not None and not (low <= value <= high and value < math.inf):
            raise KvenvError(f"{name} is {value}: it must be {wanted}")


def check_ppo(agent: Any) -> None:
    """`check_options` for what ppo and maskable_ppo share."""
    least = {"steps": 1, "num_envs": 1, "rollout": 2, "batch": 2, "epochs": 1, "seed": 0}
    cache = {"budget": 1, "sinks": 0, "recent": 0}
    shares = ("gamma", "gae_lambda")
    check_options(agent, {**least, **cache}, positive=("lr", "clip"), shares=shares)


def fit_heads(
    agent: str,
    setting: Setting,
    make_model: Callable[[KvenvVecEnv, Scale], BaseAlgorithm],
    traces: Sequence[TraceSet],
    heads: Sequence[Head] | None,
    options: Mapping[str, Any],
    run: Run | None = None,
) -> NetworkScorer:
    """Train one model for each head, one after another.

    A finished head's bundle stays in the checkpoint folder until the run is over: a run that is
    resumed takes it from there and trains the others from their start. The caller's global
    generators, which SB3 seeds and draws from, are left as they were.

    Args:
        agent: the agent's name, for the bundle.
        setting: environment and steps.
        make_model: makes the model for an environment, with its seed.
        traces: training sets, all of one model.
        heads: which heads; None means every recorded one.
        options: the agent's options, kept as provenance and checked on resuming.
        run: checkpoints, logs, progress and held-out documents.

    Returns:
        The scorer, whose ``training["curves"]`` has the held-out figures of every head by steps.

    Raises:
        KvenvError: on sets of different models, heads not recorded, or finished heads of another
            run.
    """
    run = run or Run()
    same_model([*traces, *run.validation])
    chosen = choose_heads(traces, heads)
    episodes, held_sets, held = hold_out(traces, run.validation, chosen)
    identity = {
        "agent": agent,
        "options": dict(options),
        "traces": [asdict(s) for t in [*traces, *run.validation] for s in t.manifest.shards],
    }
    identity = json.loads(json.dumps(identity))
    # A model's spaces are those of the longest prompt that it will see.
    lengths = [traces[w].info(i).n for w, i in episodes] + [held_sets[w].info(i).n for w, i in held]
    widest = {"max_tokens": max(lengths)} if setting.env_id == "kvenv/Rank-v1" else {}

    def train_head(layer: int, head: int) -> NetworkScorer:
        name = f"{layer}-{head}"
        done = run.checkpoint / name if run.checkpoint is not None else None
        if done is not None and is_bundle(done):
            scorer = NetworkScorer.from_pretrained(done)
            if not run.resume or scorer.training.get("run") != identity:
                raise KvenvError(
                    f"{str(run.checkpoint)!r} holds heads of an unfinished run: add --resume to "
                    "its very command to go on, or delete it to start again"
                )
            return scorer
        began = time.monotonic()
        arguments = {**setting.arguments, **widest, "layer": layer, "head": head}
        scale = standardise(traces, [(layer, head)], episodes=episodes)
        env = _make_env(setting.env_id, traces, episodes, setting.num_envs, arguments)
        watch = None
        if held:
            plain = {**arguments, **setting.held_out}
            watched = _make_env(setting.env_id, held_sets, held, min(len(held), WIDE), plain)
            watch = HeldOut(watched, run.evaluate_every)
        logs = run.tensorboard / name if run.tensorboard is not None else None
        logger = Run(tensorboard=logs).logger()
        bar = progress_bar("steps", run.progress)
        with _own_generators(), bar:
            model = make_model(env, scale)
            model.set_logger(logger or Logger(None, []))
            watchers = [*([watch] if watch else []), Progress(bar, setting.steps, watch)]
            model.learn(setting.steps, callback=watchers)
            model.logger.close()
        scorer = export(model)
        scorer.training = {
            "seconds": round(time.monotonic() - began, 1),
            "curve": watch.history if watch else [],
            "run": identity,
        }
        if done is not None:
            scorer.save_pretrained(done)
        env.close()
        if watch is not None:
            watch.env.close()
        return scorer

    parts = [train_head(layer, head) for layer, head in chosen]
    architecture, model = parts[0].architecture, parts[0].model
    network = architecture.build(chosen, model.head_dim)
    states = [part.network.state_dict() for part in parts]
    network.load_state_dict({k: torch.cat([state[k] for state in states]) for k in states[0]})
    curves = {
        f"{layer}:{head}": part.training["curve"]
        for part, (layer, head) in zip(parts, chosen, strict=True)
    }
    seen, which = (held_sets, held) if held else (traces, episodes)
    reader = Reader(seen, chosen)
    metrics = held_out_figures(network, architecture, reader.stream(held)) if held else {}
    last = [curve[-1] for curve in curves.values() if curve]
    if last and "retention" in last[0]:
        metrics["retention"] = float(np.mean([one["retention"] for one in last]))
    training = {
        "agent": agent,
        "options": dict(options),
        "seed": options["seed"],
        "episodes": len(episodes),
        "held_out_episodes": len(held),
        "traces": [t.manifest.origin for t in traces],
        "seconds": round(sum(part.training["seconds"] for part in parts), 1),
        "curves": curves,
    }
    calibration = calibrate(network, architecture, reader.stream(which))
    return NetworkScorer(network, architecture, model, training, metrics, calibration=calibration)


def _make_env(
    env_id: str,
    sets: Sequence[TraceSet],
    which: Sequence[Index],
    num_envs: int,
    arguments: Mapping[str, Any],
) -> KvenvVecEnv:
    """Environments of some episodes, which they number through the sets."""
    first = np.cumsum([0, *(len(one) for one in sets)])
    episodes = [int(first[where]) + index for where, index in which]
    paths = [str(one.path) for one in sets]
    return make_vec(env_id, num_envs, traces=paths, episodes=episodes, **arguments)


@contextmanager
def _own_generators() -> Iterator[None]:
    """Give the global generators, which SB3 seeds and draws from, back as they were."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        cudnn.deterministic, cudnn.benchmark = flags
