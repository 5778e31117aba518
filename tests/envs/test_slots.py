"""Stream-v1 and Evict-v1 against simulations in plain Python."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from hypothesis import given, settings
from hypothesis import strategies as st

from kvenv.envs import EvictEnv, StreamEnv
from kvenv.errors import KvenvError
from kvenv.trace import TraceSet

WHERE = {"episode": 0, "layer": 3, "head": 1}  # 46 tokens
LENGTH = 46


def shares(traces: TraceSet, drop: int = 0) -> np.ndarray:
    """The share of its attention that each token pays to each before, (46, 46) float64."""
    queries, keys = (traces.read(0, f, 3, 1).astype(np.float64) for f in ("queries", "keys"))
    weights = np.exp(queries @ keys.T / np.sqrt(8)) * np.tril(np.ones((LENGTH, LENGTH)))
    weights[:, drop:, :drop] = 0
    return (weights / weights.sum(-1, keepdims=True)).mean(0)


def simulate(
    scores: np.ndarray, budget: int, interval: int, sinks: int, recent: int
) -> list[list[int]]:
    """Positions held while each token from ``budget`` on attends, by the rule's words."""
    held, steps = list(range(budget)), []
    for t in range(budget, LENGTH):
        if len(held) == budget:
            free = [p for p in held if p >= sinks and p <= t - 1 - recent]
            worst = sorted(free, key=lambda p: (scores[p], -p))[:interval]
            held = [p for p in held if p not in worst]
        held = [*held, t]
        steps.append(held)
    return steps


@settings(max_examples=30)
@given(
    st.integers(0, 99),
    st.integers(2, 17),
    st.integers(0, 5),
    st.integers(0, 6),
    st.integers(1, 16),
    st.booleans(),
    st.booleans(),
)
def test_stream_keeps_the_best_of_what_is_held(
    folder: str,
    seed: int,
    spare: int,
    sinks: int,
    recent: int,
    interval: int,
    ties: bool,
    sink_free: bool,
) -> None:
    scores = np.random.default_rng(seed).uniform(-1, 1, LENGTH).astype(np.float32)
    scores = scores.round(0 if ties else 9)
    budget, interval = sinks + recent + spare, min(interval, spare - 1)
    env = StreamEnv(
        folder, budget=budget, interval=interval, sinks=sinks, recent=recent, sink_free=sink_free
    )
    _, info = env.reset(options=WHERE)
    assert (info["position"], info["retention"], info["interval"]) == (budget, 1.0, interval)
    steps = simulate(scores, budget, interval, sinks, recent)
    paid = shares(env.traces, 4 if sink_free else 0)
    found = [paid[t, steps[t - budget]].sum() for t in range(budget, LENGTH)]
    over, earned = False, []
    while not over:
        first = info["position"]
        _, reward, over, _, info = env.step(scores[env.batch.positions[0]])
        last = info["position"]
        counted = [found[t - budget] for t in range(first, last) if t >= (4 if sink_free else 0)]
        earned += counted
        assert reward == pytest.approx(np.mean(counted or [0]), abs=1e-6)
        places = env.batch.positions[0]
        assert places[places >= 0].tolist() == steps[last - 1 - budget]
    assert info["position"] == LENGTH
    assert info["retention"] == pytest.approx(np.mean(earned), abs=1e-6)


def test_observations_are_rows_of_what_is_held(folder: str) -> None:
    env = StreamEnv(folder, budget=8, interval=3, flat=False)
    obs, _ = env.reset(seed=0, options=WHERE)
    trace = env.traces.head(0, 3, 1)
    over = False
    while not over:
        places, now = env.batch.positions[0], int(env.batch.now[0]) - 1
        there = places >= 0
        held = places[there]
        np.testing.assert_array_equal(obs[there, :8], trace.keys[held].astype(np.float32))
        np.testing.assert_array_equal(obs[there, 8:16], trace.values[held].astype(np.float32))
        np.testing.assert_allclose(obs[there, 16], np.log2(1 + now - held) / 16, rtol=1e-6)
        assert (obs[:, 17] == there).all()
        assert not obs[~there].any()
        obs, _, over, _, _ = env.step(env.action_space.sample())
    flat = StreamEnv(folder, budget=8, interval=3).reset(options=WHERE)[0]
    np.testing.assert_array_equal(flat, env.reset(options=WHERE)[0].ravel())


