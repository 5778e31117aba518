from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvenv import cli, plugins
from kvenv.errors import KvenvError
from kvenv.learning import bench
from kvenv.learning.run import Run
from kvenv.trace import TraceSet

SETTINGS = bench.Settings(steps=4, ppo_steps=1)


@pytest.fixture(scope="module")
def traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory):
    return tiny_traces(tmp_path_factory.mktemp("traces") / "tiny", [(30, 2)] * 4)


def point(step: int, seconds: float, closure: float, sink_free: float | None) -> dict[str, Any]:
    figures = {"closure": closure, "sink_free": sink_free}
    return {"step": step, "seconds_per_head": seconds, **figures}


# Curves and targets


def test_the_curve_of_heads_trained_together_is_divided_by_them():
    curve = [{"step": 5, "seconds": 6.0, "closure": 0.5, "sink_free": 0.25}]
    scorer: Any = SimpleNamespace(
        training={"curve": curve}, network=SimpleNamespace(heads=[(0, 0), (0, 1), (1, 0)])
    )
    assert bench.mean_curve(scorer) == [point(5, 2.0, 0.5, 0.25)]


def test_the_curves_of_heads_trained_one_after_another_are_averaged():
    curves = {
        head: [
            {"steps": 128, "seconds": 1.0 + i, "reward": 9.0, "closure": 0.25 * i},
            {"steps": 256, "seconds": 3.0 + i, "reward": 9.0, "closure": 0.5 * i},
        ]
        for i, head in enumerate(("1:0", "1:1"))
    }
    scorer: Any = SimpleNamespace(
        training={"curves": curves},
        network=SimpleNamespace(heads=[(1, 0), (1, 1)]),
        metrics={"closure": 0.25, "sink_free": 0.125},
    )
    assert bench.mean_curve(scorer) == [
        point(128, 1.5, 0.125, None),
        point(256, 3.5, 0.25, 0.125),
    ]


@given(st.lists(st.floats(-1, 1), min_size=1), st.floats(-1, 1))
def test_the_first_measurement_at_the_target_or_above_counts(values: list[float], target: float):
    curve = [point(i, i / 2, value, None) for i, value in enumerate(values)]
    found = bench.first_at(curve, "closure", target)
    if found is None:
        assert max(values) < target
    else:
        step = found["step"]
        assert values[step] >= target
        assert all(value < target for value in values[:step])
        assert found["seconds_per_head"] == step / 2
    assert bench.first_at(curve, "sink_free", -1.0) is None  # never measured


def test_without_a_target_it_is_what_the_weakest_but_ppo_ends_with():
    ends = {"kvp": (0.9, 0.5), "pairwise": (0.7, 0.6), "ppo": (0.1, 0.1)}
    learners = {name: {"closure": c, "sink_free": s} for name, (c, s) in ends.items()}
    assert bench.choose_targets(learners, {}) == {"closure": 0.7, "sink_free": 0.5}
    given = bench.choose_targets(learners, {"closure": 0.95})
    assert given == {"closure": 0.95, "sink_free": 0.5}
    alone = bench.choose_targets({"ppo": learners["ppo"]}, {})
    assert alone == {"closure": 0.1, "sink_free": 0.1}


def test_seconds_are_compared_with_ours():
    targets = {"closure": 0.5, "sink_free": 0.5}
    learners: dict[str, dict[str, Any]] = {
        "kvp": {"curve": [point(1, 2.0, 0.6, 0.1), point(2, 4.0, 0.4, 0.2)]},
        "pairwise": {"curve": [point(1, 3.0, 0.4, 0.1), point(2, 5.0, 0.5, 0.5)]},
        "ppo": {"curve": [point(128, 9.0, 0.1, None)]},
    }
    others = {name: dict(row) for name, row in learners.items() if name != "kvp"}
    bench.compare(learners, targets)
    ours = {"step": 1, "seconds_per_head": 2.0, "times_ours": 1.0}
    assert learners["kvp"]["reached"] == {"closure": ours, "sink_free": None}
    theirs = {"step": 2, "seconds_per_head": 5.0}
    assert learners["pairwise"]["reached"] == {
        "closure": {**theirs, "times_ours": 2.5},
        "sink_free": {**theirs, "times_ours": None},  # ours never got there
    }
    assert learners["ppo"]["reached"] == {"closure": None, "sink_free": None}
    bench.compare(others, targets)
    assert others["pairwise"]["reached"]["closure"] == {**theirs, "times_ours": None}


