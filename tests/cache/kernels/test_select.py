"""Selection: the kernel and its reference against plain Python, on fresh random slots."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kvenv.cache.kernels import layout
from kvenv.cache.kernels import select as module
from kvenv.cache.kernels.select import cost, select
from kvenv.cache.kernels.select_reference import select_reference
from kvenv.errors import KvenvError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = [select, select_reference]


@dataclass
class Case:
    """The arguments of `select`, in order."""

    worth: torch.Tensor
    keep: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    extra: torch.Tensor | None
    starts: torch.Tensor
    lengths: torch.Tensor
    largest: int

    @property
    def arguments(self):
        return [getattr(self, field.name) for field in fields(self)]

    def after(self, function):
        """A copy of the case that ``function`` has changed."""
        parts = [x.clone() if isinstance(x, torch.Tensor) else x for x in self.arguments]
        function(*parts)
        return Case(*parts)


def make(lengths, keep, D=8, DV=8, dtype=torch.float32, extra=True, worth=None, seed=None):
    """Heads in any order, with gaps; what is unused is NaN. ``worth(shape)`` draws worth."""
    draw = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    rows, heads = lengths.shape
    T = max(sum(row) for row in lengths.tolist()) + 2 * heads + 1
    starts, used = torch.zeros_like(lengths), torch.zeros(rows, T, dtype=torch.bool)
    for row in range(rows):
        at = 0
        for head in torch.randperm(heads, generator=draw).tolist():
            at += int(torch.randint(3, (), generator=draw))
            starts[row, head] = at
            used[row, at : at + int(lengths[row, head])] = True
            at += int(lengths[row, head])
    states = [torch.randn(rows, T, d, generator=draw).to(dtype) for d in (D, DV)]
    numbers = worth((rows, T)) if worth else torch.randn(rows, T, generator=draw)
    past = torch.rand(rows, T, generator=draw)
    for poisoned in (*states, numbers, past):
        poisoned[~used] = torch.nan
    positions = torch.randint(1 << 20, (rows, T), generator=draw, dtype=torch.int32)
    tensors = (
        *(numbers, torch.tensor(keep, dtype=torch.int32), *states, positions),
        *(past if extra else None, starts, lengths),
    )
    moved = [x if x is None else x.to(DEVICE) for x in tensors]
    return Case(*moved, max(1, int(lengths.max())))


def plain(case):
    """What must come out, by sorting Python lists."""
    want = case.after(lambda *_: None)
    for row, lengths in enumerate(case.lengths.tolist()):
        for head, length in enumerate(lengths):
            start, keep = int(case.starts[row, head]), int(case.keep[row, head])
            worth = case.worth[row, start : start + length].tolist()
            best = sorted(range(length), key=lambda i: (-worth[i], i))[: max(keep, 0)]
            source = start + torch.tensor(sorted(best), dtype=torch.long, device=DEVICE)
            for old, new in (
                (getattr(case, name), getattr(want, name))
                for name in ("keys", "values", "positions", "extra")
            ):
                if old is not None:
                    new[row, start : start + len(best)] = old[row, source]
            want.lengths[row, head] = len(best)
    return want


def bits(tensor):
    """The tensor as integers, so that NaN and the sign of zero count."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def check(case, ways=WAYS):
    want = plain(case)
    for way in ways:
        got = case.after(way)
        assert torch.equal(got.lengths, want.lengths), way
        used, at = torch.ones_like(case.positions, dtype=torch.bool), want.starts
        for row in range(len(used)):  # freed slots hold anything; all else is as it must be
            for head in range(at.shape[1]):
                first = int(at[row, head])
                freed = slice(
                    first + int(want.lengths[row, head]), first + int(case.lengths[row, head])
                )
                used[row, freed] = False
        for name in ("worth", "keys", "values", "positions", "extra", "starts", "keep"):
            a, b = getattr(got, name), getattr(want, name)
            if a is None:
                continue
            if a.shape[:2] == used.shape and name != "worth":
                a, b = a[used], b[used]
            assert torch.equal(bits(a), bits(b)), (way, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("D", "DV"), [(64, 64), (80, 48), (128, 128), (7, 130)])
def test_every_size_and_type_equals_sorted_lists(dtype, D, DV):
    check(make([[200, 1, 37], [0, 150, 64]], [[150, 1, 20], [5, 1, 0]], D, DV, dtype))


@pytest.mark.parametrize("extra", [True, False])
def test_nothing_else_moves_along_unless_given(extra):
    check(make([[40, 30]], [[25, 29]], extra=extra))


@pytest.mark.parametrize("keep", [-3, 0, 1, 299, 300, 301])
def test_any_number_stays(keep):
    check(make([[300, 150]], [[keep, keep]]))


