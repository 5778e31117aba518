"""A Gymnasium environment around a batch of one."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded

from kvenv.envs.batch import RENDER_MODES, Batch, Drawing
from kvenv.errors import KvenvError

LIVE = np.ones(1, dtype=bool)


class TraceEnv(Drawing, gym.Env[np.ndarray, Any]):
    """What the kvenv environments share; the rules are the batch's.

    Args:
        batch: a batch of one.
        copy: return fresh observations; False returns the same array, overwritten, at every call.
        render_mode: "rgb_array", "ansi" or None.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 16}  # noqa: RUF012

    def __init__(self, batch: Batch, copy: bool, render_mode: str | None) -> None:
        check_render_mode(render_mode)
        self.batch = batch
        self.render_mode = render_mode
        batch.remembers = render_mode is not None
        self.observation_space, self.action_space = batch.observation_space, batch.action_space
        shape = (1, *self.observation_space.shape)
        self._out = None if copy else np.empty(shape, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; see the class for what ``options`` picks.

        Raises:
            KvenvError: if an option is unknown or out of range, naming the valid ones.
        """
        super().reset(seed=seed)
        self.batch.draws.use(0, self.np_random)
        self.batch.begin(self.batch.every, options)
        return self.batch.observe(out=self._out)[0], _first(self.batch.info())

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Play one action.

        Raises:
            KvenvError: if it is not one of the action space's, naming what is wrong.
            ResetNeeded: if there is no episode, or it has ended.
        """
        if self.batch.done[0]:
            raise ResetNeeded(f"{self.batch.env_id} has no episode to step: call reset() first")
        reward = self.batch.advance(self.batch.check_actions(np.asarray(action)[None], LIVE))
        info = {**_first(self.batch.info()), **_first(self.batch.outcome())}
        observation = self.batch.observe(out=self._out)[0]
        return observation, float(reward[0]), bool(self.batch.done[0]), False, info

    def render(self) -> Any:
        """The episode so far, as ``render_mode`` asks.

        Returns:
            (540, 960, 3) uint8 for "rgb_array", a string for "ansi", None without a mode.
        """
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode: make the environment with 'rgb_array'")
            return None
        if not self.batch.began[0]:
            raise ResetNeeded(f"{self.batch.env_id} has nothing to render: call reset() first")
        return self.batch.picture(0) if self.render_mode == "rgb_array" else self.batch.text(0)

    def close(self) -> None:
        """Close the trace files."""
        self.batch.source.close()


def check_render_mode(render_mode: str | None) -> None:
    """Refuse a render mode that there is not, naming those there are."""
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise KvenvError(f"unknown render_mode {render_mode!r}: choose 'rgb_array' or 'ansi'")


def _first(infos: dict[str, np.ndarray]) -> dict[str, Any]:
    """The only environment's info: numbers as Python's own, arrays as they are."""
    return {k: v[0] if v.ndim > 1 else v[0].item() for k, v in infos.items()}
