"""Static caches cropped, reordered, copied and continued, and models that go on without them."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvenv.cache import EvictionCache
from kvenv.errors import KvenvError
from kvenv.recording.capture import capture
from kvenv.scorers.network import Architecture

FULL = {"llama": (0, 1), "gemma": (1, 3)}
SMALL = {"budget": 14, "sinks": 2, "recent": 4}
WHOLE = {"block": 10**6}
"""Makes a cache static, on plain torch where there is no GPU, and changes nothing else."""


def held(cache, layer):
    return cache.positions(layer).sort(-1).values


@pytest.mark.parametrize("family", FULL)
def test_crop_is_that_of_the_default_cache_until_something_is_evicted(
    model, scorers, batch, run, family
):
    lm, ids = model(family), batch(1, 20)["input_ids"]
    mask = torch.ones_like(ids)
    cache = EvictionCache(lm, scorers["AgedTable"](), budget=20, **WHOLE)
    reference = DynamicCache(config=lm.config)
    for one in (cache, reference):
        run(lm, one, ids[:, :7], mask, [6, 1])
        one.crop(-3)
    layer = FULL[family][0]
    assert cache.get_seq_length() == 4
    assert [p for p in cache.positions(layer)[0, 0].tolist() if p >= 0] == [0, 1, 2, 3]
    with torch.no_grad():
        after = [lm(input_ids=ids[:, 7:17], past_key_values=c).logits for c in (cache, reference)]
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        lm(input_ids=ids, past_key_values=cache)
    cache.layers[layer].crop(0)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(KvenvError, match="cannot drop 2 tokens: 14 of 34 are evicted"):
        cache.crop(-2)
    assert all(map(torch.equal, (layer.keys for layer in cache.layers), before))


def test_assisted_decoding_works_until_tokens_are_evicted(model, scorers, batch, generate):
    lm, helper, inputs = model("llama"), model("gemma"), batch(1, 20)
    ways = {"assistant_model": helper, "max_new_tokens": 8}
    expected = generate(lm, inputs, DynamicCache(config=lm.config), max_new_tokens=8)
    ample = EvictionCache(lm, scorers["KeyNorm"](), budget=64, **WHOLE)
    assert torch.equal(generate(lm, inputs, ample, **ways), expected)
    small = EvictionCache(lm, scorers["KeyNorm"](), **SMALL, **WHOLE)
    with pytest.raises(KvenvError, match="evicted and cannot come back"):
        generate(lm, inputs, small, **ways)


def test_rows_follow_reorder_repeat_and_select(model, scorers, batch, run):
    lm, scorer = model("gemma"), scorers["AgedTable"]()
    ids, mask = batch(3, 40, padded=True).values()
    rows, turned = torch.tensor([2, 0, 0, 1]), torch.tensor([1, 2, 0])

    def state(change, chosen):
        cache = EvictionCache(lm, scorer, attention_mask=mask, **SMALL, **WHOLE)
        run(lm, cache, ids[:, :20], mask[:, :20], [18, 1, 1])
        change(cache)
        assert cache.get_seq_length() == 20
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
        return torch.cat(logits, 1), held(cache, 1)

    everyone = torch.arange(3)
    logits, kept = state(lambda cache: None, everyone)
    for change, chosen in (
        (lambda cache: cache.reorder_cache(turned), turned),
        (lambda cache: cache.reorder_cache(rows), rows),
        (lambda cache: cache.batch_select_indices(rows), rows),
        (lambda cache: cache.batch_repeat_interleave(2), everyone.repeat_interleave(2)),
    ):
        changed, moved = state(change, chosen)
        torch.testing.assert_close(changed, logits[chosen], rtol=1e-4, atol=1e-4)
        assert torch.equal(moved, kept[chosen])


def test_reordering_as_many_rows_moves_no_buffer(model, scorers, batch, run):
    lm = model("llama")
    ids, mask = batch(3, 20).values()
    cache = EvictionCache(lm, scorers["Table"](), attention_mask=mask, **SMALL, **WHOLE)
    run(lm, cache, ids, mask, [18, 1, 1])
    slots = cache.layers[0].slots
    keys, address = slots.keys.clone(), slots.keys.data_ptr()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.layers[0].slots.keys.data_ptr() == address
    assert torch.equal(slots.keys, keys[[2, 0, 0]])


def test_a_copy_and_a_reset_stand_alone(model, scorers, batch, generate, run):
    lm, scorer, inputs = model("llama"), scorers["KeyNorm"](), batch(1, 30)
    cache = EvictionCache(lm, scorer, **SMALL, **WHOLE)
    run(lm, cache, *inputs.values(), [29])
    twin, where = copy.deepcopy(cache), cache.positions(0)
    keys = cache.layers[0].keys.clone()
    expected = generate(lm, inputs, twin)
    assert twin.get_seq_length() == 41
    assert cache.get_seq_length() == 29
    assert torch.equal(cache.positions(0), where)
    assert torch.equal(cache.layers[0].keys, keys)
    assert torch.equal(generate(lm, inputs, cache), expected)
    assert torch.equal(cache.positions(0), twin.positions(0))
    address = cache.layers[0].keys.data_ptr()
    cache.reset()
    assert (cache.get_seq_length(), cache.positions(0).numel()) == (0, 0)
    again = EvictionCache(lm, scorer, **SMALL, **WHOLE)
    assert torch.equal(generate(lm, inputs, cache), generate(lm, inputs, again))
    assert cache.layers[0].keys.data_ptr() == address
    pair = batch(2, 20, padded=True)
    cache.reset(attention_mask=pair["attention_mask"])
    fresh = EvictionCache(lm, scorer, attention_mask=pair["attention_mask"], **SMALL, **WHOLE)
    assert torch.equal(generate(lm, pair, cache), generate(lm, pair, fresh))
    assert cache.nbytes == fresh.nbytes == 2 * again.nbytes


def test_a_copy_with_kernels_and_networks_stands_alone(model, learned, batch, run):
    lm = model("wide")
    ids, mask = (tensor.to(lm.device) for tensor in batch(1, 28).values())
    scorer = learned("wide", Architecture(("key", "value"), (8, 6), age=True))
    cache = EvictionCache(lm, scorer, backend="triton", **SMALL)
    run(lm, cache, ids[:, :24], mask, [22, 1, 1])
    twin, where = copy.deepcopy(cache), cache.positions(0)
    first = run(lm, twin, ids[:, 24:], mask[:, 24:], [1, 3])
    assert torch.equal(cache.positions(0), where)
    assert torch.equal(run(lm, cache, ids[:, 24:], mask[:, 24:], [1, 3]), first)
    assert torch.equal(cache.positions(0), twin.positions(0))


def test_a_prompt_read_in_inference_mode_is_continued_outside_it(
    model, scorers, batch, generate, run
):
    lm, inputs = model("llama"), batch(2, 30, padded=True)
    given = {"attention_mask": inputs["attention_mask"], **SMALL, **WHOLE}
    caches = [EvictionCache(lm, scorers["AgedTable"](), **given) for _ in range(2)]
    run(lm, caches[0], *inputs.values(), [28, 1])
    with torch.inference_mode():
        run(lm, caches[1], *inputs.values(), [28, 1])
    caches[1].reorder_cache(torch.tensor([0, 1]))
    plain, continued = (generate(lm, inputs, cache) for cache in caches)
    assert torch.equal(plain, continued)


def test_another_cache_on_the_same_model_is_served_as_ever(model, scorers, batch, generate, run):
    lm, inputs = model("gemma"), batch(2, 30, padded=True)
    plain = DynamicCache(config=lm.config)
    expected = run(lm, plain, *inputs.values(), [20, 1, 8, 1])
    text = generate(lm, inputs, None)
    cache = EvictionCache(
        lm, scorers["Table"](), attention_mask=inputs["attention_mask"], **SMALL, **WHOLE
    )
    generate(lm, inputs, cache)
    assert lm.config._attn_implementation == "kvenv|sdpa"
    after = DynamicCache(config=lm.config)
    assert torch.equal(run(lm, after, *inputs.values(), [20, 1, 8, 1]), expected)
    assert torch.equal(generate(lm, inputs, None), text)


def test_a_saved_model_does_not_carry_the_attentions_name(
    model, scorers, batch, generate, tmp_path
):
    lm, inputs = model("llama"), batch(1, 20)
    generate(lm, inputs, EvictionCache(lm, scorers["Table"](), **SMALL, **WHOLE))
    lm.save_pretrained(tmp_path)
    assert "kvenv" not in (tmp_path / "config.json").read_text()
    loaded = type(lm).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert "kvenv" not in json.dumps(lm.config.to_diff_dict())


def test_recording_works_after_a_static_cache_was_used(model, scorers, batch, generate):
    lm, inputs = model("gemma"), batch(1, 30)
    tokens = inputs["input_ids"][0]
    before, logits = capture(lm, tokens, 20)
    generate(lm, inputs, EvictionCache(lm, scorers["Table"](), **SMALL, **WHOLE))
    after, again = capture(lm, tokens, 20)
    assert torch.equal(again, logits)
    for name in ("keys", "queries", "past_sum", "utility_sum"):
        assert np.array_equal(after.stack(name), before.stack(name))
    assert lm.config._attn_implementation == "kvenv|sdpa"
    cache = EvictionCache(lm, scorers["Table"](), **SMALL, **WHOLE)
    assert generate(lm, inputs, cache).shape == (1, 42)


def test_changing_the_attention_of_a_cache_in_use_is_noticed(model, scorers, batch, run):
    lm = model("llama")
    ids, mask = batch(1, 30).values()
    cache = EvictionCache(lm, scorers["Table"](), **SMALL, **WHOLE)
    lm.set_attn_implementation("eager")
    with pytest.raises(KvenvError, match="attention of layer 0 did not come to the cache"):
        run(lm, cache, ids, mask, [20, 1])


@pytest.mark.parametrize("kind", ["Table", "AgedTable", "KeyNorm"])
def test_a_compiled_model_decodes_the_same_tokens(model, scorers, batch, run, kind):
    lm = model("llama")
    ids, mask = batch(2, 30, padded=True).values()
    given = {"attention_mask": mask, **SMALL, **WHOLE}
    caches = [EvictionCache(lm, scorers[kind](), **given) for _ in range(2)]
    for cache in caches:
        run(lm, cache, ids, mask, [20])
    compiled = torch.compile(lm, backend="eager")
    for i in range(20, 26):
        step = {"input_ids": ids[:, i : i + 1], "position_ids": mask[:, :i].sum(-1, keepdim=True)}
        with torch.no_grad():
            plain = lm(**step, past_key_values=caches[0]).logits
            found = compiled(**step, past_key_values=caches[1]).logits
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        for layer in (0, 1):
            assert torch.equal(held(caches[1], layer), held(caches[0], layer))
    torch.compiler.reset()
