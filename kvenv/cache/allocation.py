"""Divides a cache's budget among heads: the same for all, or by what each head's curve gains.

With r_h(b) the mean retention of head h at b tokens, an allocation maximises sum_h r_h(b_h) at a
fixed total: whole tokens go where the concave hull of r_h rises most, until the total is spent.
For concave curves that greedy choice is optimal (Fox 1966, "Discrete optimization via marginal
analysis"). Of b tokens the floor - 1 protected ones (sinks and the most recent) were not chosen by
rank, so that r_h is taken at the fraction (b - floor + 1) / (context - floor + 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from kvenv.errors import KvenvError
from kvenv.scorers.base import Head
from kvenv.scorers.curves import Curves

Mode = Literal["uniform", "heads", "global"]
"""The same for every head; divided among the heads of each layer; among all heads."""


def allocate(
    mode: Mode,
    heads_by_layer: Mapping[int, int],
    budget: int,
    floor: int,
    curves: Curves | None,
    context: int,
) -> dict[int, tuple[int, ...]]:
    """How many tokens each head may hold.

    Args:
        mode: "uniform" gives every head the budget; "heads" divides the budgets of each layer's
            heads among them, "global" those of all layers'.
        heads_by_layer: layer -> its number of KV heads.
        budget: tokens per head on average.
        floor: the least that any head gets: sinks + recent + 1.
        curves: what heads gain by tokens. A head without a curve gets the budget.
        context: tokens of text at which the curves' fractions are taken. No head gets more, unless
            the budget is more: then all get the budget.

    Returns:
        layer -> capacities of its heads. Sums are exact: budget * heads in every layer ("heads")
        or over all of them ("global").

    Raises:
        KvenvError: on an unknown mode, a budget below the floor, a floor, context or number of
            heads below 1, or no curves where they are needed.
    """
    if mode not in get_args(Mode):
        raise KvenvError(f"allocation {mode!r}: choose one of {', '.join(get_args(Mode))}")
    least = min((floor, context, *heads_by_layer.values()))
    if least < 1:
        raise KvenvError(
            f"an allocation of floor {floor}, context {context} and heads "
            f"{dict(heads_by_layer)}: each must be at least 1"
        )
    if budget < floor:
        raise KvenvError(
            f"budget {budget} is below the {floor} tokens (sinks + recent + 1) that every head "
            "keeps: raise the budget, or lower sinks or recent"
        )
    if mode != "uniform" and curves is None:
        raise KvenvError(
            f'allocation "{mode}" needs retention curves and the agent has none: add them with '
            '`kvenv curves BUNDLE --traces DIR`, or use allocation="uniform"'
        )
    shares = {(layer, h): budget for layer, count in heads_by_layer.items() for h in range(count)}
    if mode != "uniform" and curves is not None and budget < context:
        rows = {head: row for row, head in enumerate(curves.heads) if head in shares}
        for group in _groups(mode, sorted(rows)):
            runs = [_runs(curves, rows[head], floor, context) for head in group]
            filled = _fill(runs, floor, budget * len(group))
            shares |= dict(zip(group, filled.tolist(), strict=True))
    return {
        layer: tuple(shares[layer, h] for h in range(count))
        for layer, count in heads_by_layer.items()
    }


def _groups(mode: Mode, heads: Sequence[Head]) -> list[list[Head]]:
    """Heads that share one total."""
    if mode == "global":
        return [list(heads)] if heads else []
    layers = sorted({layer for layer, _ in heads})
    return [[head for head in heads if head[0] == layer] for layer in layers]


def _runs(curves: Curves, row: int, floor: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """A head's concave hull from ``floor`` to ``context`` tokens: gains a token, and how often."""
    protected = floor - 1
    x = protected + curves.fractions * (context - protected)
    # Between whole tokens next to the curve's points it is a line: these are all that matter.
    around = np.concatenate([np.floor(x), np.ceil(x), [floor, context]])
    knots = np.unique(around[(around >= floor) & (around <= context)])
    heights = np.interp(knots, x, curves.retention[row])
    hull: list[int] = []
    for at in range(len(knots)):
        while len(hull) > 1 and _slope(knots, heights, hull[-2], hull[-1]) <= _slope(
            knots, heights, hull[-1], at
        ):
            hull.pop()
        hull.append(at)
    counts = np.diff(knots[hull])
    return np.diff(heights[hull]) / counts, counts.astype(np.int64)


def _slope(x: np.ndarray, y: np.ndarray, a: int, b: int) -> float:
    return float((y[b] - y[a]) / (x[b] - x[a]))


def _fill(runs: Sequence[tuple[np.ndarray, np.ndarray]], floor: int, total: int) -> np.ndarray:
    """Give ``total`` tokens to heads, the steepest runs first; equal ones are levelled, (H,)."""
    given = np.full(len(runs), floor, np.int64)
    left = total - int(given.sum())
    owner = np.repeat(np.arange(len(runs)), [len(gains) for gains, _ in runs])
    gains, counts = (np.concatenate(part) for part in zip(*runs, strict=True))
    order = np.argsort(-gains, kind="stable")
    starts = np.flatnonzero(np.diff(gains[order], prepend=np.inf))
    for tied in np.split(order, starts[1:]):
        if left == 0:
            break
        room = np.zeros_like(given)
        np.add.at(room, owner[tied], counts[tied])
        added = room if room.sum() <= left else _level(given, room, left)
        given += added
        left -= int(added.sum())
    return given


def _level(given: np.ndarray, room: np.ndarray, amount: int) -> np.ndarray:
    """``amount`` < sum(room) tokens to heads as evenly as their room allows, earlier ones first."""
    low, high = int(given.min()), int((given + room).max())
    while high - low > 1:  # the highest level that the amount fills
        middle = (low + high) // 2
        if np.clip(middle - given, 0, room).sum() <= amount:
            low = middle
        else:
            high = middle
    added = np.clip(low - given, 0, room)
    rest = amount - int(added.sum())
    added[np.flatnonzero((given + added == low) & (added < room))[:rest]] += 1
    return added
