"""What every registered environment promises, whichever it is."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_sb3

from kvenv.registration import ENVIRONMENTS, register

BUDGETS = {"kvenv/Rank-v1": {"budgets": [0.5, 4]}}
every_id = pytest.mark.parametrize("env_id", ENVIRONMENTS)


def arguments(env_id: str) -> dict:
    """What suits the tiny traces."""
    return BUDGETS.get(env_id, {"budget": 8})


def play(env: gym.Env, seed: int) -> list:
    """All that a seeded episode gives, with the actions that its seeded space draws."""
    env.action_space.seed(seed)
    steps: list = [env.reset(seed=seed)]
    while len(steps) == 1 or not steps[-1][2]:
        steps.append(env.step(env.action_space.sample()))
    return steps


def same(one, other) -> None:
    np.testing.assert_equal(one, other)


@every_id
def test_checkers_have_nothing_to_say_about_the_packaged_sample(env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for check in (check_env, check_sb3):
            env = gym.make(env_id, render_mode="rgb_array")
            check(env.unwrapped)
            env.close()


@pytest.mark.parametrize("reward", ["attention", "output"])
def test_checkers_have_nothing_to_say_about_any_reward(folder: str, reward: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for check in (check_env, check_sb3):
            check(gym.make("kvenv/Rank-v1", traces=folder, reward=reward).unwrapped)


@pytest.mark.parametrize("name", ["Rank", "Stream", "Evict"])
@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_what_is_out_of_date_names_its_successor(name: str, make) -> None:
    with (
        pytest.warns(DeprecationWarning, match="v1"),
        pytest.raises(gym.error.DeprecatedEnv, match=f"use `kvenv/{name}-v1` instead"),
    ):
        make(f"kvenv/{name}-v0")


@every_id
def test_a_seed_decides_everything(folder: str, env_id: str) -> None:
    one, two = (gym.make(env_id, traces=folder, **arguments(env_id)) for _ in range(2))
    first = play(one, 5)
    same(first, play(two, 5))
    other = play(one, 6)
    assert len(other) != len(first) or not np.array_equal(other[0][0], first[0][0])
    same(first, play(one, 5))


@every_id
def test_a_spec_survives_json(folder: str, env_id: str) -> None:
    env = gym.make(env_id, traces=folder, layer=3, sinks=2, **arguments(env_id))
    assert env.spec is not None
    text = env.spec.to_json()
    assert json.loads(text)["kwargs"]["traces"] == folder
    spec = gym.envs.registration.EnvSpec.from_json(text)
    assert spec == env.spec
    twin = gym.make(spec)
    for seed in range(3):
        same(env.reset(seed=seed), twin.reset(seed=seed))
    made = {"traces": folder, **arguments(env_id)}
    vector = gym.make_vec(env_id, num_envs=2, autoreset_mode="SameStep", **made)
    assert vector.spec is not None
    assert gym.envs.registration.EnvSpec.from_json(vector.spec.to_json()) == vector.spec


@every_id
def test_workers_that_spawn_agree_with_one_process(folder: str, env_id: str) -> None:
    made = {"num_envs": 2, "traces": folder, **arguments(env_id)}
    spawn = {"context": "spawn"}
    pool = gym.make_vec(env_id, vectorization_mode="async", vector_kwargs=spawn, **made)
    here = gym.make_vec(env_id, autoreset_mode="NextStep", **made)
    same(pool.reset(seed=3), here.reset(seed=3))
    pool.action_space.seed(0)
    for _ in range(30):
        actions = pool.action_space.sample()
        same(pool.step(actions), here.step(actions))
    pool.close()
    here.close()


@every_id
def test_observations_share_memory_only_when_asked(folder: str, env_id: str) -> None:
    for shared in (False, True):
        made = {"traces": folder, "copy": not shared, **arguments(env_id)}
        env = gym.make(env_id, **made).unwrapped  # its checker warns of shared memory
        vector = gym.make_vec(env_id, num_envs=2, **made)
        for player in (env, vector):
            player.action_space.seed(0)
            first, info = player.reset(seed=0)
            kept = {key: np.copy(value) for key, value in info.items()}
            second, _, _, _, facts = player.step(player.action_space.sample())
            assert np.shares_memory(first, second) == shared
            same(info, kept)
            for key in set(info) & set(facts):
                assert not np.shares_memory(info[key], facts[key])


def test_rules_can_be_played_without_loading_transformers(folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()
    plays = "".join(
        f"gym.make('kvenv:{env_id}', traces={folder!r}, **{arguments(env_id)}).reset(seed=0)\n"
        for env_id in ENVIRONMENTS
    )
    code = (
        f"import sys, gymnasium as gym\n{plays}"
        "print(sorted({'transformers', 'stable_baselines3', 'PIL.ImageTk'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@every_id
def test_usual_wrappers_and_stable_baselines3_find_nothing_in_their_way(
    folder: str, env_id: str
) -> None:
    made = {"traces": folder, **arguments(env_id)}
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(env_id, **made))
    assert play(env, 0)[-1][4]["episode"]["l"] == len(play(env, 0)) - 1
    many = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec(env_id, num_envs=2, **made))
    many.action_space.seed(0)
    many.reset(seed=0)
    lengths: set[int] = set()
    for _ in range(60):
        *_, infos = many.step(many.action_space.sample())
        lengths |= (
            set(infos["episode"]["l"][infos["_episode"]].tolist()) if "episode" in infos else set()
        )
    assert lengths
    model = PPO("MlpPolicy", gym.make(env_id, **made), n_steps=64, batch_size=32, device="cpu")
    model.learn(192)
    assert len(model.ep_info_buffer or ()) > 1
