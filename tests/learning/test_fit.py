from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvenv import cli, plugins
from kvenv.errors import KvenvError
from kvenv.evaluation.retention import measure
from kvenv.learning.fit import Optimisation
from kvenv.learning.run import Run, load_checkpoint, save_checkpoint
from kvenv.scorers import NetworkScorer
from kvenv.scorers.calibration import fit_calibration
from kvenv.trace import TraceSet
from kvenv.trace.batches import read_heads

QUICK = {"steps": 12, "hidden": [6], "seed": 1}


@pytest.fixture(scope="module")
def traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory):
    return tiny_traces(tmp_path_factory.mktemp("traces") / "tiny", [(30, 2)] * 5)


def kvp(**options: Any) -> Any:
    return make("kvp", **options)


def make(agent: str = "kvp", **options: Any) -> Any:
    own = {"samples": 3} if agent == "kvp" else {}
    return plugins.load("agent", agent)(**{**QUICK, **own, **options})


def weights(scorer: NetworkScorer) -> dict[str, torch.Tensor]:
    return scorer.network.state_dict()


def same(first: NetworkScorer, second: NetworkScorer) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class Crashed(Exception):  # noqa: N818
    pass


def fit_until(
    monkeypatch: pytest.MonkeyPatch, traces: list[TraceSet], run: Run, step: int, **options: Any
) -> None:
    """Train, with the objective failing in a step, counted from where training starts."""
    agent = make(**options)
    gradient, calls = agent.gradient, iter(range(1000))

    def crashing(*args: Any) -> torch.Tensor:
        if next(calls) == step * agent.batch:
            raise Crashed
        return gradient(*args)

    with monkeypatch.context() as patch:
        patch.setattr(agent, "gradient", crashing)
        with pytest.raises(Crashed):
            agent.fit(traces, run=run)


# Learning


@pytest.mark.parametrize("credit", ["expected", "reward_to_go", "plain"])
def test_it_learns_a_planted_utility(planted: tuple[TraceSet, TraceSet], credit: str):
    train, test = planted
    agent = kvp(steps=200, samples=8, lr=3e-2, hidden=[], credit=credit, warm_start=0.0)
    scorer = agent.fit([train], run=Run(validation=[test]))
    assert scorer.metrics["normalized_score"] > 0.95
    assert scorer.metrics["sink_free"] > 0.95
    untrained = kvp(steps=1, lr=1e-9, hidden=[]).fit([train], run=Run(validation=[test]))
    assert untrained.metrics["normalized_score"] < 0.6


def test_each_head_learns_for_itself(planted: tuple[TraceSet, TraceSet]):
    train, test = planted
    scorer = kvp(steps=200, samples=8, lr=3e-2, hidden=[]).fit([train], heads=[(3, 0), (1, 1)])
    assert scorer.network.heads == ((1, 1), (3, 0))
    (measured,) = measure([test], {"kvp": scorer})
    assert (measured.full["normalized_score"].mean(0) > 0.95).all()
    # The directions differ: one head's network is no good for the other's tokens.
    swapped = kvp(steps=1, hidden=[]).fit([train], heads=[(3, 0), (1, 1)])
    state = weights(scorer)
    swapped.network.load_state_dict({name: x.flip(0) for name, x in state.items()})
    (measured,) = measure([test], {"swapped": swapped})
    assert (measured.full["normalized_score"].mean(0) < 0.8).all()


def test_held_out_figures_are_those_that_evaluate_prints(planted: tuple[TraceSet, TraceSet]):
    train, test = planted
    scorer = kvp(steps=7).fit([train], run=Run(validation=[test]))
    (measured,) = measure([test], {"kvp": scorer})
    assert scorer.metrics["normalized_score"] == pytest.approx(
        measured.full["normalized_score"].mean(), abs=1e-6
    )
    free = measured.sink_free["normalized_score"].mean()
    assert scorer.metrics["sink_free"] == pytest.approx(free, abs=1e-6)
    assert scorer.metrics["normalized_score"] != pytest.approx(
        scorer.metrics["sink_free"], abs=1e-6
    )


