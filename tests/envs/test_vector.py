"""The vector environments are single ones, side by side, to the last bit."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

from kvenv.envs import EvictVectorEnv, RankVectorEnv, StreamVectorEnv
from kvenv.errors import KvenvError

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("kvenv/Rank-v1", {}),
    ("kvenv/Rank-v1", {"reward": "output", "budgets": [0.25, 8], "sinks": 4, "recent": 3}),
    ("kvenv/Rank-v1", {"sink_free": True, "flat": False, "layer": 3}),
    ("kvenv/Stream-v1", {"budget": 8}),
    ("kvenv/Stream-v1", {"budget": 0.2, "sinks": 2, "recent": 1, "sink_free": True}),
    ("kvenv/Stream-v1", {"budget": 6, "interval": 2, "head": 1, "optimum": True}),
    ("kvenv/Evict-v1", {"budget": 8}),
    ("kvenv/Evict-v1", {"budget": 0.2, "sinks": 2, "recent": 2, "optimum": True, "flat": False}),
]
MODES = [mode.value for mode in AutoresetMode]


def same(one: Any, other: Any) -> None:
    """Equal to the last bit, in kind, shape and dtype, however deep."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    else:
        assert isinstance(one, np.ndarray)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if one.dtype == object:
            np.testing.assert_equal(one.tolist(), other.tolist())
        else:
            np.testing.assert_array_equal(one, other)


def sample(env: gym.vector.VectorEnv, rng: np.random.Generator) -> np.ndarray:
    if isinstance(env.unwrapped, EvictVectorEnv):
        masks = env.unwrapped.action_masks()
        return np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
    return rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("env_id", "arguments"), VARIANTS)
def test_they_give_what_gymnasiums_loop_over_single_ones_gives(
    folder: str, env_id: str, arguments: dict, mode: str
) -> None:
    made = {"num_envs": 5, "traces": folder, **arguments}
    ours = gym.make_vec(env_id, autoreset_mode=mode, **made)
    loop = gym.make_vec(
        env_id, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **made
    )
    assert ours.metadata["autoreset_mode"] is loop.metadata["autoreset_mode"]
    assert ours.single_observation_space == loop.single_observation_space
    assert ours.observation_space == loop.observation_space
    assert ours.action_space == loop.action_space
    rng, heads = np.random.default_rng(0), set()
    same(ours.reset(seed=3), loop.reset(seed=3))
    ended = 0
    for _ in range(4 if "Rank" in env_id else 110):
        actions = sample(ours, rng)
        result = ours.step(actions)
        same(result, loop.step(actions))
        heads |= set(zip(result[4]["layer"].tolist(), result[4]["head"].tolist(), strict=True))
        over = result[2]
        ended += over.sum()
        if mode == "Disabled" and over.any():
            options = {"reset_mask": over}
            same(ours.reset(options=dict(options)), loop.reset(options=dict(options)))
    assert ended > 5
    assert len(heads) >= (4 if not arguments.keys() & {"layer", "head"} else 2)


@pytest.mark.parametrize(
    ("vector", "mode"),
    [(RankVectorEnv, "SameStep"), (StreamVectorEnv, "NextStep"), (EvictVectorEnv, "NextStep")],
)
def test_default_modes(folder: str, vector: type, mode: str) -> None:
    made = {} if vector is RankVectorEnv else {"budget": 8}
    assert vector(2, traces=folder, **made).metadata["autoreset_mode"].value == mode
    enum = vector(2, autoreset_mode=AutoresetMode.DISABLED, traces=folder, **made)
    assert enum.metadata["autoreset_mode"] is AutoresetMode.DISABLED


def test_options_pick_for_all_or_for_each(folder: str) -> None:
    env = StreamVectorEnv(3, traces=folder, budget=8)
    _, info = env.reset(seed=0, options={"episode": 2, "layer": np.array([1, 3, 1])})
    assert info["episode_index"].tolist() == [2, 2, 2]
    assert info["layer"].tolist() == [1, 3, 1]
    mask = np.array([True, False, True])
    options = {"reset_mask": mask, "episode": [0, 1, 1], "budget": [5, 6, 7]}
    _, info = env.reset(options=options)
    assert info["_episode_index"].tolist() == mask.tolist()
    assert info["episode_index"].tolist() == [0, 0, 1]
    assert info["budget"].tolist() == [5, 0, 7]
    assert env.batch.budget.tolist() == [5, 8, 7]
    assert options.keys() == {"reset_mask", "episode", "budget"}  # Gymnasium's loop takes it out


