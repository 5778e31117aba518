"""Stream-v0 and Evict-v0: the same cache, which is EvictionCache's."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from hypothesis import given, settings
from hypothesis import strategies as st

from kvenv.cache.padding import LeftPadding
from kvenv.cache.scoring import CacheScorer
from kvenv.cache.slots import EvictionLayer, Limits
from kvenv.envs import EvictEnv, StreamEnv
from kvenv.errors import KvenvError
from kvenv.scorers.base import Pointwise
from kvenv.trace import TraceSet

WHERE = {"episode": 0, "layer": 3, "head": 1}  # 46 tokens
LENGTH = 46


class Given(Pointwise):
    """Scores by position, the same in every head."""

    def __init__(self, scores: np.ndarray) -> None:
        self._scores = torch.from_numpy(scores)

    def score(self, layer, keys, values, positions, **needs):
        return self._scores[positions].float()


def cache_holds(
    traces: TraceSet, scores: np.ndarray, budget: int, sinks: int, recent: int
) -> list[set[int]]:
    """What an EvictionCache holds after each token, decoding one at a time."""
    scorer = CacheScorer(Given(scores), None, {3: 2})
    layer = EvictionLayer(3, Limits(budget, sinks, recent), scorer, LeftPadding())
    keys, values = (torch.from_numpy(traces.read(0, f, 3)[None]) for f in ("keys", "values"))
    held = []
    for t in range(LENGTH):
        layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        held.append(set(layer.positions[0, 1].tolist()))
    return held


def found(traces: TraceSet, held: list[set[int]], drop: int = 0) -> list[float]:
    """The share of each step's attention that is held, by definition in float64."""
    queries, keys = (traces.read(0, f, 3, 1).astype(np.float64) for f in ("queries", "keys"))
    shares = []
    for t, kept in enumerate(held):
        weights = np.exp(queries[:, t] @ keys[: t + 1].T / np.sqrt(8))
        if t >= drop:
            weights[:, :drop] = 0
        there = [i for i in kept if i <= t]
        shares.append(float((weights[:, there].sum(-1) / weights.sum(-1)).mean()))
    return shares


def stream(env: StreamEnv, scores: np.ndarray) -> tuple[list[set[int]], list[float], dict]:
    """What is held and paid at every step; at the end the last info."""
    env.reset(options=WHERE)
    held, paid, info, over = [], [], {}, False
    while not over:
        action = scores[len(held), None].astype(np.float32)
        _, reward, over, _, info = env.step(action)
        held.append(set(env.batch.positions[0, :-1].tolist()) - {-1})
        paid.append(reward)
    return held, paid, info


@settings(max_examples=25)
@given(st.integers(0, 99), st.integers(1, 17), st.integers(0, 5), st.integers(1, 6), st.booleans())
def test_stream_holds_what_an_eviction_cache_holds(
    folder: str, seed: int, spare: int, sinks: int, recent: int, ties: bool
) -> None:
    scores = np.random.default_rng(seed).uniform(-1, 1, LENGTH).astype(np.float32)
    scores = scores.round(0 if ties else 9)
    budget = sinks + recent + spare
    env = StreamEnv(folder, budget=budget, sinks=sinks, recent=recent)
    held, paid, info = stream(env, scores)
    assert held == cache_holds(env.traces, scores, budget, sinks, recent)
    np.testing.assert_allclose(paid, found(env.traces, held), atol=1e-6)
    assert paid[:budget] == [1.0] * budget
    assert info["retention"] == pytest.approx(np.mean(paid[budget:]), abs=1e-12)
    assert info["position"] == LENGTH == len(paid)