def test_heads_longer_than_a_block_are_walked(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 128)
    check(make([[1000, 390]], [[700, 385]], worth=lambda s: torch.randint(9, s).float()))


def test_what_is_infinitely_worthy_stays_and_of_equals_the_earlier():
    def worth(shape):
        drawn = torch.randint(3, shape).float()
        drawn[torch.rand(shape) < 0.3] = math.inf
        drawn[torch.rand(shape) < 0.2] = -math.inf
        return drawn

    for keep in (2, 20, 45, 60):
        check(make([[64, 64], [64, 50]], [[keep, keep]] * 2, worth=worth))


def test_zeros_of_both_signs_are_equal():
    case = make([[6]], [[3]], worth=lambda shape: torch.zeros(shape))
    first = int(case.starts[0, 0])
    case.worth[0, first : first + 6 : 2] = -0.0
    check(case)


def test_numbers_next_to_each_other_are_told_apart():
    one = torch.tensor([1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38])
    steps = torch.cat([one, one.nextafter(torch.tensor(math.inf)), -one.abs()])
    check(make([[18]], [[7]], worth=lambda s: steps[torch.randint(18, s)]))


@settings(max_examples=40)
@given(data=st.data())
def test_any_slots_equal_sorted_lists(data):
    rows, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    lengths = [[data.draw(st.integers(0, 150)) for _ in range(heads)] for _ in range(rows)]
    keep = [[data.draw(st.integers(0, 160)) for _ in range(heads)] for _ in range(rows)]
    distinct, seed = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 999))
    draw = torch.Generator().manual_seed(seed)

    def worth(shape):
        return torch.randint(-distinct, distinct, shape, generator=draw).float()

    check(make(lengths, keep, 5, 3, worth=worth, seed=seed))


@pytest.mark.parametrize("way", WAYS)
def test_selecting_twice_is_selecting_once(way):
    once = make([[90, 33]], [[40, 40]]).after(way)
    once.worth.normal_()
    twice = once.after(way)
    assert torch.equal(twice.lengths, once.lengths)
    assert torch.equal(bits(twice.keys), bits(once.keys))


def test_a_selection_waits_for_nothing(no_waiting):
    case = make([[90, 33]], [[40, 40]])
    case.after(select)
    with no_waiting():
        case.after(select_reference)
        if DEVICE == "cuda":  # the interpreter itself reads
            case.after(select)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_large_slots_on_the_device():
    lengths = [[4096, 9000, 2048, 2049]] * 4
    check(make(lengths, [[2048, 8000, 2047, 1]] * 4, 128, 128, torch.bfloat16), [select])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_selection_is_captured_in_a_cuda_graph():
    case = make([[300, 200]], [[100, 150]], 64, 64, torch.bfloat16)
    case.after(select)
    copy = case.after(lambda *_: None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select(*copy.arguments)
    copy.lengths.copy_(case.lengths)
    copy.keep.fill_(17)
    graph.replay()
    assert copy.lengths.tolist() == [[17, 17]]


def test_torch_may_treat_it_as_an_opaque_operator():
    for extra in (True, False):
        case = make([[20, 3]], [[7, 7]], extra=extra)
        library.opcheck(torch.ops.kvenv.select.default, tuple(case.arguments))


def test_cost_counts_every_byte_once():
    row = 2 * 8 * 4
    assert cost(2, 3, 10, 4, row) == (6 * (10 * 4 + 4 * (2 * row + 16)), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": lambda x: x.long()}, "keep.*int64.*must be.*int32"),
        ({"worth": lambda x: x[:, 1:]}, r"worth.*\(1, 27\).*must be \(\(1, 28\)"),
        ({"values": lambda x: x.half()}, "values.*float16.*must be.*float32"),
        ({"keys": lambda x: x.mT.contiguous().mT}, "keys.*False.*must be.*True"),
        ({"extra": lambda x: x.double()}, "extra.*float64"),
        ({"starts": lambda x: x[0]}, r"starts.*\(2,\).*must be \(\(1, 2\)"),
        ({"largest": lambda x: 29}, "largest is 29"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    case = make([[20, 3]], [[7, 7]])
    given = {field.name: getattr(case, field.name) for field in fields(case)}
    given |= {name: alter(given[name]) for name, alter in change.items()}
    with pytest.raises(KvenvError, match=message):
        select(**given)


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(layout, "INTERPRETED", False)
    case = make([[2]], [[1]])
    parts = [x.cpu() if isinstance(x, torch.Tensor) else x for x in case.arguments]
    with pytest.raises(KvenvError, match="not on cpu: use backend='torch'"):
        select(*parts)
