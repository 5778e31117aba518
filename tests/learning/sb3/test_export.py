from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from kvenv.errors import KvenvError
from kvenv.learning.sb3 import (
    KvenvVecEnv,
    MaskablePPO,
    SlotPolicy,
    TokenPolicy,
    export,
    make_vec,
    standardise,
)
from kvenv.rotation import Rotation
from kvenv.scorers import NetworkScorer
from kvenv.trace import TraceSet

BUDGET = 8


@pytest.fixture(scope="module")
def traces(
    tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory
) -> TraceSet:
    """Three episodes of a model that rotates its keys."""
    return tiny_traces(tmp_path_factory.mktemp("rotated"), rotation=Rotation((1.0, 0.3, 0.1)))


def environment(name: str, traces: TraceSet, num_envs: int = 4, **kwargs: object) -> KvenvVecEnv:
    budget = {} if name == "Rank" else {"budget": BUDGET}
    return make_vec(f"kvenv/{name}-v1", num_envs, traces=str(traces.path), **budget, **kwargs)


def shaken(model: BaseAlgorithm) -> BaseAlgorithm:
    """With weights that are far from their first values."""
    noise = torch.Generator().manual_seed(3)
    for parameter in model.policy.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=noise)
    return model


def scores(
    scorer: NetworkScorer, traces: TraceSet, episode: int, layer: int, held: list[int]
) -> np.ndarray:
    """Of the tokens held, as the last of them sees them, of both KV heads of a layer, (2, n)."""
    keys, values = (
        torch.from_numpy(traces.read(episode, field, layer)[:, held]).float()[None]
        for field in ("keys", "values")
    )
    positions = torch.tensor(held).expand(keys.shape[:3])
    return scorer.score(layer, keys, values, positions, torch.tensor([held[-1]]))[0].numpy()


def picked(env: KvenvVecEnv, episode: int, layer: int, head: int) -> np.ndarray:
    env.set_options({"episode": episode, "layer": layer, "head": head})
    return env.reset()


@pytest.mark.parametrize("distribution", ["plackett_luce", "gaussian"])
def test_a_token_policys_scores_are_its_actions(traces: TraceSet, distribution: str):
    env = environment("Rank", traces)
    mean, std = standardise([traces], None, ("key",))
    own = {"mean": mean, "std": std, "hidden": (7, 5), "inputs": ("key",)}
    own |= {"distribution": distribution, "activation": "elu"}
    model = shaken(PPO(TokenPolicy, env, n_steps=8, batch_size=8, policy_kwargs=own))
    scorer = export(model)
    assert scorer.heads == set(traces.heads)
    assert scorer.architecture.activation == "elu"
    for episode, n in enumerate((40, 24, 33)):
        for layer, head in traces.heads:
            action, _ = model.predict(picked(env, episode, layer, head), deterministic=True)
            expected = scores(scorer, traces, episode, layer, list(range(n)))[head]
            if distribution == "gaussian":
                np.testing.assert_allclose(action[0, :n], expected.clip(-1, 1), atol=1e-5)
            else:
                assert np.array_equal(np.argsort(-action[0, :n]), np.argsort(-expected))


def test_in_a_stream_a_token_policy_keeps_what_its_export_scores_best(traces: TraceSet):
    env = environment("Stream", traces, num_envs=1, interval=2, sinks=1, recent=2)
    model = shaken(PPO(TokenPolicy, env, n_steps=8, batch_size=8, policy_kwargs={"hidden": (7,)}))
    scorer = export(model)
    observation, held, over = picked(env, 0, 3, 1), list(range(BUDGET)), False
    batch = env.env.unwrapped.batch
    while not over:
        assert batch.positions[0].tolist() == held
        action, _ = model.predict(observation, deterministic=True)
        expected = scores(scorer, traces, 0, 3, held)[1]
        assert np.array_equal(np.argsort(-action[0]), np.argsort(-expected))
        observation, _, done, _ = env.step(action)
        over = bool(done[0])
        newest = held[-1]
        guarded = np.array([p < 1 or p > newest - 2 for p in held])
        best = np.argsort(-np.where(guarded, np.inf, expected), kind="stable")[: BUDGET - 2]
        held = [*sorted(held[i] for i in best), newest + 1, newest + 2]
    assert newest == 43


def test_a_slot_policy_evicts_the_lowest_score(traces: TraceSet):
    env = environment("Evict", traces, sinks=1, recent=2)
    model = shaken(
        MaskablePPO(SlotPolicy, env, n_steps=8, batch_size=8, policy_kwargs={"hidden": (7,)})
    )
    scorer = export(model)
    observation, held = picked(env, 2, 1, 0), list(range(BUDGET + 1))
    for newcomer in range(BUDGET, 39):
        mask = np.stack(env.env_method("action_masks"))
        action, _ = model.predict(observation, deterministic=True, action_masks=mask)
        expected = scores(scorer, traces, 2, 1, held)[0]
        assert action[0] == np.where(mask[0], expected, np.inf).argmin()
        observation, *_ = env.step(action)
        held[action[0]] = newcomer
        held[-1] = newcomer + 1


def test_an_export_is_a_bundle_of_the_heads_asked_for(traces: TraceSet, tmp_path: Path):
    env = environment("Rank", traces, layer=3)
    model = PPO(TokenPolicy, env, n_steps=8, batch_size=8, seed=4)
    model.learn(32)
    scorer = export(model)
    assert scorer.network.heads == ((3, 0), (3, 1))
    assert scorer.model == traces.model
    assert scorer.training == {
        "agent": "ppo",
        "seed": 4,
        "steps": 32,
        "traces": [traces.manifest.origin],
    }
    scorer.save_pretrained(tmp_path / "ppo")
    back = NetworkScorer.from_pretrained(tmp_path / "ppo")
    for name, tensor in back.network.state_dict().items():
        assert torch.equal(tensor[0], tensor[1])
        assert torch.equal(tensor, scorer.network.state_dict()[name])
    assert export(model, heads=[(1, 1)]).heads == {(1, 1)}
    before = scorer.network.weights[0].clone()
    model.learn(32)
    assert torch.equal(scorer.network.weights[0], before)  # a copy
    model.env = None
    with pytest.raises(KvenvError, match="traces="):
        export(model)
    assert export(model, traces, [(1, 0)]).heads == {(1, 0)}


@pytest.mark.parametrize(("name", "message"), [("Rank", "TokenPolicy"), ("Evict", "SlotPolicy")])
def test_a_policy_with_no_scorer_in_it_is_an_error(traces: TraceSet, name: str, message: str):
    kind = MaskablePPO if name == "Evict" else PPO
    with pytest.raises(KvenvError, match=message):
        export(kind("MlpPolicy", environment(name, traces)))


def test_vec_normalize_is_an_error_that_names_the_cure(traces: TraceSet):
    env = VecNormalize(environment("Stream", traces))
    with pytest.raises(KvenvError, match=r"VecNormalize.*standardise"):
        export(PPO(TokenPolicy, env))
    rewards = VecNormalize(environment("Stream", traces), norm_obs=False)
    assert export(PPO(TokenPolicy, rewards)).heads == set(traces.heads)
