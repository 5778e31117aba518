"""What a terminal shows: progress bars and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from kvenv.trace import TraceSet, summary

console = Console()

RESULT_COLUMNS = {
    "normalized_score": "normalized_score",
    "reward": "all budgets",
    "retention@1/16": "1/16",
    "retention@1/8": "1/8",
    "retention@1/4": "1/4",
    "retention@1/2": "1/2",
}
"""Metric -> heading of a results table."""

SHOWN = 5
"""Heads behind that a line names; the JSON has all."""


def progress_bar(unit: str, shown: bool = True) -> Progress:
    """A bar with count, elapsed time, time left and a free text field, ``note``.

    Args:
        unit: what is counted, e.g. "episodes".
        shown: False draws nothing.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not shown,
    )


def print_summary(traces: TraceSet) -> None:
    """What a trace set holds, as a table."""
    facts = summary(traces)
    title = facts.pop("path")
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), _fact(key, value))
    console.print(table)


def _fact(key: str, value: Any) -> str:
    if key == "bytes":
        return decimal(value)
    if isinstance(value, dict):  # what is not None, and lists without their quotes
        given = {k: v for k, v in value.items() if v is not None}
        pairs = ((k, ",".join(map(str, v)) if isinstance(v, list) else v) for k, v in given.items())
        return ", ".join(f"{k}={v}" for k, v in pairs)
    if isinstance(value, list):
        whole = len(value) > 2 and value == list(range(value[0], value[-1] + 1))
        return f"{value[0]} to {value[-1]}" if whole else ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no: run the same record command again"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_results(result: Mapping[str, Any]) -> None:
    """An evaluation as two tables, agents by budgets: over all tokens, and sink-free.

    Below each, a line for every learned agent says how far it is from the best heuristics.
    """
    counted = f"{result['documents']} documents, {len(result['heads'])} heads"
    titles = {
        "full": f"retention: mean ± half the 95 % interval over {counted}",
        "sink_free": "sink-free: the same with the first 4 tokens left out",
    }
    agents = result["agents"]
    for table_name, title in titles.items():
        table = Table(title=title, show_edge=False)
        table.add_column("agent", min_width=9)
        for heading in RESULT_COLUMNS.values():
            table.add_column(heading, justify="right")
        for name in sorted(
            agents, key=lambda agent: -agents[agent][table_name]["normalized_score"]["mean"]
        ):
            figures = [agents[name][table_name][metric] for metric in RESULT_COLUMNS]
            cells = [f"{f['mean']:.3f} ±{(f['high'] - f['low']) / 2:.3f}" for f in figures]
            table.add_row(name, *cells)
        console.print(table)
        for name, tables in result["comparison"].items():
            if agents[name]["kind"] == "learned":
                line = f"{name} against the best heuristic: {_compared(tables[table_name])}"
                console.print(line, markup=False, highlight=False)


def _compared(figures: Mapping[str, Any]) -> str:
    """Paired differences at each budget with their intervals, and heads won, in words."""
    budgets = []
    for metric, heading in RESULT_COLUMNS.items():
        if metric.startswith("retention@"):
            f = figures[metric]
            budgets.append(
                f"{heading} {f['difference']:+.3f} [{f['low']:+.3f}, {f['high']:+.3f}] "
                f"{f['baseline']}"
            )
    heads = figures["heads"]
    won = f"{heads['wins']} of {heads['of']} heads"
    behind = [
        f"{layer}:{head} ({margin:+.3f}, {baseline})"
        for layer, head, baseline, margin in heads["behind"]
    ]
    if behind:
        more = f" and {len(behind) - SHOWN} more" if len(behind) > SHOWN else ""
        won += f"; behind on {', '.join(behind[:SHOWN])}{more}"
    return f"{', '.join(budgets)}; {won}"
