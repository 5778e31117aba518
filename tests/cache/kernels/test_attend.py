"""`attend` against plain softmax in float64, on fresh random slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kvenv.cache.kernels import attend as module
from kvenv.cache.kernels import layout
from kvenv.cache.kernels.attend import attend, attend_reference, cost, launch, serves, splits_for
from kvenv.errors import KvenvError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def slots(capacities, lengths, G, D, dtype=torch.float32, seed=None):
    """Arguments of `attend` but the last; heads in any order, with gaps; what is unused is NaN."""
    draw = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    rows, heads = lengths.shape
    T = sum(capacities) + 2 * heads
    query = torch.randn(rows, heads * G, D, generator=draw)
    drawn = torch.randn(2, rows, T, D, generator=draw)
    keys, values = torch.full_like(drawn, torch.nan)
    starts = torch.zeros(rows, heads, dtype=torch.int32)
    for row in range(rows):
        at = 0
        for head in torch.randperm(heads, generator=draw).tolist():
            at += int(torch.randint(3, (), generator=draw))
            starts[row, head] = at
            used = slice(at, at + int(lengths[row, head]))
            keys[row, used], values[row, used] = drawn[:, row, used]
            at += capacities[head]
    tensors = [one.to(DEVICE, dtype) for one in (query, keys, values)]
    return (*tensors, starts.to(DEVICE), lengths.to(DEVICE), 1.7 * D**-0.5)


def exact(query, keys, values, starts, lengths, scale):
    """One softmax after another, in float64."""
    out = torch.zeros_like(query, dtype=torch.float64)
    G = query.shape[1] // lengths.shape[1]
    for row, uses in enumerate(lengths.tolist()):
        for head, used in enumerate(uses):
            here = slice(int(starts[row, head]), int(starts[row, head]) + used)
            group = slice(head * G, head * G + G)
            scores = query[row, group].double() @ keys[row, here].double().T * scale
            out[row, group] = scores.softmax(-1) @ values[row, here].double()
    return out


def close(out, inputs):
    expected = exact(*inputs)
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def poison(monkeypatch):
    """Makes new memory hold NaN, so that an element that is not written shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        made = new_empty(self, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("G", "D"), [(1, 64), (3, 80), (4, 96), (7, 128), (8, 256), (17, 64)])
@pytest.mark.parametrize("splits", [1, 3])
def test_every_head_size_group_and_type_equals_the_exact_softmax(dtype, G, D, splits):
    inputs = slots([1, 50, 37], [[1, 50, 20], [0, 33, 37]], G, D, dtype)
    out = launch(*inputs, 50, splits=splits, block=16)
    assert out.dtype == dtype
    close(out, inputs)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_defaults_split_long_heads_and_equal_the_exact_softmax(dtype):
    inputs = slots([1030, 5], [[1030, 5], [777, 0]], 2, 64, dtype)
    close(attend(*inputs, 1030), inputs)


@pytest.mark.usefixtures("poison")
@settings(max_examples=12)
@given(data=st.data())
def test_any_lengths_in_any_shares_equal_the_exact_softmax(data):
    capacities = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    rows = data.draw(st.integers(1, 2))
    lengths = [[data.draw(st.integers(0, c)) for c in capacities] for _ in range(rows)]
    splits = data.draw(st.integers(1, 5))
    block = data.draw(st.sampled_from([16, 32]))
    inputs = slots(capacities, lengths, 2, 64, seed=data.draw(st.integers(0, 99)))
    close(launch(*inputs, max(capacities), splits=splits, block=block), inputs)


@pytest.mark.parametrize("way", ["kernel", "reference"])
@pytest.mark.parametrize("splits", [1, 2])
def test_rows_and_heads_without_slots_give_zeros(way, splits):
    inputs = slots([40, 20], [[0, 0], [0, 20]], 4, 64)
    if way == "kernel":
        out = launch(*inputs, 40, splits=splits, block=16)
    else:
        out = attend_reference(*inputs, 40)
    assert out[0].eq(0).all()
    assert out[1, :4].eq(0).all()
    close(out, inputs)


def test_a_single_slot_gives_its_value():
    query, keys, values, starts, *rest = slots([1, 1], [[1, 1]] * 3, 3, 80, torch.float16)
    out = attend(query, keys, values, starts, *rest, 1)
    row = torch.arange(3, device=DEVICE).unsqueeze(1)
    assert torch.equal(out, values[row, starts].repeat_interleave(3, 1))


@pytest.mark.parametrize("magnitude", [1e-3, 300.0])
def test_scores_far_from_zero_neither_overflow_nor_vanish(magnitude):
    query, *rest = slots([64], [[64]], 2, 64)
    inputs = (query * magnitude, *rest)
    out, expected = launch(*inputs, 64, splits=4, block=16), exact(*inputs)
    torch.testing.assert_close(out.double(), expected, rtol=5e-3, atol=5e-3)


def test_the_order_of_slots_does_not_matter():
    query, keys, values, starts, *rest = slots([90], [[90]], 4, 64)
    out = attend(query, keys, values, starts, *rest, 90)
    order = torch.arange(keys.shape[1], device=DEVICE)
    first = int(starts[0, 0])
    order[first : first + 90] = first + torch.randperm(90, device=DEVICE)
    moved = attend(query, keys[:, order], values[:, order], starts, *rest, 90)
    torch.testing.assert_close(moved, out, rtol=1e-5, atol=1e-5)