def test_inputs_are_standardised_per_head_over_the_training_episodes(traces: TraceSet):
    scorer = kvp(steps=1).fit([traces])
    train = [0, 2, 3, 4]  # document 1 of 5 is held out
    for row, (layer, head) in enumerate(scorer.network.heads):
        x = np.concatenate(
            [
                np.concatenate([traces.read(i, part, layer, head)[:30] for i in train])
                for part in ("keys", "values")
            ],
            axis=1,
        ).astype(np.float64)
        np.testing.assert_allclose(scorer.network.mean[row, 0], x.mean(0), atol=1e-5)
        np.testing.assert_allclose(scorer.network.std[row, 0], x.std(0), atol=1e-5)


def test_the_bundle_says_where_it_comes_from(traces: TraceSet):
    scorer = kvp().fit([traces])
    assert scorer.model == traces.model
    assert scorer.architecture.hidden == (6,)
    assert scorer.training["agent"] == "kvp"
    assert scorer.training["options"]["samples"] == 3
    assert (scorer.training["seed"], scorer.training["episodes"]) == (1, 4)
    assert scorer.training["held_out_episodes"] == 1
    assert scorer.training["traces"] == [{"workload": "random", "arguments": {}, "seed": 0}]
    assert json.loads(json.dumps(dict(scorer.training))) == scorer.training
    assert not any(p.requires_grad for p in scorer.network.parameters())


def test_one_document_holds_nothing_out(tiny_traces: Callable[..., TraceSet], tmp_path: Path):
    traces = tiny_traces(tmp_path / "one", documents=["only"] * 3)
    scorer = kvp(steps=2).fit([traces])
    assert scorer.metrics == {}
    assert scorer.training["episodes"] == 3


def test_scores_are_calibrated_on_what_is_held_out(
    planted: tuple[TraceSet, TraceSet], tmp_path: Path
):
    train, test = planted
    heads = [(1, 0), (3, 1)]
    scorer = kvp(steps=30, lr=3e-2).fit([train], heads, Run(validation=[test]))
    assert scorer.calibration is not None
    assert scorer.calibration.heads == ((1, 0), (3, 1))
    batches = [read_heads(test, index, heads) for index in range(len(test))]
    scored = [scorer.network(scorer.architecture.read(one.framed(), one.values)) for one in batches]
    wanted = fit_calibration(
        heads, [(x, one.utility, one.future) for x, one in zip(scored, batches, strict=True)]
    )
    torch.testing.assert_close(scorer.calibration.scores, wanted.scores)
    torch.testing.assert_close(scorer.calibration.masses, wanted.masses)
    assert (wanted.masses[:, -1] > 1.5 * wanted.masses[:, 0]).all()  # it learned something
    scorer.save_pretrained(tmp_path / "bundle")
    loaded = NetworkScorer.from_pretrained(tmp_path / "bundle").calibration
    assert loaded is not None
    assert torch.equal(loaded.masses, scorer.calibration.masses)


def test_with_nothing_held_out_scores_are_calibrated_on_what_was_learned_from(
    tiny_traces: Callable[..., TraceSet], tmp_path: Path
):
    scorer = kvp(steps=2).fit([tiny_traces(tmp_path / "one", documents=["only"] * 3)])
    assert scorer.calibration is not None
    assert set(scorer.calibration.heads) == set(scorer.network.heads)


# Seeds


def test_a_seed_decides_every_weight(traces: TraceSet):
    first = kvp().fit([traces])
    torch.manual_seed(99)  # no global generator has a say
    np.random.seed(99)  # noqa: NPY002
    assert same(first, kvp().fit([traces]))
    other = kvp(seed=2).fit([traces])
    for name in ("weights.0", "weights.1", "biases.0"):
        assert not torch.equal(weights(first)[name], weights(other)[name])


@pytest.mark.parametrize(
    "change",
    [
        {"credit": "plain"},
        {"credit": "reward_to_go"},
        {"warm_start": 0.25},
        {"warm_signal": "listwise"},
        {"warm_signal": "regression"},
        {"inputs": ["key"]},
        {"sink_free": 0.0},
        {"batch": 2},
        {"lr": 1e-3},
        {"weight_decay": 0.0},
        {"steps": 13},
    ],
)
def test_every_option_has_an_effect(traces: TraceSet, change: dict[str, Any]):
    assert not same(kvp().fit([traces]), kvp(**change).fit([traces]))


@pytest.mark.parametrize("credit", ["expected", "reward_to_go", "plain"])
def test_samples_matter_where_rankings_are_drawn(traces: TraceSet, credit: str):
    few, many = (kvp(credit=credit, samples=samples).fit([traces]) for samples in (3, 4))
    assert same(few, many) == (credit == "expected")


