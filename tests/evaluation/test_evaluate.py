"""`kvenv evaluate`: the file it writes and what it prints."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvenv import commands, display, models
from kvenv.errors import KvenvError
from kvenv.evaluation.retention import BUDGETS, METRICS
from kvenv.recording import recorder
from kvenv.recording.workload import Sample


class Twice:
    """Two episodes of every document."""

    def sample(self, index, *, rng, prompt_tokens, future_tokens, **_: Any):
        ids = rng.integers(0, 128, prompt_tokens + future_tokens).tolist()
        return Sample(ids[:prompt_tokens], ids[prompt_tokens:], f"document {index // 2}", {})


@pytest.fixture(scope="module")
def work(checkpoints, tmp_path_factory: pytest.TempPathFactory, quick_agent) -> Path:
    """Traces of six episodes and an agent that learned next to nothing from them."""
    root = tmp_path_factory.mktemp("evaluate")
    pair = models.load(str(checkpoints(0)))
    sizes = {"episodes": 6, "prompt_tokens": 40, "future_tokens": 8}
    traces = recorder.record(*pair, Twice(), root / "traces", name="twice", **sizes)
    quick_agent("kvp").fit([traces]).save_pretrained(root / "mine")
    return root


def test_the_file_holds_all_figures_of_version_2(work: Path, monkeypatch, capsys):
    monkeypatch.chdir(work)
    commands.evaluate("traces", "mine,knorm,random,oracle", json=Path("a.json"), texts=2)
    result = json.loads(Path("a.json").read_text())
    assert (result["format"], result["version"]) == ("kvenv-evaluation", 2)
    assert (result["model_layers"], result["kv_heads"]) == (2, 2)
    assert (result["episodes"], result["documents"]) == (6, 3)
    assert result["budgets"] == list(BUDGETS)
    assert {name: agent["kind"] for name, agent in result["agents"].items()} == {
        "mine": "learned",
        "knorm": "heuristic",
        "random": "heuristic",
        "oracle": "oracle",
    }
    assert result["comparison"].keys() == {"mine", "oracle"}
    assert set(METRICS) < result["comparison"]["mine"]["full"].keys()
    assert [text["document"] for text in result["texts"]] == ["document 0", "document 1"]
    for text in result["texts"]:
        assert len(text["tokens"]) == 40
        assert text["agents"].keys() == result["agents"].keys()
        for agent in text["agents"].values():
            ranks = np.frombuffer(base64.b64decode(agent["ranks"]), "<u2").reshape(4, 40)
            assert (np.sort(ranks) == np.arange(40)).all()
    assert capsys.readouterr().out.count("mine against the best heuristic: 1/16 ") == 2


def test_without_being_asked_there_are_no_texts(work: Path, monkeypatch):
    monkeypatch.chdir(work)
    commands.evaluate("traces", "knorm", json=Path("b.json"), device="cpu")
    result = json.loads(Path("b.json").read_text())
    assert "texts" not in result
    assert result["comparison"] == {}


def test_more_texts_than_documents_are_all_of_them(work: Path, monkeypatch):
    monkeypatch.chdir(work)
    commands.evaluate("traces,traces", "knorm", json=Path("c.json"), texts=9, heads="1:1")
    texts = json.loads(Path("c.json").read_text())["texts"]
    assert [text["document"] for text in texts] == [f"document {i}" for i in range(3)]
    assert len(base64.b64decode(texts[0]["agents"]["knorm"]["ranks"])) == 2 * 40


@pytest.mark.parametrize(("texts", "json"), [(-1, Path("d.json")), (1, None)])
def test_texts_need_a_count_and_a_file(work: Path, monkeypatch, texts: int, json: Path | None):
    monkeypatch.chdir(work)
    with pytest.raises(KvenvError, match=f"texts is {texts}: give a count, and a file"):
        commands.evaluate("traces", "knorm", json=json, texts=texts)
    assert not Path("d.json").exists()


def test_a_device_that_is_not_there_is_an_error(work: Path, monkeypatch):
    monkeypatch.chdir(work)
    with pytest.raises(KvenvError, match="device 'cuda:99' cannot be used"):
        commands.evaluate("traces", "knorm", device="cuda:99")


def figures(behind: list[Any]) -> dict[str, Any]:
    """A result as JSON has it, of one learned agent."""
    spread = {"mean": 0.5, "low": 0.4, "high": 0.6}
    agent = {table: dict.fromkeys(METRICS, spread) for table in ("full", "sink_free")}
    gain = {"baseline": "[snap]", "difference": 0.0123, "low": -0.001, "high": 0.0256}
    against = {
        **dict.fromkeys(METRICS, gain),
        "heads": {"wins": 90 - len(behind), "of": 90, "behind": behind},
    }
    return {
        "documents": 3,
        "heads": [[0, 0]],
        "agents": {
            "kvp": {"kind": "learned", **agent},
            "[snap]": {"kind": "heuristic", **agent},
            "oracle": {"kind": "oracle", **agent},
        },
        "comparison": {name: {"full": against, "sink_free": against} for name in ("kvp", "oracle")},
    }


def lines(behind: list[Any], monkeypatch: pytest.MonkeyPatch, capsys) -> list[str]:
    monkeypatch.setattr(display.console, "_width", 400)
    display.print_results(figures(behind))
    return [line for line in capsys.readouterr().out.splitlines() if "against" in line]


def test_a_line_tells_how_far_a_learned_agent_is_from_the_best_heuristic(monkeypatch, capsys):
    shown = lines([[3, 1, "[snap]", -0.0041]], monkeypatch, capsys)
    gain = "+0.012 [-0.001, +0.026] [snap]"
    assert shown == 2 * [
        f"kvp against the best heuristic: 1/16 {gain}, 1/8 {gain}, 1/4 {gain}, 1/2 {gain}; "
        "89 of 90 heads; behind on 3:1 (-0.004, [snap])"
    ]


def test_a_line_names_the_worst_heads_and_counts_the_rest(monkeypatch, capsys):
    assert lines([], monkeypatch, capsys)[0].endswith("; 90 of 90 heads")
    behind = [[3, head, "knorm", -0.1] for head in range(7)]
    line = lines(behind, monkeypatch, capsys)[1]
    assert "; 83 of 90 heads; behind on 3:0 (-0.100, knorm), 3:1 " in line
    assert line.endswith("3:4 (-0.100, knorm) and 2 more")
