"""The slots of a cache against a slow simulation with dictionaries, step by step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from kvenv.cache import EvictionCache

CONFIG = LlamaConfig(
    num_hidden_layers=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
dynamic = partial(EvictionCache, backend="torch")  # on a GPU too, where layers would be static
KINDS = ("Table", "AgedTable", "KeyNorm", "MeanKey")


@st.composite
def runs(draw):
    sinks, recent = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    budget = draw(st.integers(max(1, sinks + recent), sinks + recent + 12))
    prompt = draw(st.integers(1, 40))
    later = draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 7, 20]), max_size=25))
    pads = draw(st.lists(st.integers(0, prompt - 1), min_size=1, max_size=3))
    chunk = draw(st.sampled_from([prompt, 1, 5]))
    steps = [chunk] * (prompt // chunk) + [prompt % chunk] * (prompt % chunk > 0) + later
    return budget, sinks, recent, prompt, steps, pads


@pytest.mark.parametrize("kind", KINDS)
@given(run=runs(), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_slots_hold_what_a_simulation_holds(scorers, simulate, kind, run, seed):
    budget, sinks, recent, prompt, steps, pads = run
    rows, total, scorer = len(pads), sum(steps), scorers[kind]()
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, 2, total, 8, generator=draw)
    values = torch.randn(rows, 2, total, 6, generator=draw)
    mask = torch.ones(rows, prompt, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
        keys[row, :, :pad] = torch.nan  # nothing may depend on pads
    cache = dynamic(CONFIG, scorer, budget=budget, sinks=sinks, recent=recent, attention_mask=mask)
    sizes = steps, budget, sinks, recent
    expected = {
        (b, h): simulate(scorer, h, keys[b, h].double().numpy(), pads[b], *sizes)
        for b in range(rows)
        for h in range(2)
    }
    seen, before = 0, torch.empty(rows, 2, 0, dtype=torch.int64)
    for q in steps:
        length, offset = cache.get_mask_sizes(q, 0)
        part = slice(seen, seen + q)
        step = cache.update(keys[:, :, part], values[:, :, part], 0)
        seen += q
        assert step[0].shape[-2] == step[1].shape[-2] == length
        assert length + offset == seen == cache.get_seq_length()
        kept, layer = cache.positions(0), cache.layers[0]
        held = kept.shape[-1]
        assert held == min(budget, seen)
        for (b, h), simulation in expected.items():
            slots = kept[b, h].tolist()
            # Where the model's 2D mask, cut to its last columns, has zeros.
            masked = min(held, max(0, pads[b] - (seen - held)))
            assert slots[:masked] == [-1] * masked
            assert sorted(slots[masked:]) == next(simulation)
            assert q == 1 or slots == sorted(slots)
            attended = slots
            if q > 1 or before.shape[-1] < budget:
                attended = [*before[b, h].tolist(), *range(seen - q - pads[b], seen - pads[b])]
            for found, where in ((step, attended), ((layer.keys, layer.values), slots)):
                true = torch.tensor(where) >= 0
                index = torch.tensor(where)[true] + pads[b]
                assert torch.equal(found[0][b, h][true], keys[b, h][index])
                assert torch.equal(found[1][b, h][true], values[b, h][index])
        before = kept


def test_rows_that_generate_repeats_keep_their_own_padding(scorers):
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3])
    cache = dynamic(CONFIG, scorers["Table"](), budget=6, sinks=1, recent=1, attention_mask=mask)
    cache.update(*torch.randn(2, 4, 2, 8, 8), 0)
    assert (cache.positions(0) < 0).sum(-1)[:, 0].tolist() == [0, 0, 3, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_never_waits_for_the_device(scorers, no_waiting, kind):
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :12] = 0
    some, rest = scorers[kind](), scorers[kind]()
    some.heads = frozenset({(0, 1)})
    cache = dynamic(CONFIG, some, fallback=rest, budget=16, sinks=2, recent=3, attention_mask=mask)
    cache.update(*torch.randn(2, 2, 2, 24, 8), 0)
    for _ in range(6):
        state = torch.randn(2, 2, 2, 1, 8)
        with no_waiting():
            cache.update(state[0], state[1], 0)


def test_full_slots_are_written_in_place(scorers):
    cache = dynamic(CONFIG, scorers["KeyNorm"](), budget=16, sinks=2, recent=3)
    draw = torch.Generator().manual_seed(0)
    step = lambda q: cache.update(*torch.randn(2, 1, 2, q, 8, generator=draw), 0)  # noqa: E731
    step(40)
    layer = cache.layers[0]
    pointers = layer.keys.data_ptr(), layer.values.data_ptr()
    assert cache.nbytes == 2 * 2 * 16 * 8 * 4
    for _ in range(200):
        before, where = layer.keys.clone(), cache.positions(0)
        keys, values = step(1)
        assert (keys.data_ptr(), values.data_ptr()) == pointers
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == pointers
        assert cache.nbytes == 2 * 2 * 16 * 8 * 4
        assert ((before != layer.keys).any(-1).sum(-1) == 1).all()
        assert ((where != cache.positions(0)).sum(-1) == 1).all()
