"""What budgets that differ between heads win over equal ones, at the same total.

python examples/allocation.py --traces runs/zoo/smollm2-135m/text-test \
    --curves runs/zoo/smollm2-135m/text-validation

The prompt's cache is cut once, as `kvenv evaluate` does it. Retention is that of the kept tokens.
Without --curves the agent's own divide the budgets; a shipped agent's are of that same set. With
RULER's prompts among what curves are of, texts lose what is won here: curves want like documents.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.table import Table

from kvenv.cache.allocation import Mode, allocate
from kvenv.commands import write_json
from kvenv.display import console, progress_bar
from kvenv.evaluation.cut import Cutter, Prompt
from kvenv.evaluation.perplexity import losses, perplexity, ratio
from kvenv.evaluation.statistics import interval, paired, provenance
from kvenv.recording import models
from kvenv.scorers import load_scorer
from kvenv.scorers.curves import Curves, measure_curves
from kvenv.trace import TraceSet
from kvenv.utility import SINKS, budget_tokens, retention_of

MODES = get_args(Mode)


def main() -> None:
    """Measure every allocation at every budget, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--traces", required=True, help="held-out sets, separated by commas")
    parser.add_argument("--curves", help="sets of other documents, to measure the curves on")
    parser.add_argument("--agent", default="kvp-smollm2-135m", help="a trained one")
    parser.add_argument("--budgets", default="0.0625,0.125,0.25,0.5", help="of the prompt")
    parser.add_argument("--perplexity", default="0.125,0.25", help="budgets that run the model")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--recent", type=int, default=16)
    parser.add_argument("--json", type=Path, default=Path("docs/results/allocation.json"))
    args = parser.parse_args()
    budgets, run = (tuple(map(float, text.split(","))) for text in (args.budgets, args.perplexity))
    scorer = load_scorer(args.agent)
    sets, others = (
        [TraceSet(path) for path in text.split(",")] if text else []
        for text in (args.traces, args.curves)
    )
    if shared := names(sets) & names(others):
        parser.error(f"--curves and --traces share documents, such as {min(shared)}")
    curves = measure_curves(scorer, others) if others else getattr(scorer, "curves", None)
    if curves is None:
        parser.error(f"{args.agent} has no retention curves: give --curves")
    model, _ = models.load(sets[0].model.id, dtype="float32")
    cutter = Cutter(
        model,
        sets,
        {args.agent: scorer},
        budgets=budgets,
        sinks=args.sinks,
        recent=args.recent,
    )
    rows: list[dict[str, Any]] = []
    documents: list[str] = []
    with progress_bar("prompts") as progress:
        bar = progress.add_task("measuring", total=len(cutter), note="")
        for traces in sets:
            for index in range(len(traces)):
                prompt = cutter.read(traces, index)
                utility = {
                    layer: torch.from_numpy(traces.read(index, "utility/sum", layer))
                    for layer in prompt.orders
                }
                rows.append(measure(cutter, curves, prompt, utility, run))
                documents.append(prompt.info.document)
                progress.advance(bar)
    result = {
        "format": "kvenv-allocation",
        "version": 1,
        **provenance(),
        "model": sets[0].model.id,
        "agent": args.agent,
        "curves": {"tokens": curves.tokens, "traces": [one.manifest.origin for one in others]},
        "traces": [one.manifest.origin for one in sets],
        "protocol": "cut once",
        "sinks": args.sinks,
        "recent": args.recent,
        "documents": len(set(documents)),
        "full": {"perplexity": perplexity(column(rows, "full"), documents)},
        "budgets": {
            f"{budget:g}": {mode: figures(rows, documents, mode, budget) for mode in MODES}
            for budget in budgets
        },
    }
    show(result)
    write_json(args.json, result)


def names(sets: list[TraceSet]) -> set[str]:
    """The documents of trace sets."""
    return {one.info(index).document for one in sets for index in range(len(one))}


