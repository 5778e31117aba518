"""The cache under `generate` and under a model's own masks."""

from __future__ import annotations

import math

import pytest
import torch
from packaging.version import Version
from transformers import AttentionInterface, DynamicCache, __version__

from kvenv.cache import EvictionCache

FULL = {"llama": (0, 1), "gemma": (1, 3)}
SMALL = {"budget": 14, "sinks": 2, "recent": 4, "refresh": 3}
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "blocks": {"prefill_chunk_size": 5},
}

NEW_IDS = pytest.param(
    True,
    marks=pytest.mark.skipif(
        Version(__version__) < Version("5.3"),
        reason="below transformers 5.3, generate wants the whole text with a filled cache",
    ),
)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FULL)
def test_ample_budget_gives_the_default_caches_tokens(
    model, scorers, batch, generate, family, way, padded
):
    lm, inputs = model(family), batch(3 if padded else 1, 20, padded)
    cache = EvictionCache(
        lm, scorers["KeyNorm"](), budget=32, attention_mask=inputs["attention_mask"]
    )
    expected = generate(lm, inputs, DynamicCache(config=lm.config), **WAYS[way])
    assert torch.equal(generate(lm, inputs, cache, **WAYS[way]), expected)


def test_one_row_needs_no_mask_and_a_tight_budget_changes_the_text(model, scorers, batch, generate):
    lm, inputs = model("llama"), batch(1, 40)
    full = generate(lm, inputs, DynamicCache(config=lm.config))
    cache = EvictionCache(lm.config, scorers["KeyNorm"](), **SMALL)
    assert not torch.equal(generate(lm, inputs, cache), full)
    assert cache.positions(1).shape == (1, 2, 13)  # 11 of the prompt, 3, 11 again, 2 and so on
    assert cache.get_seq_length() == 51
    assert cache.nbytes == 2 * 2 * 2 * 14 * 16 * 4


@pytest.mark.parametrize(
    ("family", "kind"),  # the norms of Gemma's keys are all alike
    [("llama", "Aged"), ("llama", "MeanKey"), ("gemma", "MeanKey")],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_row_is_the_row_alone(model, scorers, batch, run, family, attention, kind):
    lm, scorer = model(family), scorers[kind]()
    lm.set_attn_implementation(attention)
    inputs = batch(4, 50, padded=True)
    ids, mask = inputs.values()
    # The prompt leaves pads in the slots, which single steps and a turn of several then take.
    steps = [18, 1, 1, 6, *[1] * 12, 4, *[1] * 8]
    cache = EvictionCache(lm, scorer, attention_mask=mask, **SMALL)
    logits = run(lm, cache, ids, mask, steps)
    for row in range(4):
        pad = 4 * row
        alone = EvictionCache(lm, scorer, **SMALL)
        own = slice(row, row + 1)
        parts = [18 - pad, *steps[1:]]
        expected = run(lm, alone, ids[own, pad:], mask[own, pad:], parts)
        torch.testing.assert_close(logits[own, pad:], expected, rtol=1e-4, atol=1e-4)
        for layer in FULL[family]:
            kept, single = cache.positions(layer)[own], alone.positions(layer)
            assert torch.equal(kept.sort(-1).values, single.sort(-1).values)


def test_left_padded_generate_is_each_row_alone(model, scorers, batch, generate):
    lm, inputs = model("llama"), batch(3, 20, padded=True)
    cache = EvictionCache(lm, scorers["Table"](), attention_mask=inputs["attention_mask"], **SMALL)
    together = generate(lm, inputs, cache)
    for row in range(3):
        own = {k: v[row : row + 1, 4 * row :] for k, v in inputs.items()}
        alone = generate(lm, own, EvictionCache(lm, scorers["Table"](), **SMALL))
        assert torch.equal(together[row : row + 1, 4 * row :], alone)


ALLOWED: dict[int, torch.Tensor] = {}


def only_allowed(module, query, key, value, attention_mask, scaling, **kwargs):
    """Causal attention in float64 to the keys that ``ALLOWED[layer]`` (H, keys) names."""
    group = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(-1, -2) * scaling
    q, n = logits.shape[-2:]
    seen = torch.ones(q, n, dtype=torch.bool).tril(n - q)
    if module.layer_idx in ALLOWED:
        seen = seen & ALLOWED[module.layer_idx].repeat_interleave(group, 0)[:, None]
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).float(), None


