"""LongBench: question answering, summaries, few-shot tasks, retrieval and code on long texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from kvenv.errors import KvenvError
from kvenv.recording import benchmarks, tables
from kvenv.recording.benchmarks import Problem
from kvenv.recording.tokens import check_choice


@dataclass(frozen=True)
class _Prompt:
    """How a task asks; an input that its question does not mention is the end of the context.

    Attributes:
        before: the instruction before the context.
        question: what follows it; {input} is the row's.
        metric: LongBench's for the task.
        starts: where in the row's input the question starts, if that begins with more context.
        few_shot: the context is solved examples, to be continued by a line.
        code: the context is code, to be continued.
    """

    before: str
    question: str
    metric: str = "qa_f1"
    starts: str = ""
    few_shot: bool = False
    code: bool = False


def _qa(what: str, how: str) -> _Prompt:
    return _Prompt(
        f"Read {what} below. I will ask you about it afterwards.\n\n",
        "\n\nAnswer the question on the text above " + how + ".\n\nQuestion: {input}\nAnswer:",
    )


_SHORTLY = "in as few words as possible, without explaining the answer"
_PASSAGES = _qa("the passages", _SHORTLY)
_LEARN = "Here are examples of a task, then one more of it for you to do.\n\n"
_CODE = _Prompt(
    "Continue this code by one line.\n", "\nNext line of code:\n", "code_similarity", code=True
)

_ENGLISH = {
    "narrativeqa": _qa("the story", _SHORTLY),
    "qasper": _qa(
        "the scientific article",
        _SHORTLY + "; say yes or no where that answers it, and unanswerable if nothing above does",
    ),
    "multifieldqa_en": _qa("the text", "and say nothing else"),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "gov_report": _Prompt(
        "Read the report of a government agency below.\n\n",
        "\n\nSummarise the report above on one page.",
        "rouge_l",
    ),
    "qmsum": _Prompt(
        "Read the transcript of a meeting below. I will ask you about it afterwards.\n\n",
        "\n\nBy the transcript above, answer in a sentence or a few: {input}",
        "rouge_l",
    ),
    "multi_news": _Prompt(
        "Read the news articles below.\n\n",
        "\n\nSummarise all the articles above on one page.",
        "rouge_l",
    ),
    "trec": _Prompt(_LEARN, "\n{input}", "classification", few_shot=True),
    "triviaqa": _Prompt(_LEARN, "{input}", "qa_f1", starts="Question:", few_shot=True),
    "samsum": _Prompt(_LEARN, "\n\n{input}", "rouge_l", few_shot=True),
    "passage_count": _Prompt(
        "Some of the paragraphs below may be repeated. Find out how many different ones there "
        "are.\n\n",
        "\n\nHow many different paragraphs are there above? Answer with the number only.",
        "count",
    ),
    "passage_retrieval_en": _Prompt(
        "Read the numbered paragraphs below. I will show you a summary of one afterwards.\n\n",
        "\n\nThe summary:\n{input}\n\nWhich of the paragraphs above does it summarise? Answer like "
        '"Paragraph 1".',
        "retrieval",
    ),
    "lcc": _CODE,
    "repobench-p": _CODE,
}
_CHINESE = {
    "multifieldqa_zh": _Prompt(
        "阅读下面的材料。之后我会提问。\n\n",
        "\n\n根据上文用中文回答。只写答案。\n\n问题\n{input}\n回答",
    ),
    "dureader": _Prompt(
        "阅读下面的文章。之后我会提问。\n\n",
        "\n\n根据上文回答问题。\n\n问题\n{input}\n回答",
        "rouge_l",
    ),
    "vcsum": _Prompt("阅读下面的会议记录。\n\n", "\n\n写一段话总结上面的会议。", "rouge_l"),
    "lsht": _Prompt("下面是新闻分类的例子。\n\n", "\n{input}", "classification", few_shot=True),
    "passage_retrieval_zh": _Prompt(
        "阅读下面编号的段落。之后我会给出其中一段的摘要。\n\n",
        "\n\n摘要\n{input}\n\n这是哪一段的摘要\n回答格式如段落1",
        "retrieval",
    ),
}
_PROMPTS = {**_ENGLISH, **_CHINESE}


@dataclass
class LongBench(benchmarks.Benchmark):
    """LongBench's 21 tasks, with the ideas of its prompts in other words, and its metrics.

    Source: Bai et al. 2024, arXiv 2308.14508. Rows are read from its data.zip or JSON files, never
    by a loading script. Few-shot and code tasks use no chat template, as there. Its one split is
    parted by a hash of the context. Code is asked for by the context alone (of repobench-p, that
    is the other files and then the file itself); triviaqa's last passage is context too.

    Args:
        source: the id of a Hugging Face dataset with such a data.zip or a configuration for each
            task; or a local data.zip, a folder with a .jsonl file for each task (or with a folder
            data that has them), or a file of rows.
        tasks: tasks, taken in turn by episode; a name with _e is LongBench-E's. Default: the
            English and code ones that the source has.
    """

    source: str = "zai-org/LongBench"
    tasks: list[str] | None = None

    _columns: ClassVar[tables.Columns] = {
        "input": str,
        "context": str,
        "answers": list,
        "dataset": str,
    }
    _document: ClassVar[str] = "context"

    def __post_init__(self) -> None:
        for task in self.tasks or ():
            check_choice("LongBench task", task.removesuffix("_e"), tuple(_PROMPTS))
        if self.tasks == []:
            raise KvenvError(f"no LongBench tasks given: choose from {', '.join(_PROMPTS)}")
        super().__post_init__()

    def _load(self) -> dict[str, dict[str, Any]]:
        path = Path(self.source)
        if path.is_dir():
            return self._folder(path)
        if path.is_file() and path.suffix != ".zip":
            return self._group(tables.load(self.source)["train"])
        if not path.is_file():
            tables.check_id(self.source)
            try:
                path = Path(hf_hub_download(self.source, "data.zip", repo_type="dataset"))
            except RemoteEntryNotFoundError:
                tasks = self._chosen(self.tasks or _ENGLISH)
                return {task: tables.load(self.source, task) for task in tasks}
            except (OSError, ValueError) as error:  # what the hub's client raises
                raise tables.unreadable(self.source, error) from error
        return self._folder(tables.extract(self.source, path))

    def _chosen(self, there: Sequence[str] | Mapping[str, Any]) -> list[str]:
        """The tasks to be read, of those that are there."""
        found = [task for task in self.tasks or _ENGLISH if task in there]
        missing = [task for task in self.tasks or () if task not in there]
        if missing or not found:
            raise KvenvError(
                f"{self.source} has no {', '.join(missing) or 'English task of LongBench'}, only "
                f"{', '.join(sorted(there)) or 'nothing'}: choose tasks among these"
            )
        return found

    def _folder(self, path: Path) -> dict[str, dict[str, Any]]:
        """The tasks' files in a folder, or in the folder data inside it."""
        inside = path / "data" if (path / "data").is_dir() else path
        files = {file.stem: str(file.resolve()) for file in inside.glob("*.json*")}
        return {
            task: tables.read(self.source, "json", data_files={"test": files[task]})
            for task in self._chosen(files)
        }

    def _group(self, rows: Any) -> dict[str, dict[str, Any]]:
        """The rows of one file by the task that they name."""
        tables.check({"train": rows}, self._columns, self.source)
        places: dict[str, list[int]] = {}
        for i, name in enumerate(rows["dataset"]):
            places.setdefault(str(name), []).append(i)
        return {task: {"test": rows.select(places[task])} for task in self._chosen(places)}

    def _problem(self, task: str, row: Mapping[str, Any], seed: Sequence[int]) -> Problem:
        prompt = _PROMPTS[task.removesuffix("_e")]
        context, asked = row["context"], row["input"].rstrip(" ")
        if "{input}" not in prompt.question:
            context, asked = context + asked, ""
        elif prompt.starts and prompt.starts in asked:
            passage, mark, rest = asked.rpartition(prompt.starts)
            context, asked = f"{context}\n\n{passage}", mark + rest
        facts: dict[str, Any] = {"first_line": True} if prompt.few_shot else {}
        if row.get("all_classes"):
            facts["classes"] = list(row["all_classes"])
        return Problem(
            before=prompt.before,
            context=context,
            question=prompt.question.replace("{input}", asked),
            answers=[str(answer) for answer in row["answers"]],
            metric=prompt.metric,
            chat=not (prompt.few_shot or prompt.code),
            facts=facts,
        )
