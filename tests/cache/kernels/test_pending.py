"""Newcomers that are scored at the next step: the same tokens stay as if they had it at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kvenv.cache.kernels import newcomer
from kvenv.cache.kernels.insert import insert
from kvenv.cache.kernels.insert_reference import insert_reference, settle
from kvenv.cache.kernels.network import pack
from kvenv.cache.kernels.score import score, score_reference
from kvenv.errors import KvenvError
from kvenv.scorers.network import Architecture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = Architecture(
    ("value", "position", "key_norm", "key", "fill", "value_norm"), (24, 20), budget=9, age=True
)
STATES = ("keys", "values", "positions", "scores")


def empty(B, capacities, D, dtype=torch.float32, clock=None):
    """A layer's slots, what is not used is NaN or far from any position; arguments of insert."""
    H, T = len(capacities), sum(capacities)
    begin = torch.tensor(clock or [0] * B).int()
    return {
        "keys": torch.full((B, T, D), torch.nan, dtype=dtype, device=DEVICE),
        "values": torch.full((B, T, D), torch.nan, dtype=dtype, device=DEVICE),
        "positions": torch.full((B, T), 10**9, dtype=torch.int32, device=DEVICE),
        "scores": torch.full((B, T), torch.nan, device=DEVICE),
        "offsets": torch.tensor([0, *capacities]).cumsum(0).int().to(DEVICE),
        "lengths": torch.zeros(B, H, dtype=torch.int32, device=DEVICE),
        "clock": begin.view(B, 1).repeat(1, H).to(DEVICE),
        "pending": torch.full((B, H, 4), -1, dtype=torch.int32, device=DEVICE),
    }


def cloned(slots):
    return {name: one.clone() for name, one in slots.items()}


def newcomers(slots, steps, seed=0):
    """Keys and values (B, H, D) of each step."""
    draw = torch.Generator().manual_seed(seed)
    (B, H), D = slots["lengths"].shape, slots["keys"].shape[-1]
    return torch.randn(steps, 2, B, H, D, generator=draw).to(DEVICE, slots["keys"].dtype)


def packed_network(architecture, H, D, dtype=torch.float16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    built = architecture.build([(0, h) for h in range(H)], D, draw)
    built.mean.normal_(generator=draw)
    built.std.uniform_(0.5, 2, generator=draw)
    for weight in [*built.weights, *built.biases]:
        weight.data = (3 * weight.data).to(dtype).float()
    if built.age is not None:
        built.age.data.normal_(generator=draw)
    return pack(built.requires_grad_(False), architecture, D, DEVICE)


def same(got, want, names=None):
    """All but the scores bit for bit."""
    for name in names or want:
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "scores" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(got[name], want[name], equal_nan=True, msg=name, **tolerance)


def settled(slots, packed):
    slots = cloned(slots)
    states = (slots[name] for name in STATES)
    settle(*states, slots["offsets"], slots["pending"], packed, score)
    return slots


def run(slots, steps, packed, seed=0, **options):
    """What the kernel makes of newcomers: at every step, what its reference makes."""
    own, other = cloned(slots), cloned(slots)
    for key, value in newcomers(slots, steps, seed):
        insert(key, value, **own, packed=packed, **options)
        insert_reference(key, value, **other, packed=packed, **options)
        same(own, other)
        other = cloned(own)  # a score that differs in its last bit must not add up
    assert own["pending"][..., 2:].eq(steps - 1).all()
    return own


def at_once(slots, steps, packed, seed=0, **options):
    """What the kernel makes of newcomers that are scored as they come."""
    own = cloned(slots) | {"pending": None}
    for key, value in newcomers(slots, steps, seed):
        insert(key, value, **own, packed=packed, **options)
    return own


@settings(max_examples=4)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from([2, 2, 3, 16]),
    st.integers(0, 99),
)
def test_the_same_tokens_stay_as_with_scores_at_once(capacities, sinks, recent, seed):
    packed = packed_network(EVERYTHING, len(capacities), 8, seed=seed)
    slots = empty(2, capacities, 8, clock=[0, 3])
    limits = {"sinks": sinks, "recent": recent, "largest": max(capacities)}
    own = run(slots, 12, packed, seed, **limits)
    want = at_once(slots, 12, packed, seed, **limits)
    same(settled(own, packed), want, (*STATES, "lengths", "clock"))


def test_more_rows_than_a_program_scores():
    packed = packed_network(EVERYTHING, 2, 8)
    slots = empty(9, [3, 4], 8, clock=[5 * i for i in range(9)])
    limits = {"sinks": 1, "recent": 2, "largest": 4}
    own = run(slots, 6, packed, **limits)
    same(settled(own, packed), at_once(slots, 6, packed, **limits), STATES)


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "elu", "silu"])
def test_any_activation(activation):
    architecture = Architecture(("key", "position"), (16, 16), activation=activation)
    packed = packed_network(architecture, 1, 16)
    run(empty(2, [4], 16), 6, packed, sinks=0, recent=2, largest=4)


