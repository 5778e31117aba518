"""The tables of the page: every figure in words, with its interval, before any script runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvenv.report.figures import (
    Cell,
    Figures,
    Glyph,
    Row,
    Table,
    budget_label,
    figure,
    metric_label,
    number,
)
from kvenv.report.schema import VIEWS

KIND_ORDER = {"learned": 0, "oracle": 1, "heuristic": 2}
QUANTITIES = {"versus_full": "above the full cache", "versus_oracle": "above the oracle ranking"}
MEASURES = {
    "streaming": "perplexity",
    "conversation": "perplexity",
    "streams": "sink-free retention",
}


def ordered(agents: Mapping[str, Figures]) -> list[str]:
    """Agents as they are listed: learned, oracle, heuristics; each by its sink-free score."""

    def key(name: str) -> tuple[int, float]:
        normalized_score = (agents[name].get("sink_free") or {}).get("normalized_score") or {}
        return KIND_ORDER[agents[name]["kind"]], -(normalized_score.get("mean") or 0.0)

    return sorted(agents, key=key)


def _views(agents: Mapping[str, Figures], key: str | None = None) -> list[str]:
    """The views that any agent has figures of (under ``key``)."""
    found = (a if key is None else a.get(key) or {} for a in agents.values())
    held = [view for figures in found for view in VIEWS if figures.get(view)]
    return [view for view in VIEWS if view in held]


def metric_tables(agents: Mapping[str, Figures]) -> list[Table]:
    """All agents by all metrics, one table a view."""
    tables = []
    for view in _views(agents):
        shown = {name: agents[name].get(view) or {} for name in ordered(agents)}
        metrics = list(dict.fromkeys(metric for figures in shown.values() for metric in figures))
        best = {m: _best(((n, f.get(m)) for n, f in shown.items()), agents) for m in metrics}
        rows = [
            Row(name, [_marked(f.get(m), best[m] == name) for m in metrics], agents[name]["kind"])
            for name, f in shown.items()
        ]
        tables.append(
            Table("Means over documents", "agent", [metric_label(m) for m in metrics], rows, view)
        )
    return tables


def _marked(interval: Figures | None, best: bool, digits: int = 3) -> Cell:
    cell = figure(interval, digits)
    return Cell(cell.text, cell.interval, cell.number, best)


def _best(
    found: Iterable[tuple[str, Figures | None]], agents: Mapping[str, Figures], sign: int = 1
) -> str | None:
    """The agent with the best mean, the oracle aside; None where there is no choice."""
    means = {
        name: sign * interval["mean"]
        for name, interval in found
        if interval and interval["mean"] is not None
        if (agents.get(name) or {}).get("kind") != "oracle" and name != "oracle"
    }
    return max(means, key=lambda name: means[name]) if len(means) > 1 else None


def curve_tables(agents: Mapping[str, Figures], budgets: Sequence[float]) -> list[Table]:
    """The curves' own figures: budgets by agents, one table a view."""
    tables = []
    for view in _views(agents, "curve"):
        names = [n for n in ordered(agents) if (agents[n].get("curve") or {}).get(view)]
        curves = [agents[name]["curve"][view] for name in names]
        rows = [
            Row(
                budget_label(budget),
                [figure({k: c[k][i] for k in ("mean", "low", "high")}) for c in curves],
            )
            for i, budget in enumerate(budgets)
        ]
        tables.append(Table("Retention at each budget", "budget", names, rows, view))
    return tables


def head_tables(agents: Mapping[str, Figures], heads: Sequence[Sequence[int]]) -> list[Table]:
    """The normalized score of every head: heads by agents, one table a view."""
    tables = []
    for view in _views(agents, "per_head"):
        names = [n for n in ordered(agents) if (agents[n].get("per_head") or {}).get(view)]
        rows = []
        for i, (layer, head) in enumerate(heads):
            values = [agents[name]["per_head"][view][i] for name in names]
            cells = [Cell(number(value), number=value) for value in values]
            rows.append(Row(f"layer {layer}, head {head}", cells))
        tables.append(Table("Normalized score of each head", "head", names, rows, view))
    return tables


