"""Vector environments: N episodes in one batch, without a loop over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from kvenv.envs.batch import RENDER_MODES, Batch, Drawing
from kvenv.envs.evict import EvictBatch
from kvenv.envs.rank import RankBatch
from kvenv.envs.single import check_render_mode
from kvenv.envs.source import check_options, integer
from kvenv.envs.stream import StreamBatch
from kvenv.errors import KvenvError


class TraceVectorEnv(Drawing, VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N environments of one kind, stepped together; equal to N single ones to the last bit.

    Args:
        num_envs: N.
        autoreset_mode: when an ended episode is followed by the next: "SameStep" at once, with the
            last observation in ``info["final_obs"]``; "NextStep" at the next step, whose action is
            ignored; "Disabled" at ``reset(options={"reset_mask": ...})``. Also Gymnasium's enum.
        copy: return fresh observations; False returns the same array, overwritten, at every call.
        render_mode: as for the single environment; `render` then gives a tuple of N.
        **arguments: the single environment's others.

    ``reset(seed=s)`` seeds environment i with s + i, a list each with its own. ``options`` are
    those of the single environment; "episode", "layer", "head" and "budget" may also be arrays of
    N. Infos are Gymnasium's: arrays, each with a mask under its name after an underscore.
    """

    rules: ClassVar[Callable[..., Batch]]
    mode: ClassVar[str] = AutoresetMode.NEXT_STEP.value

    def __init__(
        self,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode | None = None,
        copy: bool = True,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        if integer("num_envs", num_envs) < 1:
            raise KvenvError(f"num_envs={num_envs} is less than 1: give 1 or more")
        check_render_mode(render_mode)
        self._mode = _autoreset_mode(autoreset_mode or self.mode)
        self.batch = type(self).rules(num_envs, **arguments)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.batch.remembers = render_mode is not None
        self.metadata = {
            "render_modes": list(RENDER_MODES),
            "render_fps": 16,
            "autoreset_mode": self._mode,
        }
        self.single_observation_space = self.batch.observation_space
        self.single_action_space = self.batch.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        shape = (num_envs, *self.batch.observation_space.shape)
        self._out = None if copy else np.empty(shape, np.float32)
        self._seeds: list[int] = [-1] * num_envs

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The environments' generators."""
        self._seed([None] * self.num_envs)
        return tuple(g for g in self.batch.draws.generators if g is not None)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The seeds of `np_random`."""
        self._seed([None] * self.num_envs)
        return tuple(self._seeds)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode in every environment, or in those of a mask.

        Args:
            seed: of environment i: seed + i, or the list's own; None goes on drawing.
            options: as for the single environment, and ``"reset_mask"``: (N,) bool.

        Raises:
            KvenvError: if an option is unknown or out of range, naming the valid ones.
        """
        chosen = dict(check_options(options, (*self.batch.options, "reset_mask")))
        which = self._masked(chosen.pop("reset_mask", None))
        self._seed(_spread(seed, self.num_envs), set(which.tolist()))
        for name in ("episode", "layer", "head", "budget"):
            value = chosen.get(name)
            if np.ndim(value) == 1 and len(value) == self.num_envs:  # pyright: ignore[reportArgumentType]
                chosen[name] = np.asarray(value)[which]
        self.batch.begin(which, chosen)
        mask = np.zeros(self.num_envs, dtype=bool)
        mask[which] = True
        return self.batch.observe(out=self._out), _infos(self.batch.info(), mask)

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Play an action in every environment, as `autoreset_mode` has it.

        Raises:
            KvenvError: if an action is not one of the action space's, naming the environment.
            ResetNeeded: before the first reset, or if an episode has ended and nobody resets it.
        """
        batch, over = self.batch, self.batch.done.copy()
        next_step = self._mode is AutoresetMode.NEXT_STEP
        if not batch.began.all() or (over.any() and not next_step):
            raise ResetNeeded(
                f"environment {int(np.argmax(over | ~batch.began))} of {batch.env_id} has no "
                "episode to step: call reset() first"
            )
        rewards = batch.advance(batch.check_actions(actions, ~over))
        stepped = np.ones(self.num_envs, dtype=bool)
        infos: dict[str, Any] = {}
        outcome = batch.outcome()
        done = batch.done
        if next_step and over.any():
            done = done & ~over
            rewards[over], stepped = 0.0, ~over
            batch.begin(np.flatnonzero(over))
        elif self._mode is AutoresetMode.SAME_STEP and done.any():
            done, stepped = done.copy(), ~done
            infos = self._final(done, outcome)
            batch.begin(np.flatnonzero(done))
        everywhere = np.ones(self.num_envs, dtype=bool)
        infos |= _infos(batch.info(), everywhere)
        infos |= _infos(outcome, stepped)
        nothing = np.zeros(self.num_envs, dtype=bool)
        return batch.observe(out=self._out), rewards, done.copy(), nothing, infos

    def render(self) -> tuple[Any, ...] | None:
        """What each environment's `render` would give."""
        if self.render_mode is None:
            return None
        if not self.batch.began.all():
            raise ResetNeeded(f"{self.batch.env_id} has nothing to render: call reset() first")
        show = self.batch.picture if self.render_mode == "rgb_array" else self.batch.text
        return tuple(show(i) for i in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Close the trace files."""
        if hasattr(self, "batch"):  # Gymnasium 1.1 also closes what could not be made
            self.batch.source.close()

    def _final(self, done: np.ndarray, outcome: dict[str, np.ndarray]) -> dict[str, Any]:
        """The last observation and info of the episodes that have ended."""
        last = np.full(self.num_envs, None, dtype=object)
        which = np.flatnonzero(done)
        last[which] = np.fromiter(self.batch.observe(which), dtype=object, count=len(which))
        return {
            "final_obs": last,
            "_final_obs": done.copy(),
            "final_info": _infos({**self.batch.info(), **outcome}, done),
            "_final_info": done.copy(),
        }

    def _masked(self, mask: Any) -> np.ndarray:
        """The environments that a reset is about, (m,)."""
        if mask is None:
            return self.batch.every
        wanted = np.asarray(mask)
        if wanted.shape != (self.num_envs,) or wanted.dtype != bool or not wanted.any():
            raise KvenvError(
                f"reset_mask has shape {wanted.shape} and dtype {wanted.dtype}: give "
                f"{self.num_envs} bools, at least one of them true"
            )
        return np.flatnonzero(wanted)

    def _seed(self, seeds: Sequence[int | None], which: set[int] | None = None) -> None:
        """Seed the generators that are asked for, and those that there are not yet."""
        draws = self.batch.draws
        for i, seed in enumerate(seeds):
            wanted = seed is not None and (which is None or i in which)
            if wanted or draws.generators[i] is None:
                generator, self._seeds[i] = seeding.np_random(seed if wanted else None)
                draws.use(i, generator)


class RankVectorEnv(TraceVectorEnv):
    """N of `kvenv.envs.RankEnv` at once."""

    rules = RankBatch
    mode = AutoresetMode.SAME_STEP.value


class StreamVectorEnv(TraceVectorEnv):
    """N of `kvenv.envs.StreamEnv` at once."""

    rules = StreamBatch

    @property
    def budget(self) -> int | float:
        """The cache's slots, or their share of the prompt."""
        return self.batch.asked  # pyright: ignore[reportAttributeAccessIssue]


class EvictVectorEnv(TraceVectorEnv):
    """N of `kvenv.envs.EvictEnv` at once."""

    rules = EvictBatch

    def action_masks(self) -> np.ndarray:
        """Which slots may go, (N, budget + 1) bool."""
        return self.batch.allowed()  # pyright: ignore[reportAttributeAccessIssue]


def _infos(values: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
    """Values with their masks, zero where the mask is false; nothing where it is false all over."""
    if not mask.any():
        return {}
    everywhere = bool(mask.all())
    infos: dict[str, Any] = {}
    for name, array in values.items():
        infos[name] = array if everywhere else _where(mask, array)
        infos[f"_{name}"] = mask.copy()
    return infos


def _where(mask: np.ndarray, array: np.ndarray) -> np.ndarray:
    return np.where(mask.reshape(-1, *[1] * (array.ndim - 1)), array, np.zeros((), array.dtype))


def _spread(seed: int | Sequence[int | None] | None, num: int) -> Sequence[int | None]:
    if seed is None:
        return [None] * num
    if not isinstance(seed, Sequence | np.ndarray):
        return [integer("seed", seed) + i for i in range(num)]
    if len(seed) != num:
        raise KvenvError(f"{len(seed)} seeds for {num} environments: give one each, or an int")
    return [None if one is None else int(one) for one in seed]


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError:
        names = ", ".join(repr(one.value) for one in AutoresetMode)
        raise KvenvError(f"unknown autoreset_mode {mode!r}: choose from {names}") from None
