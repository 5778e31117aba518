"""What the model does under eviction, task by task, on the same held-out episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvenv.errors import KvenvError
from kvenv.evaluation.accuracy import Accuracy
from kvenv.evaluation.cut import Allocation, Cutter
from kvenv.evaluation.perplexity import Perplexity
from kvenv.evaluation.streaming import Feed, Streaming
from kvenv.scorers.base import Scorer
from kvenv.scorers.calibration import Calibration
from kvenv.trace import TraceSet

TASKS = ("perplexity", "accuracy", "streaming", "conversation")
"""Tasks that run the model; each is a section of an evaluation."""

Tick = Callable[[int], None]
"""Told how many passes are still to come, before the first and after each."""


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[TraceSet],
    scorers: Mapping[str, Scorer],
    tasks: Sequence[str],
    *,
    budgets: Sequence[float] = (0.5, 0.25, 0.125),
    token_budgets: Sequence[int] = (256,),
    sinks: int = 4,
    recent: int = 16,
    step: int = 1,
    refresh: int | None = None,
    allocations: Sequence[Allocation] = ("uniform",),
    calibrations: Mapping[str, Calibration] | None = None,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Run the tasks asked for.

    Args:
        model: the model that the sets were recorded from.
        tokenizer: its tokenizer.
        sets: held-out trace sets, all of this model.
        scorers: agent -> scorer.
        tasks: some of `TASKS`.
        budgets: of perplexity and accuracy, as fractions of the prompt.
        token_budgets: of streaming and conversation, in tokens a head.
        sinks: the first tokens, always kept.
        recent: the last tokens, always kept.
        step: tokens that streaming feeds at a time.
        refresh: tokens between two selections of streaming and conversation.
        allocations: how heads share the budget, each measured for every agent.
        calibrations: agent -> what heads compete by; of those not named, the scorer's own.
        tick: follows the progress.

    Returns:
        Task -> its section, JSON-safe.

    Raises:
        KvenvError: for an unknown task, sets of another model or without what a task needs, a
            scorer that cannot be used, or an impossible budget.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise KvenvError(f"task {unknown[0]!r} is unknown: choose from {', '.join(TASKS)}")
    shared: dict[str, Any] = {"allocations": allocations, "calibrations": calibrations}
    # Both are set up, and refused if they must be, before the first pass.
    jobs: list[_Job] = []
    if {"perplexity", "accuracy"} & set(tasks):
        cutter = Cutter(model, sets, scorers, budgets=budgets, sinks=sinks, recent=recent, **shared)
        jobs.append(_cut(cutter, tokenizer, tasks))
    if {"streaming", "conversation"} & set(tasks):
        streaming = Streaming(
            *(model, scorers, token_budgets),
            **{"sinks": sinks, "recent": recent, "step": step, "refresh": refresh, **shared},
        )
        jobs.append(_feed(streaming, sets, tasks, step))
    left = sum(passes for passes, _ in jobs)

    def done(passes: int = 1) -> None:
        nonlocal left
        left -= passes
        if tick is not None:
            tick(left)

    done(0)
    found: dict[str, Any] = {}
    for _, run in jobs:
        found |= run(done)
    return {task: found[task] for task in TASKS if task in found}


_Job = tuple[int, Callable[[Callable[[], None]], dict[str, Any]]]
"""How many passes it takes, and what runs it, given what to call after each."""


def _cut(cutter: Cutter, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str]) -> _Job:
    """Perplexity and accuracy, from one reading of each prompt."""
    perplexity = Perplexity(cutter) if "perplexity" in tasks else None
    accuracy = Accuracy(cutter, tokenizer) if "accuracy" in tasks else None
    every = [(traces, index) for traces in cutter.sets for index in range(len(traces))]
    judged = [one for one in every if accuracy is not None and accuracy.judges(*one)]
    if accuracy is not None and not judged:
        raise KvenvError(
            "no episode has an answer to judge: record a task that has them, such as `kvenv record "
            "ruler`, or leave accuracy out"
        )
    chosen = judged if perplexity is None else every

    def run(done: Callable[[], None]) -> dict[str, Any]:
        for one in chosen:
            prompt = cutter.read(*one)
            if perplexity is not None:
                perplexity.add(prompt)
            if accuracy is not None and one in judged:
                accuracy.add(prompt)
            done()
        parts = {"perplexity": perplexity, "accuracy": accuracy}
        return {name: part.result() for name, part in parts.items() if part is not None}

    return len(chosen), run


def _feed(streaming: Streaming, sets: Sequence[TraceSet], tasks: Sequence[str], step: int) -> _Job:
    """Streaming and conversation: bounded caches that are fed bit by bit."""
    batches: dict[str, list[Feed]] = {}
    if "streaming" in tasks:
        batches["streaming"] = streaming.texts(sets)
    if "conversation" in tasks:
        batches["conversation"] = streaming.conversations(sets)

    def run(done: Callable[[], None]) -> dict[str, Any]:
        found = {name: streaming.run(some, done) for name, some in batches.items()}
        if "streaming" in found:
            found["streaming"] = {"step": step, **found["streaming"]}
        return found

    return sum(map(streaming.passes, batches.values())), run
