"""BoolQ: yes-or-no questions on a passage of an encyclopedia."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvenv.recording import benchmarks, tables
from kvenv.recording.benchmarks import Problem

_CHOICES = ["no", "yes"]


@dataclass
class BoolQ(benchmarks.Benchmark):
    """Yes-or-no questions that people asked, each with a passage that answers it.

    Source: Clark et al. 2019, arXiv 1905.10044. Passages have some 100 to 300 tokens. The hub's
    set has no labelled test split: its validation split is test here.
    """

    source: str = "google/boolq"

    _columns: ClassVar[tables.Columns] = {"question": str, "passage": str, "answer": bool}
    _document: ClassVar[str] = "passage"

    def _load(self) -> dict[str, dict[str, Any]]:
        return {"boolq": tables.load(self.source)}

    def _problem(self, task: str, row: Mapping[str, Any], seed: Sequence[int]) -> Problem:
        return Problem(
            before="Read the passage below. I will ask you about it afterwards.\n\n",
            context=row["passage"],
            question=(
                f"\n\nBy the passage above, answer with yes or no only: "
                f"{row['question'].rstrip('?')}?"
            ),
            answers=[_CHOICES[row["answer"]]],
            metric="exact_match",
            facts={"choices": _CHOICES, "answer": int(row["answer"]), "first_line": True},
        )
