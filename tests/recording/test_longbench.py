"""The workload longbench, on small files of the test's own in LongBench's format."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub.errors import RemoteEntryNotFoundError

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.evaluation import metrics
from kvenv.recording import tables
from kvenv.recording.workload import Sample, Workload
from kvenv.testing.workloads import byte_tokenizer

datasets = pytest.importorskip("datasets")

LongBench = plugins.load("workload", "longbench")

CHAT = byte_tokenizer()
CHAT.add_special_tokens({"eos_token": "<end>"})
CHAT.chat_template = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def take(workload: Workload, index: int = 0, n: int = 400, T: int = 150) -> Sample:
    return workload.sample(
        index,
        tokenizer=CHAT,
        rng=np.random.default_rng([0, index]),
        prompt_tokens=n,
        future_tokens=T,
        seed=0,
    )


def parts(sample: Sample) -> list[str]:
    """Prompt, what of the future comes before the answer, and the answer."""
    asked = sample.metadata["question_tokens"]
    return [CHAT.decode(x) for x in (sample.prompt, sample.future[:asked], sample.future[asked:])]


def long_row(task: str, i: int = 0, **changes: Any) -> dict[str, Any]:
    context = f"{task} {i}: " + "words and more words. " * 30
    row = {
        "input": f"Who wrote {i}?",
        "context": context,
        "answers": [f"Ann {i}", "Ann"],
        "length": 90,
        "dataset": task,
        "language": "en",
        "all_classes": None,
        "_id": f"{task}{i}",
    }
    return {**row, **changes}


FEW_SHOT = "Question: Where is it?\nType: Location\n"
TASKS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # What the row has, how the context ends, how the question ends, and the answer.
    "qasper": ({"answers": ["no"]}, "words. ", "Question: Who wrote 0?\nAnswer:", "no"),
    "gov_report": ({"input": "", "answers": ["It."]}, "words. ", "on one page.", "It."),
    "trec": (
        {
            "input": "Question: Who is it?\nType:",
            "context": FEW_SHOT * 4,
            "answers": ["Person"],
            "all_classes": ["Person", "Location"],
        },
        FEW_SHOT,
        "\nQuestion: Who is it?\nType:",
        " Person",
    ),
    "triviaqa": (
        {"input": "Passage:\nAnn sang.\nQuestion:\nWho sang?\nAnswer:\n", "answers": ["Ann"]},
        "\n\nPassage:\nAnn sang.\n",
        "Question:\nWho sang?\nAnswer:\n",
        "Ann",
    ),
    "samsum": (
        {"input": "Dialogue: A: Hi\nSummary: ", "answers": ["A greets."]},
        "words. ",
        "\n\nDialogue: A: Hi\nSummary:",
        " A greets.",
    ),
    "passage_count": ({"input": "", "answers": ["7"]}, "words. ", "the number only.", "7"),
    "passage_retrieval_en": (
        {"input": "A summary.", "answers": ["Paragraph 3"]},
        "words. ",
        '"Paragraph 1".',
        "Paragraph 3",
    ),
    "passage_retrieval_zh": (
        {"input": "摘要。", "answers": ["段落3"]},
        "words. ",
        "段落1",
        "段落3",
    ),
    "lcc": (
        {"input": "", "context": "def f(x):\n" * 9, "answers": ["    return x"]},
        "def f(x):\n",
        "\nNext line of code:\n",
        "    return x",
    ),
    "repobench-p": (
        {"input": "def g():\n", "context": "# a.py\n" * 9, "answers": ["    pass"]},
        "# a.py\ndef g():\n",
        "\nNext line of code:\n",
        "    pass",
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_longbench_asks_each_task_in_its_way(tmp_path: Path, task: str) -> None:
    changes, context, question, answer = TASKS[task]
    source = write(tmp_path / f"{task}.jsonl", [long_row(task, **changes)])
    make = partial(LongBench, source, split="all", tasks=[task])
    prompt, asked, reply = parts(take(make(prompting="agnostic"), n=1000, T=400))
    few_shot = task in ("trec", "triviaqa", "samsum")
    raw = few_shot or task in ("lcc", "repobench-p")
    assert prompt.startswith("[user]") != raw
    assert prompt.endswith(context)
    assert asked.removesuffix("<end>[assistant]").endswith(question)
    assert reply == answer + ("\n" if raw else "<end>")
    facts = take(make(), n=1000).metadata
    assert facts["task"] == task
    assert metrics.score(facts, reply.removesuffix("<end>").rstrip("\n")) == 1
    # Only the first line of a few-shot answer counts.
    assert metrics.score(facts, f"\n{answer.strip()}\nQuestion: 5 Location") == 1 or not few_shot
    assert facts.get("classes") == changes.get("all_classes")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A data.zip such as LongBench's."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        for task in ("hotpotqa", "passage_count", "passage_count_e", "lsht"):
            rows = [long_row(task.removesuffix("_e"), i, answers=["3"]) for i in range(20)]
            file.write(write(tmp_path / "data" / f"{task}.jsonl", rows), f"data/{task}.jsonl")
    return tmp_path / "data.zip"


@pytest.fixture
def both(archive: Path) -> Path:
    """One file with the rows of two tasks."""
    names = ("hotpotqa", "passage_count")
    text = "\n".join((archive.parent / "data" / f"{name}.jsonl").read_text() for name in names)
    (archive.parent / "both.jsonl").write_text(text)
    return archive.parent / "both.jsonl"


def two_tasks(source: Path | str, **options: Any) -> None:
    """Check that a source gives the rows of hotpotqa and passage_count in turn."""
    workload = LongBench(str(source), split="all", **options)
    found = [take(workload, i).metadata["task"] for i in range(40)]
    assert found == ["hotpotqa", "passage_count"] * 20
    with pytest.raises(KvenvError, match="of 40 rows"):
        take(workload, 40)


@pytest.mark.parametrize("where", ["data.zip", ".", "data", "both.jsonl"])
def test_longbench_is_read_from_local_files(archive: Path, both: Path, where: str) -> None:
    two_tasks(archive.parent / where)


def test_longbench_is_read_from_the_hub_s_archive(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(*names: str, **options: str) -> str:
        asked.append((names, options))
        return str(archive)

    monkeypatch.setitem(LongBench._load.__globals__, "hf_hub_download", download)
    two_tasks("owner/name")
    assert asked == [(("owner/name", "data.zip"), {"repo_type": "dataset"})]


def test_longbench_is_read_by_configuration_where_the_hub_has_no_archive(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*names: str, **options: str) -> str:
        raise RemoteEntryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    def load(source: str, task: str) -> dict[str, Any]:
        file = archive.parent / "data" / f"{task}.jsonl"
        return tables.read(source, "json", data_files={"test": str(file)})

    monkeypatch.setitem(LongBench._load.__globals__, "hf_hub_download", download)
    monkeypatch.setattr(tables, "load", load)
    two_tasks("owner/name", tasks=["hotpotqa", "passage_count"])


def test_longbench_s_tasks_can_be_chosen(archive: Path) -> None:
    def tasks(*names: str) -> list[str]:
        workload = LongBench(str(archive), split="all", tasks=list(names))
        return [take(workload, i).metadata["task"] for i in range(len(names))]

    assert tasks("lsht", "passage_count_e") == ["lsht", "passage_count_e"]
    with pytest.raises(KvenvError, match="has no lcc, only hotpotqa, lsht, passage_count, passa"):
        tasks("hotpotqa", "lcc")


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "task": (lambda f: LongBench(tasks=["nq"]), "LongBench task 'nq' is unknown"),
    "no task": (lambda f: LongBench(tasks=[]), "no LongBench tasks given"),
    "offline archive": (lambda f: LongBench(), "'zai-org/LongBench' cannot be read"),
    "no file": (lambda f: LongBench("no.zip"), "'no.zip': no such file or folder"),
    "no archive": (
        lambda f: LongBench(write(f / "x.zip", [{}])),
        r"x\.zip has no English task of LongBench, only nothing",
    ),
    "broken archive": (
        lambda f: ((f / "x.zip").write_bytes(b"PK\3\4 and no more"), LongBench(str(f / "x.zip"))),
        r"x\.zip' cannot be read \(BadZipFile: .*local copy",
    ),
    "no english": (
        lambda f: LongBench(write(f / "x.jsonl", [long_row("lsht")])),
        "no English task of LongBench, only lsht: choose",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_named(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(KvenvError, match=message) as error:
        make(tmp_path)
    assert "\n" not in str(error.value)
