"""What an agent is: a method that turns traces into a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor
from typing_extensions import Self

from kvenv.learning.run import Run
from kvenv.scorers.base import Head, Scorer
from kvenv.trace import TraceSet


@runtime_checkable
class Agent(Protocol):
    """An eviction method: one file in agents/ defines one such class.

    The class's typed ``__init__`` arguments (a dataclass's fields) become options of
    ``kvenv train NAME``.

    Attributes:
        trains: whether `fit` learns from traces; a heuristic returns its scorer at once.
    """

    trains: bool

    def fit(
        self,
        traces: Sequence[TraceSet],
        heads: Sequence[Head] | None = None,
        run: Run | None = None,
    ) -> Scorer:
        """Learn a scorer.

        Args:
            traces: the training sets. Heuristics accept an empty sequence.
            heads: the heads to learn; None means every recorded one.
            run: where checkpoints, logs and progress go; None keeps nothing on disk.
        """
        ...


class Heuristic:
    """An agent that learns nothing and is its own scorer: a subclass writes `score` and is done.

    One that looks at more than keys, values, positions and now names it in ``needs``.
    """

    trains = False
    needs: frozenset[str] = frozenset()
    heads: frozenset[Head] | None = None

    def score(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        now: Tensor,
        **needs: Tensor,
    ) -> Tensor:
        """See `kvenv.scorers.base.Scorer.score`."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def fit(
        self,
        traces: Sequence[TraceSet] = (),
        heads: Sequence[Head] | None = None,
        run: Run | None = None,
    ) -> Self:
        """Nothing to learn."""
        return self
