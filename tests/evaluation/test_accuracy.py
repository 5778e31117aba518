from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvenv.errors import KvenvError
from kvenv.evaluation.accuracy import MARGIN, Accuracy, _interval, greedy, stop_tokens
from kvenv.evaluation.cut import Cutter, forward
from kvenv.evaluation.metrics import score
from kvenv.recording import tokens
from kvenv.scorers import load_scorer

NAMES = ("random", "knorm")
BUDGETS = (1.0, 0.4)
QUESTION, REPLY = 5, 6
LIMIT = REPLY + MARGIN
ASKED = {"prompting": "agnostic", "question_tokens": QUESTION}


@pytest.fixture(scope="module")
def judge(families):
    """Accuracy over a set, and the cutter that it judges by."""

    def judge(traces, budgets=BUDGETS) -> tuple[Accuracy, Cutter]:
        scorers = {name: load_scorer(name) for name in NAMES}
        cutter = Cutter(families("llama")[0], [traces], scorers, budgets=budgets, sinks=2, recent=3)
        return Accuracy(cutter, families("llama")[1]), cutter

    return judge


@pytest.fixture(scope="module")
def written(families, recorded):
    """Sets in which the model's own words after the full prompt are the right answers."""

    def written(**facts: Any):
        lengths = [(40, QUESTION + REPLY)] * 3
        model, tokenizer = families("llama")
        plain = recorded("llama", lengths)
        right = []
        for index in range(3):
            asked = 40 + facts.get("question_tokens", 0)
            ids = torch.from_numpy(plain.tokens(index)).long()[None, :asked]
            mask = torch.ones_like(ids)
            text = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
            right.append(tokenizer.decode(text[0, asked:], skip_special_tokens=True))
        # Two answers, so that the score is a share; the second is never right.
        answers = [{"task": "vt", "answers": [words, "\0"], **facts} for words in right]
        return recorded("llama", lengths, answers)

    return written


def expected(cutter, index: int, question: int, budget: int | None, tokenizer) -> list[float]:
    """Scores of what `model.generate` writes with a cut cache, for agnostic prompts."""
    traces = cutter.sets[0]
    prompt = cutter.read(traces, index)
    cache = prompt.whole() if budget is None else prompt.cut(budget)
    rows = 1 if budget is None else len(NAMES)
    ids = torch.from_numpy(traces.tokens(index)).long()[: 40 + question].expand(rows, -1)
    out = cutter.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=LIMIT,
        do_sample=False,
        pad_token_id=0,
    )
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [score(prompt.info.metadata, text) for text in texts]


def test_answers_are_those_that_generate_gives(families, judge, written) -> None:
    traces = written(**ASKED)
    task, cutter = judge(traces)
    for index in range(3):
        assert task.judges(traces, index)
        task.add(cutter.read(traces, index))
    (group,) = task.result()["groups"]
    assert {key: group[key] for key in ("task", "prompting", "prompt_tokens", "prompts")} == {
        "task": "vt",
        "prompting": "agnostic",
        "prompt_tokens": 40,
        "prompts": 3,
    }
    tokenizer = families("llama")[1]
    full = [expected(cutter, index, QUESTION, None, tokenizer)[0] for index in range(3)]
    assert group["full"]["mean"] == pytest.approx(sum(full) / 3) == 0.5
    small = [expected(cutter, index, QUESTION, 16, tokenizer) for index in range(3)]
    for column, name in enumerate(NAMES):
        assert group["agents"][name]["1.0"]["mean"] == 0.5
        mean = sum(row[column] for row in small) / 3
        assert group["agents"][name]["0.4"]["mean"] == pytest.approx(mean)
        assert mean < 0.5


