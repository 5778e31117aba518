from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import gelu

from kvenv.errors import KvenvError
from kvenv.scorers.network import ACTIVATIONS, KNOTS, Architecture, PerHeadMLP, age_term, features

HEADS = ((0, 1), (2, 0), (2, 1))


def network(hidden: tuple[int, ...] = (5, 4), seed: int = 0) -> PerHeadMLP:
    """Of 3 heads and 6 inputs, with a normalisation that does something."""
    noise = torch.Generator().manual_seed(seed)
    net = PerHeadMLP(HEADS, 6, hidden, noise)
    net.mean.normal_(generator=noise)
    net.std.uniform_(0.5, 3, generator=noise)
    return net


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4), (8, 8, 8)])
def test_each_head_is_an_mlp_of_its_own_over_standardised_inputs(hidden: tuple[int, ...]):
    net = network(hidden).double()
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = net(x)
    assert scores.shape == (3, 7)
    for row in range(3):
        layer = (x[row] - net.mean[row]) / net.std[row]
        for depth, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            layer = (gelu(layer) if depth else layer) @ weight[row] + bias[row]
        torch.testing.assert_close(scores[row], layer.squeeze(-1))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_an_activation_is_torchs_own_of_that_name(name: str):
    module = {"gelu": "GELU", "relu": "ReLU", "tanh": "Tanh", "elu": "ELU", "silu": "SiLU"}[name]
    net = PerHeadMLP(HEADS, 6, (5,), torch.Generator().manual_seed(0), name)
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))
    for row in range(3):
        inner = getattr(torch.nn, module)()(x[row] @ net.weights[0][row] + net.biases[0][row])
        expected = inner @ net.weights[1][row] + net.biases[1][row]
        torch.testing.assert_close(net(x)[row], expected.squeeze(-1))


def test_gradients_of_one_head_reach_no_other():
    net = network()
    net(torch.randn(3, 7, 6))[1].sum().backward()
    for parameter in net.parameters():
        moved = parameter.grad.abs().flatten(1).sum(1) > 0
        assert moved.tolist() == [False, True, False]


def test_initial_weights_come_from_the_generator_alone():
    first, again, other = (network(seed=seed).state_dict() for seed in (0, 0, 1))
    before = torch.random.get_rng_state()
    empty = PerHeadMLP(HEADS, 6, (5, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    assert not any(weight.any() for weight in empty.weights)
    for weight in network().weights:
        assert 0 < weight.abs().max() <= weight.shape[1] ** -0.5


def test_features_come_in_the_order_named():
    keys, values = torch.randn(2, 2, 5, 3, dtype=torch.float16), torch.randn(2, 2, 5, 3)
    positions = torch.tensor([0, 1, 3, 7, 65535]).expand(2, 2, 5)
    x = features(keys, values, positions, ("value", "position", "key"))
    assert x.dtype == torch.float32
    assert torch.equal(x[..., :3], values)
    assert x[0, 0, :, 3].tolist() == [0, 1 / 16, 2 / 16, 3 / 16, 1]
    assert torch.equal(x[..., 4:], keys.float())
    assert torch.equal(features(keys, values, positions, ("key",)), keys.float())


def test_fill_is_the_share_of_the_budget_that_a_token_finds_taken():
    tokens, positions = torch.zeros(4, 8), torch.tensor([0, 1, 4, 100])
    x = features(tokens, tokens, positions, ("fill",), budget=4)
    assert x.squeeze(-1).tolist() == [0, 0.25, 1, 1]
    with pytest.raises(KvenvError, match="needs a budget"):
        features(tokens, tokens, positions, ("fill",))


def test_norms_are_logarithms_and_finite_for_zeros():
    keys = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0]]).half()
    values = torch.tensor([[6e4, 6e4], [0.0, 0.25], [0.0, 0.0]]).half()
    positions = torch.arange(3)
    x = features(keys, values, positions, ("value_norm", "key_norm"))
    floor = np.log2(1e-6)
    expected = [[np.log2(6e4 * 2**0.5), np.log2(5)], [-2, floor], [floor, 0]]
    torch.testing.assert_close(x, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-6)


