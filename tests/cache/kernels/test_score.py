"""The grouped MLP scores as the networks do, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kvenv.cache.kernels.network import pack
from kvenv.cache.kernels.score import cost, score, score_reference
from kvenv.errors import KvenvError
from kvenv.scorers.network import ACTIVATIONS, Architecture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = ("value", "position", "key_norm", "key", "fill", "value_norm")


def networks(architecture, heads, head_dim, seed=0, dtype=torch.float32):
    """Networks with weights, means and deviations drawn at random, exact in ``dtype``."""
    draw = torch.Generator().manual_seed(seed)
    built = architecture.build([(0, h) for h in range(heads)], head_dim, draw)
    built.mean.normal_(generator=draw)
    built.std.uniform_(0.5, 2, generator=draw)
    if built.age is not None:
        built.age.data.normal_(generator=draw)
    for weight in [*built.weights, *built.biases]:
        weight.data = (2 * weight.data).to(dtype).float()
    return built.requires_grad_(False)


def states(B, H, n, D, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(B, H, n, D, generator=draw).to(DEVICE, dtype) for _ in range(2))
    positions = torch.randint(-3, 300, (B, H, n), generator=draw).to(DEVICE)
    return keys, values, positions


def exact(network, architecture, keys, values, positions):
    """The networks' own answer, in float64."""
    parts = (keys.double().cpu(), values.double().cpu(), positions.clamp(min=0).cpu())
    columns = []  # `features` itself is float32
    for name in architecture.features:
        if name in ("key", "value"):
            columns.append(parts[name == "value"])
        elif name == "position":
            columns.append(torch.log2(1 + parts[2].double()).unsqueeze(-1) / 16)
        elif name == "fill":
            budget = architecture.budget
            columns.append(parts[2].clamp(max=budget).double().unsqueeze(-1) / budget)
        else:
            norm = parts[name == "value_norm"].norm(dim=-1, keepdim=True)
            columns.append(norm.clamp(min=1e-6).log2())
    x = torch.cat(columns, -1)
    B, H, n, F = x.shape
    return network.double()(x.transpose(0, 1).reshape(H, B * n, F)).view(H, B, n).transpose(0, 1)


def check(architecture, B, H, n, D, dtype=torch.float32, weights=torch.float32):
    network = networks(architecture, H, D, dtype=weights)
    packed = pack(network, architecture, D, DEVICE)
    keys, values, positions = states(B, H, n, D, dtype)
    got = score(keys, values, positions, packed)
    plain = score_reference(keys.double(), values.double(), positions, packed)
    want = exact(network, architecture, keys, values, positions)
    assert got.shape == (B, H, n)
    assert got.dtype == torch.float32
    torch.testing.assert_close(plain.cpu(), want, rtol=1e-5, atol=1e-5)  # 1 / std is float32
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(24,), (20, 33)])
def test_every_activation_and_depth_agrees_with_the_networks(activation, hidden):
    check(Architecture(EVERYTHING, hidden, activation, budget=100), 2, 3, 67, 16)


@pytest.mark.parametrize(
    "features",
    [("value",), ("key",), ("value", "key"), ("key_norm",), ("position", "value_norm"), ("fill",)],
    ids="+".join,
)
def test_any_features_in_any_order(features):
    budget = 50 if "fill" in features else None
    check(Architecture(features, (16, 16), "gelu", budget), 1, 2, 5, 16)


@pytest.mark.parametrize("D", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("weights", [torch.float16, torch.float32])
def test_any_head_size(D, weights):
    check(Architecture(("key", "value"), (64, 32)), 1, 2, 65, D, weights=weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [128, 256])
def test_wide_layers_and_every_type_of_keys(dtype, width):
    check(Architecture(("key", "value"), (width, width)), 1, 1, 3, 128, dtype)


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 130), st.integers(1, 40))
def test_any_number_of_rows_heads_tokens_and_units(B, H, n, width):
    check(Architecture(EVERYTHING, (width, 41 - width), "silu", budget=7), B, H, n, 8)


