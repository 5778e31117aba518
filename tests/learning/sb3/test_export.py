from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from kvenv.errors import KvenvError
from kvenv.learning.sb3 import (
    KvenvVecEnv,
    MaskablePPO,
    SlotPolicy,
    Standardise,
    TokenPolicy,
    TokenSACPolicy,
    export,
    make_vec,
    standardise,
)
from kvenv.scorers import NetworkScorer
from kvenv.trace import TraceSet

BUDGET = 8
STREAM = ("key", "value", "position", "fill")


def environment(name: str, traces: TraceSet, num_envs: int = 4, **kwargs: object) -> KvenvVecEnv:
    budget = {} if name == "Rank" else {"budget": BUDGET}
    return make_vec(f"kvenv/{name}-v0", num_envs, traces=str(traces.path), **budget, **kwargs)


def shaken(model: BaseAlgorithm) -> BaseAlgorithm:
    """With weights that are far from their first values."""
    noise = torch.Generator().manual_seed(3)
    for parameter in model.policy.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=noise)
    return model


def scores(scorer: NetworkScorer, traces: TraceSet, episode: int, layer: int) -> np.ndarray:
    """Of every token of both KV heads of a layer, (2, S)."""
    keys, values = (
        torch.from_numpy(traces.read(episode, field, layer)).float()[None]
        for field in ("keys", "values")
    )
    positions = torch.arange(keys.shape[2]).expand(keys.shape[:3])
    return scorer.score(layer, keys, values, positions)[0].numpy()


def picked(env: KvenvVecEnv, episode: int, layer: int, head: int) -> np.ndarray:
    env.set_options({"episode": episode, "layer": layer, "head": head})
    return env.reset()


@pytest.mark.parametrize("distribution", ["plackett_luce", "gaussian"])
def test_a_token_policys_scores_are_its_actions(traces: TraceSet, distribution: str):
    env = environment("Rank", traces)
    mean, std = standardise([traces], None, ("key", "position"))
    own = {"mean": mean, "std": std, "hidden": (7, 5), "features": ("key", "position")}
    own |= {"distribution": distribution, "activation": "elu"}
    model = shaken(PPO(TokenPolicy, env, n_steps=8, batch_size=8, policy_kwargs=own))
    scorer = export(model)
    assert scorer.heads == set(traces.heads)
    assert scorer.architecture.activation == "elu"
    for episode, n in enumerate((40, 24, 33)):
        for layer, head in traces.heads:
            action, _ = model.predict(picked(env, episode, layer, head), deterministic=True)
            expected = scores(scorer, traces, episode, layer)[head, :n]
            if distribution == "gaussian":
                np.testing.assert_allclose(action[0, :n], expected.clip(-1, 1), atol=1e-5)
            else:
                assert np.array_equal(np.argsort(-action[0, :n]), np.argsort(-expected))


def test_a_sac_policys_scores_are_its_actions_before_tanh(traces: TraceSet):
    env = environment("Rank", traces)
    model = shaken(SAC(TokenSACPolicy, env, buffer_size=8, policy_kwargs={"hidden": (7,)}))
    action, _ = model.predict(picked(env, 1, 3, 1), deterministic=True)
    expected = scores(export(model), traces, 1, 3)[1, :24]
    np.testing.assert_allclose(action[0, :24], np.tanh(expected), atol=1e-5)


def test_a_slot_policy_evicts_the_lowest_score(traces: TraceSet):
    env = environment("Evict", traces, sinks=1, recent=2)
    own = {"hidden": (7,), "features": ("key", "value", "position")}
    model = shaken(MaskablePPO(SlotPolicy, env, n_steps=8, batch_size=8, policy_kwargs=own))
    expected = scores(export(model), traces, 2, 1)[0]
    observation, held = picked(env, 2, 1, 0), list(range(BUDGET + 1))
    for newcomer in range(BUDGET, 40):
        mask = np.stack(env.env_method("action_masks"))
        action, _ = model.predict(observation, deterministic=True, action_masks=mask)
        assert action[0] == np.where(mask[0], expected[held], np.inf).argmin()
        observation, *_ = env.step(action)
        held[action[0]] = held[-1]
        held[-1] = newcomer + 1