def test_an_aware_prompt_is_answered_from_its_own_end(judge, written) -> None:
    """What the whole prompt expects comes first; what follows it meets the cut cache."""
    traces = written(prompting="aware")
    task, cutter = judge(traces)
    prompt = cutter.read(traces, 0)
    task.add(prompt)
    (group,) = task.result()["groups"]
    assert group["prompting"] == "aware"
    assert group["full"]["mean"] == group["agents"]["random"]["1.0"]["mean"] == 0.5
    logits = prompt.logits.expand(2, -1)
    own = greedy(cutter.model, prompt.cut(16), logits, 40, 12, frozenset())
    assert own[0][0] == own[1][0] == int(prompt.logits.argmax())
    cache = prompt.cut(16)
    for step in range(1, 12):  # one by one, without `greedy`
        ids = torch.tensor(own)[:, step - 1 : step]
        assert forward(cutter.model, cache, ids, 39 + step)[:, -1].argmax(-1).tolist() == [
            row[step] for row in own
        ]


def test_answers_end_at_a_stop_token(judge, written) -> None:
    cutter = judge(written(**ASKED))[1]
    prompt = cutter.read(cutter.sets[0], 0)
    logits = prompt.logits.expand(2, -1)
    free = greedy(cutter.model, prompt.cut(16), logits, 40, 9, frozenset())
    assert [len(row) for row in free] == [9, 9]
    stops = frozenset({free[0][3], free[1][6]})
    own = greedy(cutter.model, prompt.cut(16), logits, 40, 9, stops)
    for row, whole in zip(own, free, strict=True):
        end = next(i for i, token in enumerate(whole) if token in stops)
        assert row == whole[:end]


def test_stop_tokens_are_the_model_s_and_the_tokenizer_s(families) -> None:
    model, tokenizer = families("llama")
    assert stop_tokens(model, tokenizer) == frozenset()
    model.generation_config.eos_token_id = [3, 9]
    tokenizer.eos_token = "b"
    try:
        found = stop_tokens(model, tokenizer)
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token = None
    assert found == {3, 9, *tokens.encode(tokenizer, "b")}


@pytest.mark.parametrize("prompting", ["agnostic", "aware"])
def test_the_likeliest_choice_is_taken(families, judge, recorded, prompting: str) -> None:
    model, tokenizer = families("llama")
    choices = ["ab", "c", "a much longer choice", "xyz"]
    question = QUESTION if prompting == "agnostic" else 0
    facts = {"choices": choices, "prompting": prompting, "question_tokens": question}
    # A letter is a token, and there are capitals enough to make 12 different prompts.
    traces = recorded(
        "llama", [(40, 11)] * 12, [{**facts, "task": "quiz", "answer": i % 4} for i in range(12)]
    )
    task, cutter = judge(traces)
    full, small = [], []
    for index in range(12):
        assert task.judges(traces, index)
        prompt = cutter.read(traces, index)
        task.add(prompt)
        sums: dict[str, list[torch.Tensor]] = {"full": [], "small": []}
        for choice in choices:
            ids = torch.tensor(tokens.encode(tokenizer, choice))
            later = torch.cat([prompt.future[:question], ids])
            whole = torch.cat([torch.from_numpy(traces.tokens(index)).long()[:40], later])
            with torch.no_grad():
                logits = model(whole[None]).logits[:, 39 + question : -1]
            sums["full"].append(_likelihood(logits, ids))
            logits = forward(model, prompt.cut(16), later.expand(2, -1), 40)
            logits = torch.cat([prompt.logits.expand(2, 1, -1), logits], 1)[:, question:-1]
            sums["small"].append(_likelihood(logits, ids))
        full.append(int(torch.stack(sums["full"]).argmax(0)) == index % 4)
        small.append((torch.stack(sums["small"]).argmax(0) == index % 4).tolist())
    (group,) = task.result()["groups"]
    assert group["full"]["mean"] == pytest.approx(sum(full) / 12)
    for column, name in enumerate(NAMES):
        assert group["agents"][name]["1.0"]["mean"] == pytest.approx(sum(full) / 12)
        mean = sum(row[column] for row in small) / 12
        assert group["agents"][name]["0.4"]["mean"] == pytest.approx(mean)


