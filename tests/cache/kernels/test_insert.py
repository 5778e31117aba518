"""The fused insert keeps what its reference and the eviction layer keep."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kvenv.cache.kernels import insert as kernel
from kvenv.cache.kernels.insert import cost, insert
from kvenv.cache.kernels.insert_reference import insert_reference
from kvenv.cache.kernels.network import pack
from kvenv.cache.kernels.score import score_reference
from kvenv.cache.padding import LeftPadding
from kvenv.cache.scoring import CacheScorer
from kvenv.cache.slots import EvictionLayer
from kvenv.cache.worth import Limits
from kvenv.errors import KvenvError
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.network import Architecture
from kvenv.trace import ModelInfo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = Architecture(
    ("value", "position", "key_norm", "key", "fill", "value_norm"), (24, 20), budget=9, age=True
)


@dataclass
class Slots:
    """A layer's slots; what is not used is NaN or far from any position."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor
    clock: torch.Tensor

    @classmethod
    def empty(cls, B, capacities, D, dtype=torch.float32, clock=None):
        H, T = len(capacities), sum(capacities)
        begin = torch.tensor(clock or [0] * B).int()
        return cls(
            torch.full((B, T, D), torch.nan, dtype=dtype, device=DEVICE),
            torch.full((B, T, D), torch.nan, dtype=dtype, device=DEVICE),
            torch.full((B, T), 10**9, dtype=torch.int32, device=DEVICE),
            torch.full((B, T), torch.nan, device=DEVICE),
            torch.tensor([0, *capacities]).cumsum(0).int().to(DEVICE),
            torch.zeros(B, H, dtype=torch.int32, device=DEVICE),
            begin.view(B, 1).repeat(1, H).to(DEVICE),
        )

    @property
    def all(self):
        return tuple(vars(self).values())

    def copy(self):
        return Slots(*(one.clone() for one in self.all))

    def held(self, row, head):
        """Positions held, ascending."""
        start, used = int(self.offsets[head]), int(self.lengths[row, head])
        positions = self.positions[row, start : start + used]
        return positions.sort().values.tolist()


def full(clock, positions, scores):
    """One row and one head whose slots are all used."""
    slots = Slots.empty(1, [len(positions)], 8, clock=[clock])
    slots.lengths.fill_(len(positions))
    slots.positions.copy_(torch.tensor([positions]))
    slots.scores.copy_(torch.tensor([scores]))
    return slots


def newcomers(B, H, D, steps, dtype=torch.float32, seed=0):
    """Keys and values (B, H, D) of each step, strided as a model's are."""
    draw = torch.Generator().manual_seed(seed)
    both = torch.randn(steps, 2, B, 1, H, D, generator=draw).to(DEVICE, dtype)
    return [tuple(one.transpose(1, 2).squeeze(2) for one in step) for step in both]


def same(got, want):
    """All but the scores bit for bit."""
    for name, value in vars(want).items():
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "scores" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(vars(got)[name], value, equal_nan=True, msg=name, **tolerance)