@settings(max_examples=15)
@given(st.integers(0, 99), st.sampled_from([(0, 0), (2, 0), (3, 4)]), st.booleans())
def test_evicting_the_lowest_score_is_stream(
    folder: str, seed: int, guards: tuple[int, int], sink_free: bool
) -> None:
    scores = np.random.default_rng(seed).uniform(-1, 1, LENGTH + 1).astype(np.float32)
    made = {"sinks": guards[0], "recent": guards[1], "budget": 9, "sink_free": sink_free}
    held, paid, last = stream(StreamEnv(folder, **made), scores)
    env = EvictEnv(folder, **made)
    _, info = env.reset(options=WHERE)
    for t in range(9, LENGTH):
        worth = np.where(info["action_mask"], scores[env.batch.positions[0]], np.inf)
        _, reward, over, _, info = env.step(int(worth.argmin()))
        assert set(env.batch.positions[0, :-1].tolist()) == held[t]
        assert reward == paid[t]
        assert over == (t == LENGTH - 1)
    assert info["retention"] == last["retention"]
    assert info["evicted"] == last["evicted"]
    drop = 4 if sink_free else 0
    np.testing.assert_allclose(paid, found(env.traces, held, drop), atol=1e-6)


def test_output_reward_is_its_definition(folder: str) -> None:
    scores = np.random.default_rng(0).uniform(-1, 1, LENGTH).astype(np.float32)
    env = StreamEnv(folder, budget=7, recent=1, reward="output")
    held, paid, info = stream(env, scores)
    queries, keys, values = (
        env.traces.read(0, f, 3, 1).astype(np.float64) for f in ("queries", "keys", "values")
    )
    for t, kept in enumerate(held):
        there = sorted(kept)
        weights = np.exp(queries[:, t] @ keys[: t + 1].T / np.sqrt(8))
        whole = weights @ values[: t + 1] / weights.sum(-1, keepdims=True)
        cut = weights[:, there] @ values[there] / weights[:, there].sum(-1, keepdims=True)
        error = np.linalg.norm(cut - whole, axis=-1) / np.linalg.norm(whole, axis=-1)
        assert paid[t] == pytest.approx(-error.mean(), abs=1e-5)
    assert min(paid) < -0.1
    assert (
        info["retention"] == stream(StreamEnv(folder, budget=7, recent=1), scores)[2]["retention"]
    )


def test_stream_shows_the_newcomer_and_the_fill(folder: str) -> None:
    env = StreamEnv(folder, budget=8)
    obs, info = env.reset(seed=0, options=WHERE)
    where = {"episode_index": 0, "layer": 3, "head": 1}
    assert info == {**where, "n": 40, "budget": 8, "position": 0, "retention": 1.0}
    trace = env.traces.head(0, 3, 1)
    for t in range(LENGTH):
        expected = [*trace.keys[t], *trace.values[t], np.log2(1 + t) / 16, min(t, 8) / 8]
        np.testing.assert_array_equal(obs, np.float32(expected))
        obs, _, _, _, info = env.step(np.array([0.5], np.float32))
        assert info["evicted"] == (-1 if t < 8 else t)  # of equal scores the latest goes
    np.testing.assert_array_equal(obs, np.r_[np.zeros(17), 1])


def test_evict_shows_every_slot(folder: str) -> None:
    env = EvictEnv(folder, budget=6, sinks=1, recent=2, flat=False)
    obs, info = env.reset(seed=0, options=WHERE)
    trace = env.traces.head(0, 3, 1)
    assert obs.shape == (7, 19)
    places = list(range(7))
    for t in range(6, LENGTH):
        assert info["position"] == t
        mask = [int(p >= 1 and p <= t - 2) for p in places]
        assert info["action_mask"].tolist() == mask == obs[:, -1].tolist()
        assert env.action_masks().tolist() == [bool(m) for m in mask]
        np.testing.assert_array_equal(obs[:, :8], trace.keys[places].astype(np.float32))
        np.testing.assert_array_equal(obs[:, 8:16], trace.values[places].astype(np.float32))
        np.testing.assert_allclose(obs[:, 16], np.log2(1 + np.array(places)) / 16, rtol=1e-6)
        np.testing.assert_allclose(obs[:, 17], np.log2(1 + t - np.array(places)) / 16, rtol=1e-6)
        slot = env.action_space.sample(info["action_mask"])
        obs, _, over, _, info = env.step(slot)
        assert info["evicted"] == places[slot]
        places[slot] = t
        places[-1] = t + 1
    assert over
    assert not obs[-1].any()
    np.testing.assert_array_equal(
        env.reset(options=WHERE)[0].ravel(),
        EvictEnv(folder, budget=6, sinks=1, recent=2).reset(options=WHERE)[0],
    )


