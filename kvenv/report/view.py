"""What one evaluation shows: the template's words and tables, and the data of the page's script."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvenv.report import tables
from kvenv.report.figures import Figures, Table, figure, number
from kvenv.report.schema import TASKS, VIEWS

TASK_TITLES = {
    "accuracy": "Accuracy of answers",
    "perplexity": "Perplexity of what follows",
    "streaming": "Eviction while decoding",
    "conversation": "Conversations of many turns",
    "streams": "Attention found in streams",
}


@dataclass(frozen=True)
class Tile:
    """A key figure at the head of a result."""

    label: str
    figure: str
    note: str
    view: str


@dataclass(frozen=True)
class Compared:
    """One agent against the best heuristic, and the heads where it is behind, in words."""

    name: str
    tables: Sequence[Table]
    behind: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Task:
    """A task's tables, and the agents that could not take it, in words."""

    name: str
    title: str
    tables: Sequence[Table]
    left_out: Sequence[str]


@dataclass(frozen=True)
class View:
    """All that the template needs of one result; empty sequences are left out of the page.

    Attributes:
        id: prefix of the section's element ids.
        title, summary: what was measured, in a few words and in a line.
        facts: where the figures come from, (label, text) pairs.
        views: which of "full" and "sink_free" there are.
        data: what the page's script draws from, JSON-safe.
    """

    id: str
    title: str
    summary: str
    command: str
    facts: Sequence[tuple[str, str]]
    tiles: Sequence[Tile]
    views: Sequence[str]
    curves: Sequence[Table]
    heads: Sequence[Table]
    metrics: Sequence[Table]
    compared: Sequence[Compared]
    tasks: Sequence[Task]
    texts: Sequence[str]
    data: Mapping[str, Any]


def view(result: Figures, index: int, name: str) -> View:
    """Lay out a checked result.

    Args:
        result: from `kvenv.report.schema.checked`.
        index: its place among the results, from 0.
        name: of its file.
    """
    agents, budgets = _with_curves(result.get("agents") or {}, result.get("budgets") or [])
    heads = result.get("heads") or []
    names = tables.ordered(agents)
    workloads = [str(t["workload"]) for t in result.get("traces") or [] if t.get("workload")]
    title = " · ".join([result.get("model") or name, *dict.fromkeys(workloads)])
    comparison = result.get("comparison") or {}
    texts = result.get("texts") or []
    views = [v for v in VIEWS if any(agent.get(v) for agent in agents.values())]
    views += [v for v in VIEWS if v not in views and any(c.get(v) for c in comparison.values())]
    return View(
        id=f"result-{index + 1}",
        title=title,
        summary=_summary(result, name),
        command=result.get("command") or "",
        facts=_facts(result, name),
        tiles=_tiles(agents, comparison, views),
        views=views,
        curves=tables.curve_tables(agents, budgets),
        heads=tables.head_tables(agents, heads) if heads else [],
        metrics=tables.metric_tables(agents),
        compared=[_compared(n, comparison[n]) for n in _sorted(comparison, names)],
        tasks=[
            Task(
                task,
                TASK_TITLES[task],
                tables.task_tables(task, result[task], agents),
                [
                    f"{n} is left out: it {why}"
                    for n, why in result[task].get("left_out", {}).items()
                ],
            )
            for task in TASKS
            if result.get(task)
        ],
        texts=[text["document"] for text in texts],
        data={
            "heads": heads,
            "budgets": budgets,
            "agents": [
                {
                    "name": n,
                    "kind": agents[n]["kind"],
                    "curve": agents[n].get("curve") or {},
                    "normalized_score": agents[n].get("per_head") or {},
                }
                for n in names
            ],
            "texts": [
                {
                    "document": text["document"],
                    "tokens": text["tokens"],
                    "agents": [
                        {"name": n, "ranks": text["agents"][n]["ranks"]}
                        for n in _sorted(text["agents"], names)
                    ],
                }
                for text in texts
            ],
        },
    )