def network(architecture, H, D, dtype=torch.float16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    built = architecture.build([(0, h) for h in range(H)], D, draw)
    built.mean.normal_(generator=draw)
    built.std.uniform_(0.5, 2, generator=draw)
    for weight in [*built.weights, *built.biases]:
        weight.data = (3 * weight.data).to(dtype).float()
    if built.age is not None:
        built.age.data.normal_(generator=draw)
    return built.requires_grad_(False)


def run(slots, steps, seed=0, arrived=None, **options):
    """What the kernel makes of newcomers: after every step, what the reference makes."""
    (B, H), D = slots.lengths.shape, slots.keys.shape[-1]
    own, other = slots.copy(), slots.copy()
    for i, (key, value) in enumerate(newcomers(B, H, D, steps, slots.keys.dtype, seed)):
        options["arrived"] = None if arrived is None else arrived[i].to(DEVICE)
        insert(key, value, *own.all, **options)
        insert_reference(key, value, *other.all, **options)
        same(own, other)
        other = own.copy()  # a score that differs in its last bit must not add up
    assert torch.equal(own.clock, slots.clock + steps)
    return own


@settings(max_examples=6)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_ragged_slots_are_those_of_the_reference(capacities, sinks, recent, levels, seed):
    draw = torch.Generator().manual_seed(seed)
    arrived = torch.randn(13, 2, len(capacities), generator=draw)
    if levels:  # ties
        arrived = (arrived * levels).round()
    slots = Slots.empty(2, capacities, 8, clock=[0, 3])
    limits = {"sinks": sinks, "recent": recent, "largest": max(capacities)}
    own = run(slots, 13, seed, arrived, **limits)
    for first, (head, capacity) in itertools.product((0, 3), enumerate(capacities)):
        held = own.held(int(first > 0), head)
        assert len(held) == min(capacity, 13)
        assert set(range(first, sinks)) & set(range(capacity)) <= set(held)
        if sinks + recent < capacity:
            assert set(range(first + 13 - recent, first + 13)) <= set(held)


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "elu", "silu"])
def test_newcomers_are_scored_as_by_the_networks(activation):
    architecture = replace(EVERYTHING, activation=activation)
    packed = pack(network(architecture, 2, 16), architecture, 16, DEVICE)
    own = run(Slots.empty(2, [5, 7], 16), 9, packed=packed, sinks=1, recent=2, largest=7)
    for head, (start, stop) in enumerate(((0, 5), (5, 12))):
        held = (x[:, start:stop].unsqueeze(1) for x in (own.keys, own.values, own.positions))
        want = score_reference(*(x.double().repeat_interleave(2, 1) for x in held), packed)
        got = own.scores[:, start:stop].double()
        torch.testing.assert_close(got, want[:, head], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("features", [("value",), ("key",), ("position",), ("key_norm", "fill")])
@pytest.mark.parametrize("hidden", [(16,), (33, 64)])
def test_any_features_and_depth(features, hidden):
    architecture = Architecture(features, hidden, budget=4 if "fill" in features else None)
    packed = pack(network(architecture, 1, 8), architecture, 8, DEVICE)
    run(Slots.empty(1, [3], 8), 6, packed=packed, sinks=0, recent=1, largest=3)


@pytest.mark.parametrize(("D", "hidden"), [(16, 32), (64, 64), (80, 16), (96, 32), (128, 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_head_size_width_and_type(D, hidden, dtype):
    architecture = Architecture(("key", "value"), (hidden, hidden))
    packed = pack(network(architecture, 2, D, dtype), architecture, D, DEVICE)
    run(Slots.empty(1, [2, 1], D, dtype), 4, packed=packed, sinks=0, recent=1, largest=2)


def test_more_slots_than_a_block_holds(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 16)
    arrived = torch.randn(50, 1, 2, generator=torch.Generator().manual_seed(0)).round()
    run(Slots.empty(1, [40, 17], 8), 50, 1, arrived, sinks=2, recent=3, largest=40)


def test_what_ages_add_decides_with_the_scores():
    age = torch.randn(2, 17, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    arrived = torch.randn(24, 2, 2, generator=torch.Generator().manual_seed(4)) / 4
    slots = Slots.empty(2, [5, 7], 8, clock=[0, 70000])
    limits = {"sinks": 1, "recent": 1, "largest": 7}
    aged = run(slots, 24, 2, arrived, age=age, **limits)
    plain = run(slots, 24, 2, arrived, **limits)
    assert aged.held(0, 0) != plain.held(0, 0)


def test_age_beyond_the_last_knot_is_constant():
    age = torch.linspace(1, 0, 17).expand(1, 17).contiguous().to(DEVICE)
    slots = full(300000, [100, 200, 299000], [0.0] * 3)
    own = run(slots, 1, 0, torch.zeros(1, 1, 1), age=age, sinks=0, recent=1, largest=3)
    assert own.held(0, 0) == [100, 299000, 300000]


@pytest.mark.parametrize("broken", [torch.nan, -torch.inf, torch.inf])
def test_broken_scores_count_as_the_least_or_the_most(broken):
    slots = full(10, [1, 2, 3, 4], [5.0, broken, -1e30, 5.0])
    limits = {"sinks": 0, "recent": 1, "largest": 4}
    own = run(slots, 1, 0, torch.zeros(1, 1, 1), **limits)
    assert own.held(0, 0) == ([1, 2, 4, 10] if broken == torch.inf else [1, 3, 4, 10])
    slots.scores.fill_(broken)
    own = run(slots, 1, 0, torch.zeros(1, 1, 1), **limits)
    assert own.held(0, 0) == [1, 2, 3, 10]


def test_of_equal_scores_the_later_token_goes_and_signs_of_zero_are_equal():
    slots = full(9, [6, 7, 1, 2], [-0.0, 0.0, -0.0, 0.0])
    own = run(slots, 1, 0, torch.zeros(1, 1, 1), sinks=0, recent=1, largest=4)
    assert own.held(0, 0) == [1, 2, 6, 9]


def test_worth_given_stands_above_scores_and_ages():
    slots = Slots.empty(1, [3, 2], 8, clock=[9])
    slots.lengths.copy_(torch.tensor([[3, 1]]))
    slots.positions.copy_(torch.tensor([[0, 1, 2, 3, 77]]))
    slots.scores.copy_(torch.tensor([[0.0, 5.0, 5.0, 1.0, torch.nan]]))
    worth = torch.tensor([[-9.0, 4.0, 3.0, 0.0, torch.nan]], device=DEVICE)
    age = torch.rand(2, 17, device=DEVICE)
    own = run(slots, 1, worth=worth, age=age, sinks=1, recent=1, largest=3)
    assert (own.held(0, 0), own.held(0, 1)) == ([0, 1, 9], [3, 9])
    assert torch.equal(own.scores.isnan(), slots.scores.isnan())  # no score to write


def test_the_newcomer_is_left_out_where_every_slot_stays():
    own = run(Slots.empty(1, [2, 3], 8), 8, 0, torch.zeros(8, 1, 2), sinks=2, recent=2, largest=3)
    assert own.held(0, 0) == [0, 1]
    assert own.held(0, 1) == [0, 1, 6]  # at 7 it is recent still
    skipped = run(own, 1, 0, torch.ones(1, 1, 2), sinks=99, recent=0, largest=3)
    same(skipped, replace(own, clock=own.clock + 1))


@pytest.mark.parametrize("age", [False, True])
@pytest.mark.parametrize("pads", [0, 5])
def test_kept_tokens_are_those_of_the_eviction_layer(age, pads):
    B, H, D, budget, steps = 2, 2, 16, 8, 30
    architecture = replace(EVERYTHING, age=age)
    built = network(architecture, H, D)
    model = ModelInfo("m", "f", "llama", "t", 1, H, H, D, (0,))
    scorer = CacheScorer(NetworkScorer(built, architecture, model), None, {0: H})
    mask = torch.ones(B, steps, dtype=torch.int64)
    mask[1, :pads] = 0
    layer = EvictionLayer(0, Limits(budget, 2, 3), scorer, LeftPadding(mask))
    slots = Slots.empty(B, [budget] * H, D)
    packed = pack(built, architecture, D, DEVICE)
    for i, (key, value) in enumerate(newcomers(B, H, D, steps)):
        layer.update(key.unsqueeze(2), value.unsqueeze(2))
        rows = slice(0, B if i >= pads else 1)  # pads are never stored
        part = Slots(*(one if one is slots.offsets else one[rows] for one in slots.all))
        insert(key[rows], value[rows], *part.all, sinks=2, recent=3, largest=budget, packed=packed)
        for row in range(B):
            for head in range(H):
                kept = layer.positions[row, head]
                assert slots.held(row, head) == kept[kept >= 0].sort().values.tolist()


def test_the_reference_needs_no_answer_from_the_device(no_waiting):
    packed = pack(network(EVERYTHING, 2, 16), EVERYTHING, 16, DEVICE)
    slots = Slots.empty(2, [5, 7], 16)
    key, value = newcomers(2, 2, 16, 1)[0]
    with no_waiting():
        insert_reference(key, value, *slots.all, sinks=1, recent=2, largest=7, packed=packed)
    assert slots.lengths.eq(1).all()


def test_the_operator_says_what_it_writes():
    packed = pack(network(EVERYTHING, 2, 16), EVERYTHING, 16, DEVICE)
    slots = Slots.empty(2, [5, 7], 16)
    key, value = newcomers(2, 2, 16, 1)[0]
    rest = (None, packed.tensors(), None, None, packed.age, 1, 2, 7, "gelu", packed.scalars, 9)
    tests = ("test_schema", "test_faketensor")
    for network_or_not in (rest, (None, [], None, slots.scores.clone(), None, *rest[5:])):
        arguments = (key, value, *slots.all, *network_or_not)
        library.opcheck(torch.ops.kvenv.insert.default, arguments, test_utils=tests)


@pytest.mark.parametrize("function", [insert, insert_reference])
def test_bad_input_is_refused(function):
    packed = pack(network(EVERYTHING, 2, 16), EVERYTHING, 16, DEVICE)
    slots = Slots.empty(2, [5, 7], 16)
    key, value = newcomers(2, 2, 16, 1)[0]
    limits = {"sinks": 0, "recent": 1, "largest": 7}
    unfit = replace(slots, offsets=slots.offsets[1:])
    for new, into in ((key[:1], slots), (key.unsqueeze(2), slots), (key, unfit)):
        with pytest.raises(KvenvError, match="do not fit"):
            function(new, value, *into.all, **limits)
    arrived = torch.zeros(2, 2, device=DEVICE)
    with pytest.raises(KvenvError, match="one way"):
        function(key, value, *slots.all, packed=packed, arrived=arrived, **limits)


def test_cost_counts_slots_states_and_weights():
    keys = torch.empty(2, 12, 16, dtype=torch.float16, device=DEVICE)
    plain = 8 * 24 + 4 * (4 * 32 + 24) + 12
    assert cost(keys, 2) == (plain, 0)
    packed = pack(network(EVERYTHING, 2, 16), EVERYTHING, 16, DEVICE)
    flops = 4 * packed.flops_per_token() + 8 * 24
    assert cost(keys, 2, packed) == (plain + 2 * packed.bytes_per_head(), flops)
