"""What is watched while a stable-baselines3 model learns: held-out episodes, and progress."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.progress
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from kvenv.errors import KvenvError
from kvenv.learning.sb3.vec_env import KvenvVecEnv
from kvenv.scorers.base import Head


class HeldOut(BaseCallback):
    """Measures the deterministic policy on every held-out episode and head, each exactly once.

    Logs ``held_out/reward``, the mean return of an episode, and of the environment's last info
    ``held_out/normalized_score`` and ``held_out/retention``, where it tells them.

    Args:
        env: an environment of the held-out episodes.
        every: timesteps between measurements. One more follows the end of training.
        episodes: which episodes; None takes those that the environment draws from.
        heads: which heads; None takes those that the environment draws from.

    Attributes:
        history: a dict for each measurement: ``steps``, ``seconds`` of training until then, and
            the figures.
    """

    def __init__(
        self,
        env: KvenvVecEnv,
        every: int,
        episodes: Sequence[int] | None = None,
        heads: Sequence[Head] | None = None,
    ) -> None:
        super().__init__()
        if every < 1:
            raise KvenvError(f"every={every} is less than one timestep: give 1 or more")
        base: Any = env.env.unwrapped
        which = base.episodes if episodes is None else episodes
        pairs = base.heads if heads is None else heads
        self.env, self.every = env, every
        self.pairs = np.array([(int(e), layer, head) for e in which for layer, head in pairs])
        self.history: list[dict[str, float]] = []
        self._clock = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent on training, without that spent here."""
        return time.monotonic() - self._clock

    def measure(self, model: BaseAlgorithm) -> dict[str, float]:
        """Mean figures over the pairs of episode and head."""
        wide, figures = self.env.num_envs, []
        for start in range(0, len(self.pairs), wide):
            chunk = self.pairs[start : start + wide]
            # Environments that are left over repeat the last pair, and are not counted.
            padded = np.concatenate([chunk, chunk[-1:].repeat(wide - len(chunk), 0)])
            figures += self._play(model, padded)[: len(chunk)]
        return {name: float(np.mean([one[name] for one in figures])) for name in figures[0]}

    def _play(self, model: BaseAlgorithm, pairs: np.ndarray) -> list[dict[str, float]]:
        """An episode in every environment."""
        env, scaled = self.env, model.get_vec_normalize_env()
        names = ("episode", "layer", "head")
        env.set_options([dict(zip(names, pair, strict=True)) for pair in pairs.tolist()])
        results: list[dict[str, float]] = [{} for _ in pairs]
        observations = env.reset()
        maskable = "action_masks" in inspect.signature(model.predict).parameters
        while not all(results):
            seen = observations if scaled is None else scaled.normalize_obs(observations)  # pyright: ignore[reportArgumentType]
            masks = {"action_masks": np.stack(env.env_method("action_masks"))} if maskable else {}
            actions, _ = model.predict(seen, deterministic=True, **masks)  # pyright: ignore[reportArgumentType]
            observations, _, done, infos = env.step(actions)
            for i in np.flatnonzero(done).tolist():
                results[i] = results[i] or _figures(infos[i])
        return results

    def _on_training_start(self) -> None:
        self._clock = time.monotonic()

    def _on_rollout_start(self) -> None:
        # Here, and not at a step, the weights are those of the timesteps counted.
        steps = self.model.num_timesteps
        if steps // self.every > (self.history[-1]["steps"] if self.history else 0) // self.every:
            self._record(steps)

    def _on_training_end(self) -> None:
        if not self.history or self.history[-1]["steps"] != self.model.num_timesteps:
            self._record(self.model.num_timesteps)

    def _on_step(self) -> bool:
        return True

    def _record(self, steps: int) -> None:
        seconds = self.seconds
        figures = self.measure(self.model)
        self._clock = time.monotonic() - seconds
        self.history.append({"steps": steps, "seconds": seconds, **figures})
        for name, value in figures.items():
            self.logger.record(f"held_out/{name}", value)
        self.logger.dump(steps)


def _figures(info: dict[str, Any]) -> dict[str, float]:
    told = {name: info.get(name) for name in ("retention", "normalized_score")}
    # A ranking's retention has a number for every budget, and its mean is the reward.
    single = {name: x for name, x in told.items() if x is not None and np.ndim(x) == 0}
    return {"reward": info["episode"]["r"], **single}


class Progress(BaseCallback):
    """Moves a bar of `kvenv.display.progress_bar`, with the mean return of late episodes beside it.

    Args:
        bar: where a task is added; it is started and stopped by whoever made it.
        total: timesteps.
        held_out: shows its last figure instead of the return.
    """

    def __init__(
        self, bar: rich.progress.Progress, total: int, held_out: HeldOut | None = None
    ) -> None:
        super().__init__()
        self._bar, self._total, self._held_out = bar, total, held_out
        self._task: rich.progress.TaskID | None = None

    def _on_training_start(self) -> None:
        name = type(self.model).__name__.lower()
        self._task = self._bar.add_task(name, total=self._total, note="")
        self._show()

    def _on_rollout_start(self) -> None:
        self._show()

    def _on_training_end(self) -> None:
        self._show()

    def _on_step(self) -> bool:
        if self._task is not None:
            self._bar.update(self._task, completed=min(self.num_timesteps, self._total))
        return True

    def _show(self) -> None:
        if self._task is None:
            return
        note = ""
        if self._held_out is not None and self._held_out.history:
            name = list(self._held_out.history[-1])[-1]
            note = f"{name} {self._held_out.history[-1][name]:.3f}"
        elif self.model.ep_info_buffer:
            returns = [episode["r"] for episode in self.model.ep_info_buffer]
            note = f"reward {np.mean(returns):.3f}"
        done = min(self.model.num_timesteps, self._total)
        self._bar.update(self._task, completed=done, note=note)
