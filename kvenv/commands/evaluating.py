"""``kvenv evaluate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvenv.commands.common import listed, parse_heads, pick_device, trace_sets, write_json
from kvenv.display import print_results, progress_bar
from kvenv.errors import KvenvError
from kvenv.scorers import Calibration, Head, Scorer, load_scorer
from kvenv.trace import TraceSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Measure = Literal["retention", "perplexity", "accuracy", "streaming", "conversation", "streams"]


def evaluate(
    traces: str,
    agents: str,
    heads: str | None = None,
    json: Path | None = None,
    texts: int = 0,
    tasks: list[Measure] = ["retention"],  # noqa: B006
    budgets: list[float] = [0.5, 0.25, 0.125],  # noqa: B006
    token_budgets: list[int] = [256],  # noqa: B006
    sinks: int = 4,
    recent: int = 16,
    step: int = 1,
    refresh: int | None = None,
    allocations: list[Literal["uniform", "layerwise", "adaptive"]] = ["uniform"],  # noqa: B006
    calibrate_on: str | None = None,
    model: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Measure what agents keep of held-out traces, and what the model then does.

    retention: the share of the future's attention that the best-ranked tokens hold, at budgets
    1/16, 1/8, 1/4, 1/2 and averaged over all, and normalized score, with and without the first 4
    tokens.
    perplexity: of the future, once the prompt's cache was cut. accuracy: of the answers, likewise
    (ruler, boolq, ...). streaming: perplexity of whole texts, fed in steps to a cache of fixed
    size. conversation: the same turn by turn (chat). streams: the share of the attention that a
    text's queries still find, simulated on traces with --queries all. All with 95 % intervals
    over documents; paired over documents, retention and accuracy (in the file) also set learned
    agents beside the best heuristic, and perplexities are set beside the full cache's.

    Args:
        traces: held-out trace sets, separated by commas.
        agents: names of heuristics and of shipped trained agents, and folders of bundles, separated
            by commas.
        heads: measure retention of these only, as layer:head,layer:head.
        json: write all figures, with their provenance, to this file.
        texts: of so many documents, add the text and every token's ranks to the file.
        tasks: what to measure; all but retention and streams run the model.
        budgets: of perplexity and accuracy, as shares of the prompt.
        token_budgets: of streaming, conversation and streams, in tokens a head.
        sinks: first tokens that are always kept (not by retention).
        recent: last tokens that are always kept (not by retention).
        step: tokens that streaming feeds at a time.
        refresh: tokens between two selections of streaming, conversation and streams.
        allocations: how heads share a budget, each measured (not by retention): the same for all
            (uniform), or by what they expect, within layers (layerwise) or over all (adaptive).
        calibrate_on: held-out traces to calibrate agents on that have no calibration, separated
            by commas; for layerwise and adaptive.
        model: where the model is, if not under the name in the traces.
        dtype: the model's number format.
        device: cpu, cuda, ...; auto takes a GPU if there is one.
    """
    from kvenv import models
    from kvenv.evaluation import statistics
    from kvenv.evaluation.show import print_tasks
    from kvenv.evaluation.streams import measure_streams
    from kvenv.evaluation.tasks import evaluate_tasks

    if texts < 0 or (texts and json is None):
        raise KvenvError(f"texts is {texts}: give a count, and a file for them with --json")
    if not tasks or (texts and "retention" not in tasks):
        raise KvenvError(f"tasks {','.join(tasks)!r}: name at least one; --texts needs retention")
    sets = trace_sets(traces)
    given = listed(agents, "agents")
    names = [Path(agent).name for agent in given]
    scorers = {
        name if names.count(name) == 1 else agent: load_scorer(agent)
        for name, agent in zip(names, given, strict=True)
    }
    chosen = parse_heads(heads) if heads else None
    place = pick_device(device)
    described = sets[0].model
    asked = [task for task in tasks if task not in ("retention", "streams")]
    # What may not be there is asked for before anything is measured.
    source = model or described.id
    loaded = models.load(source, dtype=dtype, device=place) if asked else None
    tokenizer = models.load_tokenizer(source) if texts else None
    calibrations: dict[str, Calibration] = {}
    result: dict[str, Any] = {
        "format": "kvenv-evaluation",
        "version": 2,
        **statistics.provenance(),
        "model": described.id,
        "model_layers": described.num_layers,
        "kv_heads": described.kv_heads,
        "traces": [t.manifest.origin for t in sets],
    }
    if "retention" in tasks:
        result |= _retention(sets, scorers, chosen, place)
        if tokenizer is not None:
            result["texts"] = _token_views(sets, scorers, chosen, texts, tokenizer, place)
        print_results(result)
    if set(allocations) - {"uniform"} and set(tasks) - {"retention"}:
        calibrations = _calibrations(scorers, calibrate_on, place)
    limits: dict[str, Any] = {
        "sinks": sinks,
        "recent": recent,
        "refresh": refresh,
        "allocations": allocations,
        "calibrations": calibrations,
    }
    if "streams" in tasks:
        with progress_bar("streams") as progress:
            count = sum(map(len, sets)) * len(set(token_budgets))
            bar = progress.add_task("streams", total=count, note="")
            step_on = partial(progress.advance, bar)
            result["streams"] = measure_streams(
                sets, scorers, token_budgets, **limits, tick=step_on, device=place
            )
    if loaded is not None:
        with progress_bar("passes") as progress:
            bar = progress.add_task(", ".join(asked), total=None, note="")

            def tick(left: int) -> None:
                total = progress.tasks[bar].total or left
                progress.update(bar, total=total, completed=total - left)

            found = evaluate_tasks(
                *loaded,
                sets,
                scorers,
                asked,
                budgets=budgets,
                token_budgets=token_budgets,
                step=step,
                **limits,
                tick=tick,
            )
        result |= found
    print_tasks(result)
    if json is not None:
        write_json(json, result)


