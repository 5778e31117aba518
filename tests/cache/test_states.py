"""The cache cropped, reordered, copied, reset and moved to another device."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from kvenv.cache import EvictionCache
from kvenv.errors import KvenvError

FULL = {"llama": (0, 1), "gemma": (1, 3)}
SMALL = {"budget": 14, "sinks": 2, "recent": 4}


def test_assisted_decoding_works_until_tokens_are_evicted(model, scorers, batch, generate):
    lm, helper, inputs = model("llama"), model("gemma"), batch(1, 20)
    ways = {"assistant_model": helper, "max_new_tokens": 8}
    expected = generate(lm, inputs, DynamicCache(config=lm.config), max_new_tokens=8)
    ample = EvictionCache(lm, scorers["KeyNorm"](), budget=64)
    assert torch.equal(generate(lm, inputs, ample, **ways), expected)
    with pytest.raises(KvenvError, match="are evicted and cannot come back"):
        generate(lm, inputs, EvictionCache(lm, scorers["KeyNorm"](), **SMALL), **ways)


@pytest.mark.parametrize("family", FULL)
def test_crop_is_that_of_the_default_cache_until_something_is_evicted(
    model, scorers, batch, run, family
):
    lm, ids = model(family), batch(1, 20)["input_ids"]
    mask = torch.ones_like(ids)
    cache = EvictionCache(lm, scorers["KeyNorm"](), budget=24)
    reference = DynamicCache(config=lm.config)
    for one in (cache, reference):
        run(lm, one, ids[:, :7], mask, [7])
        one.crop(-3)
    assert cache.get_seq_length() == 4
    assert cache.positions(FULL[family][0])[0, 0].tolist() == [0, 1, 2, 3]
    with torch.no_grad():
        after = [lm(input_ids=ids[:, 7:17], past_key_values=c).logits for c in (cache, reference)]
    torch.testing.assert_close(*after)
    with torch.no_grad():
        lm(input_ids=ids, past_key_values=cache)
    cache.layers[FULL[family][0]].crop(0)
    layer = FULL[family][0]
    before = cache.positions(layer)
    with pytest.raises(KvenvError, match="cannot drop 2 tokens: some are evicted"):
        cache.crop(-2)
    assert torch.equal(cache.positions(layer), before)
    assert cache.get_seq_length() == 34
    assert not any(cache.layers[layer].is_croppable for layer in FULL[family])


def test_rows_follow_reorder_repeat_and_select(model, scorers, batch, run):
    lm, scorer = model("gemma"), scorers["Aged"]()
    ids, mask = batch(3, 40, padded=True).values()
    rows = torch.tensor([2, 0, 0, 1])

    def state(change, chosen):
        cache = EvictionCache(lm, scorer, attention_mask=mask, **SMALL)
        run(lm, cache, ids[:, :20], mask[:, :20], [18, 1, 1])
        change(cache)
        given = mask[chosen]
        logits = []
        for end in (21, 22, 27, 28):  # two steps, a turn of five, one more
            start = {21: 20, 22: 21, 27: 22, 28: 27}[end]
            with torch.no_grad():
                step = lm(
                    input_ids=ids[chosen, start:end],
                    attention_mask=given[:, :end],
                    position_ids=(given[:, :end].cumsum(-1) - 1)[:, start:],
                    past_key_values=cache,
                )
            logits.append(step.logits)
        return torch.cat(logits, 1), cache.positions(1)

    everyone = torch.arange(3)
    logits, kept = state(lambda cache: None, everyone)
    for change, chosen in (
        (lambda cache: cache.reorder_cache(rows), rows),
        (lambda cache: cache.batch_select_indices(rows), rows),
        (lambda cache: cache.batch_repeat_interleave(2), everyone.repeat_interleave(2)),
    ):
        changed, moved = state(change, chosen)
        torch.testing.assert_close(changed, logits[chosen], rtol=1e-4, atol=1e-4)
        assert torch.equal(moved, kept[chosen])


def test_a_copy_and_a_reset_stand_alone(model, scorers, batch, generate, run):
    lm, scorer, inputs = model("llama"), scorers["KeyNorm"](), batch(1, 30)
    cache = EvictionCache(lm, scorer, **SMALL)
    run(lm, cache, *inputs.values(), [29])
    twin, where = copy.deepcopy(cache), cache.positions(0)
    keys = cache.pools[0].slots.keys.clone()
    expected = generate(lm, inputs, twin)
    assert torch.equal(cache.positions(0), where)
    assert torch.equal(cache.pools[0].slots.keys, keys)
    assert torch.equal(generate(lm, inputs, cache), expected)
    cache.reset()
    assert (cache.get_seq_length(), cache.positions(0).numel()) == (0, 0)
    again = EvictionCache(lm, scorer, **SMALL)
    assert torch.equal(generate(lm, inputs, cache), generate(lm, inputs, again))
    pair = batch(2, 20, padded=True)
    cache.reset(attention_mask=pair["attention_mask"])
    fresh = EvictionCache(lm, scorer, attention_mask=pair["attention_mask"], **SMALL)
    assert torch.equal(generate(lm, pair, cache), generate(lm, pair, fresh))


def test_a_prompt_read_in_inference_mode_is_continued_outside_it(
    model, scorers, batch, generate, run
):
    lm, inputs = model("llama"), batch(1, 30)
    caches = [EvictionCache(lm, scorers["KeyNorm"](), **SMALL) for _ in range(2)]
    run(lm, caches[0], *inputs.values(), [29])
    with torch.inference_mode():
        run(lm, caches[1], *inputs.values(), [29])
    plain, continued = (generate(lm, inputs, cache) for cache in caches)
    assert torch.equal(plain, continued)


def test_offload_and_prefetch_bring_a_layer_back(model, scorers, batch, generate, run):
    lm, inputs = model("llama"), batch(1, 30)
    cache = EvictionCache(lm, scorers["KeyNorm"](), **SMALL)
    run(lm, cache, *inputs.values(), [29])
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    plain = EvictionCache(lm, scorers["KeyNorm"](), **SMALL)
    run(lm, plain, *inputs.values(), [29])
    assert torch.equal(generate(lm, inputs, cache), generate(lm, inputs, plain))