@pytest.mark.parametrize("sink_free", [False, True])
def test_evict_pays_what_is_found_in_the_slots(folder: str, sink_free: bool) -> None:
    env = EvictEnv(folder, budget=6, sinks=1, recent=2, flat=False, sink_free=sink_free)
    obs, info = env.reset(seed=0, options=WHERE)
    trace, paid = env.traces.head(0, 3, 1), shares(env.traces, 4 if sink_free else 0)
    assert obs.shape == (7, 18)
    places = list(range(7))
    for t in range(6, LENGTH):
        assert info["position"] == t
        mask = [int(1 <= p <= t - 2) for p in places]
        assert info["action_mask"].tolist() == mask
        assert env.action_masks().tolist() == [bool(m) for m in mask]
        np.testing.assert_array_equal(obs[:, :8], trace.keys[places].astype(np.float32))
        np.testing.assert_array_equal(obs[:, 8:16], trace.values[places].astype(np.float32))
        np.testing.assert_allclose(obs[:, 16], np.log2(1 + t - np.array(places)) / 16, rtol=1e-6)
        slot = env.action_space.sample(info["action_mask"])
        obs, reward, over, _, info = env.step(slot)
        assert info["evicted"] == places[slot]
        places[slot] = t
        assert reward == pytest.approx(paid[t, places[:-1]].sum(), abs=1e-6)
        places[-1] = t + 1
    assert over
    assert not obs[-1].any()


def test_a_smaller_budget_leaves_slots_empty(folder: str) -> None:
    env = EvictEnv(folder, budget=10, flat=False)
    obs, info = env.reset(options={**WHERE, "budget": 4})
    assert info["budget"] == info["position"] == 4
    assert info["action_mask"].tolist() == [1] * 4 + [0] * 6 + [1]
    assert not obs[4:10].any()
    with pytest.raises(KvenvError, match=r"action 5 names a slot that may not go.*such as 0"):
        env.step(5)
    assert env.step(10)[4]["evicted"] == 4
    share = StreamEnv(folder, budget=0.25)
    assert share.reset(options={"episode": 0})[1]["budget"] == 10
    assert share.reset(options={"episode": 1})[1]["budget"] == 6


@pytest.mark.parametrize("env_type", [StreamEnv, EvictEnv])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 29}, "budget 29 holds all 29 tokens of episode 1, so nothing would ever go"),
        ({"budget": 5, "sinks": 4, "recent": 2}, "budget 5 cannot hold sinks 4 . recent 2"),
        ({"budget": 0}, "budget 0 holds no token"),
        ({"budget": 1.5}, r"budget 1.5 is not in \(0, 1\]"),
        ({"budget": "8"}, "budget '8' is not a number"),
        ({"sinks": -1, "budget": 8}, "sinks=-1 is negative"),
        ({"layer": 2, "budget": 8}, "layer 2 is not recorded"),
    ],
)
def test_arguments_that_cannot_be_are_named(folder, env_type, arguments, message) -> None:
    with pytest.raises(KvenvError, match=message):
        env_type(folder, **arguments)


def test_intervals_that_cannot_be_are_named(folder: str) -> None:
    with pytest.raises(KvenvError, match="refresh 8 does not fit: budget 8 has room for 7"):
        StreamEnv(folder, budget=8, interval=8)
    with pytest.raises(KvenvError, match="refresh 0 is not a number of tokens"):
        StreamEnv(folder, budget=8, interval=0)


def test_traces_without_every_query_say_how_to_record_them(folder, monkeypatch) -> None:
    real = TraceSet.__init__

    def without(self, source):
        real(self, source)
        object.__setattr__(self.manifest, "queries", "future")

    monkeypatch.setattr(TraceSet, "__init__", without)
    with pytest.raises(KvenvError, match="record it again with `kvenv record random --queries all"):
        StreamEnv(folder, budget=8)


def test_a_budget_beyond_the_slots_is_named(folder: str) -> None:
    with pytest.raises(KvenvError, match="budget 9 is more than the 8 slots"):
        EvictEnv(folder, budget=8).reset(options={"budget": 9})
    with pytest.raises(KvenvError, match="unknown reset option 'budgets'"):
        StreamEnv(folder, budget=8).reset(options={"budgets": [9]})


