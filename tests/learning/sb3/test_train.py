from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.learning.run import Run
from kvenv.learning.sb3 import (
    HeldOut,
    KvenvVecEnv,
    MaskablePPO,
    SlotPolicy,
    TokenPolicy,
    TokenSACPolicy,
    make_vec,
    train,
)
from kvenv.trace import TraceSet

STEPS = 128


def ppo(env: KvenvVecEnv, **kwargs: Any) -> PPO:
    own = {"hidden": (5,), "value_hidden": (5,)}
    options = {"n_steps": 4, "batch_size": 8, "n_epochs": 2, "policy_kwargs": own, **kwargs}
    return PPO(TokenPolicy, env, device="cpu", **options)


def sac(env: KvenvVecEnv) -> SAC:
    own = {"hidden": (5,), "critic_hidden": 5}
    # Fewer places than transitions, so that the oldest are overwritten.
    return SAC(
        TokenSACPolicy,
        env,
        device="cpu",
        buffer_size=80,
        learning_starts=12,
        batch_size=8,
        policy_kwargs=own,
    )


def maskable(env: KvenvVecEnv) -> MaskablePPO:
    own = {"hidden": (5,), "value_hidden": (5,)}
    return MaskablePPO(SlotPolicy, env, n_steps=4, batch_size=8, device="cpu", policy_kwargs=own)