def test_strides_of_model_states_are_followed():
    architecture = Architecture(("key", "value", "position"), (16,))
    packed = pack(networks(architecture, 2, 16), architecture, 16, DEVICE)
    keys, values, positions = states(3, 2, 9, 16)
    want = score(keys, values, positions[:, :1].expand(3, 2, 9).contiguous(), packed)
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    strided = torch.full((3, 2, 9, 32), torch.nan, device=DEVICE)
    strided[..., 16:] = values
    got = score(keys, strided[..., 16:], positions[:, :1].int().expand(3, 2, 9), packed)
    assert torch.equal(got, want)


def test_a_broken_token_is_nan_and_its_neighbours_are_not():
    for features in (("key",), ("key_norm",)):
        architecture = Architecture(features, (16, 16), "relu")
        packed = pack(networks(architecture, 1, 16), architecture, 16, DEVICE)
        keys, values, positions = states(1, 1, 5, 16)
        keys[0, 0, 2, 3] = torch.nan
        broken = [False, False, True, False, False]
        assert score(keys, values, positions, packed).isnan().flatten().tolist() == broken
        reference = score_reference(keys, values, positions, packed)
        assert reference.isnan().flatten().tolist() == broken


def test_no_tokens_no_scores():
    architecture = Architecture(("key",), (16,))
    packed = pack(networks(architecture, 2, 16), architecture, 16, DEVICE)
    assert score(*states(1, 2, 0, 16), packed).shape == (1, 2, 0)


def test_weights_are_halved_only_where_that_is_exact():
    architecture = Architecture(("key", "value"), (128, 128))
    half = pack(networks(architecture, 1, 64, dtype=torch.float16), architecture, 64, DEVICE)
    full = pack(networks(architecture, 1, 64), architecture, 64, DEVICE)
    assert (half.w_key.dtype, half.w2.dtype) == (torch.float16, torch.float16)
    assert (full.w_key.dtype, full.w2.dtype) == (torch.float32, torch.float32)
    products = 2 * 64 * 128 + 128 * 128
    assert full.bytes_per_head() - half.bytes_per_head() == 2 * products
    assert half.flops_per_token() == 2 * (products + 128)


@pytest.mark.parametrize(
    ("architecture", "head_dim"),
    [
        (Architecture(("key", "mean_key"), (16,)), 16),
        (Architecture(("key",), ()), 16),
        (Architecture(("key",), (16, 16, 16)), 16),
        (Architecture(("key",), (257,)), 16),
        (Architecture(("key",), (16,)), 512),
        (Architecture(("key",), (16,)), 12),
    ],
)
def test_what_no_kernel_serves_is_not_packed(architecture, head_dim):
    assert pack(networks(architecture, 1, head_dim), architecture, head_dim, DEVICE) is None


def test_bad_input_is_refused():
    architecture = Architecture(("key",), (16,))
    network = networks(architecture, 2, 16)
    with pytest.raises(KvenvError, match="architecture"):
        pack(network, Architecture(("key", "value"), (16,)), 16, DEVICE)
    packed = pack(network, architecture, 16, DEVICE)
    keys, values, positions = states(1, 2, 4, 16)
    with pytest.raises(KvenvError, match="2 KV heads"):
        score(keys[:, :1], values[:, :1], positions[:, :1], packed)
    with pytest.raises(KvenvError, match="positions"):
        score(keys, values, positions[..., :3], packed)


def test_cost_counts_the_states_once():
    architecture = Architecture(("key",), (16,))
    packed = pack(networks(architecture, 2, 16), architecture, 16, DEVICE)
    keys = torch.empty(3, 2, 10, 16, dtype=torch.float16, device=DEVICE)
    moved, flops = cost(keys, packed)
    assert moved == 60 * (16 * 2 + 4) + 2 * packed.bytes_per_head()
    assert flops == 60 * 2 * (16 * 16 + 16)


def test_the_operator_is_one_that_torch_can_compile():
    architecture = Architecture(("key", "value"), (16,))
    packed = pack(networks(architecture, 2, 16), architecture, 16, DEVICE)
    arguments = (*states(1, 2, 4, 16), packed.tensors(), "gelu", 0, 1)
    tests = ("test_schema", "test_faketensor")
    library.opcheck(torch.ops.kvenv.score.default, arguments, test_utils=tests)
