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

    In Rank-v0 it scores the prompt; in Stream-v0 every token as it arrives, which takes a scorer
    whose scores are fixed then; in Evict-v0 the slots at every step, as an `EvictionCache` does.
    A scorer that needs the utility (the oracle) is given the attention still to come.

    Args:
        scorer: what scores.
        env: the environment that will be played, wrapped or not.

    Raises:
        KvenvError: if the scorer cannot play this environment, or scores a head with NaN.
    """

    def __init__(self, scorer: Scorer, env: gym.Env[Any, Any]) -> None:
        self._batch: Any = getattr(env.unwrapped, "batch", None)
        players: dict[str, Callable[[], Any]] = {
            "kvenv/Rank-v0": self._rank,
            "kvenv/Stream-v0": self._stream,
            "kvenv/Evict-v0": self._evict,
        }
        env_id = getattr(self._batch, "env_id", None)
        if env_id not in players or self._batch.num > 1:
            raise KvenvError(f"{env} is no single environment of {', '.join(players)}: make one")
        self._play, self._scorer = players[env_id], scorer
        self._slots = isinstance(self._batch, SlotBatch)
        if self._slots and (missing := scorer.needs - {"utility"}):
            raise KvenvError(
                f"{type(scorer).__name__} needs {', '.join(sorted(missing))}, which {env_id} does "
                "not give: use kvenv/Rank-v0"
            )
        changes = scorer.age_term is not None or not (scorer.pointwise or scorer.needs)
        if env_id == "kvenv/Stream-v0" and changes:
            raise KvenvError(
                f"{type(scorer).__name__} gives scores that change after a token's arrival, and "
                f"{env_id} takes none of those: use kvenv/Evict-v0"
            )
        self._key: tuple[int, int] | None = None
        self._data: dict[str, torch.Tensor] = {}
        self._future = np.empty((0, 0))
        self._scores = np.empty(0)

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
        action[: len(self._scores)] = self._scores
        return action

    def _stream(self) -> np.ndarray:
        return self._scores[self._batch.now[0], None].astype(np.float32)

    def _evict(self) -> int:
        """The lowest of the slots that may go; of equal scores the latest token's."""
        batch, scorer = self._batch, self._scorer
        now = int(batch.now[0])
        slots = np.flatnonzero(batch.allowed()[0])
        held = batch.positions[0][batch.positions[0] >= 0]
        if len(self._scores):
            scores = self._scores
        else:
            scores = np.empty(now + 1)
            scores[held] = self._score(held, self._future[now, held] if scorer.needs else None)
        places = batch.positions[0, slots]
        worth = self._aged(scores[places], now - places)
        tied = worth == worth.min()
        return int(slots[np.where(tied, places, -1).argmax()])

    def _read(self) -> None:
        """Read the episode, and score all of it where that can be done at once."""
        batch, scorer = self._batch, self._scorer
        layer, _ = batch.source.heads[batch.head[0]]
        traces, index = batch.source.place(int(batch.episode[0]))
        length = int(batch.lengths[0]) if self._slots else None
        needs = frozenset[str]() if self._slots else scorer.needs
        self._data = layer_inputs(traces, index, layer, needs, length)
        every = np.arange(self._data["keys"].shape[2])
        if not self._slots:
            self._scores = _spread(self._aged(self._score(every, None), every[::-1]))
            return
        utility = None
        if scorer.needs:
            self._future = batch.future_attention(0)
            # While recent it is kept anyway, so what it gets then is not its score's merit.
            after = np.minimum(every + max(batch.recent, 1), len(every))
            utility = self._future[after, every]
        if batch.env_id == "kvenv/Stream-v0":
            self._scores = _spread(self._score(every, utility))
        elif scorer.pointwise and not scorer.needs:
            self._scores = self._score(every, None)

    def _score(self, positions: np.ndarray, utility: np.ndarray | None) -> np.ndarray:
        """Scores of the tokens at these positions, (m,), among themselves."""
        batch, data, at = self._batch, self._data, torch.from_numpy(positions)
        layer, head = batch.source.heads[batch.head[0]]
        needs = {need: data[need] for need in self._scorer.needs if need in data}
        if utility is not None:
            needs["utility"] = torch.from_numpy(utility).expand(1, data["keys"].shape[1], -1)
        inputs = (data[name][:, :, at] for name in ("keys", "values", "positions"))
        with torch.no_grad():
            scores = self._scorer.score(layer, *inputs, **needs)[0, head]
        if torch.isnan(scores).any():
            raise KvenvError(
                f"{type(self._scorer).__name__} gave NaN scores for layer {layer} head {head}: it "
                "does not know that head, or its score() is broken"
            )
        return scores.double().numpy()

    def _aged(self, scores: np.ndarray, ages: np.ndarray) -> np.ndarray:
        """Scores (m,) with what the scorer adds to tokens of these ages, in a cache's float32."""
        if self._scorer.age_term is None:
            return scores
        layer, head = self._batch.source.heads[self._batch.head[0]]
        given = torch.from_numpy(ages.copy()).expand(1, self._data["keys"].shape[1], -1)
        with torch.no_grad():
            added = self._scorer.age_term(layer, given)[0, head]
        return scores.astype(np.float32) + added.numpy()


def _spread(scores: np.ndarray) -> np.ndarray:
    """Scores as evenly spread numbers in [-1, 1]; their order and ties stay."""
    order = np.unique(scores, return_inverse=True)[1]
    return 2 * order / max(int(order.max()), 1) - 1


def play_all(env: gym.Env[Any, Any], scorer: Scorer, figure: str) -> np.ndarray:
    """Play every episode and head that an environment draws, each once, with a scorer.

    Args:
        env: a single kvenv environment.
        scorer: what plays.
        figure: which entry of the last info to take: "closure" (Rank-v0) or "retention" (others).

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
