"""Plays the environments with scorers: the actions a scorer would take, and what they earn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ResetNeeded

from kvenv.envs.slots import SlotBatch
from kvenv.errors import KvenvError
from kvenv.evaluation.retention import layer_inputs
from kvenv.scorers.base import Scorer


class ScorerPolicy:
    """A scorer as a policy of a single kvenv environment.

    In Rank-v1 it scores the prompt; in Stream-v1 and Evict-v1 what is held, at every decision, as
    an `EvictionCache` does. A scorer that needs the utility (the oracle) is given the attention
    still to come; other needs are known of prompts alone.

    Args:
        scorer: what scores.
        env: the environment that will be played, wrapped or not.

    Raises:
        KvenvError: if the scorer cannot play this environment, or scores a head with NaN.
    """

    def __init__(self, scorer: Scorer, env: gym.Env[Any, Any]) -> None:
        self._batch: Any = getattr(env.unwrapped, "batch", None)
        players: dict[str, Callable[[], Any]] = {
            "kvenv/Rank-v1": self._rank,
            "kvenv/Stream-v1": self._stream,
            "kvenv/Evict-v1": self._evict,
        }
        env_id = getattr(self._batch, "env_id", None)
        if env_id not in players or self._batch.num > 1:
            raise KvenvError(f"{env} is no single environment of {', '.join(players)}: make one")
        self._play, self._scorer = players[env_id], scorer
        slots = isinstance(self._batch, SlotBatch)
        if slots and (missing := scorer.needs - {"utility"}):
            raise KvenvError(
                f"{type(scorer).__name__} needs {', '.join(sorted(missing))}, which {env_id} does "
                "not give: use kvenv/Rank-v1"
            )
        self._needs = frozenset[str]() if slots else scorer.needs
        self._key: tuple[int, int] | None = None
        self._data: dict[str, torch.Tensor] = {}
        self._future = np.empty((0, 0))

    def __call__(self, observation: np.ndarray, info: dict[str, Any]) -> Any:
        """The action in the environment's present state."""
        batch = self._batch
        if not batch.began[0]:
            raise ResetNeeded(f"{batch.env_id} has no episode to play: call reset() first")
        key = int(batch.episode[0]), int(batch.head[0])
        if key != self._key:
            self._read()
            self._key = key
        return self._play()

    def _rank(self) -> np.ndarray:
        action = np.zeros(self._batch.action_space.shape, np.float32)
        n = int(self._batch.n[0])
        action[:n] = _spread(self._score(np.arange(n), n))
        return action

    def _stream(self) -> np.ndarray:
        held = self._batch.positions[0]
        action = np.zeros(held.shape, np.float32)
        there = held >= 0
        action[there] = _spread(self._score(held[there], int(self._batch.now[0])))
        return action

    def _evict(self) -> int:
        """The lowest of the slots that may go; of equal scores the latest token's."""
        batch = self._batch
        places, allowed = batch.candidates()[0], batch.allowed()[0]
        held = np.sort(places[places >= 0])
        scores = self._score(held, int(batch.now[0]) + 1)
        slots = np.flatnonzero(allowed)
        worth = scores[np.searchsorted(held, places[slots])]
        return int(slots[np.where(worth == worth.min(), places[slots], -1).argmax()])

    def _read(self) -> None:
        """Read the episode's layer, all of the text or the prompt alone."""
        batch = self._batch
        layer, _ = batch.source.heads[batch.head[0]]
        traces, index = batch.source.place(int(batch.episode[0]))
        slots = isinstance(batch, SlotBatch)
        length = int(batch.lengths[0]) if slots else None
        self._data = layer_inputs(traces, index, layer, self._needs, length)
        if slots and self._scorer.needs:
            rows = np.vstack([batch.square(0), np.zeros(int(batch.lengths[0]))])
            self._future = rows[::-1].cumsum(0)[::-1]

    def _score(self, positions: np.ndarray, seen: int) -> np.ndarray:
        """Scores of the tokens at these positions, (m,), among themselves.

        Args:
            positions: ascending.
            seen: tokens of the text so far; the newest is one before.
        """
        batch, data, at = self._batch, self._data, torch.from_numpy(positions)
        layer, head = batch.source.heads[batch.head[0]]
        needs = {need: data[need] for need in self._needs}
        if "utility" in self._scorer.needs - self._needs:
            # In Evict-v1 the newcomer's own queries are still to come.
            first = seen - (batch.env_id == "kvenv/Evict-v1")
            ahead = torch.from_numpy(self._future[first, positions])
            needs["utility"] = ahead.expand(1, data["keys"].shape[1], -1)
        keys, values, places = (data[n][:, :, at] for n in ("keys", "values", "positions"))
        now = torch.tensor([seen - 1])
        with torch.no_grad():
            scores = self._scorer.score(layer, keys, values, places, now, **needs)[0, head]
        if torch.isnan(scores).any():
            raise KvenvError(
                f"{type(self._scorer).__name__} gave NaN scores for layer {layer} head {head}: it "
                "does not know that head, or its score() is broken"
            )
        return scores.double().numpy()


def _spread(scores: np.ndarray) -> np.ndarray:
    """Scores as evenly spread numbers in [-1, 1]; their order and ties stay."""
    order = np.unique(scores, return_inverse=True)[1]
    return 2 * order / max(int(order.max(initial=0)), 1) - 1


def play_all(env: gym.Env[Any, Any], scorer: Scorer, figure: str) -> np.ndarray:
    """Play every episode and head that an environment draws, each once, with a scorer.

    Args:
        env: a single kvenv environment.
        scorer: what plays.
        figure: which entry of the last info to take: "normalized_score" or "retention".

    Returns:
        (episodes, heads) float64, in the order of the environment's ``episodes`` and ``heads``.
    """
    policy = ScorerPolicy(scorer, env)
    base: Any = env.unwrapped

    def play(episode: int, layer: int, head: int) -> float:
        options = {"episode": episode, "layer": layer, "head": head}
        observation, info = env.reset(options=options)
        over = False
        while not over:
            observation, _, over, _, info = env.step(policy(observation, info))
        return float(info[figure])

    return np.array([[play(e, layer, head) for layer, head in base.heads] for e in base.episodes])