@pytest.mark.parametrize("kind", ["Aged", "KeyNorm", "MeanKey"])
def test_decoding_attends_to_exactly_the_kept_tokens(model, scorers, batch, run, kind):
    lm, ids = model("llama"), batch(1, 70)["input_ids"]
    cache = EvictionCache(lm, scorers[kind](), **SMALL)
    mask = torch.ones_like(ids)
    steps = [30, *[1] * 40]
    kept = []

    def follow(_module, _inputs, _output):
        kept.append([cache.positions(layer)[0] for layer in (0, 1)])

    hook = lm.register_forward_hook(follow)
    logits = run(lm, cache, ids, mask, steps)
    hook.remove()
    AttentionInterface.register("only_allowed", only_allowed)
    lm.set_attn_implementation("only_allowed")
    try:
        reference, seen = DynamicCache(config=lm.config), 0
        for q, held in zip(steps, kept, strict=True):
            seen += q
            ALLOWED.clear()
            for layer in (0, 1) if q == 1 else ():
                among = torch.zeros(2, seen, dtype=torch.bool)
                ALLOWED[layer] = among.scatter(-1, held[layer], True)
                assert 11 < ALLOWED[layer].sum() / 2 <= 14
            with torch.no_grad():
                step = lm(input_ids=ids[:, seen - q : seen], past_key_values=reference)
            found = logits[:, seen - q : seen]
            torch.testing.assert_close(found, step.logits, rtol=1e-4, atol=1e-4)
    finally:
        ALLOWED.clear()


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("only_new", [False, NEW_IDS], ids=["whole text", "only new ids"])
def test_a_second_turn_continues_the_first(model, scorers, batch, generate, run, family, only_new):
    lm, inputs = model(family), batch(1, 30)
    cache = EvictionCache(lm, scorers["KeyNorm"](), **SMALL)
    first = generate(lm, inputs, cache)
    ids = torch.cat([first, batch(1, 9)["input_ids"]], -1)
    given = {
        "input_ids": ids[:, cache.get_seq_length() :] if only_new else ids,
        "attention_mask": torch.ones_like(ids),
    }
    second = generate(lm, given, cache)
    text = torch.cat([ids, second[:, given["input_ids"].shape[1] :]], -1)
    # The first answer's last token was never fed, so the second turn starts with it.
    by_hand = EvictionCache(lm, scorers["KeyNorm"](), **SMALL)
    steps = [30, *[1] * 11, 10, *[1] * 11]
    logits = run(lm, by_hand, text, torch.ones_like(text), steps)
    assert torch.equal(logits[:, 50:].argmax(-1), text[:, 51:])
    for layer in FULL[family]:
        assert torch.equal(cache.positions(layer), by_hand.positions(layer))


def test_sliding_layers_stay_the_librarys_own(model, scorers, batch, generate):
    lm, inputs = model("gemma"), batch(1, 40)
    cache = EvictionCache(lm, scorers["KeyNorm"](), **SMALL)
    plain = DynamicCache(config=lm.config)
    generate(lm, inputs, cache)
    sliding = [True, False, True, False]
    pairs = zip(cache.layers, plain.layers, strict=True)
    assert [type(own) is type(librarys) for own, librarys in pairs] == sliding
    assert cache.nbytes == 2 * (2 * 7 + 2 * 14) * 2 * 16 * 4
    assert cache.is_sliding == plain.is_sliding == sliding
    assert "2 of 4 layers evict, 13 of 51 tokens held" in repr(cache)
    assert repr(cache).startswith("EvictionCache(KeyNorm, budget=14, sinks=2, recent=4")
