"""Where the environments' episodes come from: a trace set, and the heads that may be drawn."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvenv.errors import KvenvError
from kvenv.trace import TraceSet


class Source:
    """The episodes and heads of a trace set that an environment draws from.

    Args:
        traces: the folder of a trace set, or the id of a packaged one.
        layer: the only layer to draw, in the model's own numbers; None draws from all.
        head: the only KV head to draw; None draws from all.

    Raises:
        KvenvError: if there is no such set, or the layer or head is not recorded.
    """

    def __init__(
        self, traces: str | Path, layer: int | None = None, head: int | None = None
    ) -> None:
        self.traces = TraceSet(traces)
        self.lengths = [self.traces.info(i).n for i in range(len(self.traces))]
        self._layer, self._head = layer, head
        # What no episode could satisfy is told now, not at the first reset.
        self._candidates(layer, head)

    def draw(self, rng: np.random.Generator, options: Mapping[str, Any]) -> dict[str, int]:
        """Pick an episode and a head: what options name, the rest uniformly at random.

        Args:
            rng: the environment's generator; each draw that is needed advances it.
            options: "episode", "layer" and "head", each optional; other keys are not looked at.

        Returns:
            "episode", "layer", "head" and "n", the prompt's tokens.

        Raises:
            KvenvError: if an option is out of range, naming what is in it.
        """
        episode, layer, head = (options.get(name) for name in ("episode", "layer", "head"))
        count = len(self.lengths)
        if episode is None:
            episode = rng.integers(count)
        elif not 0 <= integer("episode", episode) < count:
            raise KvenvError(f"episode {episode} is not in the trace set: choose 0 to {count - 1}")
        heads = self._candidates(
            self._layer if layer is None else layer, self._head if head is None else head
        )
        layer, head = heads[rng.integers(len(heads))]
        return {
            "episode": int(episode),
            "layer": layer,
            "head": head,
            "n": self.lengths[int(episode)],
        }

    def _candidates(self, layer: int | None, head: int | None) -> list[tuple[int, int]]:
        """The recorded heads with this layer and this KV head."""
        heads = self.traces.heads
        layers, kv_heads = sorted({x for x, _ in heads}), sorted({y for _, y in heads})
        if layer is not None and integer("layer", layer) not in layers:
            raise KvenvError(f"layer {layer} is not recorded: choose from {layers}")
        if head is not None and integer("head", head) not in kv_heads:
            raise KvenvError(f"head {head} is not recorded: choose from {kv_heads}")
        return [(x, y) for x, y in heads if layer in (None, x) and head in (None, y)]


def check_options(options: Mapping[str, Any] | None, known: Iterable[str]) -> Mapping[str, Any]:
    """The options of a reset, {} for None.

    Raises:
        KvenvError: if one is unknown, naming those that are known.
    """
    names = list(known)
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
