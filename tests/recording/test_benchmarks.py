"""The workloads of public benchmarks, on small files of the test's own in their formats."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from kvenv import models, plugins
from kvenv.errors import KvenvError
from kvenv.evaluation import metrics
from kvenv.recording import recorder
from kvenv.recording.tokens import SPLITS
from kvenv.recording.workload import Sample, Workload
from kvenv.testing import check_workload
from kvenv.testing.workloads import byte_tokenizer

datasets = pytest.importorskip("datasets")

NAMES = ("boolq", "arc", "longbench", "govreport")
BoolQ, ARC, LongBench, GovReport = (plugins.load("workload", name) for name in NAMES)

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    found = byte_tokenizer()
    found.add_special_tokens({"eos_token": "<end>"})
    found.chat_template = template
    return found


CHAT, PLAIN = tokenizer(), tokenizer(None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def boolq_rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "question": f"is lake {i} salty",
            "passage": f"Lake {i} is a lake. " + "It is fed by a river. " * 3,
            "answer": i % 3 == 0,
        }
        for i in range(count)
    ]


def arc_rows(count: int = 40) -> list[dict[str, Any]]:
    labels = [list("ABCD"), ["1", "2", "3"]]
    return [
        {
            "id": f"Made_{i}",
            "question": f"What is {i} and {i}?",
            "choices": {
                "text": [f"{i * 2 + j} apples" for j in range(len(labels[i % 2]))],
                "label": labels[i % 2],
            },
            "answerKey": labels[i % 2][i % 3],
        }
        for i in range(count)
    ]


def report_rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "report": f"Report {i}. " + "The agency paid for roads. " * 20 + f"End {i}.",
            "summary": f"The agency of report {i} paid for roads. ",
        }
        for i in range(count)
    ]


def longbench_rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "input": f"Who wrote book {i}?",
            "context": f"Library {i}. " + "It holds many books. " * 30,
            "answers": [f"Ann {i}", "Ann"],
            "length": 130,
            "dataset": "hotpotqa",
            "language": "en",
            "all_classes": None,
            "_id": f"{i:024x}",
        }
        for i in range(count)
    ]


def sources(folder: Path) -> dict[str, Workload]:
    """One workload of each kind, on files in its dataset's format."""
    return {
        "boolq": BoolQ(write(folder / "boolq.jsonl", boolq_rows())),
        "arc": ARC(write(folder / "arc.jsonl", arc_rows())),
        "govreport": GovReport(write(folder / "govreport.jsonl", report_rows())),
        "longbench": LongBench(write(folder / "longbench.jsonl", longbench_rows())),
    }


def take(
    workload: Workload,
    index: int = 0,
    n: int = 400,
    T: int = 150,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast = CHAT,
) -> Sample:
    return workload.sample(
        index,
        tokenizer=tokenizer,
        rng=np.random.default_rng([seed, index]),
        prompt_tokens=n,
        future_tokens=T,
        seed=seed,
    )


def words(ids: list[int]) -> str:
    return CHAT.decode(ids)


