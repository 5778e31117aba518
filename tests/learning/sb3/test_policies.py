from __future__ import annotations

import itertools
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO

from kvenv.errors import KvenvError
from kvenv.learning import sb3
from kvenv.learning.sb3 import SlotPolicy, TokenPolicy, make_vec, standardise
from kvenv.learning.sb3.distributions import PlackettLuce, TokenGaussian, places
from kvenv.rotation import Rotation
from kvenv.scorers.network import Architecture
from kvenv.trace import TraceSet

WIDTH = 18  # 2 * 8 + 2


def observations(tokens: int, valid: list[int], seed: int = 0) -> torch.Tensor:
    """As all environments give them: rows of random tokens, then rows of zeros."""
    noise = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(valid), tokens, WIDTH, generator=noise)
    for row, n in zip(rows, valid, strict=True):
        row[:n, -1], row[n:] = 1, 0
    return rows.flatten(1)


def policy(tokens: int, kind: type = TokenPolicy, **kwargs: object):
    box = spaces.Box(-np.inf, np.inf, (tokens * WIDTH,))
    action = spaces.Box(-1, 1, (tokens,))
    if kind is SlotPolicy:
        action = spaces.Discrete(tokens)
    return kind(box, action, lambda _: 1e-3, **{"hidden": (12,), **kwargs})


# Distributions


def test_places_spread_the_ranking_over_the_action_space():
    scores = torch.tensor([[3.0, 9.0, 5.0, 7.0, 100.0], [1.0, 1.0, 2.0, 50.0, 60.0]])
    valid = torch.tensor([[True, True, True, True, False], [True, True, True, False, False]])
    third = 1 / 3
    expected = [[-1, 1, -third, third, -1], [0, -1, 1, -1, -1]]  # of equals the earlier is first
    torch.testing.assert_close(places(scores, valid), torch.tensor(expected))
    one = places(scores, torch.tensor([[True] + [False] * 4] * 2))
    assert one[:, 0].tolist() == [1, 1]


def test_rankings_have_plackett_luce_probabilities():
    scores = torch.tensor([0.5, -1.0, 2.0, 77.0])
    valid = torch.tensor([True, True, True, False])
    total = 0.0
    for order in itertools.permutations(range(3)):
        left, expected = scores[:3].exp().tolist(), 1.0
        for token in order:
            expected *= left[token] / sum(left)
            left[token] = 0
        action = torch.zeros(1, 4)
        action[0, list(order)] = torch.tensor([0.9, 0.1, -0.3])
        action[0, 3] = 1  # whatever padding gets does not count
        log_prob = PlackettLuce().proba_distribution(scores[None], valid[None]).log_prob(action)
        assert log_prob.exp().item() == pytest.approx(expected, rel=1e-4)
        total += expected
    assert total == pytest.approx(1)


def test_rankings_are_drawn_as_often_as_their_probability_says():
    scores = torch.tensor([0.5, -1.0, 2.0, 77.0]).expand(20_000, 4)
    valid = torch.tensor([True, True, True, False]).expand(20_000, 4)
    drawn = PlackettLuce().proba_distribution(scores, valid)
    actions = drawn.sample()
    assert set(actions[:, 3].tolist()) == {-1.0}
    share = (actions[:, :3].argmax(-1) == 2).float().mean()
    assert share == pytest.approx(torch.softmax(scores[0, :3], 0)[2].item(), abs=0.015)
    assert torch.equal(drawn.get_actions(True)[0], torch.tensor([0.0, -1.0, 1.0, -1.0]))
    assert drawn.entropy() is None


def test_gaussians_count_valid_tokens_alone():
    scores, log_std = torch.tensor([[0.2, -0.3, 9.0]]), torch.tensor(-0.5)
    valid = torch.tensor([[True, True, False]])
    gaussian = TokenGaussian().proba_distribution(scores, valid, log_std)
    actions = torch.tensor([[0.1, 0.4, 0.7]])
    normal = torch.distributions.Normal(scores[:, :2], log_std.exp())
    expected = normal.log_prob(actions[:, :2]).sum(-1)
    torch.testing.assert_close(gaussian.log_prob(actions), expected)
    torch.testing.assert_close(gaussian.entropy(), normal.entropy().sum(-1))
    assert gaussian.sample()[0, 2] == gaussian.mode()[0, 2] == 0


# TokenPolicy


@pytest.mark.parametrize("distribution", ["plackett_luce", "gaussian"])
def test_sb3s_methods_agree_with_each_other(distribution: str):
    own = policy(10, distribution=distribution)
    seen = observations(10, [10, 4, 1])
    with torch.no_grad():
        actions, values, log_prob = own(seen)
        again = own.evaluate_actions(seen, actions)
        assert (values.shape, log_prob.shape) == ((3, 1), (3,))
        torch.testing.assert_close(again[:2], (values, log_prob))
        torch.testing.assert_close(own.predict_values(seen), values)
        torch.testing.assert_close(own.get_distribution(seen).log_prob(actions), log_prob)
    best, _ = own.predict(seen.numpy(), deterministic=True)
    scores, valid = own.mlp_extractor.forward_actor(seen)
    for row in range(3):
        n = int(valid[row].sum())
        assert (np.argsort(-best[row, :n]) == np.argsort(-scores[row, :n].detach().numpy())).all()
    assert np.abs(best).max() <= 1


