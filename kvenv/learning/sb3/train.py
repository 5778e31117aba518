"""Trains a stable-baselines3 model so that a run that was stopped ends as one that was not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import set_random_seed

from kvenv.display import progress_bar
from kvenv.errors import KvenvError
from kvenv.learning.run import Run, load_checkpoint, save_checkpoint
from kvenv.learning.sb3.callbacks import HeldOut, Progress
from kvenv.learning.sb3.state import load_state, state_tensors
from kvenv.learning.sb3.vec_env import KvenvVecEnv

Model = TypeVar("Model", bound=BaseAlgorithm)


def train(
    make_model: Callable[[KvenvVecEnv], Model],
    make_env: Callable[[], KvenvVecEnv],
    run: Run | None = None,
    *,
    steps: int,
    seed: int = 0,
    legs: int = 10,
    held_out: HeldOut | None = None,
    identity: Mapping[str, Any] | None = None,
    callbacks: Sequence[BaseCallback] = (),
) -> Model:
    """Train a model.

    Training is cut into legs of equal length. Each begins with generators seeded by (seed, leg)
    and new episodes, so that a checkpoint between two legs holds all there is to know: a run that
    was killed and resumed ends with the weights of one that was not, bit for bit on one machine
    (on a GPU as far as its kernels are deterministic). It is still one ``learn`` call: schedules
    see the progress of the whole run. The caller's global generators are left as they were.

    Args:
        make_model: makes the model for an environment; its ``seed`` stays None.
        make_env: makes the training environment; it stays open, as the model's ``get_env()``.
        run: checkpoints (at the first end of a leg after every ``checkpoint_every`` timesteps),
            logs and progress; None keeps nothing.
        steps: timesteps, at least.
        seed: of initial weights, episodes and exploration.
        legs: how many; part of what decides the weights.
        held_out: measures on the way; its history is kept in the checkpoints.
        identity: what must be equal when a run is resumed, JSON-safe: options, heads, traces.
        callbacks: SB3's, besides.

    Raises:
        KvenvError: on a checkpoint of another run, or one there without ``run.resume``.
    """
    run = run or Run()
    if not 1 <= legs <= steps:
        raise KvenvError(f"{steps} steps cannot be cut into {legs} legs: give 1 to {steps} legs")
    if seed < 0:
        raise KvenvError(f"seed is {seed}: it must be at least 0")
    with _own_generators():
        set_random_seed(_seed(seed, legs))
        model = make_model(make_env())
        if model.get_vec_normalize_env() is not None:
            raise KvenvError(
                "VecNormalize's statistics are in no checkpoint: train without it and give the "
                "policy mean and std (kvenv.learning.sb3.standardise)"
            )
        model.set_logger(run.logger() or Logger(None, []))
        same = {"algorithm": type(model).__name__, "steps": steps, "seed": seed, "legs": legs}
        same = json.loads(json.dumps({**same, **(identity or {})}))  # as a checkpoint gives it back
        bar = progress_bar("steps", run.progress)
        watch = _Legs(run, same, held_out)
        watch.resume(model)
        # What is measured at the end of a leg is measured before the checkpoint is written.
        watchers = [*([held_out] if held_out else []), watch, Progress(bar, steps, held_out)]
        with bar:
            model.learn(
                max(steps - model.num_timesteps, 0),
                callback=[*watchers, *callbacks],
                reset_num_timesteps=False,
            )
        model.logger.close()
    return model


class _Legs(BaseCallback):
    """Starts each leg afresh, and writes the checkpoints between them."""

    def __init__(self, run: Run, identity: dict[str, Any], held_out: HeldOut | None) -> None:
        super().__init__()
        self._run, self._identity, self._held_out = run, identity, held_out
        self._leg, self._saved = -1, 0

    def resume(self, model: BaseAlgorithm) -> None:
        """Put the model where the checkpoint left it, if there is one to go on from."""
        folder = self._run.checkpoint
        found = load_checkpoint(folder) if folder is not None else None
        if found is None:
            return
        tensors, state = found
        if not self._run.resume:
            raise KvenvError(
                f"{str(folder)!r} holds a checkpoint of step {state['step']}: "
                "add --resume to go on from it, or delete it to start again"
            )
        different = [name for name in self._identity if self._identity[name] != state.get(name)]
        if different:
            raise KvenvError(
                f"the checkpoint in {str(folder)!r} is of another run (its "
                f"{' and '.join(different)} differ): give the same command as before, or delete "
                "it to start again"
            )
        load_state(model, tensors)
        model.num_timesteps = self._saved = int(state["step"])
        model._n_updates = int(state["updates"])
        if self._held_out is not None:
            self._held_out.history[:] = state["history"]
            self._held_out.before = float(state["seconds"])

    def _on_rollout_start(self) -> None:
        # Weights and optimisers are at rest here: the last update is over.
        model, steps = self.model, self.model.num_timesteps
        leg = steps * self._identity["legs"] // self._identity["steps"]
        if leg == self._leg:
            return
        self._leg = leg
        folder = self._run.checkpoint
        if folder is not None and steps - self._saved >= self._run.checkpoint_every:
            self._save(folder, steps)
        model.set_random_seed(_seed(self._identity["seed"], leg))
        env = self.training_env
        model._last_obs = env.reset()  # pyright: ignore[reportAttributeAccessIssue]
        model._last_episode_starts = np.ones(env.num_envs, dtype=bool)

    def _on_step(self) -> bool:
        return True

    def _save(self, folder: Path, steps: int) -> None:
        state = {
            **self._identity,
            "step": steps,
            "updates": self.model._n_updates,
            "seconds": self._held_out.seconds if self._held_out else 0.0,
            "history": self._held_out.history if self._held_out else [],
        }
        save_checkpoint(folder, state_tensors(self.model), state)
        self._saved = steps


def _seed(seed: int, leg: int) -> int:
    return int(np.random.SeedSequence([seed, leg]).generate_state(1)[0] >> 1)


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
