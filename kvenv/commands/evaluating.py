"""``kvenv evaluate``."""

from __future__ import annotations

from pathlib import Path

from kvenv.commands.common import listed, parse_heads, trace_sets, write_json
from kvenv.display import print_results, progress_bar
from kvenv.scorers import load_scorer


def evaluate(
    traces: str,
    agents: str,
    heads: str | None = None,
    json: Path | None = None,
) -> None:
    """Measure how much of the future's attention each agent's ranking keeps.

    Prints retention at budgets 1/16, 1/8, 1/4, 1/2 and averaged over all, and closure, with and
    without the first 4 tokens, with 95 % bootstrap intervals over documents.

    Args:
        traces: held-out trace sets, separated by commas.
        agents: names of heuristics and folders of bundles, separated by commas.
        heads: measure these only, as layer:head,layer:head.
        json: write all figures, with their provenance, to this file.
    """
    from kvenv.evaluation import statistics
    from kvenv.evaluation.retention import measure

    sets = trace_sets(traces)
    given = listed(agents, "agents")
    names = [Path(agent).name for agent in given]
    scorers = {
        name if names.count(name) == 1 else agent: load_scorer(agent)
        for name, agent in zip(names, given, strict=True)
    }
    chosen = parse_heads(heads) if heads else None
    with progress_bar("episodes") as progress:
        bar = progress.add_task("measuring", total=sum(len(t) for t in sets), note="")
        measurements = measure(sets, scorers, chosen, lambda: progress.advance(bar))
    result = {
        "format": "kvenv-evaluation",
        "version": 1,
        **statistics.provenance(),
        "model": sets[0].model.id,
        "traces": [t.manifest.origin for t in sets],
        **statistics.summarise(measurements),
    }
    print_results(result)
    if json is not None:
        write_json(json, result)
