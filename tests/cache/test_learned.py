"""Learned scorers in a cache: the scores that they give on the same keys, on both backends."""

from __future__ import annotations

import pytest
import torch

from kvenv.cache import EvictionCache
from kvenv.cache.backends import has_triton
from kvenv.rules import compete, protected, worth

SMALL = {"budget": 14, "sinks": 2, "recent": 4, "refresh": 3}
FULL = {"llama": (0, 1), "gemma": (1, 3)}


def prompt_of(lm, ids, layer):
    """The keys and values (1, H, n, d) of a prompt, from a cache that holds all of it."""
    cache = lm(input_ids=ids, use_cache=True).past_key_values
    return cache.layers[layer].keys, cache.layers[layer].values


def worths_of(lm, scorer, ids, layer):
    n = ids.shape[1]
    positions, now = torch.arange(n).expand(1, 2, n), torch.tensor([n - 1])
    scores = scorer.score(layer, *prompt_of(lm, ids, layer), positions, now)
    guarded = protected(positions, now.view(1, 1, 1), SMALL["sinks"], SMALL["recent"])
    return scores, worth(scores, guarded, positions >= 0)


@pytest.mark.parametrize("family", FULL)
@torch.no_grad()
def test_a_prompts_survivors_are_the_best_by_its_scores(model, learned, batch, run, family):
    lm, scorer = model(family), learned(family)
    ids, mask = batch(1, 60).values()
    cache = EvictionCache(lm, scorer, **SMALL)
    run(lm, cache, ids, mask, [60])
    for layer in FULL[family] if family == "llama" else FULL[family][:1]:
        _, worths = worths_of(lm, scorer, ids, layer)
        order = worths.argsort(dim=-1, descending=True, stable=True)[..., :11]
        assert torch.equal(cache.positions(layer), order.sort(-1).values)


@torch.no_grad()
def test_a_decoding_selection_sees_keys_from_now(model, learned, batch, run):
    lm, scorer = model("llama"), learned("llama")
    ids, mask = batch(1, 60).values()
    cache = EvictionCache(lm, scorer, **SMALL)
    run(lm, cache, ids[:, :33], mask[:, :33], [30, 1, 1, 1])
    tokens = cache.pools[0].slots.dense(0)
    now = torch.tensor([32])
    scores = scorer.score(0, tokens.keys, tokens.values, tokens.positions, now)
    guarded = protected(tokens.positions, now.view(1, 1, 1), 2, 4)
    best = worth(scores, guarded, tokens.present).argsort(dim=-1, descending=True, stable=True)
    expected = tokens.positions.gather(-1, best[..., :11].sort(-1).values)
    lm(input_ids=ids[:, 33:34], past_key_values=cache)
    assert torch.equal(cache.positions(0)[..., :-1], expected)
    assert (cache.positions(0)[..., -1] == 33).all()


@pytest.mark.parametrize("threshold", [None, 0.75])
@torch.no_grad()
def test_heads_compete_for_one_total(model, learned, batch, run, threshold):
    lm, scorer = model("llama"), learned("llama", calibrated=True)
    ids, mask = batch(1, 60).values()
    cache = EvictionCache(lm, scorer, allocation="adaptive", threshold=threshold, **SMALL)
    run(lm, cache, ids, mask, [60])
    found = (cache.positions(0) >= 0).sum(-1)
    # Layer 1's keys depend on what layer 0 attends to, in full while a prompt is read.
    masses = []
    for layer in (0, 1):
        scores, worths = worths_of(lm, scorer, ids, layer)
        mass = scorer.calibration.masses_of(layer, scores)
        masses.append(mass.masked_fill(worths == torch.inf, torch.inf))
    both = torch.cat(masses, 1)
    if threshold is not None:
        both = both.masked_fill(both < threshold, -torch.inf)
    counts = compete(both, 4 * 11, 6)
    assert torch.equal(found, counts[:, :2])
    assert torch.equal((cache.positions(1) >= 0).sum(-1), counts[:, 2:])
    assert (int(counts.sum()) == 44) == (threshold is None)


@pytest.mark.parametrize("allocation", ["layerwise", "adaptive"])
@pytest.mark.parametrize("threshold", [None, 0.75])
def test_totals_stay_within_the_budget(model, learned, batch, run, allocation, threshold):
    lm, scorer = model("llama"), learned("llama", calibrated=True)
    ids, mask = batch(3, 200, padded=True).values()
    given = {"allocation": allocation, "threshold": threshold, **SMALL}
    cache = EvictionCache(lm, scorer, attention_mask=mask, **given)
    seen = 0
    whole = 2 * 2 * 4 * 14 * 16 * 3 * 2
    for q in [40, *[1] * 50, 6, *[1] * 60]:
        run_part(lm, cache, ids, mask, seen, q)
        seen += q
        held = torch.stack([(cache.positions(layer) >= 0).sum(-1) for layer in (0, 1)], 1)
        groups = held.flatten(1).sum(-1) if allocation == "adaptive" else held.sum(-1)
        assert int(groups.max()) <= 14 * (4 if allocation == "adaptive" else 2)
        assert cache.nbytes <= whole
        for pool in cache.pools:
            ends = pool.slots.starts + pool.slots.lengths
            assert int(ends.max()) <= pool.slots.keys.shape[1]
            assert int(pool.slots.lengths.max()) <= pool.slots.largest
    assert held.float().std() > 1
    if threshold is not None:
        assert cache.nbytes < whole


@torch.no_grad()
def run_part(lm, cache, ids, mask, seen, q):
    upto = mask[:, : seen + q]
    places = (upto.cumsum(-1) - 1).clamp(min=0)[:, seen:]
    step = ids[:, seen : seen + q]
    lm(input_ids=step, attention_mask=upto, position_ids=places, past_key_values=cache)


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_a_padded_row_of_ragged_heads_is_the_row_alone(model, learned, batch, run, allocation):
    lm, scorer = model("llama"), learned("llama", calibrated=True)
    ids, mask = batch(3, 70, padded=True).values()
    steps = [20, 1, 1, 6, *[1] * 12, 4, *[1] * 20]
    cache = EvictionCache(lm, scorer, allocation=allocation, attention_mask=mask, **SMALL)
    logits = run(lm, cache, ids, mask, steps)
    for row in range(3):
        own, pad = slice(row, row + 1), 4 * row
        alone = EvictionCache(lm, scorer, allocation=allocation, **SMALL)
        expected = run(lm, alone, ids[own, pad:], mask[own, pad:], [20 - pad, *steps[1:]])
        torch.testing.assert_close(logits[own, pad:], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not has_triton(), reason="Triton comes for Linux only")
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_kernels_keep_the_tokens_that_torch_keeps(model, learned, batch, run, allocation):
    lm, scorer = model("wide"), learned("wide", calibrated=True)
    inputs = {name: x.to(lm.device) for name, x in batch(2, 60, padded=True).items()}
    mask = inputs["attention_mask"]
    found = []
    for backend in ("torch", "triton"):
        given = {"allocation": allocation, "backend": backend, **SMALL}
        cache = EvictionCache(lm, scorer, attention_mask=mask, **given)
        logits = run(lm, cache, *inputs.values(), [30, *[1] * 12])
        found.append((logits, cache.positions(0)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-3)
    assert torch.equal(found[0][1], found[1][1])
