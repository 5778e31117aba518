"""The shipped learners: what each learns, and what its options decide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvenv import plugins
from kvenv import rules as ut
from kvenv.errors import KvenvError
from kvenv.evaluation.retention import measure
from kvenv.learning import objectives
from kvenv.learning.plackett_luce import policy_gradient
from kvenv.learning.ranking import RankingAgent
from kvenv.learning.run import Run
from kvenv.rotation import Rotation
from kvenv.scorers import NetworkScorer
from kvenv.trace import TraceSet
from kvenv.trace.batches import read_heads

LEARNERS = ("kvp", "pairwise", "listwise", "regression")
SIGNALS: dict[str, Callable[..., torch.Tensor]] = {
    "pairwise": lambda scores, utility, noise: objectives.pairwise(scores, utility, 16, noise),
    "listwise": lambda scores, utility, _: objectives.listwise(scores, utility),
    "regression": lambda scores, utility, _: objectives.regression(scores, utility, 1e-3),
}


def make(name: str, **options: Any) -> Any:
    return plugins.load("agent", name)(**{"hidden": [6], "seed": 1, **options})


def same(first: NetworkScorer, second: NetworkScorer) -> bool:
    ours, theirs = first.network.state_dict(), second.network.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory):
    return tiny_traces(tmp_path_factory.mktemp("traces") / "tiny", [(30, 2)] * 5)


@pytest.mark.parametrize("name", LEARNERS)
def test_each_learns_a_planted_utility(planted: tuple[TraceSet, TraceSet], name: str):
    train, test = planted
    agent = make(name, steps=200, lr=3e-2, hidden=[])
    scorer = agent.fit([train], run=Run(validation=[test]))
    assert scorer.metrics["normalized_score"] > 0.95
    assert scorer.metrics["sink_free"] > 0.95
    assert scorer.training["agent"] == name


@pytest.mark.parametrize("name", LEARNERS)
def test_a_gpu_learns_the_same(planted: tuple[TraceSet, TraceSet], name: str):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    train, test = planted
    agent = make(name, steps=200, lr=3e-2, hidden=[])
    scorer = agent.fit([train], run=Run(validation=[test], device="cuda"))
    assert scorer.network.mean.device.type == "cpu"
    (measured,) = measure([test], {name: scorer})
    assert measured.full["normalized_score"].mean() > 0.95
    assert scorer.metrics["normalized_score"] == pytest.approx(
        measured.full["normalized_score"].mean(), abs=1e-4
    )


# A warm start


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(
    ("share", "steps", "switch"), [(0.0, 10, 0), (0.25, 10, 3), (0.5, 10, 5), (1.0, 10, 10)]
)
def test_a_warm_start_ends_at_its_step(signal: str, share: float, steps: int, switch: int):
    agent = make("kvp", steps=steps, warm_start=share, warm_signal=signal, credit="reward_to_go")
    scores, utility = torch.randn(2, 20), torch.rand(2, 20)
    for step in range(steps):
        noise = (torch.Generator().manual_seed(step) for _ in range(2))
        given = agent.gradient(scores, utility, next(noise), step)
        if step < switch:
            wanted = SIGNALS[signal](scores, utility, next(noise))
        else:
            wanted = policy_gradient(scores, utility, 8, "reward_to_go", next(noise))
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_warm_start_to_the_end_is_the_agent_of_that_name(traces: TraceSet, signal: str):
    warm = make("kvp", steps=7, warm_start=1.0, warm_signal=signal).fit([traces])
    assert same(warm, make(signal, steps=7).fit([traces]))
    part = make("kvp", steps=7, warm_start=0.8, warm_signal=signal).fit([traces])
    assert not same(warm, part)


# Keys as they look from now

ROTATION = Rotation((1.0, 0.3, 0.1, 0.02))


def seen(keys: np.ndarray) -> np.ndarray:
    """Future attention by one channel of the key as the prompt's last token sees it."""
    back = torch.tensor([1 - keys.shape[2]])
    return np.exp(2 * ROTATION.turn(torch.from_numpy(keys), back)[..., 0].numpy())


@pytest.mark.parametrize("name", LEARNERS)
def test_what_is_learned_at_some_lengths_holds_at_others(
    tiny_traces: Callable[..., TraceSet], tmp_path: Path, name: str
):
    made = {"utility": seen, "rotation": ROTATION}
    lengths = np.random.default_rng(0).integers(16, 80, 24).tolist()
    train = tiny_traces(tmp_path / "train", [(n, 1) for n in lengths], **made)
    test = tiny_traces(tmp_path / "test", [(150, 1), (401, 1)], seed=1000, **made)
    scorer = make(name, steps=200, lr=3e-2, hidden=[]).fit([train], run=Run(validation=[test]))
    assert scorer.metrics["normalized_score"] > 0.95
    (measured,) = measure([test], {name: scorer})
    full = measured.full["normalized_score"].mean()
    assert scorer.metrics["normalized_score"] == pytest.approx(full, abs=1e-5)


# Agents of one's own


def test_a_learning_signal_is_given_what_it_is_promised(traces: TraceSet):
    calls = []

    class Own(RankingAgent):
        def gradient(
            self, scores: torch.Tensor, utility: torch.Tensor, noise: torch.Generator, step: int
        ) -> torch.Tensor:
            calls.append((scores, utility, torch.rand(1, generator=noise).item(), step))
            return scores

    agent = Own(steps=3, batch=2, sink_free=0.3)
    scorer = agent.fit([traces], heads=[(1, 1), (3, 0)])
    assert scorer.training["agent"] == "own"
    assert [step for *_, step in calls] == [0, 0, 1, 1, 2, 2]
    assert len({drawn for _, _, drawn, _ in calls}) == 6
    known = [
        ut.emphasise(read_heads(traces, index, [(1, 1), (3, 0)]).utility, 0.3) for index in range(5)
    ]
    for scores, utility, *_ in calls:
        assert scores.shape == (2, 30)
        assert not scores.requires_grad
        assert any(torch.equal(utility, each) for each in known)


def test_an_agent_without_a_signal_says_what_is_missing(traces: TraceSet):
    with pytest.raises(NotImplementedError, match=r"RankingAgent must define gradient\(\)"):
        RankingAgent().fit([traces])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pairwise", {"pairs": 0}, "pairs is 0: it must be at least 1"),
        ("regression", {"floor": 0.0}, "floor is 0.0: it must be positive"),
        ("regression", {"floor": -1.0}, "floor is -1.0"),
        ("regression", {"floor": float("nan")}, "floor is nan"),
        ("regression", {"floor": float("inf")}, "floor is inf"),
        *((name, {"sink_free": -0.1}, "sink_free is -0.1") for name in LEARNERS),
        *((name, {"sink_free": float("nan")}, "sink_free is nan") for name in LEARNERS),
    ],
)
def test_impossible_options_are_refused_at_once(name: str, options: dict, message: str):
    with pytest.raises(KvenvError, match=message):
        make(name, **options)


@pytest.mark.parametrize(
    ("name", "change"),
    [("pairwise", {"pairs": 2}), ("regression", {"floor": 0.1}), ("listwise", {"sink_free": 0.0})],
)
def test_every_option_has_an_effect(traces: TraceSet, name: str, change: dict[str, Any]):
    plain, changed = (make(name, steps=4, **o).fit([traces]) for o in ({}, change))
    assert not same(plain, changed)
