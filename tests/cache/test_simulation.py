"""What every head holds after every step, against a simulation in plain numpy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvenv.cache import EvictionCache

CONFIG = LlamaConfig(
    num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, hidden_size=32
)


def feed(cache, query, keys, values, layer=0):
    """A step (B, Hq or H, q, d), as a model takes it; output (B, q, Hq, d)."""
    module = torch.nn.Module()
    module.num_key_value_groups = query.shape[1] // keys.shape[1]
    module.is_causal = True
    module.config = CONFIG
    with torch.no_grad():
        states = cache.update(keys, values, layer)
        serve = ALL_ATTENTION_FUNCTIONS["kvenv|sdpa"]
        mask = None
        q = query.shape[2]
        pads = torch.tensor(cache.layers[layer].pool.pads)
        if q > 1 and pads.any():
            seen = cache.get_seq_length(layer)
            real = torch.arange(seen, seen + q) >= pads.view(-1, 1)
            mask = torch.ones(q, q).tril().bool() & real[:, None, None]
            mask = mask | torch.eye(q).bool()
        return serve(module, query, *states, mask, scaling=query.shape[-1] ** -0.5)[0]


runs = st.fixed_dictionaries(
    {
        "budget": st.integers(6, 20),
        "sinks": st.integers(0, 2),
        "recent": st.integers(1, 2),
        "refresh": st.integers(1, 2),
        "steps": st.lists(st.sampled_from([1, 1, 1, 1, 2, 5, 9]), min_size=1, max_size=30),
        "first": st.integers(2, 30),
        "pads": st.lists(st.integers(0, 6), min_size=1, max_size=3),
    }
)


@pytest.mark.parametrize("kind", ["Table", "KeyNorm", "Aged", "MeanKey"])
@given(run=runs, seed=st.integers(0, 9))
def test_every_head_holds_what_a_simulation_holds(scorers, simulate, kind, run, seed):
    scorer, pads, steps = scorers[kind](), run["pads"], [run["first"], *run["steps"]]
    sizes = {name: run[name] for name in ("budget", "sinks", "recent", "refresh")}
    torch.manual_seed(seed)
    total = sum(steps)
    keys, values, query = (torch.randn(len(pads), h, total, 8) for h in (2, 2, 4))
    pads = [min(pad, total - 1) for pad in pads]
    mask = torch.arange(total) >= torch.tensor(pads).view(-1, 1)
    cache = EvictionCache(CONFIG, scorer, attention_mask=mask, **sizes)
    wanted = [
        [
            simulate(scorer, head, keys[row, head].double().numpy(), pads[row], steps, **sizes)
            for head in range(2)
        ]
        for row in range(len(pads))
    ]
    seen = 0
    for q in steps:
        part = (slice(None), slice(None), slice(seen, seen + q))
        before = cache.positions(0)
        out = feed(cache, query[part], keys[part], values[part])
        seen += q
        held = cache.positions(0)
        assert held.shape[-1] <= run["budget"]
        for row in range(len(pads)):
            for head in range(2):
                positions = [p for p in held[row, head].tolist() if p >= 0]
                assert positions == next(wanted[row][head])
        if q == 1:
            check_attention(out, query[part], keys, values, held, pads)
        elif before.numel():
            last = torch.arange(seen - q, seen) - torch.tensor(pads).view(-1, 1)
            both = torch.cat([before, last.unsqueeze(1).expand(-1, 2, -1)], -1)
            end = query[:, :, seen - 1 : seen]
            check_attention(out[:, -1:], end, keys, values, both, pads)


def check_attention(out, query, keys, values, held, pads):
    """The last query's attention is over exactly the tokens held."""
    for row, pad in enumerate(pads):
        for head in range(4):
            at = held[row, head // 2]
            at = at[at >= 0] + pad
            if len(at):
                logits = keys[row, head // 2, at] @ query[row, head, 0] * 8**-0.5
                expected = logits.softmax(0) @ values[row, head // 2, at]
                torch.testing.assert_close(out[row, 0, head], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refresh", [None, 1, 5])
def test_memory_stays_the_budgets_over_thousands_of_tokens(scorers, refresh):
    cache = EvictionCache(CONFIG, scorers["KeyNorm"](), budget=24, recent=4, refresh=refresh)
    torch.manual_seed(0)
    sizes = set()
    for n in [50, *[1] * 2000]:
        feed(cache, torch.randn(1, 4, n, 8), *torch.randn(2, 1, 2, n, 8))
        assert cache.positions(0).shape[-1] <= 24
        sizes.add(cache.nbytes)
    assert sizes == {2 * 2 * 24 * 8 * 4}


@pytest.mark.parametrize("block", [2, 3, 7, 100])
def test_blocks_are_steps_of_several_tokens(scorers, block):
    torch.manual_seed(0)
    states = torch.randn(1, 4, 40, 8), *torch.randn(2, 1, 2, 40, 8)
    sizes = {"budget": 12, "sinks": 1, "recent": 2, "refresh": 3}
    whole = EvictionCache(CONFIG, scorers["MeanKey"](), block=block, **sizes)
    out = feed(whole, *states)
    parts = EvictionCache(CONFIG, scorers["MeanKey"](), **sizes)
    peaks, outs = [], []
    for start in range(0, 40, block):
        peaks.append(parts.layers[0].held + block)
        step = (x[:, :, start : start + block] for x in states)
        outs.append(feed(parts, *step))
    torch.testing.assert_close(out, torch.cat(outs, 1))
    assert torch.equal(whole.positions(0), parts.positions(0))
    assert max(peaks) <= 12 + block


def test_heads_that_compete_stay_within_their_total_over_ten_thousand_tokens(scorers, calibrated):
    torch.manual_seed(0)
    tables = calibrated([(0, 0), (0, 1)])
    cache = EvictionCache(
        CONFIG,
        scorers["KeyNorm"](),
        budget=64,
        recent=4,
        refresh=16,
        allocation="adaptive",
        calibration=tables,
    )
    feed(cache, torch.randn(1, 4, 100, 8), *torch.randn(2, 1, 2, 100, 8))
    most = 0
    for _ in range(10_000):
        feed(cache, torch.randn(1, 4, 1, 8), *torch.randn(2, 1, 2, 1, 8))
        most = max(most, int(cache.pools[0].slots.lengths.sum()))
    assert most == 2 * 64
    assert cache.nbytes == 2 * 2 * 64 * 8 * 4
    assert (cache.positions(0)[0, :, :4] == torch.arange(4)).all()
