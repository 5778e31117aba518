from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import VecMonitor

from kvenv.errors import KvenvError
from kvenv.learning.sb3 import KvenvVecEnv, make_vec
from kvenv.trace import TraceSet


@pytest.fixture
def rank(traces: TraceSet) -> KvenvVecEnv:
    return make_vec("kvenv/Rank-v1", 3, traces=str(traces.path))


def stream(traces: TraceSet, num_envs: int = 3) -> KvenvVecEnv:
    return make_vec("kvenv/Stream-v1", num_envs, traces=str(traces.path), budget=8, interval=2)


def test_a_rank_episode_ends_at_every_step_with_what_sb3_asks_for(
    rank: KvenvVecEnv, traces: TraceSet
):
    rank.seed(5)
    first = rank.reset()
    begun = list(rank.reset_infos)
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 40)).astype(np.float32)
    observations, rewards, done, infos = rank.step(actions)
    assert observations.shape == (3, 40 * 18)
    assert (rewards.dtype, done.dtype) == (np.float32, np.bool_)
    assert done.all()
    single = gym.make("kvenv/Rank-v1", traces=str(traces.path))
    for i, info in enumerate(infos):
        where = {name: begun[i][name] for name in ("layer", "head")}
        where["episode"] = begun[i]["episode_index"]
        again, _ = single.reset(options=where)
        *_, expected = (outcome := single.step(actions[i]))
        np.testing.assert_array_equal(info["terminal_observation"], first[i])
        np.testing.assert_array_equal(again, first[i])
        assert rewards[i] == np.float32(outcome[1])
        assert info["episode"]["r"] == pytest.approx(outcome[1])
        assert info["episode"]["l"] == 1
        assert info["TimeLimit.truncated"] is False
        assert info["episode_index"] == where["episode"]
        assert info["normalized_score"] == expected["normalized_score"]
        assert info["retention"].tolist() == expected["retention"].tolist()
        assert rank.reset_infos[i].keys() == begun[i].keys()


def test_an_info_is_empty_until_the_episode_ends_and_its_return_is_the_sum(traces: TraceSet):
    env = stream(traces)
    # Of 46, 29 and 40 tokens, of which 8 are there from the start.
    env.set_options([{"episode": e, "layer": 1, "head": 0} for e in range(3)])
    env.reset()
    total, ended = np.zeros(3), {}
    for step in range(1, 20):
        _, rewards, done, infos = env.step(np.zeros((3, 8), np.float32))
        total += np.where([i in ended for i in range(3)], 0, rewards)
        assert [bool(info) for info in infos] == done.tolist()
        for i in np.flatnonzero(done):
            ended.setdefault(int(i), (step, infos[i]))
    assert {i: step for i, (step, _) in ended.items()} == {0: 19, 1: 11, 2: 16}
    for i, (step, info) in ended.items():
        assert info["episode"]["l"] == step
        assert info["episode"]["r"] == pytest.approx(total[i], abs=1e-4)
        assert 0 < info["retention"] < 1
        assert info["episode"]["t"] >= 0


def test_a_seed_decides_the_episodes(rank: KvenvVecEnv):
    seen = []
    for seed in (3, 3, 4):
        assert rank.seed(seed) == [seed, seed + 1, seed + 2]
        start = rank.reset()
        seen.append([start, *(rank.step(np.zeros((3, 40)))[0] for _ in range(4))])
    assert np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])
    assert not np.array_equal(rank.reset(), seen[2][0])  # seeds count once


def test_options_reach_the_environments_once(rank: KvenvVecEnv):
    rank.set_options({"episode": 2, "layer": 3, "head": 1})
    rank.reset()
    picked = [(one["episode_index"], one["layer"], one["head"]) for one in rank.reset_infos]
    assert picked == [(2, 3, 1)] * 3
    drawn = set()
    for _ in range(20):
        rank.reset()
        drawn |= {one["episode_index"] for one in rank.reset_infos}
    assert drawn == {0, 1, 2}
    rank.set_options([{"episode": e, "head": 0} for e in (2, 0, 1)])
    rank.reset()
    assert [(one["episode_index"], one["head"]) for one in rank.reset_infos] == [
        (2, 0),
        (0, 0),
        (1, 0),
    ]
    rank.set_options([{"episode": 0}, {}, {"layer": 1}])
    with pytest.raises(KvenvError, match="different names"):
        rank.reset()


def test_masks_and_attributes_are_those_of_the_vector_environment(
    rank: KvenvVecEnv, traces: TraceSet
):
    env = make_vec("kvenv/Evict-v1", 3, traces=str(traces.path), budget=8, sinks=2)
    env.reset()
    assert env.has_attr("action_masks")
    masks = np.stack(env.env_method("action_masks"))
    assert masks.shape == (3, 9)
    assert masks.sum(1).tolist() == [7, 7, 7]
    assert len(env.env_method("action_masks", indices=[1])) == 1
    assert not rank.has_attr("action_masks")
    assert rank.get_attr("heads", indices=0) == [traces.heads]
    assert rank.get_attr("traces")[2].path == traces.path
    rank.set_attr("colour", "red")
    assert rank.get_attr("colour") == ["red"] * 3
    with pytest.raises(KvenvError, match="without indices"):
        rank.set_attr("colour", "blue", indices=[1])
    assert rank.env_is_wrapped(gym.Wrapper, indices=[0, 1]) == [False, False]


def test_gymnasiums_own_vector_environment_works_as_well(traces: TraceSet):
    def make() -> gym.Env:
        return gym.make("kvenv/Evict-v1", traces=str(traces.path), budget=8)

    env = KvenvVecEnv(SyncVectorEnv([make] * 2, autoreset_mode=AutoresetMode.SAME_STEP))
    env.seed(0)
    env.reset()
    assert np.stack(env.env_method("action_masks")).shape == (2, 9)
    assert env.has_attr("traces")
    assert not env.has_attr("colour")
    ended = []
    while len(ended) < 2:
        ended += [info for info in env.step(np.array([8, 8]))[3] if info]
    assert all(info["episode"]["l"] in (21, 32, 38) for info in ended)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_another_autoreset_mode_is_an_error_that_names_it(traces: TraceSet, mode: AutoresetMode):
    env = gym.make_vec("kvenv/Rank-v1", 2, traces=str(traces.path), autoreset_mode=mode)
    with pytest.raises(KvenvError, match=f"{mode.value}.*autoreset_mode='SameStep'"):
        KvenvVecEnv(env)


def test_observations_that_are_overwritten_are_refused(traces: TraceSet):
    with pytest.raises(KvenvError, match="copy=False"):
        make_vec("kvenv/Rank-v1", 2, traces=str(traces.path), copy=False)


def test_it_renders_and_sb3_wrappers_wrap_it(traces: TraceSet):
    env = make_vec("kvenv/Rank-v1", 2, traces=str(traces.path), render_mode="rgb_array")
    env.reset()
    env.step(np.zeros((2, 40)))
    picture = env.render()
    assert picture is not None
    assert picture.shape == (1080, 960, 3)  # one above the other
    assert picture[:540].any()
    assert picture[540:].any()
    with pytest.warns(UserWarning, match="already wrapped with a .Monitor"):
        monitored = VecMonitor(env)
    monitored.reset()
    *_, infos = monitored.step(np.zeros((2, 40)))
    assert infos[0]["episode"]["l"] == 1
    assert monitored.unwrapped is env
