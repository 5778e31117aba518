"""What kvenv is for, on the real model: record, train, evaluate, decode in a bounded cache."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from kvenv.cli import main
from kvenv.rules import refresh_interval
from kvenv.trace import TraceSet

pytestmark = pytest.mark.slow


def numbers(plain: Any) -> list[float]:
    """Every number in nested JSON."""
    if isinstance(plain, dict):
        plain = list(plain.values())
    if isinstance(plain, list):
        return [number for item in plain for number in numbers(item)]
    return [plain] if isinstance(plain, int | float) and not isinstance(plain, bool) else []


def kvenv(command: str) -> None:
    assert main(command.split()) == 0, command


def test_record_train_evaluate_generate(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    kvenv("record text --out text --episodes 2 --prompt-tokens 200 --future-tokens 32")
    kvenv(
        "record ruler --tasks niah_single --out ruler --episodes 2 --prompt-tokens 300 "
        "--future-tokens 48 --split test"
    )
    text, ruler = TraceSet("text"), TraceSet("ruler")
    assert text.model == ruler.model
    assert (text.model.id, len(text.heads)) == ("smollm2-135m", 90)
    assert [len(text), len(ruler)] == [2, 2]

    kvenv("train kvp --traces text --out kvp --steps 3 --heads 3:0,20:2")
    kvenv("evaluate --traces ruler --agents kvp,knorm,oracle,random --json result.json")
    result = json.loads(Path("result.json").read_text())
    assert result["heads"] == [[3, 0], [20, 2]]
    assert result["episodes"] == 2
    assert all(map(math.isfinite, numbers(result)))
    figures = {name: agent["full"] for name, agent in result["agents"].items()}
    assert figures["oracle"]["normalized_score"]["mean"] == pytest.approx(1)
    assert figures["random"]["normalized_score"]["mean"] < 0.8
    for agent in figures.values():
        shares = [agent[f"retention@1/{part}"]["mean"] for part in (16, 8, 4, 2)]
        assert 0 < shares[0] < shares[1] < shares[2] < shares[3] <= 1

    capsys.readouterr()
    kvenv(
        "generate --traces ruler --agent kvp --fallback knorm --compare --budget 0.5 "
        "--max-new-tokens 24"
    )
    shown = capsys.readouterr().out
    (answer,) = ruler.info(0).metadata["answers"]
    full = shown.split("full cache")[1].split("tokens a head")[0]
    assert answer in full, "SmolLM2 finds a single needle with its whole cache"
    rows = re.findall(r"│ (full|kvp) +│ (\d+) +│ ([\d.]+) MiB", shown)
    assert [name for name, *_ in rows] == ["full", "kvp"]
    prompt = ruler.info(0).n
    budget = round(0.5 * prompt)
    assert budget - refresh_interval(budget) < int(rows[1][1]) <= budget < prompt <= int(rows[0][1])
    assert float(rows[1][2]) < float(rows[0][2])
