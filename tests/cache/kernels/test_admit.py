"""Admission of newcomers: the kernel against the reference, and that against plain Python."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import library

from kvenv.cache.kernels import admit as module
from kvenv.cache.kernels.admit import admit, cost
from kvenv.cache.kernels.admit_reference import admit_reference
from kvenv.errors import KvenvError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@dataclass
class Case:
    """The arguments of `admit`, in order."""

    new_keys: torch.Tensor
    new_values: torch.Tensor
    new_positions: torch.Tensor
    new_scores: torch.Tensor
    new_worth: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor
    worth: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor
    largest: int

    @property
    def arguments(self):
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def capacities(self):
        return self.offsets.diff().tolist()

    def copy(self):
        return Case(*(p.clone() if isinstance(p, torch.Tensor) else p for p in self.arguments))

    def after(self, function):
        """A copy of the case that ``function`` has changed."""
        copy = self.copy()
        function(*copy.arguments)
        return copy

    def used(self):
        """Whether each slot (B, T) is in use."""
        used = torch.zeros(self.positions.shape, dtype=torch.bool)
        for b, lengths in enumerate(self.lengths.tolist()):
            for start, length in zip(self.offsets.tolist(), lengths, strict=False):
                used[b, start : start + length] = True
        return used.to(self.positions.device)


def make(
    capacities, lengths, q, *, D=8, dtype=torch.float32, pads=None, worth=None, seed=0, poison=True
):
    """A random case of B = len(lengths) rows; ``worth(shape, rng)`` draws worth."""
    rng = torch.Generator().manual_seed(seed)
    B, H, T = len(lengths), len(capacities), sum(capacities)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    draw = worth or (lambda shape, rng: torch.randn(shape, generator=rng))
    used = torch.tensor(lengths, dtype=torch.int32).reshape(B, H)
    # Distinct positions of a head: what it holds is older than the newcomers, in no order.
    positions = torch.zeros(B, T, dtype=torch.int32)
    offsets = [0, *torch.tensor(capacities).cumsum(0).tolist()]
    for h, c in enumerate(capacities):
        order = torch.rand(B, 3 * c, generator=rng).argsort(-1)[:, :c]
        positions[:, offsets[h] : offsets[h + 1]] = order.int()
    fresh = (torch.arange(q) + 3 * max(capacities)).int().expand(B, H, q).clone()
    for b, count in enumerate(pads or []):
        fresh[b, :, : min(count, q)] = -1 - b
    case = Case(
        *(normal(B, H, q, D).to(dtype), normal(B, H, q, D).to(dtype), fresh),
        *(normal(B, H, q), draw((B, H, q), rng)),
        *(normal(B, T, D).to(dtype), normal(B, T, D).to(dtype), positions),
        *(normal(B, T), draw((B, T), rng)),
        *(torch.tensor(offsets, dtype=torch.int32), used, max(capacities)),
    )
    if poison:
        unused = ~case.used()
        for tensor in (case.keys, case.values, case.scores, case.worth):
            tensor[unused] = torch.nan
        case.positions[unused] = (seed % 2) * (2**31 - 1)  # first or last of equals, were they read
        pad = case.new_positions < 0
        for tensor in (case.new_keys, case.new_values, case.new_scores, case.new_worth):
            tensor[pad] = torch.nan
    return Case(*(p.to(DEVICE) if isinstance(p, torch.Tensor) else p for p in case.arguments))


def bits(tensor):
    """The tensor as integers, so that NaN and the sign of zero count."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def agree(case):
    """Check kernel and reference on all that they change; return what the kernel made."""
    ours, theirs = case.after(admit), case.after(admit_reference)
    for name in ("keys", "values", "positions", "scores", "lengths"):
        # Unused slots too: neither may write there.
        assert torch.equal(bits(getattr(ours, name)), bits(getattr(theirs, name))), name
    assert (ours.lengths <= ours.offsets.diff()).all()
    return ours


def ties(shape, rng):
    """Few distinct numbers: both zeros, both infinities."""
    numbers = torch.tensor([-INF, -1.5, -0.0, 0.0, 0.0, 2.0, INF])
    return numbers[torch.randint(len(numbers), shape, generator=rng)]