@pytest.mark.parametrize(
    ("env_type", "action", "message"),
    [
        (StreamEnv, np.full(8, np.nan), "slot 0 the score nan"),
        (StreamEnv, np.zeros(2), r"shape \(2,\)"),
        (StreamEnv, 0.5, r"shape \(\) and dtype float64: give 8 numbers, one for each slot"),
        (StreamEnv, np.array(["a"] * 8), "dtype <U1"),
        (EvictEnv, 9, "action 9 is not a slot: choose from 0 to 8"),
        (EvictEnv, -1, "action -1 is not a slot"),
        (EvictEnv, 0, "action 0 names a slot that may not go"),
        (EvictEnv, 0.0, "dtype float64: give one whole number from 0 to 8"),
        (EvictEnv, np.array([3]), r"shape \(1,\)"),
    ],
)
def test_actions_that_cannot_be_are_named(folder, env_type, action, message) -> None:
    env = env_type(folder, budget=8, sinks=2, recent=1)
    with pytest.raises(ResetNeeded, match="has no episode to step"):
        env.step(action)
    env.reset(seed=0)
    with pytest.raises(KvenvError, match=message):
        env.step(action)
    env.step(np.zeros(8) if env_type is StreamEnv else 4)  # the episode is still there


@pytest.mark.parametrize("env_id", ["kvenv/Stream-v1", "kvenv/Evict-v1"])
def test_pictures_and_text_show_what_is_held(folder: str, env_id: str) -> None:
    frames = {}
    for mode in ("rgb_array", "ansi"):
        env = gym.make(env_id, traces=folder, budget=6, sinks=2, render_mode=mode)
        env.action_space.seed(1)
        env.reset(seed=0, options=WHERE)
        base = env.unwrapped
        first = env.render()
        for _ in range(12 if "Evict" in env_id else 3):
            mask = base.action_masks().astype(np.int8) if "Evict" in env_id else None
            env.step(env.action_space.sample(mask))
        frames[mode] = first, env.render()
        places = base.batch.positions[0]
        seen, held = int(base.batch.now[0]), sorted(places[places >= 0].tolist())
    assert frames["rgb_array"][0].shape == (540, 960, 3)
    assert (frames["rgb_array"][0] != frames["rgb_array"][1]).any()
    title, line, text = frames["ansi"][1].split("\n", 2)
    assert title == f"{env_id} · layer 3 head 1 · episode 0"
    assert line.startswith("budget 6 · held 6 · retention 0.")
    kept = " ".join(part.split("\x1b[0m")[-1] for part in ("\x1b[0m" + text).split("\x1b[2m"))
    ids = TraceSet(folder).tokens(0)
    assert kept.split() == [str(ids[i]) for i in held]
    assert len(text.replace("\x1b[2m", "").replace("\x1b[0m", "").split()) == seen


@pytest.mark.parametrize("env_type", [StreamEnv, EvictEnv])
def test_only_episodes_that_are_drawn_or_asked_for_must_suit_the_budget(folder, env_type) -> None:
    env = env_type(folder, budget=35, episodes=[0, 2])  # episode 1 has 29 tokens
    assert env.reset(options={"episode": 2})[1]["budget"] == 35
    with pytest.raises(KvenvError, match="budget 35 holds all 29 tokens of episode 1"):
        env.reset(options={"episode": 1})
    small = env_type(folder, budget=0.25, episodes=[1])
    with pytest.raises(KvenvError, match="budget 10 is more than the 6 slots"):
        small.reset(options={"episode": 0})
    assert small.reset(options={"episode": 0, "budget": 0.125})[1]["budget"] == 5


@pytest.mark.parametrize("env_type", [StreamEnv, EvictEnv])
@pytest.mark.parametrize("guards", [{}, {"sinks": 2, "recent": 3}])
def test_no_play_is_better_than_the_optimum(folder: str, env_type, guards) -> None:
    env = env_type(folder, budget=12, optimum=True, **guards)
    env.action_space.seed(0)
    for _ in range(4):
        _, info = env.reset(options=WHERE)
        over = False
        while not over:
            sampled = env.action_space.sample(info.get("action_mask"))
            _, _, over, _, info = env.step(sampled)
        assert info["random"] < info["optimum"] <= 1
        assert info["retention"] <= info["optimum"] + 1e-9
        assert info["normalized_score"] <= 1 + 1e-9
