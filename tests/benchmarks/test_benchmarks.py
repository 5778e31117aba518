"""Every benchmark runs, small, and says how both ways compare."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run a benchmark: its figures; each baseline's ratio is 1 and is printed."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)

    def run(name: str, line: str) -> dict:
        words = [name, "--repeats", "1", "--json", "figures.json", *line.split()]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        figures = json.loads(Path("figures.json").read_text())
        rows, printed = figures["rows"], capsys.readouterr().out
        first, *others = rows.values()
        assert first["speed_over_baseline"] == 1
        for row in others:
            ratio = first["seconds"] / row["seconds"]
            assert row["speed_over_baseline"] == pytest.approx(ratio)
            assert f"{ratio:.2f}x" in printed
        assert figures["options"]["repeats"] == 1
        return rows

    return run


@pytest.mark.parametrize("name", ["Rank", "Stream", "Evict"])
def test_environments(bench, name: str) -> None:
    line = f"--env kvenv/{name}-v1 --num-envs 2 --steps 3 --budget 24"
    assert list(bench("env.py", line)) == ["gymnasium's SyncVectorEnv", "kvenv"]


def test_recording(bench, checkpoints) -> None:
    line = f"--model {checkpoints(0)} --episodes 1 --prompt-tokens 32 --future-tokens 4"
    rows = bench("record.py", line + " --device cpu")
    assert list(rows) == ["forward pass", "kvenv record"]
    for row in rows.values():
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(36)


def test_decoding(bench, checkpoints) -> None:
    line = f"--model {checkpoints(0)} --context 48 --budget 32 --new-tokens 4 --device cpu"
    rows = bench("cache.py", line)
    assert list(rows) == ["DynamicCache", "model.generate", "kvenv.cache.generate"]
    full, *bounded = (row["cache_bytes"] for row in rows.values())
    assert full == 2 * 2 * 2 * 8 * 4 * (48 + 3)  # layers, keys and values, heads, size, bytes
    assert all(0 < held < full for held in bounded)


def test_no_repeats_are_an_error(bench) -> None:
    with pytest.raises(SystemExit, match="--repeats 0: give at least 1"):
        bench("env.py", "--num-envs 2 --steps 1 --repeats 0")
