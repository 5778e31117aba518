"""ARC: science questions, asked after as many solved ones as fill the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from kvenv.errors import KvenvError
from kvenv.recording import benchmarks, tables
from kvenv.recording.benchmarks import Problem
from kvenv.recording.tokens import check_choice


@dataclass
class ARC(benchmarks.Benchmark):
    """Multiple-choice questions of school science, with few-shot examples as the context.

    Source: Clark et al. 2018, arXiv 1803.05457. A question has no long text of its own, so the
    context is other questions with their right answers: drawn from the train split, in an order of
    each episode's own, as many whole ones as fit. The options are not listed: each is judged as a
    continuation of "Question: ... Answer:", the usual way for models without instruction tuning,
    and so no chat template is used. Agnostic prompts end with the examples.

    Args:
        subset: ARC-Challenge holds what simple retrieval gets wrong, ARC-Easy the rest.
    """

    source: str = "allenai/ai2_arc"
    subset: Literal["ARC-Challenge", "ARC-Easy"] = "ARC-Challenge"

    _columns: ClassVar[tables.Columns] = {"question": str, "choices": dict, "answerKey": str}
    _document: ClassVar[str] = "question"

    def __post_init__(self) -> None:
        check_choice("subset", self.subset, ("ARC-Challenge", "ARC-Easy"))
        super().__post_init__()
        self._examples = self._part(self._task, "train")

    @property
    def _task(self) -> str:
        return self.subset.lower().replace("-", "_")

    def _load(self) -> dict[str, dict[str, Any]]:
        return {self._task: tables.load(self.source, self.subset)}

    def _problem(self, task: str, row: Mapping[str, Any], seed: Sequence[int]) -> Problem:
        question = f"Question: {row['question'].strip()}\nAnswer:"
        answer = _right(row)
        choices = row["choices"]["text"]
        return Problem(
            before="Questions on science, each with its answer.\n\n",
            context=self._solved(row["question"], seed),
            question=question,
            answers=[] if answer is None else [choices[answer]],
            metric="exact_match",
            chat=False,
            facts={
                "choices": [benchmarks.gap(question) + choice for choice in choices],
                "answer": answer,
                "first_line": True,
            },
        )

    def _solved(self, asked: str, seed: Sequence[int]) -> Iterator[str]:
        """Train questions other than ``asked`` with their answers, in an order drawn from seed."""
        for number in np.random.default_rng(seed).permutation(len(self._examples)).tolist():
            row = self._examples[number]
            answer = _right(row)
            if answer is not None and row["question"] != asked:
                text = row["choices"]["text"][answer]
                yield f"Question: {row['question'].strip()}\nAnswer: {text}\n\n"


def _right(row: Mapping[str, Any]) -> int | None:
    """The right option's place: labels are letters or, of some questions, numbers."""
    if not {"label", "text"} <= row["choices"].keys():
        raise KvenvError(
            f"the choices of an ARC question hold {', '.join(row['choices'])}: they must be lists "
            "named label and text"
        )
    labels = row["choices"]["label"]
    return labels.index(row["answerKey"]) if row["answerKey"] in labels else None
