"""Tables of what the model does under eviction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from kvenv.display import console

Figure = Mapping[str, float]

SPREAD = "mean ± half the 95 % interval over documents"
ABOVE = f"{SPREAD} (above the full cache's)"


def print_tasks(result: Mapping[str, Any]) -> None:
    """The sections of `kvenv.evaluation.tasks.evaluate_tasks`, a table each (accuracy: a group)."""
    for name in ("perplexity", "streaming", "conversation"):
        if section := result.get(name):
            _perplexities(name, section)
    if section := result.get("streams"):
        _streams(section)
    for group in result.get("accuracy", {}).get("groups", ()):
        _accuracies(group)


def _perplexities(name: str, section: Mapping[str, Any]) -> None:
    """Agents by budgets, best first, and how far each lies above the full cache."""
    counted = f"{section['tokens']:,} tokens of {section['documents']} documents"
    kept = f"sinks {section['sinks']}, recent {section['recent']}"
    what = {
        "perplexity": "perplexity of the future, the prompt's cache cut once",
        "streaming": f"streaming: perplexity while decoding, {section.get('step')} tokens a step",
        "conversation": "conversation: perplexity, the cache bounded after every turn",
    }[name]
    tokens = "" if name == "perplexity" else " tokens"
    agents = section["agents"]
    table = _table(f"{what} ({counted}; {kept})", _budgets(agents), tokens, ABOVE)
    table.add_row("full cache", _spread(section["full"], ".2f"))
    for agent in sorted(agents, key=lambda one: _mean(agents[one])):
        cells = [
            f"{_spread(figure, '.2f')} ({figure['versus_full']['mean']:+.1%})"
            for figure in agents[agent].values()
        ]
        table.add_row(agent, *cells)
    console.print(table)
    for agent, why in section.get("left_out", {}).items():
        console.print(f"{agent} is left out: it {why}", markup=False, highlight=False)


def _streams(section: Mapping[str, Any]) -> None:
    """Agents by budgets, best first."""
    title = f"streams: sink-free retention ({section['documents']} documents)"
    agents = section["agents"]
    table = _table(title, _budgets(agents), " tokens")
    for agent in sorted(agents, key=lambda one: -_mean(agents[one])):
        table.add_row(agent, *(_spread(figure, ".3f") for figure in agents[agent].values()))
    console.print(table)


def _accuracies(group: Mapping[str, Any]) -> None:
    """Agents by budgets, best first."""
    title = (
        f"accuracy: {group['task']}, question-{group['prompting']}, {group['prompt_tokens']} "
        f"prompt tokens, {group['prompts']} prompts"
    )
    agents = group["agents"]
    table = _table(title, _budgets(agents), "")
    table.add_row("full cache", _spread(group["full"], ".3f"))
    for agent in sorted(agents, key=lambda one: -_mean(agents[one])):
        table.add_row(agent, *(_spread(figure, ".3f") for figure in agents[agent].values()))
    console.print(table)


def _table(title: str, budgets: Sequence[str], unit: str, caption: str = SPREAD) -> Table:
    table = Table(title=title, caption=caption, caption_justify="left", show_edge=False)
    table.add_column("agent", min_width=9)
    for budget in budgets:
        table.add_column(f"{float(budget):g}{unit}", justify="right")
    return table


def _budgets(agents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(next(iter(agents.values())))


def _mean(figures: Mapping[str, Figure]) -> float:
    """Over budgets, to sort by."""
    return sum(figure["mean"] for figure in figures.values()) / len(figures)


def _spread(figure: Figure, form: str) -> str:
    return f"{figure['mean']:{form}} ±{(figure['high'] - figure['low']) / 2:{form}}"
