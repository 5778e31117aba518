from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from kvenv.errors import KvenvError
from kvenv.scorers.network import ACTIVATIONS, Architecture, PerHeadMLP, features

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


@pytest.mark.parametrize(
    ("names", "width"),
    [
        (("key",), 8),
        (("key", "value"), 16),
        (("value", "position"), 9),
        (("key", "value", "position", "fill"), 18),
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
