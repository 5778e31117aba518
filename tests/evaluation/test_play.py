"""A scorer's actions earn what its scores are worth, in every environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from kvenv import plugins
from kvenv import rules as u
from kvenv.errors import KvenvError
from kvenv.evaluation.play import ScorerPolicy, play_all
from kvenv.learning.agent import Heuristic
from kvenv.scorers import load_scorer
from kvenv.trace import TraceSet
from kvenv.trace.batches import read_heads

CACHE = {"budget": 9, "sinks": 2, "recent": 3}


@pytest.fixture(scope="module")
def traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory) -> TraceSet:
    return tiny_traces(tmp_path_factory.mktemp("traces") / "tiny")


@pytest.fixture(scope="module")
def kvp(traces: TraceSet) -> Any:
    return plugins.load("agent", "kvp")(steps=30).fit([traces])


def make(env_id: str, traces: TraceSet, **arguments: Any) -> gym.Env:
    return gym.make(f"kvenv/{env_id}-v1", traces=str(traces.path), **arguments)


def test_kvp_earns_in_rank_what_its_learner_says(traces: TraceSet, kvp: Any) -> None:
    env = make("Rank", traces)
    for episode in range(len(traces)):
        batch = read_heads(traces, episode, kvp.network.heads)
        x = kvp.architecture.read(batch.framed(), batch.values)
        for scores, utility, (layer, head) in zip(
            kvp.network(x), batch.utility, kvp.network.heads, strict=True
        ):
            where = {"episode": episode, "layer": layer, "head": head}
            observation, info = env.reset(options=where)
            _, reward, _, _, info = env.step(ScorerPolicy(kvp, env)(observation, info))
            assert reward == float(u.reward(utility, scores))
            assert info["normalized_score"] == float(u.normalized_score(utility, scores))


def test_an_interval_of_one_is_evict(traces: TraceSet, kvp: Any) -> None:
    """Where a selection comes at every token, both hold the same but for when they decide."""
    for scorer in (kvp, load_scorer("knorm"), load_scorer("streaming")):
        one = play_all(make("Stream", traces, interval=1, **CACHE), scorer, "retention")
        two = play_all(make("Evict", traces, **CACHE), scorer, "retention")
        assert one.shape == two.shape == (3, 4)
        assert len(np.unique(one)) == one.size
        assert abs(one.mean() - two.mean()) < 0.05


def test_the_oracle_knows_what_is_still_to_come(traces: TraceSet) -> None:
    worth = {}
    for env_id in ("Stream", "Evict"):
        env = make(env_id, traces, **CACHE)
        for name in ("random", "oracle"):
            worth[env_id, name] = play_all(env, load_scorer(name), "retention").mean()
    assert worth["Stream", "oracle"] > worth["Stream", "random"] + 0.01
    assert worth["Evict", "oracle"] > worth["Evict", "random"] + 0.01
    assert (
        play_all(make("Rank", traces), load_scorer("oracle"), "normalized_score").min() > 1 - 1e-12
    )


def test_what_cannot_play_is_named(traces: TraceSet, kvp: Any) -> None:
    class Past(Heuristic):
        needs = frozenset({"past_attention"})

        def score(self, layer, keys, values, positions, now, **needs):
            return needs["past_attention"]

    for env_id in ("Stream", "Evict"):
        with pytest.raises(KvenvError, match=f"Past needs past_attention, which kvenv/{env_id}"):
            ScorerPolicy(Past(), make(env_id, traces, **CACHE))
    assert play_all(make("Rank", traces), Past(), "normalized_score").shape == (3, 4)
    with pytest.raises(KvenvError, match="is no single environment of kvenv/Rank-v1"):
        ScorerPolicy(load_scorer("knorm"), gym.make("CartPole-v1"))
    part = plugins.load("agent", "kvp")(steps=2).fit([traces], [(1, 0)])
    env = make("Rank", traces)
    observation, info = env.reset(options={"layer": 3})
    with pytest.raises(KvenvError, match="NaN scores for layer 3"):
        ScorerPolicy(part, env)(observation, info)