# The whole


def test_every_learner_learns_from_the_same(
    traces: TraceSet, tiny_traces: Callable[..., TraceSet], tmp_path: Path
):
    validation = tiny_traces(tmp_path / "validation", [(24, 2), (28, 2)], seed=100)
    out, heads = io.StringIO(), [(3, 0), (1, 1)]
    result = bench.run([traces], [validation], heads, SETTINGS, Console(file=out, width=80))
    assert json.loads(json.dumps(result)) == result
    assert result["heads"] == [[1, 1], [3, 0]]
    assert (result["episodes"], result["held_out_episodes"]) == (4, 2)
    assert (result["threads"] > 0, result["gpu"]) == (True, None)
    learners = result["learners"]
    assert list(learners) == list(bench.LEARNERS)
    for name, row in learners.items():
        agent, options = bench.LEARNERS[name]
        steps = 1 if name == "ppo" else 4
        assert options.items() <= row["options"].items()
        plugin = plugins.load("agent", agent)(**options, steps=steps)
        expected = plugin.fit([traces], heads, Run(validation=[validation]))
        assert {metric: row[metric] for metric in bench.METRICS} == expected.metrics
        last = row["curve"][-1]
        assert last["closure"] == pytest.approx(row["closure"], abs=1e-6)
        assert last["sink_free"] == row["sink_free"]
        seconds = [one["seconds_per_head"] for one in row["curve"]]
        assert seconds == sorted(seconds)
        assert row["seconds_per_head"] == seconds[-1] > 0
        assert f"{name} " in out.getvalue()
    others = [row for name, row in learners.items() if name != "ppo"]
    assert [one["step"] for one in others[0]["curve"]] == [1, 2, 3, 4]
    for metric, target in result["targets"].items():
        assert target == min(row[metric] for row in others)
        assert all(row["reached"][metric] for row in others)
        assert learners["kvp"]["reached"][metric]["times_ours"] == 1
        assert f"≥ {target:.3f}" in out.getvalue()


def test_the_command_writes_its_figures(
    traces: TraceSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "learners.json"
    options = "--learners pairwise,kvp --steps 2 --heads 1:0 --target 1 --sink-free-target 0.001"
    command = ["bench", "learners", "--traces", str(traces.path), *options.split()]
    assert cli.main([*command, "--device", "cpu", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert (written["bench"], written["steps"], written["heads"]) == ("learners", 2, [[1, 0]])
    assert written["targets"] == {"closure": 1.0, "sink_free": 0.001}
    assert list(written["learners"]) == ["pairwise", "kvp"]
    assert all(row["reached"]["closure"] is None for row in written["learners"].values())
    assert "torch" in written["versions"]
    text = capsys.readouterr().out
    assert "never" in text
    assert "ppo" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learners": ["kvp", "sac"]}, "unknown learner 'sac': choose from kvp, kvp-sampled"),
        ({"learners": []}, "no learners: name some of kvp"),
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"ppo_steps": 0}, "ppo-steps is 0"),
        ({"targets": {"closure": 1.5}}, "a target of 1.5 for closure"),
        ({"targets": {"sink_free": 0.0}}, "a target of 0.0 for sink-free closure"),
        ({"targets": {"closure": float("nan")}}, "a target of nan"),
    ],
)
def test_unusable_settings_are_errors(options: dict[str, Any], message: str):
    with pytest.raises(KvenvError, match=message):
        bench.Settings(**options)


def test_nothing_held_out_is_an_error(tiny_traces: Callable[..., TraceSet], tmp_path: Path):
    alone = tiny_traces(tmp_path / "one", documents=["only"] * 3)
    with pytest.raises(KvenvError, match=r"nothing is held out of a single document.*--validation"):
        bench.run([alone], (), None, SETTINGS, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("learners", "bench learners learns from traces: give --traces"),
        ("learners --traces x --repeats 3", "bench learners takes no --repeats"),
        ("learners --model m --traces x", "bench learners takes no --model"),
        ("record --traces x --steps 3", "bench record takes no --traces or --steps"),
        ("env --ppo-steps 3 --device cpu", "bench env takes no --ppo-steps or --device"),
        ("learners --traces x --learners kvp,best", "unknown learner 'best'"),
        ("learners --traces nowhere", "nowhere"),
    ],
)
def test_what_the_command_refuses(command: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", *command.split()]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
