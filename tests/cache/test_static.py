"""Static layers against a slow simulation: what they hold and what is attended to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("Table", "AgedTable", "KeyNorm", "MeanKey")
GARBAGE = 1e4
BUFFERS = ("keys", "values", "positions", "scores", "lengths", "clock", "offsets")


def held(layer, row, head):
    """Position -> its slot, from the buffers."""
    slots = layer.slots
    start, count = int(slots.offsets[head]), int(slots.lengths[row, head])
    where = slots.positions[row, start : start + count].tolist()
    assert len(set(where)) == len(where)
    return {position: start + i for i, position in enumerate(where)}


def exact(query, keys, values):
    """Attention in float64 of one query (d) to keys and values (n, d)."""
    query, keys, values = query.double(), keys.double(), values.double()
    return (keys @ query * query.shape[-1] ** -0.5).softmax(0) @ values


def own_mask(q, pads):
    """What the library would hand over for a first step: (B, 1, q, q) bool."""
    index = torch.arange(q)
    causal = index[:, None] >= index
    real = index[None] >= torch.tensor(pads)[:, None]
    return (causal[None] & real[:, None]).unsqueeze(1)


@st.composite
def runs(draw):
    sinks, recent = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    least = max(1, sinks + recent)
    capacities = tuple(draw(st.lists(st.integers(least, least + 12), min_size=2, max_size=2)))
    prompt = draw(st.integers(1, 40))
    later = draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 7, 20]), max_size=20))
    pads = draw(st.lists(st.integers(0, prompt - 1), min_size=1, max_size=3))
    chunk = draw(st.sampled_from([prompt, 1, 5]))
    steps = [chunk] * (prompt // chunk) + [prompt % chunk] * (prompt % chunk > 0) + later
    block = draw(st.sampled_from([None, None, 3, 8]))
    return capacities, sinks, recent, prompt, steps, pads, block, draw(st.booleans())


def check(simulate, static_layer, feed, scorer, run, seed, head_dim, backend):
    capacities, sinks, recent, prompt, steps, pads, block, broken_pads = run
    rows, total = len(pads), sum(steps)
    draw = torch.Generator().manual_seed(seed)
    queries, keys, values = (
        torch.randn(rows, heads, total, head_dim, generator=draw) for heads in (4, 2, 2)
    )
    mask = torch.ones(rows, prompt, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
        if broken_pads:  # nothing but the pads' own attention may depend on them
            keys[row, :, :pad] = torch.nan
    layer = static_layer(capacities, scorer, sinks, recent, backend=backend, block=block, mask=mask)
    first = steps[0]
    layer.lazy_initialization(*(x[:, :, :first].to(DEVICE) for x in (keys, values)))
    for name in ("keys", "values", "positions", "scores"):
        getattr(layer.slots, name).fill_(GARBAGE)  # no unused slot may matter
    address = [getattr(layer.slots, name).data_ptr() for name in BUFFERS]
    parts, seen = [], 0  # every step in the blocks that it is read in
    for q in steps:
        size = q if block is None else block
        parts.append([min(size, q - start) for start in range(0, q, size)])
    flat = [q for part in parts for q in part]
    expected = {
        (b, h): simulate(scorer, h, keys[b, h].double().numpy(), pads[b], flat, *sizes)
        for b in range(rows)
        for h, sizes in enumerate((c, sinks, recent) for c in capacities)
    }
    before = {where: [] for where in expected}
    for part in parts:
        q, single = sum(part), sum(part) == 1 and seen >= max(pads)
        assert layer.get_seq_length() == seen
        assert layer.get_mask_sizes(q) == (q, 0 if single else seen)
        now = (slice(None), slice(None), slice(seen, seen + q))
        mask = None if seen else own_mask(q, pads)
        output = feed(layer, queries[now], keys[now], values[now], mask)
        at = 0
        for size in part:
            for (b, h), simulation in expected.items():
                kept = next(simulation)
                for i in range(at, at + size):
                    position = seen + i - pads[b]
                    unclear = broken_pads and seen + at < pads[b]
                    if position < 0 or unclear:
                        continue
                    own = range(max(0, seen + at - pads[b]), position + 1)
                    attended = kept if single else [*before[b, h], *own]
                    index = torch.tensor(attended) + pads[b]
                    for group in (2 * h, 2 * h + 1):
                        torch.testing.assert_close(
                            output[b, i, group].double(),
                            exact(
                                queries[b, group, seen + i], keys[b, h, index], values[b, h, index]
                            ),
                            rtol=1e-4,
                            atol=1e-4,
                        )
                before[b, h] = kept
            at += size
        seen += q
        for (b, h), kept in before.items():
            slots = held(layer, b, h)
            assert sorted(slots) == kept
            assert len(slots) <= capacities[h]
            index = torch.tensor(list(slots)) + pads[b]
            for name, states in (("keys", keys), ("values", values)):
                found = getattr(layer.slots, name)[b, list(slots.values())].cpu()
                assert torch.equal(found, states[b, h, index.long()])
            shown = layer.positions[b, h]
            assert sorted(shown[shown >= 0].tolist()) == kept
    assert [getattr(layer.slots, name).data_ptr() for name in BUFFERS] == address


@pytest.mark.parametrize("kind", KINDS)
@given(run=runs(), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_slots_and_attention_are_those_of_a_simulation(
    scorers, simulate, static_layer, feed, kind, run, seed
):
    check(simulate, static_layer, feed, scorers[kind](), run, seed, 8, "torch")


SHORT = ((7, 5), 1, 2, 9, [9, 1, 1, 3, 1, 1, 1], [0, 4], None, True)
CHUNKS = ((4, 6), 0, 1, 5, [5, *[1] * 5], [3, 4, 0], 3, False)
SINGLE = ((3, 3), 1, 1, 2, [1] * 7, [1], None, True)


@pytest.mark.parametrize("run", [SHORT, CHUNKS, SINGLE], ids=["short", "blocks", "single"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_hold_and_attend_as_a_simulation(scorers, simulate, static_layer, feed, kind, run):
    check(simulate, static_layer, feed, scorers[kind](), run, 7, 64, "triton")


@pytest.mark.parametrize("capacities", [(9, 9), (12, 6)], ids=["even", "ragged"])
def test_values_of_another_size_than_keys(static_layer, scorers, feed, capacities):
    whole, narrow = (static_layer(capacities, scorers["KeyNorm"]()) for _ in range(2))
    draw = torch.Generator().manual_seed(3)
    for q in (14, 1, 1, 5, 1, 1):
        query, key, value = (torch.randn(1, heads, q, 24, generator=draw) for heads in (4, 2, 2))
        expected = feed(whole, query, key, value)[..., :16]
        torch.testing.assert_close(feed(narrow, query, key, value[..., :16]), expected)
    assert torch.equal(whole.positions, narrow.positions)
