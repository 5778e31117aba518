"""Static caches under `generate`: against the default cache and the one that grows its tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache, __version__

from kvenv.cache import EvictionCache
from kvenv.cache.static import SlotLayer
from kvenv.errors import KvenvError
from kvenv.scorers.curves import Curves
from kvenv.scorers.network import Architecture

FULL = {"llama": (0, 1), "gemma": (1, 3)}
SMALL = {"budget": 14, "sinks": 2, "recent": 4}
WHOLE = {"block": 10**6}
"""Makes a cache static, on plain torch where there is no GPU, and changes nothing else."""

WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunks": {"prefill_chunk_size": 5},
}
KINDS = ("Table", "AgedTable", "KeyNorm", "MeanKey")
NETWORKS = {
    "key and value": Architecture(("key", "value"), (8, 6)),
    "age": Architecture(("key", "value"), (8,), age=True),
    "scalars": Architecture(("key", "position", "value_norm"), (8, 6), age=True),
}


def kept(cache, layer):
    """Sorted positions by row and head, wherever the slots are."""
    rows = cache.positions(layer).tolist()
    return [[sorted(p for p in head if p >= 0) for head in row] for row in rows]


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FULL)
def test_ample_budget_gives_the_default_caches_tokens(
    model, scorers, batch, generate, family, way, padded
):
    lm, inputs = model(family), batch(3 if padded else 1, 20, padded)
    expected = generate(lm, inputs, DynamicCache(config=lm.config), **WAYS[way])
    for block in (10**6, 7):
        mask = inputs["attention_mask"]
        cache = EvictionCache(lm, scorers["KeyNorm"](), budget=32, block=block, attention_mask=mask)
        assert torch.equal(generate(lm, inputs, cache, **WAYS[way]), expected)
        assert isinstance(cache.layers[1], SlotLayer)


@pytest.mark.parametrize("block", [10**6, 7], ids=["whole", "blocks"])
@pytest.mark.parametrize("family", FULL)
def test_ample_budget_with_eager_attention(model, scorers, batch, generate, family, block):
    lm, inputs = model(family), batch(3, 20, padded=True)
    lm.set_attn_implementation("eager")
    expected = generate(lm, inputs, DynamicCache(config=lm.config))
    cache = EvictionCache(
        lm, scorers["KeyNorm"](), budget=32, block=block, attention_mask=inputs["attention_mask"]
    )
    assert lm.config._attn_implementation == "kvenv|eager"
    assert torch.equal(generate(lm, inputs, cache), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize(
    ("family", "kind"),  # gemma's keys are all of one norm
    [
        *(("llama", kind) for kind in KINDS),
        *(("gemma", kind) for kind in KINDS if kind != "KeyNorm"),
    ],
)
def test_small_budgets_keep_and_write_what_the_dynamic_layer_does(
    model, scorers, batch, run, family, kind, padded
):
    lm, scorer = model(family), scorers[kind]()
    ids, mask = batch(3 if padded else 1, 50, padded).values()
    steps = [18, 1, 1, 6, *[1] * 12, 4, *[1] * 8]  # pads are held at first, where that is possible
    given = {"attention_mask": mask, **SMALL}
    dynamic, static = (
        EvictionCache(lm, scorer, **given),
        EvictionCache(lm, scorer, **given, **WHOLE),
    )
    logits, expected = run(lm, static, ids, mask, steps), run(lm, dynamic, ids, mask, steps)
    real = mask[:, : sum(steps)].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)
    for layer in FULL[family]:
        assert kept(static, layer) == kept(dynamic, layer)
        assert {len(head) for row in kept(static, layer) for head in row} == {14}
    assert static.get_seq_length() == dynamic.get_seq_length() == 50
    assert static.nbytes == dynamic.nbytes


@pytest.mark.parametrize("way", ["beams", "return sequences", "chunks", "sampled beams"])
@pytest.mark.parametrize("family", FULL)
def test_small_budgets_decode_as_the_dynamic_layer_in_every_way(
    model, scorers, batch, generate, family, way
):
    lm, inputs = model(family), batch(3, 30, padded=True)
    given = {"attention_mask": inputs["attention_mask"], **SMALL}
    dynamic = EvictionCache(lm, scorers["AgedTable"](), **given)
    static = EvictionCache(lm, scorers["AgedTable"](), **given, **WHOLE)
    expected = generate(lm, inputs, dynamic, **WAYS[way])
    assert torch.equal(generate(lm, inputs, static, **WAYS[way]), expected)
    for layer in FULL[family]:
        assert kept(static, layer) == kept(dynamic, layer)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["AgedTable", "MeanKey"])
def test_a_padded_row_is_the_row_alone(model, scorers, batch, run, kind, attention):
    lm, scorer = model("gemma"), scorers[kind]()
    lm.set_attn_implementation(attention)
    ids, mask = batch(4, 40, padded=True).values()
    steps = [5, 1, 12, 1, 6, *[1] * 15]  # the longest padding covers the first three
    cache = EvictionCache(lm, scorer, attention_mask=mask, block=7, **SMALL)
    logits = run(lm, cache, ids, mask, steps)
    for row in range(4):
        pad, own = 4 * row, slice(row, row + 1)
        alone = EvictionCache(lm, scorer, block=7, **SMALL)
        # Blocks end where those of the batch do, since MeanKey's scores depend on it.
        ends = np.cumsum([size for q in steps for size in split(q, 7)])
        parts = np.diff([0, *(end - pad for end in ends if end > pad)]).tolist()
        expected = run(lm, alone, ids[own, pad:], mask[own, pad:], parts)
        torch.testing.assert_close(logits[own, pad:], expected, rtol=1e-4, atol=1e-4)
        for layer in FULL["gemma"]:
            assert kept(cache, layer)[row] == kept(alone, layer)[0]


def split(q, block):
    return [min(block, q - start) for start in range(0, q, block)]


@pytest.mark.skipif(
    Version(__version__) < Version("5.17"),
    reason="transformers 5.2 gives the chunks of a prompt other positions, 5.17 does not",
)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_prefill_chunk_size(model, scorers, batch, generate, kind):
    lm, inputs = model("llama"), batch(2, 60, padded=True)
    given = {"attention_mask": inputs["attention_mask"], **SMALL}
    blocks = EvictionCache(lm, scorers[kind](), block=8, **given)
    chunks = EvictionCache(lm, scorers[kind](), **WHOLE, **given)
    texts = [generate(lm, inputs, blocks), generate(lm, inputs, chunks, prefill_chunk_size=8)]
    assert torch.equal(*texts)
    for layer in (0, 1):
        assert kept(blocks, layer) == kept(chunks, layer)


@pytest.mark.parametrize("block", [10**6, 4], ids=["whole", "blocks"])
def test_a_second_turn_continues_the_first(model, scorers, batch, generate, run, block):
    lm, inputs = model("gemma"), batch(1, 30)
    cache = EvictionCache(lm, scorers["AgedTable"](), block=block, **SMALL)
    first = generate(lm, inputs, cache)
    ids = torch.cat([first, batch(1, 9)["input_ids"]], -1)
    text = generate(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache)
    by_hand = EvictionCache(lm, scorers["AgedTable"](), **SMALL)
    steps = [*split(30, block), *[1] * 11, *split(10, block), *[1] * 11]
    logits = run(lm, by_hand, text, torch.ones_like(text), steps)
    assert torch.equal(logits[:, 50:].argmax(-1), text[:, 51:])
    for layer in FULL["gemma"]:
        assert kept(cache, layer) == kept(by_hand, layer)


def decode_both(lm, scorer, ids, steps, sizes):
    """Two caches that read the same tokens; the pairs of what they hold after every step."""
    caches = [
        EvictionCache(lm, scorer, backend=backend, **sizes, **WHOLE)
        for backend in ("triton", "torch")
    ]
    seen = 0
    for q in steps:
        with torch.no_grad():
            part = ids[:, seen : seen + q]
            logits = [lm(input_ids=part, past_key_values=cache).logits for cache in caches]
        seen += q
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
        yield [kept(cache, 0) for cache in caches]


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_keep_the_tokens_that_torch_keeps(model, learned, batch, name):
    lm = model("wide")
    ids = batch(1, 80)["input_ids"].to(lm.device)
    scorer = learned("wide", NETWORKS[name])
    for pair in decode_both(lm, scorer, ids, [30, *[1] * 16, 9, *[1] * 8], SMALL):
        assert pair[0] == pair[1]
    assert {len(head) for head in pair[0][0]} == {14}


@pytest.mark.slow
def test_kernels_keep_the_tokens_that_torch_keeps_over_512_steps(model, learned, batch):
    lm = model("wide")
    ids = batch(1, 640)["input_ids"].to(lm.device)
    scorer = learned("wide", NETWORKS["age"])
    sizes = {"budget": 48, "sinks": 4, "recent": 16}
    changed, before = 0, []
    for pair in decode_both(lm, scorer, ids, [128, *[1] * 512], sizes):
        assert pair[0] == pair[1]
        changed += pair[0] != before
        before = pair[0]
    assert changed == 513


def curves(scorer, family, context):
    """Head 0 of each layer gains all by few tokens, others steadily."""
    fractions = np.linspace(0, 1, 33)
    heads = [(layer, head) for layer in FULL[family] for head in (0, 1)]
    steep = [1 - (1 - fractions) ** (8 if head == 0 else 1.5) for _, head in heads]
    return replace(scorer, curves=Curves(tuple(heads), fractions, np.array(steep), context))


@pytest.mark.parametrize("mode", ["heads", "global"])
@pytest.mark.parametrize("family", FULL)
def test_divided_budgets_are_held_exactly(model, learned, batch, generate, run, family, mode):
    lm, inputs = model(family), batch(2, 60, padded=True)
    scorer = curves(learned(family, NETWORKS["key and value"]), family, 60)
    given = {"attention_mask": inputs["attention_mask"], "allocation": mode, **SMALL}
    cache = EvictionCache(lm, scorer, **given)
    sizes = cache.capacities
    totals = [sum(sizes[layer]) for layer in FULL[family]]
    assert totals == [28, 28] if mode == "heads" else sum(totals) == 56
    assert all(first > second >= 7 for first, second in sizes.values())
    text = generate(lm, inputs, cache)
    for layer in FULL[family]:
        for row in kept(cache, layer):
            assert tuple(map(len, row)) == sizes[layer]
            assert all({0, 1, *range(row[0][-1] - 3, row[0][-1] + 1)} <= {*head} for head in row)
    evicting = [cache.layers[layer] for layer in FULL[family]]
    held = sum(layer.keys.numel() + layer.values.numel() for layer in evicting)
    assert held == 2 * 2 * sum(totals) * 16
    single = EvictionCache(lm, scorer, **given)
    steps = [60, *[1] * 11]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 12).long()], -1)
    logits = run(lm, single, text, mask, steps)
    assert torch.equal(logits[:, 59:].argmax(-1), text[:, 60:])
    with pytest.raises(KvenvError, match="needs retention curves and the agent has none"):
        EvictionCache(lm, replace(scorer, curves=None), **given)