@pytest.mark.parametrize("distribution", ["plackett_luce", "gaussian"])
def test_padding_contributes_nothing(distribution: str):
    small, large = policy(5, distribution=distribution), policy(16, distribution=distribution)
    large.load_state_dict(small.state_dict(), strict=True)
    seen = observations(5, [5, 3])
    padded = torch.cat([seen, torch.zeros(2, 11 * WIDTH)], 1)
    actions = torch.rand(2, 5) * 2 - 1
    garbage = torch.cat([actions, torch.full((2, 11), 0.99)], 1)
    one, other = small.evaluate_actions(seen, actions), large.evaluate_actions(padded, garbage)
    for ours, theirs in zip(one, other, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    gradients = []
    for own, (values, log_prob, _) in ((small, one), (large, other)):
        (values.sum() + log_prob.sum()).backward()
        gradients.append({name: p.grad for name, p in own.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, gradients[1][name])


def test_the_score_of_a_token_is_that_of_a_per_head_network():
    mean, std = np.linspace(-1, 1, 8), np.linspace(0.5, 2, 8)
    own = policy(6, inputs=("value",), mean=mean, std=std, activation="tanh")
    seen = observations(6, [6])
    scores, _ = own.mlp_extractor.forward_actor(seen)
    network, shape = own.scorer_network()
    x = seen.view(6, WIDTH)[:, 8:16]
    torch.testing.assert_close(scores, network(x[None]))
    by_hand = (x - torch.tensor(mean).float()) / torch.tensor(std).float()
    by_hand = torch.tanh(by_hand @ network.weights[0][0] + network.biases[0][0])
    by_hand = by_hand @ network.weights[1][0] + network.biases[1][0]
    torch.testing.assert_close(scores[0], by_hand.squeeze(-1))
    assert shape == Architecture(("value",), (12,), "tanh")


@pytest.mark.parametrize("kind", [TokenPolicy, SlotPolicy])
def test_no_score_depends_on_age(kind: type):
    own = policy(6, kind)
    seen = observations(6, [6, 4])
    older = seen.view(2, 6, WIDTH).clone()
    older[:, :4, -2] += 0.5
    older = older.flatten(1)
    scores, valid = own.mlp_extractor.forward_actor(seen)
    assert torch.equal(own.mlp_extractor.forward_actor(older)[0], scores)
    assert valid.sum(1).tolist() == [6, 4]
    assert not torch.allclose(own.predict_values(older), own.predict_values(seen))


@pytest.mark.parametrize("kind", [TokenPolicy, SlotPolicy])
def test_the_value_function_sees_the_mean_token_its_age_and_their_number(kind: type):
    mean, std = np.linspace(-1, 1, 8), np.linspace(0.5, 2, 8)
    seen = observations(6, [6, 4])
    rows = seen.view(2, 6, WIDTH).double().numpy()
    own = policy(6, kind, inputs=("value",), mean=mean, std=std)
    pooled = own.mlp_extractor.forward_critic(seen)
    for row, n, latent in zip(rows, (6, 4), pooled.numpy(), strict=True):
        values = ((row[:n, 8:16] - mean) / std).mean(0)
        np.testing.assert_allclose(latent, [*values, row[:n, 16].mean(), np.log2(n)], atol=1e-5)


def test_inputs_are_standardised_over_all_prompt_tokens(tiny_traces, tmp_path: Path):
    rotation = Rotation((1.0, 0.1), "pairs")
    traces = tiny_traces(tmp_path / "turned", rotation=rotation)
    mean, std = standardise([traces], [(1, 0), (3, 1)])
    parts = []
    for i, (layer, head) in itertools.product(range(3), [(1, 0), (3, 1)]):
        n = traces.info(i).n
        keys, values = (traces.read(i, name, layer, head)[:n] for name in ("keys", "values"))
        framed = rotation.turn(torch.from_numpy(keys), torch.tensor([1 - n]))
        parts.append(np.hstack([framed.numpy(), values]))
    x = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-5)
    np.testing.assert_allclose(std, x.std(0), rtol=1e-4)
    alone, _ = standardise([traces], [(1, 0), (3, 1)], ("value",))
    np.testing.assert_allclose(alone, mean[8:], atol=1e-6)


@pytest.mark.parametrize("distribution", ["plackett_luce", "gaussian"])
def test_ppo_learns_with_it(traces: TraceSet, distribution: str):
    env = make_vec("kvenv/Rank-v1", 8, traces=str(traces.path), layer=1, head=0)
    mean, std = standardise([traces])
    own = {"mean": mean, "std": std, "hidden": (8,), "distribution": distribution}
    model = PPO(
        TokenPolicy,
        env,
        n_steps=16,
        n_epochs=4,
        batch_size=128,
        learning_rate=1e-2,
        seed=0,
        device="cpu",
        policy_kwargs=own,
    )
    model.learn(128)
    before = np.mean([one["r"] for one in model.ep_info_buffer])
    model.learn(1536, reset_num_timesteps=False)
    after = np.mean([one["r"] for one in model.ep_info_buffer])
    assert after > before + 0.04


def test_ppo_learns_on_streams(traces: TraceSet):
    made = {"traces": str(traces.path), "layer": 1, "head": 0, "budget": 12, "interval": 2}
    model = PPO(
        TokenPolicy,
        make_vec("kvenv/Stream-v1", 16, **made),
        n_steps=16,
        n_epochs=8,
        batch_size=256,
        learning_rate=1e-2,
        gamma=0.9,
        seed=0,
        device="cpu",
        policy_kwargs={"hidden": (32,)},
    )
    watch = sb3.HeldOut(make_vec("kvenv/Stream-v1", 3, optimum=True, **made), 10_000)
    before = watch.measure(model)
    model.learn(12_288)
    after = watch.measure(model)
    assert after["retention"] > before["retention"] + 0.02
    assert before["normalized_score"] < 0.1  # against the best schedule there is
    assert after["normalized_score"] > 0.2


# SlotPolicy


def test_the_slot_with_the_lowest_score_goes():
    own = policy(6, SlotPolicy)
    seen = observations(6, [6, 6])
    scores = own.mlp_extractor.forward_actor(seen)[0].detach()
    masks = torch.ones(2, 6, dtype=torch.bool)
    masks[0, scores[0].argmin()] = False
    with torch.no_grad():
        goes = own._predict(seen, deterministic=True, action_masks=masks.numpy())
        probabilities = own.get_distribution(seen, masks.numpy()).distribution.probs
    assert goes[0] == scores[0].masked_fill(~masks[0], torch.inf).argmin()
    assert goes[1] == scores[1].argmin()
    torch.testing.assert_close(probabilities[1], torch.softmax(-scores[1], 0))
    other = policy(9, SlotPolicy)
    other.load_state_dict(own.state_dict(), strict=True)
    padded = torch.cat([seen, torch.zeros(2, 3 * WIDTH)], 1)
    torch.testing.assert_close(other.predict_values(padded), own.predict_values(seen))


def test_maskable_ppo_learns_with_it(traces: TraceSet):
    env = make_vec("kvenv/Evict-v1", 4, traces=str(traces.path), budget=8)
    model = sb3.MaskablePPO(
        SlotPolicy,
        env,
        n_steps=16,
        batch_size=32,
        seed=0,
        device="cpu",
        policy_kwargs={"hidden": (8,), "inputs": ("key",)},
    )
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    model.learn(128)
    moved = [
        name for name, t in model.policy.state_dict().items() if not torch.equal(t, before[name])
    ]
    assert {name.split(".")[0] for name in moved} == {"mlp_extractor", "value_net"}
    assert model.num_timesteps == 128


def test_without_sb3_contrib_the_cure_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    monkeypatch.delitem(sys.modules, "kvenv.learning.sb3.slots")
    monkeypatch.delattr(sb3, "slots")
    with pytest.raises(KvenvError, match=r"pip install 'kvenv\[sb3\]'"):
        _ = sb3.SlotPolicy
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = sb3.Nonsense


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distribution": "cauchy"}, "'cauchy': choose"),
        ({"inputs": ("key", "age")}, "age"),
        ({"mean": np.zeros(3)}, r"\(3,\), not \(16,\)"),
        ({"use_sde": True}, "use_sde"),
        ({"activation": "sine"}, "'sine'"),
    ],
)
def test_what_cannot_be_is_an_error(change: dict, message: str):
    with pytest.raises(KvenvError, match=message):
        policy(4, **change)


@pytest.mark.parametrize(
    ("kind", "env_id", "message"),
    [
        (TokenPolicy, "kvenv/Evict-v1", "kvenv/Rank-v1"),
        (SlotPolicy, "kvenv/Rank-v1", "kvenv/Evict-v1"),
    ],
)
def test_a_policy_for_another_environment_is_an_error(
    traces: TraceSet, kind: type, env_id: str, message: str
):
    budget = {} if env_id == "kvenv/Rank-v1" else {"budget": 8}
    env = gym.make(env_id, traces=str(traces.path), **budget)
    with pytest.raises(KvenvError, match=message):
        kind(env.observation_space, env.action_space, lambda _: 1e-3)


def test_rows_of_another_width_are_an_error():
    box = spaces.Box(-1, 1, (4 * 19,))
    with pytest.raises(KvenvError, match=r"76 numbers is not 4 tokens of 2d \+ 2 columns"):
        TokenPolicy(box, spaces.Box(-1, 1, (4,)), lambda _: 1e-3)
