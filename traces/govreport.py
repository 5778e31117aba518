"""GovReport: long reports of government agencies, to be summarised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvenv.recording import benchmarks, tables
from kvenv.recording.benchmarks import Problem


@dataclass
class GovReport(benchmarks.Benchmark):
    """Reports of thousands of words with the summaries that experts wrote.

    Source: Huang et al. 2021, arXiv 2104.02112. Judged by ROUGE-L.
    """

    source: str = "ccdv/govreport-summarization"

    _columns: ClassVar[tables.Columns] = {"report": str, "summary": str}
    _document: ClassVar[str] = "report"

    def _load(self) -> dict[str, dict[str, Any]]:
        return {"govreport": tables.load(self.source)}

    def _problem(self, task: str, row: Mapping[str, Any], seed: Sequence[int]) -> Problem:
        return Problem(
            before="Read the report of a government agency below.\n\n",
            context=row["report"],
            question="\n\nSummarise the report above on one page.",
            answers=[row["summary"].strip()],
            metric="rouge_l",
        )