@pytest.mark.parametrize(
    ("algorithm", "squash"),
    [
        (PPO, lambda x: x.clip(-1, 1)),
        (A2C, lambda x: x.clip(-1, 1)),
        (SAC, np.tanh),
        (TD3, np.tanh),
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_a_plain_policys_scores_are_its_actions(
    traces: TraceSet, algorithm: type, squash: Callable, scaled: bool, activation: type
):
    env = environment("Stream", traces, num_envs=1)
    own: dict = {"net_arch": [6, 5], "activation_fn": activation}
    if scaled:
        mean, std = standardise([traces], None, STREAM, BUDGET)
        own["features_extractor_class"] = Standardise
        own["features_extractor_kwargs"] = {"mean": mean, "std": std}
    memory = {"buffer_size": 8} if algorithm in (SAC, TD3) else {"n_steps": 64}
    model = shaken(algorithm("MlpPolicy", env, policy_kwargs=own, **memory))
    scorer = export(model, budget=BUDGET)
    assert scorer.architecture.features == STREAM
    observation, actions = picked(env, 0, 3, 1), []
    for _ in range(46):
        action, _ = model.predict(observation, deterministic=True)
        actions.append(action[0, 0])
        observation, *_ = env.step(action)
    expected = scores(scorer, traces, 0, 3)[1]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(actions, squash(expected), atol=1e-4)


def test_a_plain_policy_without_hidden_layers_is_linear(traces: TraceSet):
    model = PPO("MlpPolicy", environment("Stream", traces), policy_kwargs={"net_arch": []})
    assert export(model, budget=BUDGET).architecture.hidden == ()


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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Rank", {}, "TokenPolicy"),
        ("Evict", {}, "SlotPolicy"),
        ("Stream", {"activation_fn": nn.Softplus}, "Softplus.*GELU, ReLU"),
        ("Stream", {"activation_fn": nn.PReLU}, "PReLU"),
    ],
)
def test_a_policy_with_no_scorer_in_it_is_an_error(
    traces: TraceSet, name: str, change: dict, message: str
):
    kind = MaskablePPO if name == "Evict" else PPO
    model = kind("MlpPolicy", environment(name, traces), policy_kwargs=change)
    with pytest.raises(KvenvError, match=message):
        export(model, budget=BUDGET)


def test_a_budget_that_is_no_number_of_tokens_is_an_error(traces: TraceSet):
    model = PPO("MlpPolicy", environment("Stream", traces))
    with pytest.raises(KvenvError, match=r"budget=0\.25"):
        export(model, budget=0.25)  # pyright: ignore[reportArgumentType]


def test_an_extractor_of_ones_own_is_an_error(traces: TraceSet):
    class Own(nn.Flatten):
        features_dim = 18

        def __init__(self, space: object) -> None:
            super().__init__()

    model = PPO(
        "MlpPolicy", environment("Stream", traces), policy_kwargs={"features_extractor_class": Own}
    )
    with pytest.raises(KvenvError, match="Own cannot be exported: use Standardise"):
        export(model, budget=BUDGET)


def test_vec_normalize_is_an_error_that_names_the_cure(traces: TraceSet):
    env = VecNormalize(environment("Stream", traces))
    with pytest.raises(KvenvError, match=r"VecNormalize.*standardise"):
        export(PPO("MlpPolicy", env), budget=BUDGET)
    rewards = VecNormalize(environment("Stream", traces), norm_obs=False)
    assert export(PPO("MlpPolicy", rewards), budget=BUDGET).heads == set(traces.heads)


def test_standardising_by_numbers_of_another_size_is_an_error(traces: TraceSet):
    env = environment("Stream", traces)
    with pytest.raises(KvenvError, match=r"\(3,\).*\(18,\)"):
        Standardise(env.observation_space, np.zeros(3), np.ones(3))