def _calibrations(
    scorers: dict[str, Scorer], calibrate_on: str | None, device: str
) -> dict[str, Calibration]:
    """Calibrations of the agents that have none, fitted on sets given for that."""
    from kvenv.evaluation.calibrating import calibrate

    if calibrate_on is None:
        return {}
    sets = trace_sets(calibrate_on)
    bare = {n: one for n, one in scorers.items() if getattr(one, "calibration", None) is None}
    with progress_bar("episodes") as progress:
        total = len(bare) * sum(map(len, sets))
        bar = progress.add_task("calibrating", total=total, note="")
        step_on = partial(progress.advance, bar)
        return {n: calibrate(one, sets, tick=step_on, device=device) for n, one in bare.items()}


def _retention(
    sets: list[TraceSet], scorers: dict[str, Scorer], heads: list[Head] | None, device: str
) -> dict[str, Any]:
    """The flat part of an evaluation: what rankings keep."""
    from kvenv.evaluation.retention import measure
    from kvenv.evaluation.statistics import summarise

    with progress_bar("episodes") as progress:
        bar = progress.add_task("measuring", total=sum(len(t) for t in sets), note="")
        return summarise(measure(sets, scorers, heads, lambda: progress.advance(bar), device))


def _token_views(
    sets: list[TraceSet],
    scorers: dict[str, Scorer],
    heads: list[Head] | None,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
) -> list[dict[str, Any]]:
    """Token views of the first episodes of ``count`` documents, or of all if there are fewer."""
    from kvenv.evaluation.retention import shared_heads
    from kvenv.evaluation.texts import token_view

    chosen = shared_heads(sets, scorers, heads)
    firsts: dict[str, tuple[TraceSet, int]] = {}
    for traces in sets:
        for index in range(len(traces)):
            if len(firsts) < count:
                firsts.setdefault(traces.info(index).document, (traces, index))
    return [
        token_view(traces, index, scorers, tokenizer, chosen, device)
        for traces, index in firsts.values()
    ]
