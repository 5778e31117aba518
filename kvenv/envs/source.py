"""Where episodes come from: trace sets, the heads that may be drawn, and the draws themselves."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvenv.errors import KvenvError
from kvenv.trace import TraceSet, same_model

Traces = str | Path | Sequence[str | Path]
"""One trace set or several: folders, or ids of packaged sets."""


class Source:
    """The episodes and heads that environments draw from.

    Args:
        traces: folders of trace sets, or ids of packaged ones; the episodes of several are
            numbered through.
        layer: the only layer to draw, in the model's own numbers; None draws from all.
        head: the only KV head to draw; None draws from all.
        episodes: draw from these episodes only; None draws from all.

    Attributes:
        sets: the trace sets.
        heads: the (layer, KV head) pairs recorded in all of them.
        n: prompt tokens of every episode, (E,).
        lengths: S, tokens of prompt and future of every episode, (E,).
        episodes: those that are drawn, (D,).
        pool: indices of the heads that are drawn.

    Raises:
        KvenvError: if there is no such set, the sets are of different models, or an episode,
            layer or head is not recorded.
    """

    def __init__(
        self,
        traces: Traces,
        layer: int | None = None,
        head: int | None = None,
        episodes: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(traces, str | Path | Sequence) or not len(names := _listed(traces)):
            raise KvenvError(
                f"traces={traces!r} names no trace set: give a folder, or a list of them"
            )
        self.sets = [TraceSet(name) for name in names]
        same_model(self.sets)
        self.heads: list[tuple[int, int]] = sorted(
            set.intersection(*(set(t.heads) for t in self.sets))
        )
        if not self.heads:
            held = "; ".join(f"{t.path} holds {t.heads}" for t in self.sets)
            raise KvenvError(
                f"the trace sets share no (layer, KV head): {held}; record the same --layers"
            )
        rotations = [self.sets[0].model.rotation(layer) for layer, _ in self.heads]
        self._rotations = list(dict.fromkeys(rotations))
        self._kinds = np.array([self._rotations.index(one) for one in rotations])
        self._places = [(t, i) for t in self.sets for i in range(len(t))]
        infos = [t.info(i) for t, i in self._places]
        self.n = np.array([info.n for info in infos])
        self.lengths = np.array([info.S for info in infos])
        self.episodes = self._check_episodes(episodes)
        self._layer, self._head = layer, head
        self._numbers = np.array(self.heads).T  # layers and KV heads, (2, H)
        self.pool = np.flatnonzero(self._candidates({}, 1)[0])

    @property
    def traces(self) -> TraceSet:
        """The first of the trace sets."""
        return self.sets[0]

    def place(self, episode: int) -> tuple[TraceSet, int]:
        """The trace set that an episode is in, and its index there."""
        return self._places[episode]

    def read(self, episode: int, field: str, head: int) -> np.ndarray:
        """One dataset of an episode for the head of that index; see `TraceSet.read`."""
        traces, index = self._places[episode]
        return traces.read(index, field, *self.heads[head])

    def frame(self, keys: np.ndarray, heads: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Keys in the frame of now; see `kvenv.rotation.Rotation.frame`.

        Args:
            keys: (m, W, d) of m heads.
            heads: their indices, (m,).
            now: the newest token's position in each, (m,).

        Returns:
            (m, W, d) float32.
        """
        kinds = self._kinds[heads]
        framed = np.empty(keys.shape, np.float32)
        for kind in np.unique(kinds).tolist():
            rows = kinds == kind
            by = torch.from_numpy(-now[rows])[:, None]
            turned = self._rotations[kind].turn(torch.from_numpy(keys[rows]), by)
            framed[rows] = turned.numpy()
        return framed

    def tokens(self, episode: int) -> np.ndarray:
        """Token ids of prompt and future, (S,) int32."""
        traces, index = self._places[episode]
        return traces.tokens(index)

    def need_all_queries(self) -> None:
        """Check that every token's queries are recorded.

        Raises:
            KvenvError: naming the set and how to record it.
        """
        for traces in self.sets:
            if traces.manifest.queries != "all":
                raise KvenvError(
                    f"{traces.path} holds the queries of its last tokens only, and sequential "
                    f"environments need every token's: record it again with `kvenv record "
                    f"{traces.manifest.workload} --queries all ...`"
                )

    def choose(
        self, draws: np.ndarray, options: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pick an episode and a head for each of m environments.

        Args:
            draws: (m, 2), uniform in [0, 1): what options leave open.
            options: "episode", "layer" and "head", each optional, a number for all or (m,) of
                them; other keys are not looked at.

        Returns:
            Episodes (m,) and indices of heads (m,).

        Raises:
            KvenvError: if an option is out of range, naming what is in it.
        """
        m = len(draws)
        if options.get("episode") is None:
            episode = self.episodes[(draws[:, 0] * len(self.episodes)).astype(np.int64)]
        else:
            episode = per_environment("episode", options["episode"], m)
            if wrong := [e for e in episode.tolist() if not 0 <= e < len(self.n)]:
                raise KvenvError(
                    f"episode {wrong[0]} is not in the trace set: choose 0 to {len(self.n) - 1}"
                )
        if options.get("layer") is None and options.get("head") is None:
            return episode, self.pool[(draws[:, 1] * len(self.pool)).astype(np.int64)]
        fits = self._candidates(options, m)
        nth = (draws[:, 1] * fits.sum(-1)).astype(np.int64)
        return episode, (fits.cumsum(-1) > nth[:, None]).argmax(-1)

    def close(self) -> None:
        """Close the trace files."""
        for traces in self.sets:
            traces.close()

    def _candidates(self, options: Mapping[str, Any], m: int) -> np.ndarray:
        """Which heads have the layer and KV head asked for, (m, H) bool."""
        fits = np.ones((m, len(self.heads)), dtype=bool)
        for name, default, numbers in zip(
            ("layer", "head"), (self._layer, self._head), self._numbers, strict=True
        ):
            asked = options.get(name)
            if (asked := default if asked is None else asked) is None:
                continue
            wanted = per_environment(name, asked, m)
            if unknown := sorted(set(wanted.tolist()) - set(numbers.tolist())):
                raise KvenvError(
                    f"{name} {unknown[0]} is not recorded: choose from "
                    f"{sorted(set(numbers.tolist()))}"
                )
            fits &= wanted[:, None] == numbers
        return fits

    def _check_episodes(self, episodes: Sequence[int] | None) -> np.ndarray:
        count = len(self.n)
        if episodes is None:
            return np.arange(count)
        if not np.ndim(episodes):
            raise KvenvError(f"episodes={episodes!r} is no list: give one of indices, e.g. [0, 1]")
        chosen = [integer("episodes", episode) for episode in episodes]
        if not chosen:
            raise KvenvError("episodes is empty: name at least one, or None for all")
        if wrong := [e for e in chosen if not 0 <= e < count]:
            raise KvenvError(f"episode {wrong[0]} is not in the trace set: choose 0 to {count - 1}")
        return np.array(chosen)


class Draws:
    """Uniform numbers for N environments, each from a generator of its own.

    They are drawn a block at a time, so that a batch takes them by indexing. A new generator starts
    a new block; setting back the state of one does not.
    """

    BLOCK = 64

    def __init__(self, num: int) -> None:
        self.generators: list[np.random.Generator | None] = [None] * num
        self._block = np.empty((num, self.BLOCK, 2))
        self._used = np.full(num, self.BLOCK)

    def use(self, i: int, generator: np.random.Generator) -> None:
        """Draw for environment ``i`` from this generator; a new one starts a new block."""
        if generator is not self.generators[i]:
            self.generators[i] = generator
            self._used[i] = self.BLOCK

    def next(self, which: np.ndarray) -> np.ndarray:
        """The next pair for each of these environments, (m, 2), until they are taken."""
        for i in which[self._used[which] == self.BLOCK]:
            generator = self.generators[i] = self.generators[i] or np.random.default_rng()
            self._block[i] = generator.random((self.BLOCK, 2))
            self._used[i] = 0
        return self._block[which, self._used[which]]

    def take(self, which: np.ndarray) -> None:
        """Go on to the pairs after those that `next` gave."""
        self._used[which] += 1


def check_options(options: Mapping[str, Any] | None, known: Iterable[str]) -> Mapping[str, Any]:
    """The options of a reset, {} for None.

    Raises:
        KvenvError: if one is unknown, naming those that are known.
    """
    names = list(known)
    if options is not None and not isinstance(options, Mapping):
        raise KvenvError(f"options={options!r} is no dict: give one with {', '.join(names)}")
    for name in options or {}:
        if name not in names:
            raise KvenvError(f"unknown reset option {name!r}: choose from {', '.join(names)}")
    return options or {}


def integer(name: str, value: object) -> int:
    """The value as an int; KvenvError naming it where it is not a whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise KvenvError(f"{name}={value!r} is not a whole number: give an int") from None


def count(name: str, value: object) -> int:
    """A number of tokens, 0 or more; KvenvError naming it where it is none."""
    if (tokens := integer(name, value)) < 0:
        raise KvenvError(f"{name}={tokens} is negative: give 0 or more tokens")
    return tokens


def per_environment(name: str, value: object, m: int) -> np.ndarray:
    """A whole number for each of m environments, (m,) int64, from one for all or m of them."""
    if np.ndim(value) == 0:  # pyright: ignore[reportArgumentType]
        return np.full(m, integer(name, value))
    values = np.asarray(value)
    if values.shape != (m,) or values.dtype.kind not in "iu":
        raise KvenvError(f"{name}={value!r} is not {m} whole numbers: give one for each, or an int")
    return values.astype(np.int64)


def _listed(traces: Traces) -> Sequence[str | Path]:
    return [traces] if isinstance(traces, str | Path) else traces