@pytest.mark.parametrize("features", [("value",), ("key",), ("position",), ("value_norm", "fill")])
@pytest.mark.parametrize("hidden", [(16,), (33, 64)])
def test_any_features_and_depth(features, hidden):
    architecture = Architecture(features, hidden, budget=4 if "fill" in features else None)
    packed = packed_network(architecture, 1, 8)
    run(empty(1, [3], 8), 5, packed, sinks=0, recent=2, largest=3)


@pytest.mark.parametrize(("D", "hidden"), [(16, 32), (80, 64), (128, 128), (256, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_head_size_width_and_type(D, hidden, dtype):
    architecture = Architecture(("key", "value"), (hidden, hidden))
    packed = packed_network(architecture, 2, D, dtype)
    run(empty(1, [3, 3], D, dtype), 5, packed, sinks=0, recent=2, largest=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_that_are_read_in_pieces(monkeypatch, dtype):
    monkeypatch.setattr(newcomer, "PIECE", 4096)
    architecture = Architecture(("key", "value", "key_norm"), (64, 64))
    packed = packed_network(architecture, 1, 80, dtype)
    run(empty(1, [3], 80), 5, packed, sinks=0, recent=2, largest=3)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_numbers_far_from_one_are_scored_alike(scale):
    packed = packed_network(Architecture(("key",), (16, 16), activation="tanh"), 1, 16)
    slots = empty(3, [6], 16)
    for key, value in scale * newcomers(slots, 5):
        insert(key, value, **slots, packed=packed, sinks=0, recent=2, largest=6)
    states = (slots[name][:, :4].unsqueeze(1) for name in ("keys", "values", "positions"))
    want = score_reference(*states, packed)
    torch.testing.assert_close(slots["scores"][:, :4].unsqueeze(1), want, rtol=1e-4, atol=1e-4)


def test_a_score_comes_one_step_late_or_when_settled():
    packed = packed_network(EVERYTHING, 2, 16)
    slots = empty(2, [4, 6], 16)
    for step, (key, value) in enumerate(newcomers(slots, 3)):
        insert(key, value, **slots, packed=packed, sinks=0, recent=2, largest=6)
        assert slots["scores"][:, [0, 4]].isfinite().all() == (step > 0)
        assert slots["scores"][:, [step, 4 + step]].isnan().all()
    done = settled(slots, packed)
    assert done["scores"][:, [2, 6]].isfinite().all()
    assert done["pending"].eq(-1).all()
    same(settled(done, packed), done)
    for key, value in newcomers(slots, 9, seed=1):  # goes on from either
        for one in (slots, done):
            insert(key, value, **one, packed=packed, sinks=0, recent=2, largest=6)
    same(settled(slots, packed), settled(done, packed))


def test_a_newcomer_that_is_left_out_leaves_no_score():
    packed = packed_network(EVERYTHING, 1, 8)
    slots = empty(1, [2], 8)
    own = run(slots, 5, packed, sinks=2, recent=3, largest=2)
    assert own["positions"].tolist() == [[0, 1]]
    assert own["pending"][0, 0, :2].tolist() == [-1, -1]
    assert own["scores"].isfinite().all()


def test_settling_waits_for_no_answer_from_the_device(no_waiting):
    packed = packed_network(EVERYTHING, 2, 16)
    slots = empty(2, [5, 7], 16)
    key, value = newcomers(slots, 1)[0]
    with no_waiting():
        insert_reference(key, value, **slots, sinks=1, recent=2, largest=7, packed=packed)
        states = (slots[name] for name in STATES)
        settle(*states, slots["offsets"], slots["pending"], packed, score_reference)
    assert slots["scores"][:, [0, 5]].isfinite().all()


def test_the_operator_says_what_it_writes():
    packed = packed_network(EVERYTHING, 2, 16)
    slots = empty(2, [5, 7], 16)
    rest = (packed.tensors(), None, None, packed.age, 1, 2, 7, "gelu", packed.scalars, 9)
    arguments = (*newcomers(slots, 1)[0], *slots.values(), *rest)
    tests = ("test_schema", "test_faketensor")
    library.opcheck(torch.ops.kvenv.insert.default, arguments, test_utils=tests)


@pytest.mark.parametrize("function", [insert, insert_reference])
def test_scores_may_wait_only_where_someone_makes_them_in_time(function):
    packed = packed_network(EVERYTHING, 2, 16)
    slots = SimpleNamespace(**empty(2, [5, 7], 16))
    key, value = newcomers(vars(slots), 1)[0]
    for recent, networks in ((1, packed), (2, None)):
        with pytest.raises(KvenvError, match="scores can wait"):
            function(key, value, **vars(slots), sinks=0, recent=recent, largest=7, packed=networks)
    slots.pending = slots.pending[..., :3]
    with pytest.raises(KvenvError, match="four numbers"):
        function(key, value, **vars(slots), sinks=0, recent=2, largest=7, packed=packed)
