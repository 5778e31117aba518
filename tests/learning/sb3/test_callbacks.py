from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.logger import Logger

from kvenv.display import progress_bar
from kvenv.errors import KvenvError
from kvenv.learning.sb3 import (
    HeldOut,
    MaskablePPO,
    Progress,
    SlotPolicy,
    TokenPolicy,
    make_vec,
)
from kvenv.trace import TraceSet


class Recorder(Logger):
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        super().__init__(None, [])
        self.dumped: list[tuple[int, dict]] = []

    def dump(self, step: int = 0) -> None:
        self.dumped.append((step, dict(self.name_to_value)))
        super().dump(step)


def ppo(traces: TraceSet) -> PPO:
    env = make_vec("kvenv/Rank-v1", 4, traces=str(traces.path))
    own = {"hidden": (5,)}
    return PPO(TokenPolicy, env, n_steps=4, batch_size=8, seed=0, device="cpu", policy_kwargs=own)


def test_every_held_out_episode_and_head_counts_exactly_once(traces: TraceSet):
    model = ppo(traces)
    single = gym.make("kvenv/Rank-v1", traces=str(traces.path))
    rewards, normalized_scores = [], []
    for episode in (0, 2):
        for layer, head in traces.heads:
            where = {"episode": episode, "layer": layer, "head": head}
            observation, _ = single.reset(options=where)
            action, _ = model.predict(observation, deterministic=True)
            _, reward, *_, info = single.step(action)
            rewards.append(reward)
            normalized_scores.append(info["normalized_score"])
    for num_envs in (1, 3, 8, 11):  # 8 pairs
        env = make_vec("kvenv/Rank-v1", num_envs, traces=str(traces.path))
        measured = HeldOut(env, 1, episodes=[0, 2]).measure(model)
        assert measured == pytest.approx(
            {"reward": np.mean(rewards), "normalized_score": np.mean(normalized_scores)}, abs=1e-6
        )


@pytest.mark.parametrize("env_id", ["kvenv/Stream-v1", "kvenv/Evict-v1"])
def test_episodes_of_many_steps_are_played_to_their_end(traces: TraceSet, env_id: str):
    # The shortest episode, which is the next one everywhere, ends again before the longest does.
    env = make_vec(env_id, 5, traces=str(traces.path), budget=16, episodes=[1])
    model = (
        MaskablePPO(SlotPolicy, env, n_steps=4, batch_size=20, seed=0, device="cpu")
        if "Evict" in env_id
        else PPO(TokenPolicy, env, n_steps=4, batch_size=20, seed=0, device="cpu")
    )
    single = gym.make(env_id, traces=str(traces.path), budget=16)
    returns, retention = [], []
    for episode in range(3):
        for layer, head in traces.heads[:2]:
            where = {"episode": episode, "layer": layer, "head": head}
            observation, _ = single.reset(options=where)
            total, over, info = 0.0, False, {}
            while not over:
                masks = (
                    {"action_masks": single.unwrapped.action_masks()} if "Evict" in env_id else {}
                )
                action, _ = model.predict(observation, deterministic=True, **masks)
                observation, reward, over, _, info = single.step(action)
                total += float(reward)
            returns.append(total)
            retention.append(info["retention"])
    measured = HeldOut(env, 1, [0, 1, 2], traces.heads[:2]).measure(model)
    assert measured == pytest.approx(
        {"reward": np.mean(returns), "retention": np.mean(retention)}, rel=1e-5
    )


def test_it_measures_every_so_often_and_at_the_end_and_tells_sb3s_logger(traces: TraceSet):
    model, logger = ppo(traces), Recorder()
    model.set_logger(logger)
    held_out = HeldOut(make_vec("kvenv/Rank-v1", 12, traces=str(traces.path)), every=40)
    model.learn(112, callback=held_out)
    # A rollout is 16 timesteps: the first to begin at or after 40 and 80 begin at 48 and 80.
    assert [one["steps"] for one in held_out.history] == [48, 80, 112]
    logged = [
        (step, values) for step, values in logger.dumped if "held_out/normalized_score" in values
    ]
    assert [step for step, _ in logged] == [48, 80, 112]
    for one, (_, values) in zip(held_out.history, logged, strict=True):
        assert values["held_out/normalized_score"] == one["normalized_score"]
        assert values["held_out/reward"] == one["reward"]
    assert any("rollout/ep_rew_mean" in values for _, values in logger.dumped)
    assert 0 < held_out.history[0]["seconds"] < held_out.history[1]["seconds"]


def test_episodes_between_measurements_are_counted_in_timesteps(traces: TraceSet):
    env = make_vec("kvenv/Rank-v1", 1, traces=str(traces.path))
    with pytest.raises(KvenvError, match="every=0"):
        HeldOut(env, every=0)


def test_progress_moves_a_bar(traces: TraceSet):
    bar = progress_bar("steps", shown=False)
    held_out = HeldOut(make_vec("kvenv/Rank-v1", 12, traces=str(traces.path)), every=16)
    model = ppo(traces)
    model.learn(32, callback=[held_out, Progress(bar, 32, held_out)])
    (task,) = bar.tasks
    assert (task.description, task.completed, task.total) == ("ppo", 32, 32)
    assert task.fields["note"] == f"normalized_score {held_out.history[-1]['normalized_score']:.3f}"
    model.learn(16, callback=Progress(bar, 16))
    assert bar.tasks[1].fields["note"].startswith("reward 0.")


def test_an_algorithm_without_masks_is_measured_on_evict(traces: TraceSet) -> None:
    made = {"traces": str(traces.path), "budget": 8}
    watch = HeldOut(make_vec("kvenv/Evict-v1", 2, **made), every=64)
    model = DQN(
        "MlpPolicy", make_vec("kvenv/Evict-v1", 2, **made), learning_starts=8, buffer_size=64
    )
    model.learn(128, callback=watch)
    assert len(watch.history) >= 2
    assert 0 < watch.history[-1]["retention"] < 1