def cosines(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What "mean_key" is, one token at a time in float64."""
    found = torch.zeros(len(positions))
    for i, key in enumerate(keys.double()):
        mean = keys.double()[positions <= positions[i]].mean(0)
        found[i] = key @ mean / (key.norm() * mean.norm())
    return found


@st.composite
def key_sets(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (B, H, n, d) and positions (B, H, n): in any order, with gaps, some twice."""
    batch, heads, n, d = (draw(st.integers(1, most)) for most in (2, 2, 9, 4))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    keys = torch.randn(batch, heads, n, d, generator=noise)
    positions = torch.randint(0, 2 * n, (batch, heads, n), generator=noise)
    return keys + 1, positions


@given(given=key_sets())
def test_mean_key_is_the_cosine_to_the_mean_of_the_keys_so_far(given):
    keys, positions = given
    found = features(keys, keys, positions, ("mean_key",)).squeeze(-1)
    for b, h in np.ndindex(*positions.shape[:2]):
        expected = cosines(keys[b, h], positions[b, h])
        torch.testing.assert_close(found[b, h], expected, rtol=0, atol=1e-5)


@given(given=key_sets(), seed=st.integers(0, 99))
def test_the_order_in_which_slots_are_filled_changes_no_feature(given, seed):
    keys, positions = given
    order = torch.randperm(keys.shape[2], generator=torch.Generator().manual_seed(seed))
    names = ("key", "value_norm", "mean_key", "position")
    straight = features(keys, keys, positions, names)[:, :, order]
    mixed = features(keys[:, :, order], keys[:, :, order], positions[:, :, order], names)
    torch.testing.assert_close(mixed, straight, rtol=0, atol=1e-5)


def test_a_key_of_zeros_has_a_cosine_of_zero():
    keys = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    x = features(keys, keys, torch.tensor([0, 1, 2]), ("mean_key",)).squeeze(-1)
    assert x.tolist() == [0, 1, 0]


@given(ages=st.lists(st.integers(0, 2**40), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_an_age_term_is_linear_between_its_knots_and_constant_beyond(ages, seed):
    table = torch.randn(3, KNOTS, generator=torch.Generator().manual_seed(seed))
    found = age_term(table, torch.tensor(ages).expand(2, 3, len(ages)))
    assert found.shape == (2, 3, len(ages))
    assert found.dtype == torch.float32
    for row in range(3):
        place = np.log2(1 + np.array(ages, dtype=np.float64))
        expected = np.interp(place, np.arange(KNOTS), table[row].double().numpy())
        np.testing.assert_allclose(found[:, row].numpy(), [expected] * 2, rtol=0, atol=2e-5)


def test_an_age_term_takes_its_knots_as_they_are():
    table = torch.randn(2, KNOTS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(age_term(table, 2 ** torch.arange(KNOTS).expand(2, -1) - 1), table)


def test_a_network_adds_its_age_term_where_ages_are_given():
    shape = Architecture(("key",), (4,), age=True)
    net = shape.build(HEADS, 8, torch.Generator().manual_seed(0))
    plain = Architecture(("key",), (4,)).build(HEADS, 8, torch.Generator().manual_seed(0))
    x, ages = torch.randn(3, 7, 8), 6 - torch.arange(7).expand(3, 7)
    assert net.age.shape == (3, KNOTS)
    assert torch.equal(net(x, ages), plain(x))  # nothing learned yet
    net.age.data.normal_(generator=torch.Generator().manual_seed(1))
    assert torch.equal(net(x), plain(x))
    assert torch.equal(plain(x, ages), plain(x))
    assert torch.equal(net(x, ages), plain(x) + age_term(net.age, ages))
    assert torch.equal(net(x, ages.float()), net(x, ages))


def test_only_the_knots_around_an_age_learn_from_it():
    net = Architecture(("key",), (4,), age=True).build(HEADS, 8, torch.Generator().manual_seed(0))
    ages = torch.tensor([[5, 0], [1, 1], [10**7, 10**6]])
    net(torch.randn(3, 2, 8), ages)[:, 0].sum().backward()
    share = np.log2(6) - 2
    expected = torch.zeros(3, KNOTS)
    expected[0, 2], expected[0, 3] = 1 - share, share
    expected[1, 1] = expected[2, 16] = 1
    torch.testing.assert_close(net.age.grad, expected)


@pytest.mark.parametrize(
    ("names", "width"),
    [
        (("key",), 8),
        (("key", "value"), 16),
        (("value", "position"), 9),
        (("key", "value", "position", "fill"), 18),
        (("key_norm", "key", "value_norm", "mean_key"), 11),
    ],
)
def test_the_architecture_knows_its_input_width(names: tuple, width: int):
    shape = Architecture(names, budget=3 if "fill" in names else None)
    tokens = torch.zeros(1, 5, 8)
    x = shape.read(tokens, tokens, torch.zeros(1, 5, dtype=torch.int64))
    assert shape.inputs(8) == width == x.shape[-1]
    assert shape.build([(0, 0)], 8)(x).shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ()}, "features"),
        ({"features": ("key", "key")}, "distinct"),
        ({"features": ("key", "age")}, "'age'"),
        ({"age": 1}, "age=1 is neither True nor False"),
        ({"activation": "sine"}, "'sine': choose from gelu, relu"),
        ({"features": ("key", "fill")}, "fill needs a budget"),
        ({"budget": 64}, "budget=64"),
        ({"features": ("fill",), "budget": 0}, "budget=0"),
        ({"hidden": (128, 0)}, r"hidden widths \[128, 0\]"),
    ],
)
def test_an_impossible_architecture_is_an_error(options: dict, message: str):
    with pytest.raises(KvenvError, match=message):
        Architecture(**options)
