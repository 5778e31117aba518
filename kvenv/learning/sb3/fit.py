"""What the agents ppo, sac and maskable_ppo share: one model a head, all in one bundle."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from kvenv.errors import KvenvError
from kvenv.learning.episodes import Index, Reader, choose_heads, hold_out
from kvenv.learning.fit import evaluate
from kvenv.learning.run import Run
from kvenv.learning.sb3.callbacks import HeldOut
from kvenv.learning.sb3.export import export
from kvenv.learning.sb3.tokens import standardise
from kvenv.learning.sb3.train import train
from kvenv.learning.sb3.vec_env import KvenvVecEnv, make_vec
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer, is_bundle
from kvenv.scorers.network import Feature
from kvenv.trace import TraceSet, same_model

Scale = tuple[np.ndarray, np.ndarray]
"""Mean and standard deviation of a policy's inputs."""

LEGS = 10
"""Parts that training is cut into, with a checkpoint between them."""

WIDE = 32
"""Held-out episodes played side by side."""


@dataclass(frozen=True)
class Task:
    """Where a model learns, and for how long.

    Attributes:
        env_id: the environment.
        arguments: of the environment.
        features: what of a token the policy sees.
        steps: timesteps for each head.
        num_envs: environments side by side.
        seed: of everything random.
        held_out: arguments of the held-out environment where they differ.
    """

    env_id: str
    arguments: Mapping[str, Any]
    features: Sequence[Feature]
    steps: int
    num_envs: int
    seed: int
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


def fit(
    agent: str,
    task: Task,
    make_model: Callable[[KvenvVecEnv, Scale], BaseAlgorithm],
    traces: Sequence[TraceSet],
    heads: Sequence[Head] | None,
    options: Mapping[str, Any],
    run: Run | None = None,
) -> NetworkScorer:
    """Train one model for each head, one after another.

    Args:
        agent: the agent's name, for the bundle.
        task: environment, steps, seed.
        make_model: makes the model for an environment.
        traces: training sets, all of one model.
        heads: which heads; None means every recorded one.
        options: the agent's options, kept as provenance and checked on resuming.
        run: checkpoints, logs, progress and held-out documents.

    Returns:
        The scorer, whose ``training["curves"]`` has the held-out figures of every head by steps.
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
    widest = {"max_tokens": max(lengths)} if task.env_id == "kvenv/Rank-v0" else {}

    def train_head(layer: int, head: int) -> NetworkScorer:
        name = f"{layer}-{head}"
        folder = run.checkpoint / name if run.checkpoint is not None else None
        done = run.checkpoint / f"{name}.done" if run.checkpoint is not None else None
        if done is not None and is_bundle(done):
            scorer = NetworkScorer.from_pretrained(done)
            if not run.resume or scorer.training.get("run") != identity:
                raise KvenvError(
                    f"{str(run.checkpoint)!r} holds heads of an unfinished run: add --resume to "
                    "its very command to go on, or delete it to start again"
                )
            return scorer
        began = time.monotonic()
        arguments = {**task.arguments, **widest, "layer": layer, "head": head}
        budget = task.arguments.get("budget") if "fill" in task.features else None
        scale = standardise(traces, [(layer, head)], task.features, budget, episodes)
        watch = None
        if held:
            plain = {**arguments, **task.held_out}
            env = _make_env(task.env_id, held_sets, held, min(len(held), WIDE), plain)
            watch = HeldOut(env, run.evaluate_every)
        model = train(
            lambda env: make_model(env, scale),
            lambda: _make_env(task.env_id, traces, episodes, task.num_envs, arguments),
            replace(
                run,
                checkpoint=folder,
                validation=(),
                tensorboard=run.tensorboard / name if run.tensorboard is not None else None,
            ),
            steps=task.steps,
            seed=task.seed,
            legs=min(LEGS, task.steps),
            held_out=watch,
            identity={**identity, "head": [layer, head]},
        )
        scorer = export(model)
        seconds = round(time.monotonic() - began, 1)
        curve = watch.history if watch is not None else []
        scorer.training = {"seconds": seconds, "curve": curve, "run": identity}
        if done is not None:
            scorer.save_pretrained(done)
        for env in (model.get_env(), watch and watch.env):
            if env is not None:
                env.close()
        return scorer

    parts = [train_head(layer, head) for layer, head in chosen]
    training = {
        "agent": agent,
        "options": dict(options),
        "seed": task.seed,
        "episodes": len(episodes),
        "held_out_episodes": len(held),
        "traces": [t.manifest.origin for t in traces],
        "seconds": round(sum(part.training["seconds"] for part in parts), 1),
    }
    return _joined(parts, training, held_sets, held)


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


def _joined(
    parts: Sequence[NetworkScorer],
    training: dict[str, Any],
    held_sets: Sequence[TraceSet],
    held: Sequence[Index],
) -> NetworkScorer:
    """The networks of single heads as one scorer, measured on what was held out."""
    architecture, model = parts[0].architecture, parts[0].model
    heads = [head for part in parts for head in part.network.heads]
    network = architecture.build(heads, model.head_dim)
    states = [part.network.state_dict() for part in parts]
    network.load_state_dict({k: torch.cat([state[k] for state in states]) for k in states[0]})
    curves = {
        f"{layer}:{head}": part.training["curve"]
        for part, (layer, head) in zip(parts, heads, strict=True)
    }
    metrics = evaluate(network, architecture, Reader(held_sets, heads).stream(held)) if held else {}
    last = [curve[-1] for curve in curves.values() if curve]
    if last and "retention" in last[0]:
        metrics["retention"] = float(np.mean([one["retention"] for one in last]))
    return NetworkScorer(network, architecture, model, {**training, "curves": curves}, metrics)