def test_a_query_with_gaps_is_read_right():
    query, *rest = slots([30, 9], [[30, 9]], 3, 64)
    wide = torch.full((1, 6, 128), torch.nan, device=DEVICE)
    wide[..., ::2] = query
    close(attend(wide[..., ::2], *rest, 30), (query, *rest))


def test_the_reference_in_float64_equals_the_exact_softmax():
    query, keys, values, *rest = slots([1, 50, 37], [[1, 50, 20], [0, 33, 37]], 3, 24)
    inputs = (query.double(), keys.double(), values.double(), *rest)
    out = attend_reference(*inputs, 50)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, exact(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_reference_equals_the_exact_softmax_in_the_dtype_of_its_inputs(dtype):
    inputs = slots([5, 60], [[5, 41], [0, 60]], 3, 80, dtype)
    out = attend_reference(*inputs, 60)
    assert out.dtype == dtype
    tolerance = 4 * TOLERANCE[dtype]  # scores are rounded too
    torch.testing.assert_close(out.double(), exact(*inputs), rtol=tolerance, atol=tolerance)


def test_torch_may_treat_it_as_an_opaque_operator():
    inputs = slots([20, 3], [[20, 2]], 2, 64)
    library.opcheck(torch.ops.kvenv.attend.default, (*inputs, 20))


def test_a_step_waits_for_nothing(no_waiting):
    inputs = slots([20, 3], [[20, 2]], 2, 64)
    with no_waiting():
        attend_reference(*inputs, 20)
        if DEVICE == "cuda":  # the interpreter itself reads
            attend(*inputs, 20)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_step_is_captured_in_a_cuda_graph():
    inputs = slots([700, 30], [[700, 2], [1, 30]], 4, 128, torch.bfloat16)
    lengths = inputs[4]
    attend(*inputs, 700)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*inputs, 700)
    lengths[0, 0] = 300
    graph.replay()
    close(out, inputs)


@pytest.mark.parametrize(
    ("programs", "largest", "splits"),
    [(128, 4096, 1), (8, 4096, 16), (1, 131072, 128), (1024, 4096, 1), (8, 100, 1), (1, 256, 2)],
)
def test_splits_fill_132_multiprocessors_with_programs_worth_starting(programs, largest, splits):
    assert splits_for(programs, largest, 132) == splits


@given(st.integers(1, 4096), st.integers(1, 1 << 20), st.integers(1, 200))
def test_splits_never_overfill_the_device_nor_starve_a_program(programs, largest, multiprocessors):
    splits = splits_for(programs, largest, multiprocessors, 32)
    assert 1 <= splits <= module.MOST_SPLITS
    if splits > 1:
        assert splits * programs <= module.PROGRAMS * multiprocessors
        assert largest / splits >= module.LEAST_BLOCKS * 32


def test_cost_counts_every_byte_and_product_once():
    inputs = slots([6, 3], [[6, 3]] * 2, 4, 64, torch.float16)
    out = attend(*inputs, 6)
    held = 2 * (2 * 9 * 64 * 2)  # keys and values in use
    moved = held + sum(x.numel() * x.element_size() for x in (inputs[0], *inputs[3:5], out))
    scores = 2 * 4 * 9  # rows, query heads of a KV head, slots of a row
    assert cost(2, 8, 2, 9, 64, 2) == (moved, 2 * 2 * 64 * scores)


def test_it_serves_the_head_sizes_and_types_that_it_names():
    for D in (64, 80, 96, 128, 256):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert serves(D, dtype)
    assert not serves(72, torch.float16)
    assert not serves(64, torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": lambda x: x[..., :40]}, "not 40"),
        ({"query": lambda x: x.double()}, "not 64 in torch.float64"),
        ({"query": lambda x: x[:, :3]}, "3 query heads"),
        ({"keys": lambda x: x.half()}, "keys.*float16.*must be.*float32"),
        ({"values": lambda x: x[:, :-1]}, r"values.*\(1, 26, 64\).*must be \(\(1, 27, 64\)"),
        ({"keys": lambda x: x.mT.contiguous().mT}, "keys.*False.*must be.*True"),
        ({"starts": lambda x: x[0]}, r"starts.*\(2,\).*must be \(\(1, 2\)"),
        ({"lengths": lambda x: x.long()}, "lengths.*int64.*must be.*int32"),
        ({"largest": lambda x: 28}, "largest is 28"),
        ({"largest": lambda x: 0}, "largest is 0"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    names = ["query", "keys", "values", "starts", "lengths", "scale", "largest"]
    given = dict(zip(names, (*slots([20, 3], [[20, 2]], 2, 64), 20), strict=True))
    given |= {name: alter(given[name]) for name, alter in change.items()}
    with pytest.raises(KvenvError, match=message):
        attend(**given)


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(layout, "INTERPRETED", False)
    inputs = [x.cpu() if isinstance(x, torch.Tensor) else x for x in slots([2], [[2]], 1, 64)]
    with pytest.raises(KvenvError, match="not on cpu: use backend='torch'"):
        attend(*inputs, 2)
