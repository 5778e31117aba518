"""The grouped MLP scores slots as the networks score framed tokens, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kvenv.cache.kernels import layout
from kvenv.cache.kernels.network import pack
from kvenv.cache.kernels.score import cost, score, score_reference
from kvenv.errors import KvenvError
from kvenv.rotation import Rotation
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.network import ACTIVATIONS, Architecture
from kvenv.trace import ModelInfo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = [score, score_reference]
NONE = Rotation()


def halves(D, **changes):
    """A rotation of all D channels, as Llama's."""
    return Rotation(tuple(10000.0 ** (-2 * i / D) for i in range(D // 2)), **changes)


def networks(architecture, heads, head_dim, seed=0):
    """Networks with weights, means and deviations drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    built = architecture.build([(0, h) for h in range(heads)], head_dim, draw)
    built.mean.normal_(generator=draw)
    built.std.uniform_(0.5, 2, generator=draw)
    for weight in [*built.weights, *built.biases]:
        weight.data *= 2
    return built.requires_grad_(False)


def states(lengths, D, dtype=torch.float32, seed=None):
    """Arguments of `score` before ``packed``: heads in any order, gaps; what is unused is NaN."""
    draw = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    rows, heads = lengths.shape
    T = max(sum(row) for row in lengths.tolist()) + 2 * heads + 1
    keys, values = torch.full((2, rows, T, D), torch.nan)
    starts = torch.zeros_like(lengths)
    for row in range(rows):
        at = 0
        for head in torch.randperm(heads, generator=draw).tolist():
            at += int(torch.randint(3, (), generator=draw))
            starts[row, head], n = at, int(lengths[row, head])
            drawn = torch.randn(2, n, D, generator=draw)
            keys[row, at : at + n], values[row, at : at + n] = drawn
            at += n
    now = torch.randint(40_000, (rows,), generator=draw)
    tensors = (keys.to(dtype), values.to(dtype), starts, lengths, now)
    return tuple(one.to(DEVICE) for one in tensors)


def turned(rotation, keys, now):
    """R(-now) k in float64, plane by plane."""
    out = keys.double().clone()
    n = len(rotation.frequencies)
    for plane, speed in enumerate(rotation.frequencies):
        pair = (plane, plane + n) if rotation.layout == "halves" else (2 * plane, 2 * plane + 1)
        i, j = (rotation.offset + one for one in pair)
        angle = torch.tensor(-now * speed, dtype=torch.float64)
        a, b = keys[..., i].double(), keys[..., j].double()
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., j] = b * angle.cos() + a * angle.sin()
    return out


def exact(network, architecture, rotation, keys, values, starts, lengths, now):
    """The networks' own answer, in float64, head after head."""
    out = torch.zeros(keys.shape[:2], dtype=torch.float64)
    network = network.double().cpu()
    for row, uses in enumerate(lengths.tolist()):
        for head, n in enumerate(uses):
            here = slice(int(starts[row, head]), int(starts[row, head]) + n)
            framed = turned(rotation, keys[row, here].cpu(), int(now[row]))
            parts = {"key": framed, "value": values[row, here].cpu().double()}
            x = torch.cat([parts[name] for name in architecture.inputs], -1)
            out[row, here] = network(x.expand(lengths.shape[1], *x.shape))[head]
    return out


def check(architecture, lengths, D, rotation=None, dtype=torch.float32):
    rotation = halves(D) if rotation is None else rotation
    heads = len(lengths[0])
    network = networks(architecture, heads, D)
    packed = pack(network, architecture, rotation, D, DEVICE)
    given = states(lengths, D, dtype)
    largest = max(1, *(max(row) for row in lengths))
    want = exact(network, architecture, rotation, *given)
    got = score(*given, packed, largest)
    wide = (given[0].double(), given[1].double(), *given[2:])
    plain = score_reference(*wide, packed, largest)
    assert got.dtype == torch.float32
    assert plain.dtype == torch.float64
    torch.testing.assert_close(plain.cpu(), want, rtol=2e-6, atol=2e-6)  # weights are float32
    torch.testing.assert_close(got.cpu().double(), want, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(24,), (20, 33)])
def test_every_activation_and_depth_agrees_with_the_networks(activation, hidden):
    check(Architecture(hidden=hidden, activation=activation), [[67, 0, 5], [1, 30, 64]], 16)


@pytest.mark.parametrize("inputs", [("value",), ("key",), ("value", "key")], ids="+".join)
def test_any_inputs_in_any_order(inputs):
    check(Architecture(inputs, (16, 16)), [[2, 5]], 16)


@pytest.mark.parametrize(
    "rotation",
    [
        NONE,
        halves(64),
        halves(64, layout="pairs"),
        halves(16, offset=48),
        halves(24, layout="pairs", offset=8, factor=1.3),
    ],
)
def test_every_kind_of_rotation_is_a_rotation_of_the_weights(rotation):
    check(Architecture(hidden=(32, 16)), [[33, 4], [0, 20]], 64, rotation)


@pytest.mark.parametrize("D", [8, 64, 80, 96, 128, 256])
def test_any_head_size(D):
    check(Architecture(hidden=(64, 32)), [[65, 3]], D)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [128, 256])
def test_wide_layers_and_every_type_of_keys(dtype, width):
    check(Architecture(hidden=(width, width)), [[3]], 128, dtype=dtype)


@settings(max_examples=10)
@given(data=st.data())
def test_any_number_of_rows_heads_tokens_and_units(data):
    rows, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    lengths = [[data.draw(st.integers(0, 130)) for _ in range(heads)] for _ in range(rows)]
    width = data.draw(st.integers(1, 40))
    check(Architecture(hidden=(width, 41 - width), activation="silu"), lengths, 8)


@pytest.mark.parametrize("way", WAYS)
def test_it_equals_the_scorer_that_the_networks_make(way):
    D, rotation = 16, halves(16)
    info = ModelInfo("m", "f", "llama", "t", 1, 2, 4, D, (0,), rotations=(rotation,))
    architecture = Architecture(hidden=(24, 24))
    network = networks(architecture, 2, D)
    given = states([[40, 40], [40, 40]], D)
    keys, values, starts, _, now = given
    packed = pack(network, architecture, rotation, D, DEVICE)
    index = starts.unsqueeze(-1) + torch.arange(40, device=DEVICE)
    row = torch.arange(2, device=DEVICE).view(-1, 1, 1)
    scorer = NetworkScorer(network, architecture, info)
    positions = torch.arange(40, device=DEVICE).expand(2, 2, 40)
    want = scorer.score(0, keys[row, index], values[row, index], positions, now)
    got = way(*given, packed, 40)[row, index]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_in_use_scores_zero_and_is_not_read(way):
    architecture = Architecture(hidden=(16,))
    packed = pack(networks(architecture, 2, 16), architecture, NONE, 16, DEVICE)
    given = states([[5, 0], [0, 0]], 16)
    scores = way(*given, packed, 8)
    first = int(given[2][0, 0])
    assert scores[0, first : first + 5].ne(0).all()
    assert scores[0, :first].eq(0).all()
    assert scores[0, first + 5 :].eq(0).all()
    assert scores[1].eq(0).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_broken_token_is_nan_and_its_neighbours_are_not(way):
    architecture = Architecture(("key",), (16, 16), "relu")
    packed = pack(networks(architecture, 1, 16), architecture, halves(16), 16, DEVICE)
    keys, *rest = states([[5]], 16)
    first = int(rest[1][0, 0])
    keys[0, first + 2, 3] = torch.nan
    broken = [False, False, True, False, False]
    found = way(keys, *rest, packed, 5)[0, first : first + 5]
    assert found.isnan().tolist() == broken


def test_a_score_waits_for_nothing(no_waiting):
    architecture = Architecture(hidden=(16, 16))
    packed = pack(networks(architecture, 2, 16), architecture, halves(16), 16, DEVICE)
    given = states([[9, 4]], 16)
    score(*given, packed, 9)
    with no_waiting():
        score_reference(*given, packed, 9)
        if DEVICE == "cuda":  # the interpreter itself reads
            score(*given, packed, 9)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_score_is_captured_in_a_cuda_graph():
    architecture = Architecture()
    packed = pack(networks(architecture, 2, 64), architecture, halves(64), 64, DEVICE)
    given = states([[300, 200], [10, 0]], 64, torch.bfloat16)
    score(*given, packed, 300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = score(*given, packed, 300)
    given[-1].add_(777)
    graph.replay()
    torch.testing.assert_close(out, score(*given, packed, 300))


@pytest.mark.parametrize(
    ("architecture", "head_dim"),
    [
        (Architecture(("key",), ()), 16),
        (Architecture(("key",), (16, 16, 16)), 16),
        (Architecture(("key",), (257,)), 16),
        (Architecture(("key",), (16,)), 512),
        (Architecture(("key",), (16,)), 12),
    ],
)
def test_what_no_kernel_serves_is_not_packed(architecture, head_dim):
    network = networks(architecture, 1, head_dim)
    assert pack(network, architecture, NONE, head_dim, DEVICE) is None


def test_networks_of_another_architecture_are_not_packed():
    network = networks(Architecture(("key",), (16,)), 2, 16)
    with pytest.raises(KvenvError, match="architecture"):
        pack(network, Architecture(("key", "value"), (16,)), NONE, 16, DEVICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: lambda x: x[..., :8]}, r"keys \(1, 12, 8\).*must be \(B, T, 16\)"),
        ({3: lambda x: x[:, :1]}, r"lengths \(1, 1\).*\(B, 2\)"),
        ({0: lambda x: x.double()}, "not torch.float64"),
        ({1: lambda x: x.half()}, "values.*float16.*must be.*float32"),
        ({2: lambda x: x.long()}, "starts.*int64"),
        ({4: lambda x: x.int()}, "now.*int32.*must be.*int64"),
        ({6: lambda x: 13}, "largest is 13"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    architecture = Architecture(("key",), (16,))
    packed = pack(networks(architecture, 2, 16), architecture, NONE, 16, DEVICE)
    given = [*states([[4, 3]], 16), packed, 4]
    for i, alter in change.items():
        given[i] = alter(given[i])
    with pytest.raises(KvenvError, match=message):
        score(*given)


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(layout, "INTERPRETED", False)
    architecture = Architecture(("key",), (16,))
    packed = pack(networks(architecture, 1, 16), architecture, NONE, 16, "cpu")
    with pytest.raises(KvenvError, match="not on cpu: use backend='torch'"):
        score(*(one.cpu() for one in states([[2]], 16)), packed, 2)


def test_cost_counts_the_states_once():
    architecture = Architecture(("key",), (16,))
    packed = pack(networks(architecture, 2, 16), architecture, halves(16), 16, DEVICE)
    keys = torch.empty(3, 30, 16, dtype=torch.float16, device=DEVICE)
    moved, flops = cost(keys, 20, packed)
    weights = 3 * 2 * packed.bytes_per_head() + 3 * (2 * 16 * 16) * 4
    assert moved == 60 * (16 * 2 + 4) + 4 * 90 + weights
    assert flops == 60 * 2 * (16 * 16 + 16)


def test_the_operator_is_one_that_torch_can_compile():
    w = torch.randn(1, 2, 16, 16, device=DEVICE)
    b, empty = torch.randn(2, 16, device=DEVICE), torch.empty(0, device=DEVICE)
    network = [w, empty, b, empty, empty, b, b[:, 0].contiguous()]
    arguments = (*states([[4, 3]], 16)[:4], network, "gelu", 4)
    tests = ("test_schema", "test_faketensor")
    library.opcheck(torch.ops.kvenv.score.default, arguments, test_utils=tests)
