"""N episodes side by side: what a single environment (N = 1) and a vector environment both run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from gymnasium import spaces

from kvenv.envs.arena import Arena
from kvenv.envs.source import Draws, Source, check_options, count
from kvenv.errors import KvenvError
from kvenv.trace import TraceSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST = 2 * float(np.finfo(np.float16).max)
"""Keys and values are recorded as float16; turning a key makes no entry more than 1.42 as large."""

RENDER_MODES = ("rgb_array", "ansi")


class Batch(ABC):
    """The rules of an environment, for N episodes at once.

    Whatever is per environment has a leading axis N, and no step loops over the environments, but
    for Rank-v1's output reward.

    Args:
        num: N.
        source: the episodes and heads to draw from.
        reward: "attention" or "output".
        sinks, recent, sink_free: what is protected, and what does not count.
        tokenizer: for text; None takes the recorded model's.

    Attributes:
        observation_space, action_space: of a single environment.
        remembers: whether episodes keep what pictures need; set it before they begin.
        done: whether each episode has ended, (N,).
        draws: the random numbers of the resets.
    """

    env_id: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    observation_space: spaces.Box
    action_space: spaces.Space[Any]
    arena: Arena
    remembers: bool = False

    def __init__(
        self,
        num: int,
        source: Source,
        reward: str,
        sinks: int,
        recent: int,
        sink_free: bool,
        tokenizer: str | None = None,
    ) -> None:
        if reward not in ("attention", "output"):
            raise KvenvError(f"unknown reward {reward!r}: choose 'attention' or 'output'")
        if reward == "output" and sink_free:
            raise KvenvError("sink_free=True goes with reward='attention': the output has no sinks")
        self.num, self.source, self.reward = num, source, reward
        self.sinks, self.recent = count("sinks", sinks), count("recent", recent)
        self.sink_free = sink_free
        self._tokenizer_name = tokenizer
        self.draws = Draws(num)
        self.every = np.arange(num)
        self.episode, self.head, self.row, self.n = (
            np.zeros(num, dtype=np.int64) for _ in range(4)
        )
        self.done = np.ones(num, dtype=bool)
        self.began = np.zeros(num, dtype=bool)
        layers, kv_heads = np.array(source.heads).T
        self._layers, self._kv_heads = layers.copy(), kv_heads.copy()

    def begin(self, which: np.ndarray, options: Mapping[str, Any] | None = None) -> None:
        """Start new episodes in these environments, (m,) indices.

        Raises:
            KvenvError: if an option is unknown or out of range; nothing has then been started.
        """
        chosen = check_options(options, self.options)
        episode, head = self.source.choose(self.draws.next(which), chosen)
        extra = self._check(episode, chosen)
        others = self.began.copy()
        others[which] = False
        row = self.arena.rows(episode * len(self.source.heads) + head, self.row[others])
        self.episode[which], self.head[which], self.row[which] = episode, head, row
        self.draws.take(which)
        self.n[which] = self.source.n[episode]
        self.done[which], self.began[which] = False, True
        self._begin(which, extra)

    def info(self) -> dict[str, np.ndarray]:
        """What `reset` and `step` both tell, each (N, ...), in arrays of their own."""
        return {
            "episode_index": self.episode.copy(),
            "layer": self._layers[self.head],
            "head": self._kv_heads[self.head],
            "n": self.n.copy(),
        }

    @abstractmethod
    def _check(self, episode: np.ndarray, options: Mapping[str, Any]) -> Any:
        """What `_begin` wants to know of the options, checked, before anything is changed."""

    @abstractmethod
    def _begin(self, which: np.ndarray, extra: Any) -> None:
        """Set up the state of new episodes."""

    @abstractmethod
    def observe(self, which: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """The observations of these environments, or of all, in ``out`` or a new array.

        Args:
            which: indices, (m,).
            out: (m, *shape) float32, written and returned.
        """

    @abstractmethod
    def check_actions(self, actions: Any, live: np.ndarray) -> np.ndarray:
        """Actions as the rules want them; only those of live environments, (N,) bool, are judged.

        Raises:
            KvenvError: naming the first that cannot be played.
        """

    @abstractmethod
    def advance(self, actions: np.ndarray) -> np.ndarray:
        """Play actions; the rewards, (N,) float64. `done` and `outcome` then tell the rest."""

    @abstractmethod
    def outcome(self) -> dict[str, np.ndarray]:
        """What `step` tells beside `info`, each (N, ...), in arrays of their own."""

    @abstractmethod
    def picture(self, i: int) -> np.ndarray:
        """A picture of environment ``i``, (540, 960, 3) uint8."""

    @abstractmethod
    def text(self, i: int) -> str:
        """The text of environment ``i`` with evicted words dimmed."""

    def title(self, i: int) -> str:
        """What environment ``i`` shows, in a line."""
        layer, head = self.source.heads[self.head[i]]
        return f"{self.env_id} · layer {layer} head {head} · episode {self.episode[i]}"

    def whose(self, i: int) -> str:
        """Names environment ``i`` in an error, where there are several."""
        return f" in environment {i}" if self.num > 1 else ""

    def entry(self, entry: int) -> tuple[int, int]:
        """The episode and the index of the head that an arena's entry stands for."""
        return divmod(entry, len(self.source.heads))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer asked for, else the recorded model's, else None."""
        # Loading transformers takes seconds, and only text needs it.
        from kvenv.models import load_tokenizer

        if self._tokenizer_name is not None:
            return load_tokenizer(self._tokenizer_name)
        try:
            return load_tokenizer(self.source.traces.model.id)
        except KvenvError:
            return None


class Drawing:
    """Names the trace set, the heads and the episodes that an environment draws from."""

    batch: Batch

    @property
    def traces(self) -> TraceSet:
        """The trace set; of several, the first."""
        return self.batch.source.traces

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The (layer, KV head) pairs that are drawn."""
        return [self.batch.source.heads[i] for i in self.batch.source.pool]

    @property
    def episodes(self) -> list[int]:
        """The episodes that are drawn."""
        return self.batch.source.episodes.tolist()


def token_box(shape: tuple[int, ...], rows: int, head_dim: int) -> spaces.Box:
    """The observation space of ``rows`` tokens in the layout of `kvenv.envs.core.features`.

    Args:
        shape: of an observation, (rows, 2d + 2) or flat.
        rows: tokens.
        head_dim: d.
    """
    wide = 2 * head_dim
    low = np.array([*[-LARGEST] * wide, 0, 0], np.float32)
    high = np.array([*[LARGEST] * wide, 2, 1], np.float32)
    lows, highs = (np.tile(one, rows).reshape(shape) for one in (low, high))
    return spaces.Box(lows, highs, dtype=np.float32)
