"""What the workloads of public benchmarks share: a row of a dataset becomes an episode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any, ClassVar, Literal, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvenv.errors import KvenvError
from kvenv.recording import tables, tokens
from kvenv.recording.workload import Sample

_LEAST = 16  # tokens of context without which a problem is left out, unless it has fewer
_MARK = "\u241e"  # holds the context's place while a chat template does its work


@dataclass(frozen=True)
class Problem:
    """A question on a context: ``before + context + question`` is asked, the answer follows.

    Attributes:
        before: the instruction that precedes the context.
        context: one text, which loses its middle where it is too long; or examples, of which the
            first that fit are taken.
        question: asked after the context, with what parts it from the context.
        answers: the right answers, of which the future holds the first; none: leave this row out.
        metric: how to judge an answer, one of `kvenv.evaluation.metrics.METRICS`.
        chat: whether it goes through the tokenizer's chat template; otherwise the answer simply
            continues the text, as LongBench asks few-shot and code tasks.
        facts: what else the episode's metadata tell.
    """

    before: str
    context: str | Iterable[str]
    question: str
    answers: Sequence[str]
    metric: str
    chat: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Benchmark(ABC):
    """A dataset as a workload; a subclass names its columns and makes a `Problem` of each row.

    Rows come in an order shuffled by the set's seed, each once. Left out are those with an empty
    text, those whose prompt cannot hold the instruction and the question beside 16 tokens of
    context, and those whose question leaves no room for an answer in the future. A context that is
    too long for the prompt loses its middle (LongBench's rule; the rest stays whole). Prompt and
    future, and the context and what is around it, are tokenised apart.

    Args:
        source: a .json, .jsonl or .parquet file, a folder of such files (named by their splits), or
            the id of a Hugging Face dataset (needs the datasets package).
        split: which rows; the dataset's own splits where it has these three, else by a hash of the
            document (see `kvenv.recording.tables.part`); splits never share a document. all takes
            every row.
        prompting: aware: the question is part of the prompt. agnostic: the prompt ends with the
            context, so that a cache is cut before the question is seen; the question then opens
            the future.
    """

    source: str
    split: Literal["train", "validation", "test", "all"] = "train"
    prompting: Literal["aware", "agnostic"] = "aware"

    _columns: ClassVar[tables.Columns]
    """What rows must have."""

    _document: ClassVar[str]
    """The column that makes two rows one document."""

    def __post_init__(self) -> None:
        tokens.check_choice("split", self.split, (*tokens.SPLITS, "all"))
        tokens.check_choice("prompting", self.prompting, ("aware", "agnostic"))
        self._sets = self._load()
        for sets in self._sets.values():
            tables.check(sets, self._columns, self.source)
        self._rows = {task: self._part(task, self.split) for task in self._sets}
        self._found: dict[_Key, tuple[list[_Place], Iterator[_Place]]] = {}

    @abstractmethod
    def _load(self) -> dict[str, dict[str, Any]]:
        """The tasks, each with its dataset's splits (see `tables.load`)."""

    @abstractmethod
    def _problem(self, task: str, row: Mapping[str, Any], seed: Sequence[int]) -> Problem:
        """What is asked of a row; ``seed`` is the row's own, for what is drawn."""

    def sample(
        self,
        index: int,
        *,
        tokenizer: PreTrainedTokenizerBase,
        rng: np.random.Generator,
        prompt_tokens: int,
        future_tokens: int,
        seed: int,
    ) -> Sample:
        """Episode ``index``: see `kvenv.recording.workload.Workload.sample`.

        The metadata hold task, question, answers and metric (for `kvenv.evaluation.metrics.score`),
        prompting, question_tokens (how much of the future comes before the answer) and, of a
        multiple choice, choices (each as the text that would follow) and answer (the right one's
        place among them, from 0).
        """
        key = (tokenizer, prompt_tokens, future_tokens, seed)
        if key not in self._found:
            self._found[key] = [], self._fitting(key)
        found, rest = self._found[key]
        found.extend(islice(rest, max(0, index + 1 - len(found))))
        if index >= len(found):
            raise KvenvError(
                f"episode {index} does not exist: of {sum(map(len, self._rows.values()))} rows of "
                f"{self.source} (split {self.split}), {len(found)} fit in {prompt_tokens} prompt "
                f"and {future_tokens} future tokens; give more of these, or split all"
            )
        return cast("Sample", self._sample(found[index], key))  # it fitted when it was found

    def _part(self, task: str, split: str) -> tables.Rows:
        return tables.part(self._sets[task], self._document, split, self.source)

    def _fitting(self, key: _Key) -> Iterator[_Place]:
        """The rows that fit; tasks take turns, and one that has run out is passed over."""
        rng = np.random.default_rng(key[-1])
        orders = [
            [(task, number) for number in rng.permutation(len(rows)).tolist()]
            for task, rows in self._rows.items()
        ]
        for turn in zip_longest(*orders):
            for place in turn:
                if place is not None and self._sample(place, key) is not None:
                    yield place

    def _sample(self, place: _Place, key: _Key) -> Sample | None:
        """A row's episode, or None if it is left out."""
        (task, number), (tokenizer, room, future, seed) = place, key
        row = self._rows[task][number]
        if not all(isinstance(row[name], kind) for name, kind in self._columns.items()):
            return None
        problem = self._problem(task, row, [seed, number])
        if not problem.answers or not problem.answers[0].strip():
            return None
        start, end = _frame(tokenizer, problem)
        asked = end if self.prompting == "agnostic" else []
        context = _fit(tokenizer, problem.context, room - len(start) - len(end) + len(asked))
        if not context or len(asked) >= future:
            return None
        return Sample(
            prompt=[*start, *context, *(() if asked else end)],
            future=asked + _reply(tokenizer, problem, future - len(asked)),
            document=f"{task}/{tables.digest(row[self._document])}",
            metadata={
                "task": task,
                "question": problem.question.strip(),
                "answers": list(problem.answers),
                "metric": problem.metric,
                "prompting": self.prompting,
                "question_tokens": len(asked),
                **problem.facts,
            },
        )


_Place = tuple[str, int]
_Key = tuple[PreTrainedTokenizerBase, int, int, int]


def gap(question: str) -> str:
    """What parts a question from an answer that continues its text."""
    return " " if question.endswith(":") else ""


def _frame(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> tuple[list[int], list[int]]:
    """Token ids before and after the context, up to where the answer begins."""
    text = f"{problem.before}{_MARK}{problem.question}"
    if problem.chat:
        text = tokens.render(tokenizer, [{"role": "user", "content": text}])
    before, mark, after = text.partition(_MARK)
    if not mark:
        raise KvenvError("the tokenizer's chat template rewrites the text: use another model")
    templated = problem.chat and tokenizer.chat_template
    start = [] if templated else tokens.opening(tokenizer)
    return start + tokens.encode(tokenizer, before), tokens.encode(tokenizer, after)


def _fit(tokenizer: PreTrainedTokenizerBase, context: str | Iterable[str], room: int) -> list[int]:
    """Token ids of what fits of a context: both ends of a text, or the first examples."""
    if isinstance(context, str):
        ids = tokens.encode(tokenizer, context)
        if not context.strip() or room < min(_LEAST, len(ids)):
            return []
        head = (room + 1) // 2
        return ids if len(ids) <= room else ids[:head] + ids[len(ids) - room + head :]
    found: list[int] = []
    for example in context:
        ids = tokens.encode(tokenizer, example)
        if len(found) + len(ids) > room:
            break
        found += ids
    return found


def _reply(tokenizer: PreTrainedTokenizerBase, problem: Problem, room: int) -> list[int]:
    """The first answer, ended as a chat's turn or as a line, cut to ``room`` tokens."""
    answer = problem.answers[0]
    if problem.chat:
        return tokens.reply_tokens(tokenizer, answer, room)
    return tokens.encode(tokenizer, f"{gap(problem.question)}{answer}\n")[:room]
