"""Gymnasium's vector environments as stable-baselines3 wants them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from kvenv.errors import KvenvError


def make_vec(env_id: str, num_envs: int, **kwargs: Any) -> KvenvVecEnv:
    """Make N environments for stable-baselines3.

    Args:
        env_id: e.g. "kvenv/Rank-v1".
        num_envs: N.
        **kwargs: the environment's arguments.

    Raises:
        KvenvError: on ``copy=False``.
    """
    if not kwargs.get("copy", True):
        raise KvenvError(
            "copy=False overwrites observations that stable-baselines3 still has to store: leave it"
        )
    mode = AutoresetMode.SAME_STEP
    return KvenvVecEnv(gym.make_vec(env_id, num_envs=num_envs, autoreset_mode=mode, **kwargs))


class KvenvVecEnv(VecEnv):
    """A vector environment of Gymnasium, in autoreset mode SAME_STEP, behind SB3's interface.

    The info of an environment whose episode goes on is empty. That of one whose episode has just
    ended holds the episode's final info (its key ``episode`` as ``episode_index``, since SB3 keeps
    ``episode`` for the return, length and time of `Monitor`), ``terminal_observation`` and
    ``TimeLimit.truncated``.

    Attributes and methods are the vector environment's own, one value for all environments; a
    method's result is split into one for each. Gymnasium's SyncVectorEnv is asked through its
    ``call``.

    Args:
        env: the vector environment.

    Raises:
        KvenvError: if its autoreset mode is another.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            name = mode.value if isinstance(mode, AutoresetMode) else mode
            raise KvenvError(
                f"the vector environment has autoreset_mode={name!r}, and stable-baselines3 goes "
                "on with the next episode at once: make it with autoreset_mode='SameStep'"
            )
        self.env = env
        self._actions: Any = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, dtype=np.int64)
        self._began = time.monotonic()

    def reset(self) -> np.ndarray:
        """Start an episode in every environment, with the seeds and options set before."""
        seeds = None if self._seeds[0] is None else self._seeds
        observations, infos = self.env.reset(
            seed=seeds,  # pyright: ignore[reportArgumentType]
            options=_merge(self._options),
        )
        self.reset_infos = _split(infos, np.arange(self.num_envs))
        self._reset_seeds()
        self._reset_options()
        self._return[:], self._length[:] = 0, 0
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions, (N, ...), for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Observations (N, ...), rewards (N,) float32, whether episodes ended (N,), and infos."""
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        self._return += rewards
        self._length += 1
        done = terminated | truncated
        sb3_infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        which = np.flatnonzero(done)
        if len(which):
            seconds = round(time.monotonic() - self._began, 6)
            rows = zip(
                which.tolist(),
                _split(infos["final_info"], which),
                _split(infos, which),
                self._return[which].tolist(),
                self._length[which].tolist(),
                (truncated & ~terminated)[which].tolist(),
                strict=True,
            )
            for i, final, new, total, length, cut in rows:
                final["episode"] = {"r": total, "l": length, "t": seconds}
                final["terminal_observation"] = infos["final_obs"][i]
                final["TimeLimit.truncated"] = cut
                sb3_infos[i], self.reset_infos[i] = final, new
            self._return[which], self._length[which] = 0, 0
        return observations, rewards.astype(np.float32), done, sb3_infos

    def close(self) -> None:
        """Close the vector environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The value of an attribute, for each environment asked for."""
        base, which = self.env.unwrapped, self._get_indices(indices)
        if hasattr(base, attr_name) or not hasattr(base, "get_attr"):
            value = getattr(base, attr_name)
            return [value for _ in which]
        values = base.get_attr(attr_name)  # pyright: ignore[reportAttributeAccessIssue]
        return [values[i] for i in which]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute, for all environments at once.

        Raises:
            KvenvError: if only some of them are meant.
        """
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise KvenvError(
                f"{attr_name!r} belongs to all {self.num_envs} environments: set it without indices"
            )
        base = self.env.unwrapped
        if hasattr(base, attr_name) or not hasattr(base, "set_attr"):
            setattr(base, attr_name, value)
        else:
            base.set_attr(attr_name, value)  # pyright: ignore[reportAttributeAccessIssue]

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """What a method gives, called once, for each environment asked for."""
        base = self.env.unwrapped
        if hasattr(base, method_name) or not hasattr(base, "call"):
            result = getattr(base, method_name)(*method_args, **kwargs)
        else:
            result = base.call(method_name, *method_args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return [None if result is None else result[i] for i in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Whether infos are those of SB3's Monitor, which they are; nothing else wraps them."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """The pictures of all environments."""
        return self.env_method("render")


def _merge(options: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The options of each environment as one dict: a value where all agree, else an array."""
    names = options[0].keys()
    if any(one.keys() != names for one in options):
        raise KvenvError(
            f"environments have options of different names, {[list(one) for one in options]}: "
            "give each of them the same ones"
        )
    merged: dict[str, Any] = {}
    for name in names:
        values = [one[name] for one in options]
        same = all(value == values[0] for value in values)
        merged[name] = values[0] if same else np.array(values)
    return merged or None


def _split(infos: Mapping[str, Any], which: np.ndarray) -> list[dict[str, Any]]:
    """The infos of some environments, one dict each, from arrays with masks."""
    names = [
        name
        for name, value in infos.items()
        if f"_{name}" in infos and isinstance(value, np.ndarray) and name != "final_obs"
    ]
    rows: list[dict[str, Any]] = [{} for _ in which]
    for name in names:
        array = infos[name][which]
        values = array.tolist() if array.ndim == 1 else list(array)
        mask = infos[f"_{name}"][which]
        for row, value, there in zip(rows, values, mask.tolist(), strict=True):
            if there:
                row[name] = value
    return rows