class Interrupt(BaseCallback):
    """Ends training as a killed process does, at the first step from `at` on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._at:
            raise KeyboardInterrupt
        return True


@pytest.fixture
def rank(traces: TraceSet) -> Callable[[], KvenvVecEnv]:
    return lambda: make_vec("kvenv/Rank-v0", 4, traces=str(traces.path))


def weights(model: BaseAlgorithm) -> dict[str, torch.Tensor]:
    return model.policy.state_dict()


def same(one: BaseAlgorithm, other: BaseAlgorithm) -> bool:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("make", "env_id"),
    [(ppo, "kvenv/Rank-v0"), (sac, "kvenv/Rank-v0"), (maskable, "kvenv/Evict-v0")],
)
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(
    traces: TraceSet, tmp_path: Path, make: Callable, env_id: str
):
    budget = {"budget": 8} if "Evict" in env_id else {}

    def make_env() -> KvenvVecEnv:
        return make_vec(env_id, 4, traces=str(traces.path), **budget)

    options: dict[str, Any] = {"steps": STEPS, "seed": 3, "legs": 4}
    whole = train(make, make_env, **options)
    run = Run(checkpoint=tmp_path / "state", checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(make, make_env, run, **options, callbacks=[Interrupt(3 * STEPS // 4 - 4)])
    kept = {path.name for path in (tmp_path / "state").iterdir()}
    assert kept == {"checkpoint.json", f"step-{STEPS // 2:08d}.safetensors"}
    torch.manual_seed(77)
    resumed = train(make, make_env, Run(checkpoint=tmp_path / "state", resume=True), **options)
    assert same(whole, resumed)
    assert resumed.num_timesteps == whole.num_timesteps == STEPS
    assert resumed._n_updates == whole._n_updates
    if isinstance(whole, SAC):
        assert torch.equal(whole.log_ent_coef, resumed.log_ent_coef)
        assert whole.replay_buffer is not None
        assert np.array_equal(whole.replay_buffer.actions, resumed.replay_buffer.actions)


def test_a_seed_and_the_legs_decide_the_weights_and_nothing_else_does(
    rank: Callable, tmp_path: Path, traces: TraceSet
):
    plain = train(ppo, rank, steps=STEPS, legs=4)
    torch.manual_seed(9)
    run = Run(checkpoint=tmp_path / "a", checkpoint_every=40, tensorboard=tmp_path / "logs")
    held_out = HeldOut(make_vec("kvenv/Rank-v0", 5, traces=str(traces.path)), every=24)
    watched = train(ppo, rank, run, steps=STEPS, legs=4, held_out=held_out)
    assert same(plain, watched)
    assert not same(plain, train(ppo, rank, steps=STEPS, legs=4, seed=1))
    assert not same(plain, train(ppo, rank, steps=STEPS, legs=2))
    # Legs end at 32, 64 and 96; the checkpoint waits for 40 timesteps.
    assert json.loads((tmp_path / "a" / "checkpoint.json").read_text())["step"] == 64
    assert list((tmp_path / "logs").glob("events*"))


def test_the_callers_generators_are_left_as_they_were(rank: Callable):
    def state() -> tuple:
        legacy = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), legacy[1].tolist(), random.getstate()

    before = state()
    model = train(ppo, rank, steps=16, legs=2)
    assert state() == before
    assert model.num_timesteps == 16
    with pytest.raises(KeyboardInterrupt):
        train(ppo, rank, steps=16, legs=2, callbacks=[Interrupt(8)])
    assert state() == before


def test_schedules_see_the_progress_of_the_whole_run(rank: Callable):
    left = []

    def rate(progress_remaining: float) -> float:
        left.append(progress_remaining)
        return 1e-3

    train(lambda env: ppo(env, learning_rate=rate), rank, steps=STEPS, legs=4)
    seen = sorted(set(left), reverse=True)
    assert seen == pytest.approx([1 - i / 8 for i in range(9)])


def test_held_out_figures_go_into_the_checkpoint(rank: Callable, traces: TraceSet, tmp_path: Path):
    def held_out() -> HeldOut:
        return HeldOut(make_vec("kvenv/Rank-v0", 5, traces=str(traces.path)), every=32)

    options: dict[str, Any] = {"steps": STEPS, "legs": 4}
    run = Run(checkpoint=tmp_path / "state", checkpoint_every=1)
    whole, first, second = held_out(), held_out(), held_out()
    train(ppo, rank, **options, held_out=whole)
    with pytest.raises(KeyboardInterrupt):
        train(ppo, rank, run, **options, held_out=first, callbacks=[Interrupt(80)])
    again = Run(checkpoint=tmp_path / "state", resume=True)
    train(ppo, rank, again, **options, held_out=second)
    assert [one["steps"] for one in whole.history] == [32, 64, 96, 128]
    assert second.history[:2] == first.history
    seconds = [one["seconds"] for one in second.history]
    assert seconds == sorted(seconds)
    for ours, theirs in zip(whole.history, second.history, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_a_checkpoint_of_another_run_is_an_error(rank: Callable, tmp_path: Path):
    folder = tmp_path / "state"
    options: dict[str, Any] = {"steps": STEPS, "legs": 4, "identity": {"heads": [(1, 0)]}}
    train(ppo, rank, Run(checkpoint=folder, checkpoint_every=1), **options)
    with pytest.raises(KvenvError, match=r"step 96.*--resume"):
        train(ppo, rank, Run(checkpoint=folder), **options)
    again = Run(checkpoint=folder, resume=True)
    for change, name in (
        ({"seed": 1}, "seed"),
        ({"legs": 2}, "legs"),
        ({"steps": 256}, "steps"),
        ({"identity": {"heads": [(1, 1)]}}, "heads"),
    ):
        with pytest.raises(KvenvError, match=rf"another run \(its {name} differ"):
            train(ppo, rank, again, **{**options, **change})
    with pytest.raises(KvenvError, match=r"its algorithm differ"):
        train(sac, rank, again, **options)
    assert train(ppo, rank, again, **options).num_timesteps == STEPS


@pytest.mark.parametrize(
    ("change", "message"),
    [({"legs": 0}, "0 legs"), ({"steps": 3, "legs": 4}, "1 to 3"), ({"seed": -1}, "seed is -1")],
)
def test_what_cannot_be_is_an_error(rank: Callable, change: dict, message: str):
    with pytest.raises(KvenvError, match=message):
        train(ppo, rank, **{"steps": 16, **change})


def test_vec_normalize_is_refused(rank: Callable):
    with pytest.raises(KvenvError, match=r"VecNormalize.*standardise"):
        train(lambda env: ppo(VecNormalize(env)), rank, steps=16, legs=2)


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_held_out_prompts_may_be_longer_or_shorter(
    tiny_traces, tmp_path: Path, quick_agent, name: str
) -> None:
    sets = [tiny_traces(tmp_path / str(n), [(n, 4)] * 2, seed=n) for n in (20, 30)]
    for train_set, held_out in (sets, sets[::-1]):
        scorer = quick_agent(name).fit([train_set], [(1, 0)], Run(validation=[held_out]))
        assert len(scorer.training["curves"]["1:0"]) >= 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ppo", {"batch": 1}, "batch is 1: it must be at least 2"),
        ("ppo", {"steps": 0}, "steps is 0: it must be at least 1"),
        ("ppo", {"lr": -1.0}, "lr is -1.0: it must be positive"),
        ("ppo", {"gamma": 2.0}, "gamma is 2.0: it must be a share"),
        ("maskable_ppo", {"epochs": 0}, "epochs is 0: it must be at least 1"),
        ("maskable_ppo", {"lr": float("nan")}, "lr is nan: it must be positive"),
        ("sac", {"start": 500, "steps": 64}, "start is 500 and steps 64: nothing would be learned"),
    ],
)
def test_options_that_nothing_can_be_learned_with_are_named(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(KvenvError, match=message):
        plugins.load("agent", name)(**options)