def test_what_is_measured_and_kept_on_the_way_changes_nothing(traces: TraceSet, tmp_path: Path):
    plain = kvp().fit([traces])
    run = Run(checkpoint=tmp_path / "kept", checkpoint_every=3, evaluate_every=2)
    assert same(plain, kvp().fit([traces], run=run))


# Stopping and going on


@pytest.mark.parametrize("step", [1, 5, 6, 11])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": 3, "inputs": ["key"], "credit": "reward_to_go"},
        {"agent": "pairwise"},
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    traces: TraceSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    options: dict[str, Any],
):
    folder = tmp_path / "state"
    stopped = Run(checkpoint=folder, checkpoint_every=3)
    fit_until(monkeypatch, [traces], stopped, step, **options)
    found = load_checkpoint(folder)
    assert (found[1]["step"] if found else 0) == step // 3 * 3
    resumed = Run(checkpoint=folder, checkpoint_every=3, resume=True)
    assert same(make(**options).fit([traces], run=resumed), make(**options).fit([traces]))


def test_stopping_twice_is_no_different(
    traces: TraceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "state"
    fit_until(monkeypatch, [traces], Run(checkpoint=folder, checkpoint_every=2), 5)
    resumed = Run(checkpoint=folder, checkpoint_every=2, resume=True)
    fit_until(monkeypatch, [traces], resumed, 4)  # the fifth step since step 4: step 8
    found = load_checkpoint(folder)
    assert found is not None
    assert found[1]["step"] == 8
    assert len(list(folder.iterdir())) == 2  # older tensors are gone
    assert same(kvp().fit([traces], run=resumed), kvp().fit([traces]))


@pytest.fixture
def stopped(traces: TraceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run that stopped."""
    fit_until(monkeypatch, [traces], Run(checkpoint=tmp_path / "state", checkpoint_every=5), 7)
    return tmp_path / "state"


def test_a_checkpoint_is_not_gone_on_from_unasked(traces: TraceSet, stopped: Path):
    with pytest.raises(KvenvError, match="checkpoint of step 5: add --resume") as caught:
        kvp().fit([traces], run=Run(checkpoint=stopped))
    assert str(stopped) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 1e-3}, "options"),
        ({"seed": 2}, "options"),
        ({"heads": [(1, 0)]}, "heads"),
        ({"more": True}, "traces"),
    ],
)
def test_a_checkpoint_of_another_run_is_an_error(
    tiny_traces: Callable[..., TraceSet],
    traces: TraceSet,
    stopped: Path,
    tmp_path: Path,
    change: dict[str, Any],
    named: str,
):
    sets = [traces]
    if change.pop("more", False):
        sets.append(tiny_traces(tmp_path / "more", seed=9))
    heads = change.pop("heads", None)
    with pytest.raises(KvenvError, match=f"of another run .its {named} differ") as caught:
        kvp(**change).fit(sets, heads, Run(checkpoint=stopped, resume=True))
    assert str(stopped) in str(caught.value)


@pytest.mark.parametrize("part", ["checkpoint.json", "step-00000005.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_an_error(traces: TraceSet, stopped: Path, part: str, damage: str):
    file = stopped / part
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.unlink()
    if (part, damage) == ("checkpoint.json", "missing"):
        assert load_checkpoint(stopped) is None  # its tensors alone are what a kill left behind
        return
    with pytest.raises(KvenvError, match="is damaged") as caught:
        kvp().fit([traces], run=Run(checkpoint=stopped, resume=True))
    assert str(stopped) in str(caught.value)


@pytest.mark.parametrize("method", ["open", "mkdir"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    folder = tmp_path / "state"
    save_checkpoint(folder, {"x": torch.zeros(3)}, {"step": 1})

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, full)
        with pytest.raises(KvenvError, match=r"could not be written.*--resume") as caught:
            save_checkpoint(folder, {"x": torch.ones(3)}, {"step": 2})
    assert str(folder) in str(caught.value)
    found = load_checkpoint(folder)
    assert found is not None
    assert found[1]["step"] == 1
    assert torch.equal(found[0]["x"], torch.zeros(3))
    assert len(list(folder.iterdir())) == 2  # nothing half written is left


def test_a_killed_command_goes_on_where_it_was(
    tiny_traces: Callable[..., TraceSet], tmp_path: Path
):
    traces = tiny_traces(tmp_path / "set", [(60, 1)] * 5)
    options = {"steps": 40, "batch": 12, "samples": 3, "hidden": [8]}
    spelt = ["--steps", "40", "--batch", "12", "--samples", "3", "--hidden", "8"]
    command = ["train", "kvp", "--traces", str(traces.path), "--out", str(tmp_path / "kvp")]
    command += [*spelt, "--checkpoint-every", "5"]
    state = tmp_path / "kvp.checkpoint" / "checkpoint.json"
    with subprocess.Popen(
        [sys.executable, "-m", "kvenv.cli", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            limit = time.monotonic() + 60
            while not state.exists() and process.poll() is None and time.monotonic() < limit:
                time.sleep(0.005)
        finally:
            os.kill(process.pid, signal.SIGKILL)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "kvp").exists()
    assert 5 <= json.loads(state.read_text())["step"] < 40

    assert cli.main(command) == 2  # a run that was stopped is not started again by mistake
    assert cli.main([*command, "--resume"]) == 0
    resumed = NetworkScorer.from_pretrained(tmp_path / "kvp")
    assert same(resumed, kvp(**options, seed=0).fit([traces]))
    assert not state.parent.exists()


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"credit": "plain", "samples": 1}, "samples is 1: credit plain .* 2 or more"),
        ({"credit": "reward_to_go", "samples": 0}, "samples is 0"),
        ({"credit": "both"}, "credit is 'both': give one of expected, reward_to_go, plain"),
        ({"warm_signal": "luck"}, "warm_signal is 'luck': give one of pairwise"),
        ({"warm_start": 1.01}, "warm_start is 1.01"),
        ({"warm_start": float("nan")}, "warm_start is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"sink_free": 1.5}, "sink_free is 1.5"),
        ({"sink_free": -0.1}, "sink_free is -0.1"),
        ({"hidden": [0]}, "hidden"),
        ({"inputs": ["age"]}, "inputs"),
    ],
)
def test_impossible_options_are_an_error(traces: TraceSet, change: dict, message: str):
    with pytest.raises(KvenvError, match=message):
        kvp(**change).fit([traces])


def test_unusable_sets_and_heads_are_an_error(
    tiny_traces: Callable[..., TraceSet], traces: TraceSet, tmp_path: Path
):
    other = tiny_traces(tmp_path / "other", fingerprint="other")
    fewer = tiny_traces(tmp_path / "fewer", layers=(1,))
    with pytest.raises(KvenvError, match="different models"):
        kvp().fit([traces, other])
    with pytest.raises(KvenvError, match="different models"):
        kvp().fit([traces], run=Run(validation=[other]))
    with pytest.raises(KvenvError, match=r"heads \[\(2, 0\)\] are not recorded"):
        kvp().fit([traces], heads=[(1, 0), (2, 0)])
    with pytest.raises(KvenvError, match=r"not recorded in .*fewer"):
        kvp().fit([traces], run=Run(validation=[fewer]))
    with pytest.raises(KvenvError, match="no trace sets"):
        kvp().fit([])


def test_the_learning_rate_falls_from_its_value_to_zero():
    optimisation = Optimisation(steps=100, lr=0.5, weight_decay=0, batch=1, seed=0)
    rates = [optimisation.rate(step) for step in range(101)]
    assert rates[0] == 0.5
    assert rates[50] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0)
    assert (np.diff(rates) < 0).all()


def test_prompts_of_sinks_alone_are_an_error(tiny_traces: Callable[..., TraceSet], tmp_path: Path):
    traces = tiny_traces(tmp_path / "short", [(9, 1), (4, 1)])
    with pytest.raises(KvenvError, match="4 prompt tokens"):
        kvp().fit([traces])


# Logs


def test_tensorboard_logs_hold_the_held_out_figures(traces: TraceSet, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tensorboard=tmp_path / "logs", evaluate_every=5)
    scorer = kvp().fit([traces], run=run)
    logged = EventAccumulator(str(tmp_path / "logs")).Reload()
    events = logged.Scalars("held_out/normalized_score")
    assert [event.step for event in events] == [5, 10, 12]
    assert events[-1].value == pytest.approx(scorer.metrics["normalized_score"], abs=1e-6)
    free = logged.Scalars("held_out/sink_free")[-1]
    assert free.value == pytest.approx(scorer.metrics["sink_free"], abs=1e-6)