def _sorted(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Names in the agents' order, those of no agent last."""
    return sorted(found, key=lambda name: names.index(name) if name in names else len(names))


def _with_curves(
    agents: Mapping[str, Figures], budgets: Sequence[float]
) -> tuple[Mapping[str, Figures], Sequence[float]]:
    """The agents with their curves; of version 1, those through the few budgets it reports."""
    if any(agent.get("curve") for agent in agents.values()):
        return agents, budgets
    metrics = {m for agent in agents.values() for v in VIEWS for m in agent.get(v) or {}}
    points_of = {m: re.fullmatch(r"retention@1/([1-9][0-9]{0,5})", m) for m in metrics}
    found = {1 / int(match[1]): m for m, match in points_of.items() if match}
    points = sorted(found)
    if not points:
        return agents, []
    made = {}
    for name, agent in agents.items():
        curve = {}
        for v in VIEWS:
            values = [(agent.get(v) or {}).get(found[point]) for point in points]
            if all(values):
                curve[v] = {k: [f[k] for f in values if f] for k in ("mean", "low", "high")}
        made[name] = {**agent, "curve": curve}
    return made, points


def _facts(result: Figures, name: str) -> list[tuple[str, str]]:
    """The record of where the figures come from, without what is absent."""
    traces = []
    for entry in result.get("traces") or []:
        given = {**(entry.get("arguments") or {}), "seed": entry.get("seed")}
        words = [f"{k.replace('_', ' ')} {_word(v)}" for k, v in given.items() if v is not None]
        traces.append(f"{entry.get('workload') or 'unnamed'} ({', '.join(words)})")
    heads = result.get("heads") or []
    layers = sorted({layer for layer, _ in heads})
    of = f" of {result['model_layers']}" if result.get("model_layers") else ""
    which = f" ({', '.join(map(str, layers))})" if len(layers) <= 4 else ""
    documents, episodes = result.get("documents"), result.get("episodes")
    more = f" ({episodes:,} episodes)" if episodes and episodes != documents else ""
    machine = result.get("machine") or {}
    cores = f"{machine['cores']} cores" if machine.get("cores") else ""
    known = ("system", "processor", "cores")
    rest = [f"{k} {_word(v)}" for k, v in machine.items() if k not in known and v is not None]
    hardware = [_word(machine[k]) for k in known[:2] if machine.get(k)] + [cores, *rest]
    versions = [f"{k} {_word(v)}" for k, v in (result.get("versions") or {}).items()]
    pairs = [
        ("Model", result.get("model") or ""),
        ("Traces", "; ".join(traces)),
        ("Documents", f"{documents:,}{more}" if documents else ""),
        ("Heads", f"{len(heads)} in {len(layers)}{of} layers{which}" if heads else ""),
        ("Date", result.get("date") or ""),
        ("Machine", ", ".join(filter(None, hardware))),
        ("Versions", ", ".join(versions)),
        ("File", name),
    ]
    return [(label, text) for label, text in pairs if text]


def _summary(result: Figures, name: str) -> str:
    counts = {
        "held-out documents": result.get("documents"),
        "heads": len(result.get("heads") or []),
    }
    counts["agents"] = len(result.get("agents") or {})
    words = [f"{count:,} {what}" for what, count in counts.items() if count]
    return " · ".join([*words, result.get("date") or name])


def _word(value: Any) -> str:
    return " ".join(map(_word, value)) if isinstance(value, list) else str(value)


def _tiles(
    agents: Mapping[str, Figures], comparison: Mapping[str, Figures], views: Sequence[str]
) -> list[Tile]:
    """The best learned agent, the best heuristic and how the two compare."""
    tiles = []
    for v in views:
        best: dict[str, str] = {}
        for kind, label in (("learned", "Best learned agent"), ("heuristic", "Best heuristic")):
            found = {
                n: normalized_score
                for n, agent in agents.items()
                if agent["kind"] == kind
                and (normalized_score := (agent.get(v) or {}).get("normalized_score"))
                and normalized_score["mean"] is not None
            }
            if found:
                best[kind] = max(found, key=lambda n: found[n]["mean"])
                cell = figure(found[best[kind]])
                note = f"{best[kind]}, normalized score" + (
                    f" ({cell.interval})" if cell.interval else ""
                )
                tiles.append(Tile(label, cell.text, note, v))
        against = (comparison.get(best.get("learned", "")) or {}).get(v) or {}
        if won := against.get("heads"):
            note = f"{best['learned']}, above each head's own best heuristic"
            tiles.append(Tile("Heads ahead", f"{won['wins']} of {won['of']}", note, v))
        if improvement := against.get("improvement"):
            cell = figure(improvement, 2)
            note = "on a random document and head" + (
                f" ({cell.interval})" if cell.interval else ""
            )
            tiles.append(Tile("Probability of improvement", cell.text, note, v))
    return tiles


def _compared(name: str, compared: Figures) -> Compared:
    behind = {
        v: [
            f"layer {layer}, head {head}: {number(abs(margin or 0.0), 4)} below {rival}"
            for layer, head, rival, margin in compared[v]["heads"]["behind"]
        ]
        for v in VIEWS
        if (compared.get(v) or {}).get("heads")
    }
    return Compared(name, tables.comparison_tables(compared), behind)
