from __future__ import annotations

import json
from typing import Any

import pytest

from kvenv import models, plugins
from kvenv.display import console
from kvenv.errors import KvenvError
from kvenv.evaluation.accuracy import Accuracy
from kvenv.evaluation.cut import Cutter
from kvenv.evaluation.perplexity import Perplexity
from kvenv.evaluation.show import print_tasks
from kvenv.evaluation.streaming import Streaming
from kvenv.evaluation.tasks import TASKS, evaluate_tasks
from kvenv.recording import recorder
from kvenv.scorers import load_scorer

FACTS: list[dict[str, Any]] = [
    {"task": "vt", "answers": ["a"], "turns": [0, 30, 44]},
    {},
    {"task": "vt", "answers": ["b"]},
]
LIMITS: dict[str, int] = {"sinks": 2, "recent": 3}
OPTIONS: dict[str, Any] = {"budgets": [0.5, 0.25], "token_budgets": [16, 24], **LIMITS}


@pytest.fixture(scope="module")
def traces(recorded):
    return recorded("llama", facts=FACTS)


def scorers(*names: str) -> dict[str, Any]:
    return {name: load_scorer(name) for name in names}


def test_every_task_gives_its_own_section(families, traces) -> None:
    agents, left = scorers("random", "knorm", "oracle"), []
    result = evaluate_tasks(
        *families("llama"), [traces], agents, TASKS[::-1], tick=left.append, **OPTIONS
    )
    assert list(result) == list(TASKS)
    assert json.loads(json.dumps(result)) == result
    # Three prompts; two batches of texts and a conversation, with two agents at two budgets.
    assert left == list(range(3 + 3 * (1 + 2 * 2), -1, -1))
    cutter = Cutter(families("llama")[0], [traces], agents, budgets=[0.5, 0.25], **LIMITS)
    perplexity, accuracy = Perplexity(cutter), Accuracy(cutter, families("llama")[1])
    for index, prompt in enumerate(cutter):
        perplexity.add(prompt)
        if FACTS[index]:
            accuracy.add(prompt)
    stream = Streaming(families("llama")[0], agents, [16, 24], **LIMITS)
    assert result == {
        "perplexity": perplexity.result(),
        "accuracy": accuracy.result(),
        "streaming": {"step": 1, **stream.run(stream.texts([traces]))},
        "conversation": stream.run(stream.conversations([traces])),
    }


def test_accuracy_alone_reads_only_what_it_judges(families, traces) -> None:
    left: list[int] = []
    result = evaluate_tasks(
        *families("llama"),
        [traces],
        scorers("random"),
        ["accuracy"],
        tick=left.append,
        **OPTIONS,
    )
    assert list(result) == ["accuracy"]
    assert left == [2, 1, 0]


def test_nothing_runs_before_everything_is_checked(families, traces, sets) -> None:
    model, tokenizer = families("llama")

    def run(*tasks: str, of=traces, **options: Any) -> None:
        ticks: list[int] = []
        try:
            evaluate_tasks(
                model,
                tokenizer,
                [of],
                scorers("random"),
                tasks,
                tick=ticks.append,
                **{**OPTIONS, **options},
            )
        finally:
            assert not ticks

    with pytest.raises(KvenvError, match="task 'retention' is unknown: choose from perplexity,"):
        run("perplexity", "retention")
    with pytest.raises(KvenvError, match="no episode has an answer to judge"):
        run("perplexity", "accuracy", of=sets("llama"))
    with pytest.raises(KvenvError, match="none after the first 46"):
        run("perplexity", "streaming", token_budgets=[46])
    with pytest.raises(KvenvError, match="where its turns begin"):
        run("perplexity", "conversation", of=sets("llama"))
    with pytest.raises(KvenvError, match="step is 0"):
        run("perplexity", "streaming", step=0)


def test_tables_show_every_figure(families, traces) -> None:
    result = evaluate_tasks(
        *families("llama"), [traces], scorers("random", "knorm", "oracle"), TASKS, **OPTIONS
    )
    before, console.width = console.width, 200
    try:
        with console.capture() as printed:
            print_tasks(result)
    finally:
        console.width = before
    text = " ".join(printed.get().split())
    for part in (
        "perplexity of the future, the prompt's cache cut once (30 tokens of 3 documents",
        "streaming: perplexity while decoding, 1 tokens a step",
        "conversation: perplexity, the cache bounded after every turn",
        "accuracy: vt, question-aware, 44 prompt tokens, 2 prompts",
        "sinks 2, recent 3",
        "16 tokens",
        "oracle is left out: it needs utility",
    ):
        assert part in text, part
    for section in ("perplexity", "streaming", "conversation"):
        assert f"{result[section]['full']['mean']:.2f} ±" in text
        for figures in result[section]["agents"].values():
            for figure in figures.values():
                assert f"{figure['mean']:.2f} ±" in text
                assert f"({figure['versus_full']['mean']:+.1%})" in text
    (group,) = result["accuracy"]["groups"]
    for figure in group["agents"]["random"].values():
        assert f"{figure['mean']:.3f} ±" in text
    with console.capture() as printed:
        print_tasks({})
    assert not printed.get()


@pytest.mark.slow
def test_a_real_model_s_answers(tmp_path) -> None:
    """Needles in some 250 tokens: the whole budget is the full cache, chance at 1/8 is not."""
    model, tokenizer = models.load("smollm2-135m")
    workload = plugins.load("workload", "ruler")(
        tasks=["niah_single", "niah_multikey"], prompting="agnostic", split="test"
    )
    traces = recorder.record(
        model,
        tokenizer,
        workload,
        tmp_path / "set",
        episodes=4,
        prompt_tokens=250,
        future_tokens=80,
        name="ruler",
    )
    result = evaluate_tasks(
        model,
        tokenizer,
        [traces],
        scorers("random", "oracle"),
        ["perplexity", "accuracy"],
        budgets=[1, 0.125],
    )
    groups = result["accuracy"]["groups"]
    assert [group["task"] for group in groups] == ["niah_multikey", "niah_single"]
    for group in groups:
        assert group["prompting"] == "agnostic"
        for agent in ("random", "oracle"):
            assert group["agents"][agent]["1.0"] == group["full"]
    assert sum(group["full"]["mean"] for group in groups) >= 1
    assert sum(group["agents"]["random"]["0.125"]["mean"] for group in groups) <= 0.5
    figures = result["perplexity"]["agents"]
    assert abs(figures["random"]["1.0"]["versus_full"]["mean"]) < 1e-3
    assert figures["random"]["0.125"]["versus_oracle"]["low"] > 0