def _likelihood(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(rows,) summed log-likelihoods of ids (q,) under logits (rows, q, V)."""
    spread = logits.double().log_softmax(-1)
    return spread[:, torch.arange(len(ids)), ids].sum(-1)


def test_tasks_promptings_and_lengths_are_kept_apart(judge, recorded) -> None:
    facts = [
        {"task": "vt", "answers": ["a"]},
        {"task": "cwe", "answers": ["a"], **ASKED},
        {"task": "vt", "answers": ["a"], **ASKED},
        {"task": "vt", "answers": ["a"], "metric": "exact_match"},
        {},
    ]
    traces = recorded("llama", [(40, 11)] * 5, facts)
    task, cutter = judge(traces)
    assert [task.judges(traces, i) for i in range(5)] == [True] * 4 + [False]
    for index in range(4):
        task.add(cutter.read(traces, index))
    assert [
        (g["task"], g["prompting"], g["prompt_tokens"], g["prompts"])
        for g in task.result()["groups"]
    ] == [("cwe", "agnostic", 40, 1), ("vt", "agnostic", 40, 1), ("vt", "aware", 40, 2)]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"answers": ["a"], "task": "chess"}, "RULER task 'chess'"),
        ({"answers": ["a"], "metric": "taste"}, "metric 'taste'"),
        ({"answers": ["a"]}, "metric 'None' is unknown: choose from exact_match"),
        ({"answers": ["a"], "task": "vt", "prompting": "agnostic"}, '"question_tokens" None'),
        ({"answers": ["a"], "task": "vt", **ASKED, "question_tokens": 11}, '"question_tokens" 11'),
        ({"choices": ["ab", "cd"], "answer": 2}, '"answer" 2 must be an index of its 2'),
        ({"choices": ["ab", ""], "answer": 0}, "none of them empty"),
        ({"choices": ["a", "b"], "answer": 0}, "record it with prompting agnostic"),
    ],
)
def test_what_cannot_be_judged_is_named(judge, recorded, facts: dict, message: str) -> None:
    traces = recorded("llama", [(40, 11)], [facts])
    task, _ = judge(traces)
    with pytest.raises(KvenvError, match=f"episode 0 of .* cannot be judged: .*{message}"):
        task.judges(traces, 0)


def test_a_learned_agent_is_compared_pair_by_pair() -> None:
    """With the heuristic that is right most often, and with the oracle; on the same prompts."""
    task = Accuracy.__new__(Accuracy)
    kinds = {"mine": "learned", "weak": "heuristic", "good": "heuristic", "best": "oracle"}
    task._cutter = SimpleNamespace(kinds=kinds, agents=tuple(kinds), oracle="best")
    scores = np.array([[1, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]], float)
    documents = ["a", "b", "c", "d"]
    found = task._compared("mine", scores, documents)
    assert found["versus_heuristic"]["baseline"] == "good"
    assert found["versus_heuristic"]["difference"] == 0.25
    assert found["versus_oracle"]["difference"] == -0.25
    # Prompts that both get right or wrong are certain: 1 of 4 differs, so at most 3 in a resample.
    assert found["versus_heuristic"]["low"] == 0 <= found["versus_heuristic"]["high"] <= 0.75
    assert task._compared("good", scores, documents) == {}
    task._cutter = SimpleNamespace(kinds={"mine": "learned"}, agents=("mine",), oracle=None)
    assert task._compared("mine", scores[:, :1], documents) == {}


@pytest.mark.parametrize(("right", "low", "high"), [(24, 0.8620, 1.0), (0, 0.0, 0.1380)])
def test_all_right_is_not_certain(right: int, low: float, high: float) -> None:
    """Wilson 1927: n / (n + z^2) at the ends, z = 1.96."""
    scores = np.array([1.0] * right + [0.0] * (24 - right))
    found = _interval(scores, [str(i) for i in range(24)])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-4)
    assert _interval(np.full(24, 0.5), [str(i) for i in range(24)])["high"] == 0.5  # shares
    assert _interval(scores, ["one"] * 24)["high"] == right / 24  # a document says nothing alone
