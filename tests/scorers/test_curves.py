"""Retention curves: what is measured, kept in a bundle, and refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvenv import utility as ut
from kvenv.cli import main
from kvenv.commands import curves
from kvenv.errors import KvenvError
from kvenv.evaluation.retention import score_prompt
from kvenv.learning.run import Run
from kvenv.scorers import NetworkScorer, load_scorer, storage
from kvenv.scorers.curves import GRID, SINK_FREE, Curves, average, measure_curves


@pytest.fixture
def traces(tiny_traces, tmp_path: Path):
    return tiny_traces(tmp_path / "traces")


@pytest.fixture
def scorer(make, traces) -> NetworkScorer:
    return make(model=traces.model)


def by_hand(scorer, sets, head: int, fraction: float) -> float:
    """The mean over episodes of the blended retention between the two nearest budgets."""
    found = []
    for traces in sets:
        for index in range(len(traces)):
            heads = sorted(scorer.heads)
            utility, scores = score_prompt(traces, index, {"a": scorer}, heads)
            order = ut.ranking(scores["a"])[head]
            plain = utility[head].double()
            free = plain.clone()
            free[: ut.SINKS] = 0
            held = [
                [0.0, *((mass[order].cumsum(0) / mass.sum()).tolist())] for mass in (plain, free)
            ]
            place = fraction * len(order)
            at = [np.interp(place, range(len(order) + 1), one) for one in held]
            found.append((1 - SINK_FREE) * at[0] + SINK_FREE * at[1])
    return float(np.mean(found))


def test_curves_are_the_mean_retention_of_the_agent_s_own_ranking(
    scorer, traces, tiny_traces, tmp_path: Path
) -> None:
    other = tiny_traces(tmp_path / "more", ((50, 4),), seed=9)
    curves = measure_curves(scorer, [traces, other])
    assert curves.heads == tuple(sorted(scorer.heads))
    assert curves.tokens == (40 + 24 + 33 + 50) / 4
    assert curves.fractions.tolist() == list(GRID)
    assert (curves.retention[:, 0] == 0).all()
    assert (curves.retention[:, -1] == 1).all()
    for head in range(4):
        for point in (1, 5, 9, 14, 22, 30, 40, 45):
            expected = by_hand(scorer, [traces, other], head, GRID[point])
            assert curves.retention[head, point] == pytest.approx(expected, abs=1e-6)


def test_a_grid_point_between_two_budgets_is_between_their_retentions() -> None:
    curve = torch.tensor([[0.5, 0.6, 1.0]], dtype=torch.float64)
    curves = average([(0, 0)], [curve])
    at = dict(zip(GRID, curves.retention[0], strict=True))
    assert at[1 / 4] == pytest.approx(0.5 * 0.75)
    assert at[1 / 2] == pytest.approx((0.5 + 0.6) / 2)
    assert at[3 / 4] == pytest.approx(0.75 * 0.6 + 0.25)


def test_every_step_is_told(scorer, traces) -> None:
    ticks: list[None] = []
    measure_curves(scorer, [traces], tick=lambda: ticks.append(None))
    assert len(ticks) == 3


def test_curves_of_a_better_ranking_lie_higher(traces) -> None:
    oracle, chance = (measure_curves(load_scorer(n), [traces]) for n in ("oracle", "random"))
    assert (oracle.retention >= chance.retention - 0.05).all()
    assert oracle.retention.mean() > chance.retention.mean() + 0.1


def test_nothing_to_measure_is_an_error(scorer) -> None:
    with pytest.raises(KvenvError, match="give at least one"):
        measure_curves(scorer, [])
    with pytest.raises(KvenvError, match="no episodes"):
        average([(0, 0)], [])


def test_another_model_s_traces_are_refused(scorer, tiny_traces, tmp_path: Path) -> None:
    other = tiny_traces(tmp_path / "other", fingerprint="g")
    with pytest.raises(KvenvError, match="trained on"):
        measure_curves(scorer, [other])


def test_a_bundle_keeps_its_curves(scorer, traces, tmp_path: Path) -> None:
    curves = measure_curves(scorer, [traces])
    told = replace(scorer, curves=curves)
    told.save_pretrained(tmp_path / "kvp")
    back = NetworkScorer.from_pretrained(tmp_path / "kvp").curves
    assert back is not None
    assert back.to_json() == curves.to_json()
    assert repr(back) == "Curves(4 heads, 47 budgets, prompts of 32.3 tokens)"
    names = {path.name for path in (tmp_path / "kvp").iterdir()}
    assert names == {"config.json", "model.safetensors", "curves.json"}
    NetworkScorer.from_pretrained(tmp_path / "kvp").save_pretrained(tmp_path / "again")
    first, second = (tmp_path / name / "curves.json" for name in ("kvp", "again"))
    assert first.read_bytes() == second.read_bytes()
    scorer.save_pretrained(tmp_path / "kvp")  # and one without takes their place
    assert NetworkScorer.from_pretrained(tmp_path / "kvp").curves is None


def test_curves_are_asked_of_the_hub(scorer, traces, tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    replace(scorer, curves=measure_curves(scorer, [traces])).save_pretrained(tmp_path / "hub")

    def download(repo_id, allow_patterns):
        shutil.copytree(tmp_path / "hub", tmp_path / "got")
        for path in (tmp_path / "got").iterdir():
            if path.name not in allow_patterns:
                path.unlink()
        return str(tmp_path / "got")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert NetworkScorer.from_pretrained("someone/kvp").curves is not None


def test_curves_may_be_of_some_heads_but_not_of_others(make) -> None:
    rows = [[0.0, 1.0]]
    part = replace(make(), curves=Curves(((1, 1),), [0, 1], rows, 10))
    assert part.curves.heads == ((1, 1),)
    with pytest.raises(KvenvError, match=r"heads \[\(2, 0\)\] that the agent does not have"):
        replace(make(), curves=Curves(((2, 0),), [0, 1], rows, 10))


GOOD = {
    "format": "kvenv-curves",
    "version": 1,
    "tokens": 12,
    "fractions": [0, 0.5, 1],
    "heads": [[1, 0], [1, 1]],
    "retention": [[0, 0.5, 1], [0, 1, 1]],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "no kvenv-curves file"),
        ({"version": 2}, "version 2, not 1: update kvenv"),
        ({"heads": [[1, 0], [1, 0]]}, "are of no heads, or twice of one"),
        ({"heads": [[1, 0]]}, r"of shape \(2, 3\) do not fit 1 heads"),
        ({"heads": [[1], [2]]}, "damaged curves"),
        ({"heads": [[1, 0], [2, 5]]}, r"heads \[\(2, 5\)\] that the agent does not have"),
        ({"fractions": [0, 0.5]}, "do not fit 2 heads"),
        ({"fractions": [0, 0.5, 0.5]}, "ascend from 0 to 1"),
        ({"fractions": [0, float("nan"), 1]}, "ascend from 0 to 1"),
        ({"retention": [[0, 0.5, 1], [0, 0.9, 0.8]]}, "layer 1 head 1 do not rise"),
        ({"retention": [[0, float("nan"), 1], [0, 1, 1]]}, "layer 1 head 0 do not rise"),
        ({"retention": [[0, 0.5, 1], [0, 1, 1.2]]}, "layer 1 head 1 do not rise"),
        ({"retention": [[0, 0.5, 1], [0]]}, "damaged curves"),
        ({"retention": "high"}, "damaged curves"),
        ({"tokens": 0}, "were measured at 0.0 tokens"),
        ({"tokens": float("inf")}, "were measured at inf tokens"),
        ({"tokens": None}, "damaged curves"),
    ],
)
def test_damaged_curves_are_refused(saved: Path, change: dict, message: str) -> None:
    (saved / "curves.json").write_text(json.dumps(GOOD))
    assert NetworkScorer.from_pretrained(saved).curves is not None
    (saved / "curves.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(KvenvError, match=message):
        NetworkScorer.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_file_that_is_none_is_named(saved: Path, text: str) -> None:
    (saved / "curves.json").write_text(text)
    with pytest.raises(KvenvError, match=str(saved / "curves.json")):
        NetworkScorer.from_pretrained(saved)


@pytest.mark.parametrize("name", ["kvp", "regression"])
def test_training_measures_curves_on_what_it_held_out(
    quick_agent, traces, tiny_traces, tmp_path: Path, name: str
) -> None:
    held = tiny_traces(tmp_path / "held", ((30, 5), (26, 6)), seed=5)
    trained = quick_agent(name).fit([traces], None, Run(validation=[held]))
    assert trained.curves.to_json() == measure_curves(trained, [held]).to_json()


def test_training_on_one_document_measures_curves_there(
    quick_agent, tiny_traces, tmp_path: Path
) -> None:
    only = tiny_traces(tmp_path / "one", ((30, 5), (26, 6)), documents=["same", "same"])
    trained = quick_agent("pairwise").fit([only])
    assert trained.curves.to_json() == measure_curves(trained, [only]).to_json()


def test_the_command_adds_curves_and_leaves_the_rest(
    make, traces, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kvp"
    make(model=traces.model).save_pretrained(folder, dtype=torch.float16)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["curves", str(folder), "--traces", str(traces.path), "--device", "cpu"]) == 0
    assert f"measured 4 of 4 heads on 3 episodes; wrote {folder}" in capsys.readouterr().out
    scorer = NetworkScorer.from_pretrained(folder)
    assert scorer.curves is not None
    assert scorer.curves.to_json() == measure_curves(scorer, [traces]).to_json()
    assert {n: (folder / n).read_bytes() for n in before} == before
    assert len(list(folder.iterdir())) == len(before) + 1


def test_the_command_warns_of_what_the_agent_was_trained_on(
    quick_agent, traces, tmp_path: Path
) -> None:
    quick_agent("kvp").fit([traces]).save_pretrained(tmp_path / "kvp")
    with pytest.warns(UserWarning, match=f"was trained on {traces.path}"):
        curves(tmp_path / "kvp", str(traces.path), device="cpu")


@pytest.mark.parametrize("there", [True, False])
def test_the_command_wants_a_bundle(traces, tmp_path: Path, capsys, there: bool) -> None:
    folder = tmp_path / "kvp"
    if there:
        folder.mkdir()
    assert main(["curves", str(folder), "--traces", str(traces.path)]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_curves_that_cannot_be_written_leave_the_old_ones(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_curves(saved, Curves.from_json(GOOD))
    before = (saved / "curves.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "replace", full)
    other = Curves(((1, 0),), [0, 1], [[0, 1]], 7)
    with pytest.raises(KvenvError, match="No space left"):
        storage.write_curves(saved, other)
    assert (saved / "curves.json").read_bytes() == before
    assert len(list(saved.iterdir())) == 3


@pytest.mark.parametrize("name", ["kvp-smollm2-135m", "kvp-gemma-3-270m"])
def test_shipped_agents_have_curves_of_every_head(name: str) -> None:
    scorer = load_scorer(name)
    assert isinstance(scorer, NetworkScorer)
    assert scorer.curves is not None
    assert set(scorer.curves.heads) == scorer.heads
    assert scorer.curves.retention[:, GRID.index(1 / 4)].mean() > 0.7