def plain(case):
    """The layout that `admit` defines, token by token: (positions, lengths) as lists."""
    positions, lengths = case.positions.tolist(), case.lengths.tolist()
    offsets, worth = case.offsets.tolist(), case.worth.tolist()
    for b, row in enumerate(lengths):
        for h, used in enumerate(row):
            start, capacity = offsets[h], offsets[h + 1] - offsets[h]
            held = [(-worth[b][s], positions[b][s], s) for s in range(start, start + used)]
            fresh = [
                (-w, p, None)
                for w, p in zip(
                    case.new_worth[b, h].tolist(), case.new_positions[b, h].tolist(), strict=True
                )
                if p >= 0
            ]
            kept = sorted(held + fresh, key=lambda token: token[:2])[:capacity]
            taken = {s for _, _, s in kept}
            free = [s for s in range(start, start + capacity) if s not in taken]
            arrivals = [token[1] for token in fresh if token in kept]
            for slot, position in zip(free, arrivals, strict=False):
                positions[b][slot] = position
            lengths[b][h] = len(kept)
    return positions, lengths


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that few tokens span several."""
    monkeypatch.setattr(module, "BLOCK", 32)
    monkeypatch.setattr(module, "ROWS", 8)


@pytest.mark.parametrize("q", [1, 4, 5, 13])
def test_an_empty_head_keeps_the_best_of_a_prefill(q):
    case = make([5, 1, 9], [[0, 0, 0], [0, 0, 0]], q, seed=q)
    after = agree(case)
    assert after.lengths.tolist() == [[min(q, c) for c in (5, 1, 9)]] * 2


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("q", [1, 37])
@pytest.mark.parametrize("worth", [None, ties])
def test_kernel_and_reference_agree_on_ragged_heads_held_lengths_and_pads(seed, q, worth):
    rng = torch.Generator().manual_seed(100 * seed + q)
    capacities = [1, *torch.randint(1, 50, (2,), generator=rng).tolist()]
    lengths = [
        [int(torch.randint(0, c + 1, (), generator=rng)) for c in capacities] for _ in range(2)
    ]
    lengths[seed % 2] = capacities
    agree(
        make(
            capacities,
            lengths,
            q,
            pads=[[0, q // 2], [q // 2, q], [0, 0]][seed],
            worth=worth,
            seed=seed,
        )
    )


def test_the_blocks_used_on_a_gpu_span_several_steps():
    agree(make([70], [[0], [50]], 2 * module.BLOCK + 77, pads=[0, 900], worth=ties))
    agree(make([70, 3], [[30, 1]], module.BLOCK + 1, seed=1))


def test_all_fit_and_are_appended_in_order():
    case = make([6, 8], [[2, 0], [3, 5]], 4, pads=[0, 1])
    after = agree(case)
    assert after.lengths.tolist() == [[6, 4], [6, 8]]
    assert torch.equal(after.positions[0, 2:6], case.new_positions[0, 0])
    assert torch.equal(after.positions[1, 6 + 5 : 6 + 8], case.new_positions[1, 1, 1:])
    assert torch.equal(after.keys[1, 6 + 5 : 6 + 8], case.new_keys[1, 1, 1:])


def test_a_row_of_pads_changes_nothing():
    case = make([4, 3], [[0, 2], [4, 3]], 5, pads=[5, 5])
    after = agree(case)
    for name in ("keys", "values", "positions", "scores", "lengths"):
        assert torch.equal(bits(getattr(after, name)), bits(getattr(case, name)))


def test_no_newcomers_change_nothing():
    case = make([4, 3], [[0, 2]], 0)
    assert torch.equal(agree(case).lengths, case.lengths)


@pytest.mark.parametrize("worth", [-INF, -0.0, 0.0, 1.25, INF])
def test_of_equal_worth_the_earliest_positions_stay(worth):
    def draw(shape, _):
        return torch.full(shape, worth)

    case = make([7, 2], [[7, 1]], 9, worth=draw)
    held = case.positions.clone()
    case.new_positions[0, 0, 3] = 1000  # later than all others, and in their midst
    case.new_positions[0, 1, 8] = 22
    case.positions[0, 7] = 23
    case.new_positions[0, 1, :8] += 1000
    after = agree(case)
    assert torch.equal(after.positions[0, :7], held[0, :7])
    assert after.positions[0, 7:].tolist() == [23, 22]


def test_minus_zero_equals_zero():
    case = make([2], [[2]], 2, worth=lambda shape, _: torch.zeros(shape))
    case.positions[0] = torch.tensor([8, 5])
    case.new_positions[0, 0] = torch.tensor([7, 3])
    case.worth[0] = torch.tensor([0.0, -0.0])
    case.new_worth[0, 0] = torch.tensor([0.0, -0.0])
    assert agree(case).positions.tolist() == [[3, 5]]


def test_numbers_next_to_one_another_are_told_apart():
    near = [struct.unpack("f", struct.pack("i", n))[0] for n in (1, 2, 2**23, 2**30, 2**30 + 1)]
    numbers = sorted([*near, *(-n for n in near), 0.0, INF, -INF, 3.4028235e38, -3.4028235e38])
    for capacity in range(1, len(numbers), 2):
        case = make([capacity], [[0]], len(numbers), seed=capacity)
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(capacity))
        case.new_worth[0, 0] = torch.tensor(numbers, device=DEVICE)[order]
        case.new_positions[0, 0] = order.flip(0).int()
        after = agree(case)
        kept = order >= len(numbers) - capacity
        assert after.positions[0].tolist() == order.flip(0)[kept].tolist()


@pytest.mark.parametrize("shift", [0, 19])
def test_equals_beside_close_neighbours_are_counted_whatever_their_bits(shift):
    # Of six equals three fit: three tokens are better by one step, and one by two.
    steps = torch.tensor([0] * 4 + [1] * 3 + [2] + [0] * 2 + [-1] * 2)
    case = make([7] * 8, [[0] * 8], 12, D=1)
    numbers = (torch.arange(32, 40)[:, None] + steps) << shift
    case.new_worth[0] = numbers.int().view(torch.float32)
    kept = case.new_positions[0, :, [0, 1, 2, 4, 5, 6, 7]]
    assert torch.equal(agree(case).positions.reshape(8, 7), kept)


def test_survivors_do_not_move_and_newcomers_take_free_slots_in_order():
    case = make([5], [[4]], 4)
    case.positions[0, :4] = torch.tensor([9, 2, 7, 4])
    case.worth[0, :4] = torch.tensor([5.0, 1.0, 6.0, 0.0])
    case.new_positions[0, 0] = torch.tensor([21, 20, 23, 22])
    case.new_worth[0, 0] = torch.tensor([3.0, -1.0, INF, 2.0])
    after = agree(case)
    assert after.positions.tolist() == [[9, 21, 7, 23, 22]]
    assert after.lengths.tolist() == [[5]]
    assert torch.equal(after.keys[0, [0, 2]], case.keys[0, [0, 2]])
    for old, new in (("keys", "new_keys"), ("values", "new_values"), ("scores", "new_scores")):
        assert torch.equal(getattr(after, old)[0, [1, 3, 4]], getattr(case, new)[0, 0, [0, 2, 3]])


def test_protected_newcomers_beyond_the_capacity_leave_the_earliest():
    case = make([3], [[2]], 6, worth=lambda shape, _: torch.full(shape, INF))
    case.worth[0, 0] = 4.0
    case.new_positions[0, 0] = torch.tensor([50, 40, 30, 60, 20, 10])
    held = case.positions[0, 1].item()
    assert agree(case).positions.tolist() == [[20, held, 10]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [8, 80, 256])
def test_rows_of_any_width_and_type_are_copied_bit_by_bit(D, dtype):
    agree(make([9, 4], [[5, 4], [0, 2]], 11, D=D, dtype=dtype, pads=[0, 3]))


@pytest.mark.parametrize("function", [admit, admit_reference])
def test_newcomers_may_be_strided_and_positions_expanded(function):
    case = make([6, 4, 5], [[3, 4, 0], [6, 0, 2]], 9, D=16, pads=[2, 0])
    contiguous = case.after(function)

    def transposed(tensor):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    keys = torch.cat([case.new_keys, case.new_keys], -1)[..., :16]  # rows apart
    odd = case.new_values.transpose(-1, -2).contiguous().transpose(-1, -2)
    positions = case.new_positions[:, :1].contiguous().expand(-1, 3, -1)
    assert positions.stride(1) == 0
    scores, worth = transposed(case.new_scores), transposed(case.new_worth)
    for values in (transposed(case.new_values), odd):
        strided = case.copy()
        function(keys, values, positions, scores, worth, *strided.arguments[5:])
        for name in ("keys", "values", "positions", "scores", "lengths"):
            assert torch.equal(bits(getattr(strided, name)), bits(getattr(contiguous, name)))


def test_blocks_one_after_the_other_keep_what_one_block_keeps():
    case = make([10, 3], [[0, 0]], 40, pads=[12], worth=ties)
    whole, parts = case.after(admit), case.copy()
    for start in range(0, 40, 17):
        new = [p[:, :, start : start + 17] for p in case.arguments[:5]]
        # The worth of what is held: by position, since newcomers are numbered in order.
        index = (parts.positions.clamp(30, 69) - 30).long()
        for h, (low, high) in enumerate([(0, 10), (10, 13)]):
            parts.worth[:, low:high] = case.new_worth[:, h].gather(1, index[:, low:high])
        admit(*new, *parts.arguments[5:])
    assert torch.equal(whole.lengths, parts.lengths)
    for low, high in ((0, 10), (10, 13)):
        ours, theirs = (c.positions[:, low:high].sort(-1).values for c in (whole, parts))
        assert torch.equal(ours, theirs)


WORTH = st.sampled_from([-INF, -2.0, -0.0, 0.0, 1e-45, 1.0, INF])


@st.composite
def cases(draw):
    capacities = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    rows = draw(st.integers(1, 2))
    lengths = [[draw(st.integers(0, c)) for c in capacities] for _ in range(rows)]
    q = draw(st.integers(1, 6))
    case = make(capacities, lengths, q, D=2, seed=draw(st.integers(0, 9)), poison=False)
    for tensor in (case.worth, case.new_worth):
        numbers = draw(st.lists(WORTH, min_size=tensor.numel(), max_size=tensor.numel()))
        tensor.copy_(torch.tensor(numbers).reshape(tensor.shape))
    for b in range(rows):
        for h in range(len(capacities)):
            fresh = draw(st.permutations(range(100, 100 + q)))
            pads = draw(st.lists(st.booleans(), min_size=q, max_size=q))
            case.new_positions[b, h] = torch.tensor(
                [-1 if pad else p for p, pad in zip(fresh, pads, strict=True)]
            )
    return case


@given(case=cases())
@example(case=make([1], [[1]], 1, D=2, worth=lambda shape, _: torch.zeros(shape)))
def test_the_reference_does_what_plain_python_does(case):
    positions, lengths = plain(case)
    after = case.after(admit_reference)
    assert after.lengths.tolist() == lengths
    used = after.used()
    expected = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    assert torch.equal(after.positions[used], expected[used])
    assert torch.equal(after.positions[~used], case.positions[~used])


def test_the_reference_takes_double_precision():
    case = make([4, 2], [[4, 1]], 6)
    real = ("new_keys", "new_values", "keys", "values")
    double = replace(case, **{name: getattr(case, name).double() for name in real})
    ours, theirs = double.after(admit_reference), case.after(admit_reference)
    assert ours.keys.dtype is torch.float64
    assert torch.equal(ours.positions, theirs.positions)
    used = ours.used()
    assert torch.equal(ours.keys[used].float(), theirs.keys[used])


def test_the_operator_declares_what_it_changes():
    case = make([4, 2], [[4, 1], [0, 2]], 6, poison=False)
    tests = ("test_schema", "test_faketensor")
    library.opcheck(admit, tuple(case.arguments), test_utils=tests)


@pytest.mark.parametrize("function", [admit, admit_reference])
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("new_positions", lambda t: t.long(), "new_positions of shape .*int32"),
        ("new_worth", lambda t: t[..., 1:], "new_worth of shape"),
        ("lengths", lambda t: t[:, :1], "lengths of shape"),
        ("values", lambda t: t.half(), "values of shape"),
        ("keys", lambda t: t[0], r"slots \(B, T, D\)"),
        ("keys", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "keys contiguous"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(function, name, change, says):
    case = make([4, 2], [[4, 1], [0, 2]], 6)
    with pytest.raises(KvenvError, match=says):
        function(*replace(case, **{name: change(getattr(case, name))}).arguments)


def test_tensors_on_the_cpu_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)
    case = make([2], [[0]], 1)
    cpu = [p.cpu() if isinstance(p, torch.Tensor) else p for p in case.arguments]
    with pytest.raises(KvenvError, match="admit_reference"):
        admit(*cpu)


def test_cost_counts_each_candidate_and_each_arrival_once():
    # Two keys of 4 bytes, values alike, read and written, with position and score; two lists.
    assert cost(rows=1, heads=1, q=3, held=2, arrivals=1, row=4) == (5 * 8 + 2 * 16 + 16, 0)
    assert cost(rows=2, heads=3, q=3, held=2, arrivals=1, row=4)[0] == 6 * 88