def parts(sample: Sample) -> tuple[str, str, str]:
    """Prompt, what of the future comes before the answer, and the answer."""
    asked = sample.metadata["question_tokens"]
    return words(sample.prompt), words(sample.future[:asked]), words(sample.future[asked:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompting", ["aware", "agnostic"])
def test_the_contract_is_kept(tmp_path: Path, name: str, prompting: str) -> None:
    workload = sources(tmp_path)[name]
    workload = type(workload)(workload.source, prompting=prompting)
    check_workload(workload, CHAT, 500, 300, 4)
    check_workload(workload, None, 400, 200, 4, seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_tells_how_to_judge_it(
    tmp_path: Path, name: str, checkpoints: Callable[[int], Path]
) -> None:
    workload = sources(tmp_path)[name]
    agnostic = type(workload)(workload.source, prompting="agnostic", split="all")
    traces = recorder.record(
        *models.load(str(checkpoints(0))), agnostic, tmp_path / "set",
        episodes=3, prompt_tokens=200, future_tokens=250,
    )  # fmt: skip
    assert len({traces.info(i).document for i in range(3)}) == 3
    for i in range(3):
        info = traces.info(i)
        facts, ids = info.metadata, traces.tokens(i)
        assert facts["prompting"] == "agnostic"
        asked = info.n + facts["question_tokens"]
        assert facts["question"] in words(ids[info.n : asked].tolist())
        reply = words(ids[asked:].tolist())
        assert metrics.score(facts, reply.strip()) == 1
        assert metrics.score(facts, "something else") == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [CHAT, PLAIN], ids=["chat", "plain"])
def test_both_promptings_ask_the_same(
    tmp_path: Path, name: str, kind: PreTrainedTokenizerFast
) -> None:
    workload = sources(tmp_path)[name]
    agnostic = type(workload)(workload.source, prompting="agnostic")
    known = take(workload, n=2000, T=300, tokenizer=kind)
    unknown = take(agnostic, n=2000, T=300, tokenizer=kind)
    if name != "arc":  # whose context grows with the room
        assert known.prompt + known.future == unknown.prompt + unknown.future
    assert known.metadata["question_tokens"] == 0
    assert known.metadata["question"] in words(known.prompt)
    assert unknown.metadata["question"] not in words(unknown.prompt)
    assert parts(known)[2] == parts(unknown)[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_sets_the_order(tmp_path: Path, name: str) -> None:
    workload = sources(tmp_path)[name]
    orders = [[take(workload, i, seed=seed).document for i in range(6)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == 6


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_document(tmp_path: Path, name: str) -> None:
    workload = sources(tmp_path)[name]
    names: list[str] = []
    for split in SPLITS:
        part = type(workload)(workload.source, split=split)
        with pytest.raises(KvenvError, match=f"split {split}.* fit in 400 prompt") as error:
            take(part, 99)
        size = int(str(error.value).split(" fit in")[0].split()[-1])
        names += [take(part, i).document for i in range(size)]
    assert len(names) == len(set(names)) == 40


def test_long_contexts_lose_their_middle(tmp_path: Path) -> None:
    workload = GovReport(write(tmp_path / "r.jsonl", report_rows()), split="all")
    full, cut = take(workload, n=2000), take(workload, n=301)
    before, context, after = re.split("(Report.*End [0-9]+[.])", words(full.prompt))
    assert len(context) == 558
    shorter = words(cut.prompt).removeprefix(before).removesuffix(after)
    room = 301 - len(full.prompt) + len(context)
    assert len(cut.prompt) == 301
    assert shorter == context[: (room + 1) // 2] + context[-(room // 2) :]
    assert take(workload, n=len(full.prompt)) == full


def test_rows_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    rows = boolq_rows(3)
    rows[0]["question"] = "is " * 150
    rows[1]["passage"] = " "
    workload = BoolQ(write(tmp_path / "b.jsonl", rows), split="all")
    assert take(workload).metadata["question"].endswith("lake 2 salty?")
    with pytest.raises(KvenvError, match=r"episode 1 .*: of 3 rows of .*, 1 fit in 400"):
        take(workload, 1)
    assert take(workload, 1, n=900).document != take(workload, 0, n=900).document
    agnostic = BoolQ(workload.source, split="all", prompting="agnostic")
    question = take(agnostic).metadata["question_tokens"]
    assert len(take(agnostic, T=question + 1).future) == question + 1
    with pytest.raises(KvenvError, match=f"0 fit in 400 prompt and {question} future"):
        take(agnostic, T=question)


def test_boolq_answers_are_no_and_yes(tmp_path: Path) -> None:
    workload = BoolQ(write(tmp_path / "b.jsonl", boolq_rows(6)), split="all")
    for i in range(6):
        facts = take(workload, i).metadata
        lake = int(facts["question"].split()[-2])
        assert facts["choices"] == ["no", "yes"]
        assert facts["answer"] == (lake % 3 == 0)
        assert facts["answers"] == [facts["choices"][facts["answer"]]]
        assert parts(take(workload, i))[2] == facts["answers"][0] + "<end>"


def test_boolq_s_labelled_hub_split_is_test(tmp_path: Path) -> None:
    rows = boolq_rows(30)
    write(tmp_path / "set" / "train.jsonl", rows[:21])
    write(tmp_path / "set" / "validation.jsonl", rows[20:])
    count = {}
    for split in SPLITS:
        workload = BoolQ(str(tmp_path / "set"), split=split)
        with pytest.raises(KvenvError, match=r"of \d+ rows") as error:
            take(workload, 99)
        count[split] = int(str(error.value).split(" rows")[0].split()[-1])
    assert count["test"] == 10
    assert count["train"] + count["validation"] == 20  # row 20 is in both files
    assert count["train"] > count["validation"] > 0


def test_arc_fills_the_prompt_with_solved_questions_of_train(tmp_path: Path) -> None:
    for split, rows in (("train", arc_rows()[:30]), ("test", arc_rows()[30:])):
        write(tmp_path / "set" / "ARC-Challenge" / f"{split}.jsonl", rows)
    workload = ARC(str(tmp_path / "set"), split="test")
    sample = take(workload, n=500)
    prompt, _, reply = parts(sample)
    start, *solved, asked = prompt.split("Question: ")
    assert "[user]" not in prompt
    assert start.endswith("\n\n")
    assert 450 < len(sample.prompt) <= 500
    assert asked.endswith("?\nAnswer:")
    assert int(asked.split()[2]) >= 30
    numbers = [int(text.split()[2]) for text in solved]
    assert max(numbers) < 30
    assert len(set(numbers)) == len(numbers) > 5
    for i, text in zip(numbers, solved, strict=True):
        assert text == f"What is {i} and {i}?\nAnswer: {i * 2 + i % 3} apples\n\n"
    facts = sample.metadata
    i = int(asked.split()[2])
    assert facts["task"] == "arc_challenge"
    assert facts["answer"] == i % 3
    assert facts["choices"][facts["answer"]] + "\n" == reply
    assert facts["answers"] == [f"{i * 2 + i % 3} apples"]
    other = words(take(workload, 1, n=500).prompt)
    assert other.split("Question: ")[1] != solved[0]


def test_arc_never_shows_the_question_it_asks(tmp_path: Path) -> None:
    workload = ARC(write(tmp_path / "a.jsonl", arc_rows(8)), split="train", subset="ARC-Easy")
    for i in range(3):
        sample = take(workload, i, n=5000)
        assert words(sample.prompt).count(sample.metadata["question"]) == 1
        assert sample.metadata["task"] == "arc_easy"


def test_arc_leaves_out_questions_without_a_right_option(tmp_path: Path) -> None:
    rows = arc_rows(20)
    for row in rows[1:]:
        row["answerKey"] = "E"
    workload = ARC(write(tmp_path / "a.jsonl", rows), split="all")
    with pytest.raises(KvenvError, match=r"of 20 rows .*, 0 fit"):
        take(workload)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "split": (lambda f: BoolQ(split="dev"), "split 'dev' is unknown"),
    "prompting": (lambda f: BoolQ(prompting="x"), "prompting 'x' is unknown"),
    "subset": (lambda f: ARC(subset="hard"), "subset 'hard' is unknown: choose from ARC-Challenge"),
    "offline": (lambda f: BoolQ(), "'google/boolq' cannot be read"),
    "columns": (
        lambda f: ARC(write(f / "x.jsonl", boolq_rows())),
        "has no choices and no answerKey, only question, passage, answer",
    ),
    "type": (
        lambda f: BoolQ(write(f / "x.jsonl", [{**row, "answer": "no"} for row in boolq_rows()])),
        "has answer 'no' of type str in row 0: it must be of type bool",
    ),
    "rows": (
        lambda f: GovReport(write(f / "x.jsonl", report_rows(1)), split="test"),
        r"has no row for split test, only train \(1 rows\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_named(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(KvenvError, match=message) as error:
        make(tmp_path)
    assert "\n" not in str(error.value)


def test_templates_that_rewrite_the_text_say_so(tmp_path: Path) -> None:
    with pytest.raises(KvenvError, match="chat template rewrites the text"):
        take(sources(tmp_path)["boolq"], tokenizer=tokenizer("nothing"))


def test_arc_choices_need_their_two_lists(tmp_path: Path) -> None:
    rows = [{**row, "choices": {"text": row["choices"]["text"]}} for row in arc_rows(8)]
    with pytest.raises(KvenvError, match="hold text: they must be lists named label and text"):
        ARC(write(tmp_path / "a.jsonl", rows), split="train").sample(
            0, tokenizer=None, rng=None, prompt_tokens=64, future_tokens=8, seed=0
        )