def test_seeds_are_gymnasiums(folder: str) -> None:
    env = RankVectorEnv(3, traces=folder)
    spread, listed = env.reset(seed=7)[1], env.reset(seed=[7, 8, 9])[1]
    same(spread, listed)
    assert env.np_random_seed == (7, 8, 9)
    first = env.np_random[0]
    env.reset(seed=[None, 8, None])
    assert env.np_random[0] is first
    with pytest.raises(KvenvError, match="2 seeds for 3 environments"):
        env.reset(seed=[1, 2])


def test_episodes_beyond_memory_are_read_again(folder: str, monkeypatch) -> None:
    whole = RankVectorEnv(2, traces=folder)
    monkeypatch.setattr("kvenv.envs.arena.MEMORY", 1)
    small = RankVectorEnv(2, traces=folder)
    assert len(whole.batch.arena["rows"]) == 12
    assert len(small.batch.arena["rows"]) == 2
    rng = np.random.default_rng(0)
    same(whole.reset(seed=1), small.reset(seed=1))
    for _ in range(30):
        actions = sample(whole, rng)
        same(whole.step(actions), small.step(actions))


def test_what_cannot_be_is_named(folder: str) -> None:
    with pytest.raises(KvenvError, match="unknown autoreset_mode 'same': choose from 'NextStep'"):
        RankVectorEnv(2, autoreset_mode="same", traces=folder)
    with pytest.raises(KvenvError, match="num_envs=0 is less than 1"):
        RankVectorEnv(0, traces=folder)
    env = EvictVectorEnv(2, autoreset_mode="Disabled", traces=folder, budget=8, sinks=1)
    with pytest.raises(ResetNeeded, match="environment 0 of kvenv/Evict-v1 has no episode"):
        env.step(np.array([3, 3]))
    env.reset(seed=0)
    with pytest.raises(KvenvError, match=r"shape \(3,\).*give 2 whole numbers"):
        env.step(np.array([3, 3, 3]))
    with pytest.raises(KvenvError, match="action 0 in environment 1 names a slot"):
        env.step(np.array([3, 0]))
    for mask in (np.array([True]), np.array([0, 1]), np.zeros(2, bool)):
        with pytest.raises(KvenvError, match="reset_mask has shape"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(KvenvError, match="is not 2 whole numbers"):
        env.reset(options={"episode": [0, 1, 2]})
    shortest = int(np.argmin(env.batch.source.lengths))
    env.reset(options={"episode": [shortest, 0]})
    while not env.step(np.array([3, 3]))[2].any():
        pass
    with pytest.raises(ResetNeeded, match="environment 0 of"):
        env.step(np.array([3, 3]))


def test_every_environment_can_be_drawn(folder: str) -> None:
    env = gym.make_vec("kvenv/Stream-v1", num_envs=2, traces=folder, budget=8, render_mode="ansi")
    env.reset(seed=0, options={"episode": [0, 1]})
    for _ in range(3):
        env.step(np.zeros((2, 8), np.float32))
    texts = env.render()
    assert ["episode 0" in texts[0], "episode 1" in texts[1]] == [True, True]


def test_a_refused_reset_changes_nothing(folder: str) -> None:
    one, two = (RankVectorEnv(2, traces=folder) for _ in range(2))
    same(one.reset(seed=0), two.reset(seed=0))
    for options in ({"episode": 99}, {"layer": 2}, {"budgets": [99]}, {"x": 1}, 5):
        with pytest.raises(KvenvError):
            one.reset(options=options)
    same(one.reset(), two.reset())
    actions = np.zeros((2, 40))
    actions[1, 1] = np.nan
    with pytest.raises(KvenvError, match="token 1 in environment 1 the score nan"):
        one.step(actions)


def test_budgets_of_each_may_be_fractions(folder: str) -> None:
    env = StreamVectorEnv(2, traces=folder, budget=0.5)
    _, info = env.reset(options={"episode": [0, 1], "budget": [0.25, 0.5]})
    assert info["budget"].tolist() == [10, 12]


def test_pictures_of_the_others_stay_when_one_is_reset(folder: str) -> None:
    made = {"autoreset_mode": "Disabled", "render_mode": "ansi", "traces": folder}
    env = RankVectorEnv(2, **made)
    with pytest.raises(ResetNeeded, match="nothing to render"):
        env.render()
    env.reset(seed=0)
    env.step(np.zeros((2, 40)))
    before = env.render()
    env.reset(options={"reset_mask": np.array([True, False])})
    after = env.render()
    assert "normalized score" in before[0]
    assert "normalized score" not in after[0]
    assert after[1] == before[1]
