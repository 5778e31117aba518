"""A scorer's actions earn what its scores are worth, in every environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from kvenv import plugins
from kvenv import utility as u
from kvenv.cache.padding import LeftPadding
from kvenv.cache.scoring import CacheScorer
from kvenv.cache.slots import EvictionLayer, Limits
from kvenv.errors import KvenvError
from kvenv.evaluation.play import ScorerPolicy, play_all
from kvenv.evaluation.retention import measure
from kvenv.learning.episodes import read_heads
from kvenv.scorers import load_scorer
from kvenv.scorers.base import Pointwise
from kvenv.trace import TraceSet

CACHE = {"budget": 9, "sinks": 2, "recent": 3}


@pytest.fixture(scope="module")
def traces(tiny_traces: Callable[..., TraceSet], tmp_path_factory) -> TraceSet:
    return tiny_traces(tmp_path_factory.mktemp("traces") / "tiny")


@pytest.fixture(scope="module")
def kvp(traces: TraceSet) -> Any:
    return plugins.load("agent", "kvp")(steps=30).fit([traces])


class Aged(Pointwise):
    """A score of the key, which fades with age."""

    def score(self, layer, keys, values, positions, **needs):
        return keys.float().sum(-1)

    def age_term(self, layer, age):
        return -age.float() / 4


def make(env_id: str, traces: TraceSet, **arguments: Any) -> gym.Env:
    return gym.make(f"kvenv/{env_id}-v0", traces=str(traces.path), **arguments)


def test_kvp_earns_in_rank_what_its_learner_says(traces: TraceSet, kvp: Any) -> None:
    env = make("Rank", traces)
    for episode in range(len(traces)):
        batch = read_heads(traces, episode, kvp.network.heads)
        x = kvp.architecture.read(batch.keys, batch.values, batch.positions)
        for scores, utility, (layer, head) in zip(
            kvp.network(x), batch.utility, kvp.network.heads, strict=True
        ):
            where = {"episode": episode, "layer": layer, "head": head}
            observation, info = env.reset(options=where)
            _, reward, _, _, info = env.step(ScorerPolicy(kvp, env)(observation, info))
            assert reward == float(u.reward(utility, scores))
            assert info["closure"] == float(u.closure(utility, scores))


def test_ages_count_in_rank_as_at_the_prompt_s_end(traces: TraceSet) -> None:
    (measured,) = measure([traces], {"aged": Aged()})
    earned = play_all(make("Rank", traces), Aged(), "closure")
    np.testing.assert_array_equal(earned, measured.full["closure"])
    Young = type("Young", (Aged,), {"age_term": None})
    assert (earned != play_all(make("Rank", traces), Young(), "closure")).any()


def test_fixed_scores_earn_the_same_in_stream_and_evict(traces: TraceSet, kvp: Any) -> None:
    for scorer in (kvp, load_scorer("knorm"), load_scorer("streaming")):
        one = play_all(make("Stream", traces, **CACHE), scorer, "retention")
        two = play_all(make("Evict", traces, **CACHE), scorer, "retention")
        assert one.shape == (3, 4)
        np.testing.assert_array_equal(one, two)
        assert len(np.unique(one)) == one.size


@pytest.mark.parametrize("scorer", [load_scorer("keydiff"), Aged()])
def test_changing_scores_hold_in_evict_what_an_eviction_cache_holds(
    traces: TraceSet, scorer: Any
) -> None:
    env = make("Evict", traces, **CACHE)
    layer = EvictionLayer(3, Limits(**CACHE), CacheScorer(scorer, None, {3: 2}), LeftPadding())
    keys, values = (torch.from_numpy(traces.read(0, f, 3)[None]) for f in ("keys", "values"))
    observation, info = env.reset(options={"episode": 0, "layer": 3, "head": 1})
    policy = ScorerPolicy(scorer, env)
    for t in range(keys.shape[2]):
        layer.update(keys[:, :, t : t + 1].float(), values[:, :, t : t + 1].float())
        if t < CACHE["budget"]:
            continue
        observation, _, _, _, info = env.step(policy(observation, info))
        held = set(env.unwrapped.batch.positions[0, :-1].tolist())
        assert held == set(layer.positions[0, 1].tolist())


def test_the_oracle_knows_what_is_still_to_come(traces: TraceSet) -> None:
    worth = {}
    for env_id in ("Stream", "Evict"):
        env = make(env_id, traces, **CACHE)
        for name in ("random", "oracle"):
            worth[env_id, name] = play_all(env, load_scorer(name), "retention").mean()
    assert worth["Stream", "oracle"] > worth["Stream", "random"] + 0.01
    assert worth["Evict", "oracle"] > worth["Stream", "oracle"]  # it forgets what is used up
    assert play_all(make("Rank", traces), load_scorer("oracle"), "closure").min() > 1 - 1e-12


def test_what_cannot_play_is_named(traces: TraceSet, kvp: Any) -> None:
    with pytest.raises(KvenvError, match=r"KeyDiff gives scores that change.*use kvenv/Evict-v0"):
        ScorerPolicy(load_scorer("keydiff"), make("Stream", traces, **CACHE))

    class Past(Pointwise):
        needs = frozenset({"past_attention"})

        def score(self, layer, keys, values, positions, **needs):
            return needs["past_attention"]

    for env_id in ("Stream", "Evict"):
        with pytest.raises(KvenvError, match=f"Past needs past_attention, which kvenv/{env_id}"):
            ScorerPolicy(Past(), make(env_id, traces, **CACHE))
    assert play_all(make("Rank", traces), Past(), "closure").shape == (3, 4)
    with pytest.raises(KvenvError, match="is no single environment of kvenv/Rank-v0"):
        ScorerPolicy(load_scorer("knorm"), gym.make("CartPole-v1"))
    part = plugins.load("agent", "kvp")(steps=2).fit([traces], [(1, 0)])
    env = make("Rank", traces)
    observation, info = env.reset(options={"layer": 3})
    with pytest.raises(KvenvError, match="NaN scores for layer 3"):
        ScorerPolicy(part, env)(observation, info)