def test_a_smaller_budget_leaves_slots_empty(folder: str) -> None:
    env = EvictEnv(folder, budget=10, flat=False)
    obs, info = env.reset(options={**WHERE, "budget": 4})
    assert info["budget"] == info["position"] == 4
    assert info["action_mask"].tolist() == [1] * 4 + [0] * 6 + [1]
    assert not obs[4:10].any()
    with pytest.raises(KvenvError, match=r"action 5 names a slot that may not go.*such as 0"):
        env.step(5)
    assert env.step(10)[4]["evicted"] == 4
    fraction = StreamEnv(folder, budget=0.25)
    assert fraction.reset(options={"episode": 0})[1]["budget"] == 10
    assert fraction.reset(options={"episode": 1})[1]["budget"] == 6


@pytest.mark.parametrize("env_type", [StreamEnv, EvictEnv])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 29}, "budget 29 holds all 29 tokens of episode 1, so nothing would ever go"),
        ({"budget": 5, "sinks": 4, "recent": 2}, "budget 5 cannot hold sinks 4 . recent 2"),
        ({"budget": 0}, "budget 0 cannot hold any token: give at least 1"),
        ({"budget": 1.5}, "fraction 1.5 is not in"),
        ({"budget": "8"}, "budget '8' is no number: give tokens, or a fraction"),
        ({"reward": "loss", "budget": 8}, "unknown reward 'loss'"),
        ({"reward": "output", "sink_free": True, "budget": 8}, "sink_free=True goes with"),
        ({"sinks": -1, "budget": 8}, "sinks=-1 is negative"),
        ({"layer": 2, "budget": 8}, "layer 2 is not recorded"),
    ],
)
def test_arguments_that_cannot_be_are_named(folder, env_type, arguments, message) -> None:
    with pytest.raises(KvenvError, match=message):
        env_type(folder, **arguments)


def test_traces_without_every_query_say_how_to_record_them(folder, monkeypatch) -> None:
    future = TraceSet(folder).manifest.__class__
    monkeypatch.setattr(future, "queries", "future", raising=False)
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
        (StreamEnv, np.array([np.nan]), "token 0 the score nan"),
        (StreamEnv, np.zeros(2), r"shape \(2,\)"),
        (StreamEnv, 0.5, r"shape \(\) and dtype float64: give an array of one number"),
        (StreamEnv, np.array(["a"]), "dtype <U1"),
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
    env.step(np.array([0.0]) if env_type is StreamEnv else 4)  # the episode is still there


@pytest.mark.parametrize("env_id", ["kvenv/Stream-v0", "kvenv/Evict-v0"])
def test_pictures_and_text_show_what_is_held(folder: str, env_id: str) -> None:
    frames = {}
    for mode in ("rgb_array", "ansi"):
        env = gym.make(env_id, traces=folder, budget=6, sinks=2, render_mode=mode)
        env.action_space.seed(1)
        env.reset(seed=0, options=WHERE)
        first = env.render()
        for _ in range(12):
            env.step(
                env.action_space.sample(env.reset.__self__.unwrapped.action_masks().astype(np.int8))
                if "Evict" in env_id
                else env.action_space.sample()
            )
        frames[mode] = first, env.render()
        batch = env.unwrapped.batch
        seen, held = int(batch.now[0]), sorted(set(batch.positions[0, :-1].tolist()) - {-1})
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


def test_attention_to_the_sinks_never_counts(folder: str) -> None:
    env = StreamEnv(folder, budget=2, sink_free=True)
    _, paid, info = stream(env, np.linspace(1, -1, LENGTH))
    assert paid[:4] == [1.0] * 4
    assert max(paid[4:]) == 0  # the first two tokens are kept, and they are sinks
    assert info["retention"] == 0
