"""Column sums and maxima against float64, through the interpreter or on the GPU."""

from __future__ import annotations

import secrets
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from kvenv.cache.kernels import columns as module
from kvenv.cache.kernels.columns import column_sums, columns, columns_reference, cost
from kvenv.cache.kernels.flash import flash
from kvenv.errors import KvenvError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Products and sums are float32's, whatever the inputs are; a GPU's exponentials are approximate.
TOLERANCE = 1e-4 if DEVICE == "cuda" else 2e-5
close = partial(torch.testing.assert_close, rtol=TOLERANCE, atol=TOLERANCE)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.Generator().manual_seed(secrets.randbits(60))
    return torch.randn(*shape, generator=random).to(DEVICE, dtype)


def lse_of(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Natural log-sum-exp (B, Hq, S) float64 of causal attention over a whole sequence."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    hidden = torch.ones(query.shape[2], key.shape[2], device=DEVICE).triu(1).bool()
    return (query.double() @ key.mT * scale).masked_fill(hidden, -torch.inf).logsumexp(-1)


def agree(query, key, lse, start: int, n: int, scale: float) -> None:
    got = columns(query, key, lse.float(), start, n, scale)
    # The log-sum-exp that the kernel is given is float32's; the reference gets the same one.
    want = columns_reference(query.double(), key.double(), lse.float().double(), start, n, scale)
    for mine, right in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        close(mine.double(), right)
    close(column_sums(query, key, lse.float(), start, n, scale), got[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "d", "start", "n"),
    [(1, 64, 0, 147), (3, 80, 129, 129), (7, 128, 101, 101), (8, 16, 40, 77), (1, 256, 0, 131)],
)
def test_kernel_agrees_with_float64(
    dtype: torch.dtype, group: int, d: int, start: int, n: int
) -> None:
    key = drawn(1, 2, 147, d, dtype=dtype)
    query = drawn(1, 2 * group, 147, d, dtype=dtype)
    lse = lse_of(query, key, d**-0.5)
    agree(query[:, :, start:], key, lse[:, :, start:], start, n, d**-0.5)


@pytest.mark.skipif(DEVICE == "cpu", reason="too long for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_prompt_agrees_with_float64(dtype: torch.dtype) -> None:
    query, key = drawn(1, 8, 4133, 128, dtype=dtype), drawn(1, 2, 4133, 128, dtype=dtype)
    lse = lse_of(query, key, 128**-0.5)
    agree(query, key, lse, 0, 4133, 128**-0.5)
    agree(query[:, :, 4069:], key, lse[:, :, 4069:], 4069, 4069, 128**-0.5)


@settings(max_examples=10)
@given(st.data())
def test_any_sizes_agree_with_float64(data: st.DataObject) -> None:
    def whole(name: str, low: int, high: int) -> int:
        return data.draw(st.integers(low, high), label=name)

    heads, group, d = whole("H", 1, 2), whole("G", 1, 4), whole("D", 1, 40)
    length = whole("S", 1, 140)
    start, n = whole("start", 0, length - 1), whole("n", 1, length)
    query = drawn(1, heads * group, length, d)
    key = drawn(1, heads, length, d)
    end = whole("end", start, length)
    lse = lse_of(query, key, 0.5)
    agree(query[:, :, start:end], key, lse[:, :, start:end], start, n, 0.5)


@pytest.mark.parametrize(("rows", "group"), [(1, 1), (1, 3), (2, 2)])
def test_queries_split_among_programs_agree_with_float64(
    rows: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", 1)
    query, key = drawn(rows, 2 * group, 99, 16), drawn(rows, 2, 99, 16)
    lse = lse_of(query, key, 0.2)
    agree(query, key, lse, 0, 99, 0.2)
    agree(query[:, :, 91:], key, lse[:, :, 91:], 91, 91, 0.2)


@pytest.mark.parametrize("splits", [1, 10**6])
def test_every_result_is_written_and_repeats_bit_for_bit(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRAMS", splits)
    monkeypatch.setattr(module, "STEPS", 1)
    query, key = drawn(1, 4, 90, 32), drawn(1, 2, 90, 32)
    lse = lse_of(query, key, 0.2).float()
    made: list[torch.Tensor] = []

    def poisoned(empty):
        def make(*args, **kwargs):
            made.append(empty(*args, **kwargs).fill_(torch.nan))
            return made[-1]

        return make

    first = columns(query, key, lse, 0, 85, 0.2)
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    again = columns(query, key, lse, 0, 85, 0.2)
    assert len(made) >= 2
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
        assert torch.isfinite(one).all()


def test_what_lies_beyond_the_queries_and_keys_is_not_read() -> None:
    whole = {"q": drawn(4, 200, 24), "k": drawn(2, 200, 24)}
    lse = lse_of(whole["q"][None], whole["k"][None], 0.2)[0].float()
    want = columns(whole["q"][:, 50:101], whole["k"], lse[:, 50:101], 50, 77, 0.2)
    for name, seen in (("q", slice(50, 101)), ("k", slice(0, 77))):
        poison = torch.full_like(whole[name], torch.nan)
        poison[:, seen] = whole[name][:, seen]
        whole[name] = poison
    beyond = torch.full_like(lse, torch.nan)
    beyond[:, 50:101] = lse[:, 50:101]
    got = columns(whole["q"][:, 50:101], whole["k"], beyond[:, 50:101], 50, 77, 0.2)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_strides_as_a_model_leaves_them() -> None:
    query, key = drawn(1, 60, 6, 16).transpose(1, 2), drawn(1, 60, 2, 16).transpose(1, 2)
    lse = lse_of(query, key, 0.3).mT.contiguous().mT
    agree(query, key, lse, 0, 60, 0.3)


@pytest.mark.parametrize("group", [1, 3])
def test_all_that_queries_give_arrives(group: int) -> None:
    length, n = 150, 100
    query, key = drawn(2 * group, length, 32), drawn(2, length, 32)
    lse = lse_of(query[None], key[None], 0.5)[0].float()
    past = column_sums(query[:, :n], key, lse[:, :n], 0, n, 0.5)
    close(past.sum(-1), torch.full_like(past[:, 0], group * n))
    every = column_sums(query[:, n:], key, lse[:, n:], n, length, 0.5)
    given_, largest = columns(query[:, n:], key, lse[:, n:], n, n, 0.5)
    close(every[:, :n], given_)
    close(every.sum(-1), torch.full_like(every[:, 0], group * (length - n)))
    assert (largest <= given_ * (1 + 1e-5)).all()


def test_no_queries_give_nothing() -> None:
    sums, maxima = columns(drawn(2, 0, 32), drawn(1, 5, 32), drawn(2, 0), 3, 5, 1.0)
    assert torch.equal(sums, torch.zeros(1, 5, device=DEVICE))
    assert torch.equal(maxima, torch.zeros(1, 5, device=DEVICE))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES[:2] if DEVICE == "cuda" else DTYPES)
@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_flash_returns_causal_attention_and_its_log_sum_exp(
    group: int, dtype: torch.dtype, d: int
) -> None:
    query = drawn(2, 2 * group, 77, d, dtype=dtype)
    key, value = drawn(2, 2, 77, d, dtype=dtype), drawn(2, 2, 77, d, dtype=dtype)
    output, lse = flash(query, key, value, d**-0.5)
    assert output.dtype == dtype
    want = lse_of(query, key, d**-0.5)
    assert lse.shape == want.shape
    torch.testing.assert_close(lse.double(), want, rtol=1e-4, atol=1e-4)
    deep = [part.double().repeat_interleave(group, 1) for part in (key, value)]
    logits = query.double() @ deep[0].mT * d**-0.5 - want.unsqueeze(-1)
    right = logits.exp().tril() @ deep[1]
    loose = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(output.double(), right, rtol=loose, atol=loose)


def test_compiled_code_takes_the_operator_whole() -> None:
    shapes = (drawn(2, 4, 9, 16), drawn(2, 2, 9, 16), drawn(2, 4, 9))
    for peaks in (True, False):
        library.opcheck(torch.ops.kvenv.columns.default, (*shapes, 0, 7, 0.5, peaks))


def test_cost_counts_visible_pairs() -> None:
    query, key = torch.empty(2, 6, 10, 16, device="meta"), torch.empty(2, 3, 40, 16, device="meta")
    for start, n in ((0, 10), (0, 4), (7, 12), (25, 20)):
        pairs = sum(min(n, start + t + 1) for t in range(10))
        moved = 4 * (2 * 6 * 10 * 16 + 2 * 3 * n * 16 + 2 * 6 * 10 + 2 * 2 * 3 * n)
        assert cost(query, key, start, n) == (moved, 2 * 16 * 12 * pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n = 0 and start = 2"),
        ({"n": 10}, "n = 10 .* do not fit 9 keys"),
        ({"start": -1}, "start = -1"),
        ({"lse": torch.zeros(4, 8)}, r"lse \(4, 8\) do not fit"),
        ({"key": torch.zeros(3, 9, 16)}, "query heads do not divide"),
        ({"key": torch.zeros(2, 9, 8)}, "differ in batch or head size"),
        ({"key": torch.zeros(2, 9, 16).half()}, "keys must have the queries' dtype"),
        ({"query": torch.zeros(4, 9, 16).double()}, "float64 has no kernel"),
        ({"query": torch.zeros(4, 16, 9).mT}, "contiguous axis"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    given_ = {
        "query": torch.zeros(4, 9, 16),
        "key": torch.zeros(2, 9, 16),
        "lse": torch.zeros(4, 9),
        "start": 2,
        "n": 5,
        "scale": 1.0,
        **change,
    }
    with pytest.raises(KvenvError, match=message):
        columns(**given_)


def test_tensors_that_no_kernel_can_reach_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.knobs.runtime, "interpret", False)
    with pytest.raises(KvenvError, match="tensors on cpu have no kernel: use columns_reference"):
        columns(torch.zeros(4, 9, 16), torch.zeros(2, 9, 16), torch.zeros(4, 9), 0, 9, 1.0)
