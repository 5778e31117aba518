from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvenv.learning import fit
from kvenv.learning.run import Run
from kvenv.scorers import NetworkScorer
from kvenv.trace import TraceSet

STEPS = 12


@pytest.fixture(scope="module")
def traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory):
    return tiny_traces(tmp_path_factory.mktemp("traces") / "tiny", [(30, 2)] * 5)


class Crashed(Exception):  # noqa: N818
    pass


@pytest.fixture
def train(
    traces: TraceSet, monkeypatch: pytest.MonkeyPatch, quick_agent: Callable[..., Any]
) -> Callable[..., NetworkScorer]:
    """Trains by a clock on which a gradient takes a second and a measurement a hundred."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(fit, "time", SimpleNamespace(monotonic=lambda: clock.now))
    evaluate = fit.held_out_figures

    def slowly(*args: Any) -> dict[str, float]:
        clock.now += 100
        return evaluate(*args)

    monkeypatch.setattr(fit, "held_out_figures", slowly)

    def make(crash: int | None = None, **run: Any) -> NetworkScorer:
        agent = quick_agent("kvp", steps=STEPS, hidden=[6])
        gradient = agent.gradient

        def counted(*args: Any) -> torch.Tensor:
            if args[-1] == crash:
                raise Crashed
            clock.now += 1
            return gradient(*args)

        agent.gradient = counted
        return agent.fit([traces], run=Run(**{"evaluate_every": 5, **run}))

    return make


def test_a_curve_has_the_held_out_figures_by_steps_and_by_seconds_of_training_alone(
    train: Callable[..., NetworkScorer], tmp_path: Path
):
    scorer = train()
    curve = scorer.training["curve"]
    assert [(one["step"], one["seconds"]) for one in curve] == [(5, 5.0), (10, 10.0), (12, 12.0)]
    assert scorer.training["seconds"] == 12
    assert {name: curve[-1][name] for name in scorer.metrics} == scorer.metrics
    assert len({one["normalized_score"] for one in curve}) == 3
    scorer.save_pretrained(tmp_path / "bundle")
    assert NetworkScorer.from_pretrained(tmp_path / "bundle").training["curve"] == curve


def test_a_point_of_a_curve_is_what_was_learned_until_then(train: Callable[..., NetworkScorer]):
    coarse, fine = (train(evaluate_every=every).training["curve"] for every in (4, 1))
    assert [one["step"] for one in fine] == list(range(1, STEPS + 1))
    assert coarse == fine[3::4]


def test_nothing_held_out_has_no_curve(
    tiny_traces: Callable[..., TraceSet], tmp_path: Path, quick_agent: Callable[..., Any]
):
    alone = tiny_traces(tmp_path / "one", documents=["only"] * 3)
    assert quick_agent("pairwise").fit([alone]).training["curve"] == []


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("crash", [2, 3, 7, 11])
def test_a_resumed_run_has_the_curve_of_an_undisturbed_one(
    train: Callable[..., NetworkScorer], tmp_path: Path, crash: int, every: int
):
    kept = {"checkpoint": tmp_path / "state", "checkpoint_every": 3, "evaluate_every": every}
    with pytest.raises(Crashed):
        train(crash, **kept)
    resumed, undisturbed = train(**kept, resume=True), train(evaluate_every=every)
    # By this clock even the seconds are the same: those that were lost do not count.
    assert resumed.training == undisturbed.training
    assert resumed.metrics == undisturbed.metrics
