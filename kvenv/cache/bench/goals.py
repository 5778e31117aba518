"""What the figures should reach, and by how much they miss it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

COPY_SHARE = 0.8
INSERT_SHARE = 0.05
SPEED_UP = 3.0
MEMORY = 0.02
FLAT = 0.05
GOAL_BUDGET, GOAL_BATCH = 4096, 16
"""Attention and eviction have their goals at this budget and from this batch on."""

Row = Mapping[str, Any]


def find_goals(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal that something was measured for.

    Args:
        results: what `kvenv.cache.bench.run` gives, or a part of it.

    Returns:
        ``name``, ``figure``, ``goal``, ``at_least`` (else at most) and ``met`` of each.
    """
    return [*_kernels(results), *_decoding(results.get("decoding", {}))]


def _goal(name: str, figure: float, goal: float, at_least: bool) -> dict[str, Any]:
    met = figure >= goal if at_least else figure <= goal
    return {"name": name, "figure": figure, "goal": goal, "at_least": at_least, "met": met}


def _kernels(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row in results.get("step", ()):
        if "attend" not in row or row["budget"] != GOAL_BUDGET or row["batch"] < GOAL_BATCH:
            continue
        at = f"batch {row['batch']}, budget {row['budget']}"
        share = row["attend"]["share_of_copy"]
        yield _goal(f"attend, share of copy bandwidth, {at}", share, COPY_SHARE, True)
        share = row["insert_share_of_attend"]
        yield _goal(f"insert, share of attend's time, {at}", share, INSERT_SHARE, False)


def _decoding(decoding: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    rows = [row for row in decoding.get("rows", ()) if "step_seconds" in row]
    ours = [row for row in rows if row["way"] == "ours"]
    for row in rows:
        if row["way"] == "compiled" and (mine := _against(row, ours)):
            at = f"context {row['context']}, budget {mine['budget']}, batch {row['batch']}"
            ratio = mine["tokens_per_second"] / row["tokens_per_second"]
            yield _goal(f"decoding against the compiled StaticCache, {at}", ratio, SPEED_UP, True)
    if ours:
        off = max(abs(row["cache_of_budget"] - 1) for row in ours)
        yield _goal("cache bytes off the budget's, worst", off, MEMORY, False)
    if slopes := list(flatness(ours)):
        worst = max(slopes, key=lambda one: one["spread"])
        at = f"budget {worst['budget']}, batch {worst['batch']}"
        name = f"step time over contexts {worst['contexts'][0]} to {worst['contexts'][-1]}, {at}"
        yield _goal(f"{name}: spread, worst", worst["spread"], FLAT, False)
    memory = decoding.get("memory", {})
    if "grew_by" in memory:
        name = f"bytes that the device holds more after {memory['tokens']} tokens"
        yield _goal(name, memory["grew_by"], 0, False)


def _against(row: Row, ours: Sequence[Row]) -> Row | None:
    """Ours at the same context and batch: with a budget of 2048 if there is one."""
    same = [mine for mine in ours if _where(mine) == _where(row)]
    return min(same, key=lambda mine: abs(mine["budget"] - 2048), default=None)


def _where(row: Row) -> tuple[int, int]:
    return row["context"], row["batch"]


def flatness(ours: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """How far step times at one batch and budget differ over contexts beyond the budget."""

    def fixed(row: Row) -> tuple[int, int]:
        return row["batch"], row["budget"]

    longer = [row for row in ours if row["context"] > row["budget"]]
    for (batch, budget), group in groupby(sorted(longer, key=fixed), fixed):
        by_context = {row["context"]: row["step_seconds"] for row in group}
        if len(by_context) > 1:
            yield {
                "batch": batch,
                "budget": budget,
                "contexts": sorted(by_context),
                "spread": max(by_context.values()) / min(by_context.values()) - 1,
            }


def sentence(goal: Mapping[str, Any]) -> str:
    """One line of a report."""
    figure, wanted = goal["figure"], goal["goal"]
    sign = ">=" if goal["at_least"] else "<="
    miss = "met" if goal["met"] else f"missed by {abs(figure - wanted):.3g}"
    return f"{goal['name']}: {figure:.3g}, goal {sign} {wanted:g}: {miss}"