def comparison_tables(compared: Figures) -> list[Table]:
    """One agent's paired differences against the best heuristic, one table a view."""
    tables = []
    for view in (view for view in VIEWS if compared.get(view)):
        entries = {k: e for k, e in compared[view].items() if k not in ("improvement", "heads")}
        ends = [e[k] or 0.0 for e in entries.values() for k in ("difference", "low", "high")]
        low, high = min([0.0, *ends]), max([0.0, *ends])
        rows = [
            Row(
                metric_label(metric),
                [
                    figure(entry, middle="difference"),
                    Cell("", glyph=_glyph(entry, low, high)),
                    Cell(entry["baseline"]),
                ],
            )
            for metric, entry in entries.items()
        ]
        columns = ["difference", "against zero", "best heuristic"]
        facts = []
        if improvement := compared[view].get("improvement"):
            cell = figure(improvement, 2)
            between = f" ({cell.interval})" if cell.interval else ""
            facts.append(f"probability of improvement {cell.text}{between}")
        if heads := compared[view].get("heads"):
            facts.append(f"{heads['wins']} of {heads['of']} heads above their own best heuristic")
        tables.append(Table("Paired differences", "metric", columns, rows, view, facts))
    return tables


def _glyph(entry: Figures, low: float, high: float) -> Glyph | None:
    values = [entry[key] for key in ("low", "difference", "high")]
    if None in values or low == high:
        return None
    places = [6 + 108 * (value - low) / (high - low) for value in (0.0, *values)]
    verdict = "above" if values[0] > 0 else "below" if values[2] < 0 else "unclear"
    zero, start, middle, end = (round(place, 2) for place in places)
    return Glyph(zero, start, middle, end, verdict)


def task_tables(task: str, block: Figures, agents: Mapping[str, Figures]) -> list[Table]:
    """What cuts cost on a task: agents by budgets, a table for each group and quantity."""
    tables = []
    shared = _facts(block)
    for group in block.get("groups") or [block]:
        facts = _facts(group)
        caption = str(group.get("task") or MEASURES.get(task, task))
        budgets = list(dict.fromkeys(b for entry in group["agents"].values() for b in entry))
        budgets.sort(key=float, reverse=True)
        cells = [cell for entry in group["agents"].values() for cell in entry.values()]
        for key in _quantities(cells):
            full = (group.get("full") or {}) if key is None else (group.get("full") or {}).get(key)
            tables.append(
                Table(
                    f"{caption}, {QUANTITIES.get(key, key.replace('_', ' '))}" if key else caption,
                    "agent",
                    [budget_label(budget) for budget in budgets],
                    _task_rows(task, group["agents"], agents, budgets, key, full),
                    facts=facts if group is block else [*facts, *shared],
                )
            )
    return tables


def _task_rows(
    task: str,
    entries: Mapping[str, Figures],
    agents: Mapping[str, Figures],
    budgets: Sequence[str],
    key: str | None,
    full: Any,
) -> list[Row]:
    percent = key in QUANTITIES
    digits = 1 if percent else 3 if task == "streams" else 2
    sign = 1 if task in ("accuracy", "streams") else -1
    found = {
        name: [_part(entry.get(budget), key) for budget in budgets]
        for name, entry in entries.items()
    }
    best = [
        _best(((n, row[i]) for n, row in found.items()), agents, sign) for i in range(len(budgets))
    ]
    rows = []
    if isinstance(full, Mapping) and "mean" in full:
        cell = figure(full, 2)
        rows.append(Row("full cache", [Cell(cell.text, cell.interval, span=len(budgets))], "full"))
    rank = {name: place for place, name in enumerate(ordered(agents))}
    for name in sorted(found, key=lambda name: rank.get(name, -1)):
        if any(found[name]):
            cells = []
            for interval, winner in zip(found[name], best, strict=True):
                cell = figure(interval, digits, percent=percent)
                cells.append(Cell(cell.text, cell.interval, cell.number, winner == name))
            rows.append(Row(name, cells, (agents.get(name) or {}).get("kind", "")))
    return rows


def _quantities(cells: Iterable[Figures]) -> list[str | None]:
    """What the cells measure: None for the cell itself, and the intervals that it holds."""
    found: dict[str | None, None] = {}
    for cell in cells:
        if "mean" in cell:
            found[None] = None
        found.update({key: None for key, part in cell.items() if _part(cell, key)})
    return list(found)


def _part(cell: Figures | None, key: str | None) -> Figures | None:
    part = cell if cell is None or key is None else cell.get(key)
    return part if isinstance(part, Mapping) and {"mean", "low", "high"} <= part.keys() else None


def _facts(group: Figures) -> list[str]:
    """What a group of figures was measured on, in words."""
    facts = []
    for key, value in group.items():
        if key == "prompting" and value in ("agnostic", "aware"):
            facts.append(f"question-{value}")
        elif key == "step":
            facts.append(f"step of {value}")
        elif type(value) is int:
            facts.append(f"{value:,} {key.replace('_', ' ')}")
        elif isinstance(value, str | float) and key != "task":
            facts.append(f"{key.replace('_', ' ')} {value}")
    return facts
