from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from kvenv.errors import KvenvError
from kvenv.scorers.network import ACTIVATIONS, Architecture, PerHeadMLP

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


@pytest.mark.parametrize("inputs", [("key",), ("value",), ("key", "value"), ("value", "key")])
def test_inputs_come_in_the_order_named(inputs: tuple):
    shape = Architecture(inputs)
    noise = torch.Generator().manual_seed(0)
    framed, values = (torch.randn(2, 3, 5, 8, generator=noise).half() for _ in range(2))
    x = shape.read(framed, values)
    assert x.dtype == torch.float32
    assert x.shape == (2, 3, 5, shape.width(8)) == (2, 3, 5, 8 * len(inputs))
    for part, name in zip(x.split(8, -1), inputs, strict=True):
        assert torch.equal(part, {"key": framed, "value": values}[name].float())
    assert shape.build(HEADS, 8)(x[0]).shape == (3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ()}, r"inputs \[\] must be distinct names out of key, value"),
        ({"inputs": ("key", "key")}, "distinct"),
        ({"inputs": ("key", "age")}, "'age'"),
        ({"activation": "sine"}, "'sine': choose from gelu, relu"),
        ({"hidden": (128, 0)}, r"hidden widths \[128, 0\]"),
    ],
)
def test_an_impossible_architecture_is_an_error(options: dict, message: str):
    with pytest.raises(KvenvError, match=message):
        Architecture(**options)
