from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.learning.run import Run
from kvenv.learning.sb3 import MaskablePPO
from kvenv.scorers import NetworkScorer
from kvenv.scorers.calibration import fit_calibration
from kvenv.trace import TraceSet
from kvenv.trace.batches import read_heads

HEADS = [(1, 0), (1, 1), (3, 0)]
AGENTS = [("ppo", {}), ("ppo", {"env": "stream"}), ("maskable_ppo", {})]
STEPS = {"steps": 12, "hidden": [5]}


class Killed(BaseException):
    pass


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of the models that were trained to their end; the second to start is killed."""
    done: list[int] = []

    def watch(kind: Any) -> None:
        learn = kind.learn

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(done) == 1:
                done.append(-1)
                raise Killed
            outcome = learn(self, *args, **kwargs)
            done.append(self.seed)
            return outcome

        monkeypatch.setattr(kind, "learn", watched)

    watch(PPO)
    watch(MaskablePPO)
    return done


def same(one: NetworkScorer, other: NetworkScorer) -> bool:
    ours, theirs = one.network.state_dict(), other.network.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("name", "options"), AGENTS)
def test_a_resumed_run_trains_the_heads_that_were_not_finished(
    traces: TraceSet,
    tmp_path: Path,
    quick_agent: Callable[..., Any],
    trained: list[int],
    name: str,
    options: dict[str, Any],
):
    agent = quick_agent(name, **STEPS, **options)
    run = Run(checkpoint=tmp_path / "state")
    with pytest.raises(Killed):
        agent.fit([traces], HEADS, run)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["1-0"]
    resumed = agent.fit([traces], HEADS, Run(checkpoint=tmp_path / "state", resume=True))
    assert len(trained) == 1 + 1 + 2  # one, one that was killed, and two
    torch.manual_seed(77)  # no global generator has a say
    whole = agent.fit([traces], HEADS)
    assert same(whole, resumed)
    assert whole.metrics == resumed.metrics
    assert resumed.network.heads == tuple(HEADS)
    assert not torch.equal(resumed.network.weights[0][0], resumed.network.weights[0][1])
    assert not same(whole, quick_agent(name, **STEPS, **options, seed=1).fit([traces], HEADS))


def test_finished_heads_of_another_run_are_an_error(
    traces: TraceSet, tmp_path: Path, quick_agent: Callable[..., Any], trained: list[int]
):
    run, again = (Run(checkpoint=tmp_path / "state", resume=resume) for resume in (False, True))
    with pytest.raises(Killed):
        quick_agent("ppo", **STEPS).fit([traces], HEADS, run)
    with pytest.raises(KvenvError, match=r"state'.*unfinished run: add --resume"):
        quick_agent("ppo", **STEPS).fit([traces], HEADS, run)
    with pytest.raises(KvenvError, match="unfinished run: add --resume to its very command"):
        quick_agent("ppo", **STEPS, seed=1).fit([traces], HEADS, again)


def test_the_callers_generators_are_left_as_they_were(
    traces: TraceSet, quick_agent: Callable[..., Any], trained: list[int]
):
    def state() -> tuple:
        legacy = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), legacy[1].tolist(), random.getstate()

    before = state()
    with pytest.raises(Killed):
        quick_agent("ppo", **STEPS).fit([traces], HEADS)
    assert state() == before
    quick_agent("ppo", **STEPS).fit([traces], HEADS)
    assert state() == before


@pytest.mark.parametrize(("name", "options"), AGENTS)
def test_the_bundle_has_figures_and_a_calibration_of_what_was_held_out(
    traces: TraceSet,
    tmp_path: Path,
    quick_agent: Callable[..., Any],
    name: str,
    options: dict[str, Any],
):
    agent = quick_agent(name, **STEPS, **options)
    run = Run(validation=[traces], evaluate_every=4, tensorboard=tmp_path / "logs")
    scorer = agent.fit([traces], HEADS[:2], run)
    assert set(scorer.training["curves"]) == {"1:0", "1:1"}
    steps = [one["steps"] for one in scorer.training["curves"]["1:0"]]
    assert steps == [4, 8, 12]
    streams = name != "ppo" or bool(options)
    wanted = {"normalized_score", "sink_free", *(["retention"] if streams else [])}
    assert set(scorer.metrics) == wanted
    assert list((tmp_path / "logs" / "1-1").glob("events*"))
    batches = [read_heads(traces, index, HEADS[:2]) for index in range(len(traces))]
    architecture = scorer.architecture
    scored = [
        (scorer.network(architecture.read(one.framed(), one.values)), one.utility, one.future)
        for one in batches
    ]
    assert scorer.calibration is not None
    torch.testing.assert_close(scorer.calibration.masses, fit_calibration(HEADS[:2], scored).masses)


def test_held_out_prompts_may_be_longer_or_shorter(
    tiny_traces, tmp_path: Path, quick_agent
) -> None:
    sets = [tiny_traces(tmp_path / str(n), [(n, 4)] * 2, seed=n) for n in (20, 30)]
    for train_set, held_out in (sets, sets[::-1]):
        scorer = quick_agent("ppo").fit([train_set], [(1, 0)], Run(validation=[held_out]))
        assert len(scorer.training["curves"]["1:0"]) >= 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ppo", {"batch": 1}, "batch is 1: it must be at least 2"),
        ("ppo", {"steps": 0}, "steps is 0: it must be at least 1"),
        ("ppo", {"lr": -1.0}, "lr is -1.0: it must be positive"),
        ("ppo", {"gamma": 2.0}, "gamma is 2.0: it must be a share"),
        ("maskable_ppo", {"epochs": 0}, "epochs is 0: it must be at least 1"),
        ("maskable_ppo", {"lr": float("nan")}, "lr is nan: it must be positive"),
        ("ppo", {"env": "evict"}, "env is 'evict': give one of rank, stream"),
        ("ppo", {"seed": -1}, "seed is -1: it must be at least 0"),
    ],
)
def test_options_that_nothing_can_be_learned_with_are_named(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(KvenvError, match=message):
        plugins.load("agent", name)(**options)