def measure(
    cutter: Cutter,
    curves: Curves,
    prompt: Prompt,
    utility: dict[int, torch.Tensor],
    run: tuple[float, ...],
) -> dict[Any, float]:
    """One prompt's figures by (allocation, budget, what); "full" is the uncut cache's loss."""
    n, future = prompt.info.n, prompt.future.unsqueeze(0)
    heads = {layer: orders.shape[1] for layer, orders in prompt.orders.items()}
    floor = cutter.sinks + cutter.recent + 1
    found: dict[Any, float] = {
        "full": float(losses(cutter.model, prompt.whole(), future, start=n).mean())
    }
    for mode in MODES:
        for budget in cutter.budgets:
            held = allocate(mode, heads, budget_tokens(budget, n), floor, curves, n)
            kept = np.array(
                [retained(utility[at], prompt.orders[at][0], held[at]) for at in heads]
            ).mean((0, 2))
            found |= {(mode, budget, "retention"): kept[0], (mode, budget, "sink_free"): kept[1]}
            sizes = [size for layer in held.values() for size in layer]
            found |= {(mode, budget, "least"): min(sizes), (mode, budget, "most"): max(sizes)}
            if budget in run:
                loss = losses(cutter.model, prompt.cut(held), future, start=n).mean()
                found[mode, budget, "loss"] = float(loss)
    return found


def retained(
    utility: torch.Tensor, order: torch.Tensor, held: tuple[int, ...]
) -> list[list[float]]:
    """Retention of a layer's heads, each at its own budget; and sink-free, of the same tokens."""
    free = utility.clone()
    free[:, :SINKS] = 0
    last = torch.tensor(held).clamp(max=order.shape[-1]).unsqueeze(1) - 1
    order = order.to(utility.device)
    return [retention_of(one, order).gather(1, last)[:, 0].tolist() for one in (utility, free)]


def column(rows: list[dict[str, Any]], key: Any) -> np.ndarray:
    """One figure of every prompt."""
    return np.array([row[key] for row in rows])


def figures(
    rows: list[dict[str, Any]], documents: list[str], mode: str, budget: float
) -> dict[str, Any]:
    """An allocation at a budget: means over documents, and how far they are from uniform's."""
    own: dict[str, Any] = {
        "least": int(column(rows, (mode, budget, "least")).min()),
        "most": int(column(rows, (mode, budget, "most")).max()),
    }
    for what in ("retention", "sink_free"):
        values, equal = (column(rows, (one, budget, what)) for one in (mode, "uniform"))
        own[what] = interval(values, documents)
        own[f"{what}_versus_uniform"] = paired(values, equal, documents)
    if (mode, budget, "loss") in rows[0]:
        values, equal = (column(rows, (one, budget, "loss")) for one in (mode, "uniform"))
        own["perplexity"] = perplexity(values, documents)
        own["perplexity_versus_full"] = ratio(values, column(rows, "full"), documents)
        own["perplexity_versus_uniform"] = ratio(values, equal, documents)
    return own


def show(result: dict[str, Any]) -> None:
    """Print the figures; a perplexity is followed by its distance from uniform's."""
    table = Table("budget", "allocation", "tokens a head", "retention", "sink-free", "perplexity")
    for budget, modes in result["budgets"].items():
        for mode, one in modes.items():
            cells = [f"{one[what]['mean']:.4f}" for what in ("retention", "sink_free")]
            told = f"{one['perplexity']['mean']:.3f}" if "perplexity" in one else ""
            if told and mode != "uniform":
                versus = one["perplexity_versus_uniform"]
                mean, low, high = (f"{versus[key]:+.2%}" for key in ("mean", "low", "high"))
                told += f"  {mean} ({low} to {high})"
            table.add_row(budget, mode, f"{one['least']}-{one['most']}", *cells, told)
    console.print(table)
    console.print(f"full cache: perplexity {result['full']['perplexity']['mean']:.3f}")


if __name__ == "__main__":
    main()
