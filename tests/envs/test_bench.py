"""The environments' benchmark, for too short a time to say anything about speed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from kvenv import cli
from kvenv.envs import bench
from kvenv.errors import KvenvError


@pytest.fixture(scope="module", params=bench.CASES, ids=lambda case: f"{case.env_id} {case.size}")
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bench.Case, str]:
    folder = tmp_path_factory.mktemp("traces")
    bench.write_traces(folder, request.param)
    return request.param, str(folder)


def test_contenders_play_the_same_game(recorded: tuple[bench.Case, str]) -> None:
    case, folder = recorded
    rewards, observations = {}, {}
    actions = bench.draw_actions(case, folder, 2)
    with bench.contenders(case, folder, 2) as made:
        assert list(made) == list(bench.CONTENDERS)
        for name, contender in made.items():
            contender.reset({"episode": 1, "head": 1})
            contender.reset({})
            steps = [contender.step(action)[:2] for action in 5 * actions]
            observations[name] = steps[-1][0]
            rewards[name] = np.array([step[1] for step in steps], dtype=np.float32)
    size = observations["ours"][0].nbytes / 1024
    assert size == pytest.approx(bench.SIZES[case.size], rel=0.01)
    assert len(np.unique(rewards["ours"])) > 2
    for name in bench.CONTENDERS:
        assert np.array_equal(observations[name], observations["ours"])
        assert np.array_equal(rewards[name], rewards["ours"])


def test_rates_ratios_and_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GOAL_ENVS", 2)
    monkeypatch.setattr(bench, "SECONDS", 0.001)
    out, threads = io.StringIO(), torch.get_num_threads()
    result = bench.run(["small"], [1, 2], 1, Console(file=out, width=80))
    assert torch.get_num_threads() == threads
    ids = ["kvenv/Rank-v0", "kvenv/Stream-v0", "kvenv/Evict-v0"]
    rows = result["rows"]
    assert [(row["env"], row["num_envs"]) for row in rows] == [(i, n) for i in ids for n in (1, 2)]
    text = out.getvalue()
    for row in rows:
        rates = row["steps_per_second"]
        assert set(rates) == {"copy", *bench.CONTENDERS}
        assert min(rates.values()) > 0
        # One repeat: the median ratio is the medians'.
        for ratio, value in row["ratios"].items():
            one, other = ratio.split("/")
            assert value == pytest.approx(rates[one] / rates[other])
        assert f"{rates['ours'] / 1000:,.1f}" in text
    assert [goal["env"] for goal in result["goals"]] == ids
    for goal, row in zip(result["goals"], rows[1::2], strict=True):
        assert goal["ratio"] == row["ratios"]["ours/sync"]
        verdict = "met" if goal["ratio"] >= 20 else f"missed by {20 - goal['ratio']:.1f}x"
        assert f"{goal['ratio']:.1f}x, goal 20x: {verdict}" in text


def test_the_command_writes_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.001)
    options = ("--sizes", "medium", "--num-envs", "3", "--repeats", "2")
    assert cli.main(["bench", "env", *options, "--json", str(tmp_path / "env.json")]) == 0
    written = json.loads((tmp_path / "env.json").read_text())
    figures = [(row["env"], row["size"], row["num_envs"]) for row in written["rows"]]
    assert figures == [(f"kvenv/{name}-v0", "medium", 3) for name in ("Rank", "Evict")]
    assert (written["bench"], written["repeats"], written["goals"]) == ("env", 2, [])
    assert "gymnasium" in written["versions"]
    assert "against SyncVectorEnv" not in capsys.readouterr().out  # no goals to speak of


@pytest.mark.parametrize(
    ("sizes", "num_envs", "repeats", "message"),
    [
        (["small", "huge"], [1], 1, "unknown size 'huge': choose from small, medium, large"),
        (["small"], [8, 0], 1, "num-envs is 0"),
        (["small"], [1], 0, "repeats is 0"),
    ],
)
def test_errors(sizes: list[str], num_envs: list[int], repeats: int, message: str) -> None:
    with pytest.raises(KvenvError, match=message):
        bench.run(sizes, num_envs, repeats, Console(file=io.StringIO()))


def test_traces_fit_their_case(tmp_path: Path) -> None:
    case = bench.CASES[0]
    bench.write_traces(tmp_path, case)
    actions = bench.draw_actions(case, str(tmp_path), 3)
    assert len(actions) == bench.ACTIONS
    assert {action.shape for action in actions} == {(3, case.n)}
    assert len(np.unique(actions)) > case.n
