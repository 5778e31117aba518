"""`kvenv.cache.generate` against transformers' own generation with the same cache."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from packaging.version import Version
from transformers import StoppingCriteria, __version__
from transformers.generation.streamers import BaseStreamer

from kvenv.cache import EvictionCache
from kvenv.cache.generation import generate as fast
from kvenv.errors import KvenvError

SMALL = {"budget": 14, "sinks": 2, "recent": 4, "refresh": 3}
STATIC = {"static": {"block": 10**6}, "blocks": {"block": 7}}
WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "penalised": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunks": {"do_sample": False, "prefill_chunk_size": 5},
    "no tokens to speak of": {"do_sample": False, "max_new_tokens": 1},
}

CHUNKS = pytest.mark.skipif(
    Version(__version__) < Version("5.17"),
    reason="transformers 5.2 gives the chunks of a prompt other positions, 5.17 does not",
)


def both(lm, scorer, inputs, kind, check_every=8, **ways):
    """What transformers' loop and ours write, and their caches."""
    ways = {"max_new_tokens": 20} | ways
    caches = [
        EvictionCache(lm, scorer, attention_mask=inputs["attention_mask"], **SMALL, **STATIC[kind])
        for _ in range(2)
    ]
    torch.manual_seed(3)
    expected = lm.generate(**inputs, past_key_values=caches[0], **ways)
    torch.manual_seed(3)
    mask = inputs["attention_mask"]
    ids = inputs["input_ids"]
    ours = fast(lm, ids, caches[1], attention_mask=mask, check_every=check_every, **ways)
    return expected, ours, caches


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize(
    "way", [w if w != "chunks" else pytest.param(w, marks=CHUNKS) for w in WAYS]
)
@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_tokens_are_those_of_transformers(model, scorers, batch, family, kind, way, padded):
    inputs = batch(3 if padded else 1, 25, padded)
    expected, ours, caches = both(model(family), scorers["Table"](), inputs, kind, **WAYS[way])
    assert torch.equal(ours, expected)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    assert torch.equal(caches[0].positions(1), caches[1].positions(1))


def endings(text, length, rows):
    """A token that ends each row at another place."""
    new = text[:, length:].tolist()
    return [new[row][3 + 4 * row] for row in range(rows)]


@pytest.mark.parametrize("check_every", [1, 3, 8, 100])
@pytest.mark.parametrize("kind", STATIC)
def test_rows_that_end_early_are_filled_up_with_pads(model, scorers, batch, kind, check_every):
    lm, inputs, scorer = model("llama"), batch(3, 25, padded=True), scorers["Table"]()
    free, _, _ = both(lm, scorer, inputs, kind, do_sample=False)
    ends = endings(free, 25, 3)
    for pad in (0, 7):
        given = {"eos_token_id": ends, "pad_token_id": pad, "do_sample": False}
        expected, ours, _ = both(lm, scorer, inputs, kind, check_every, **given)
        assert expected.shape[1] < free.shape[1]
        ended = [(row[25:] == pad).sum().item() for row in expected]
        assert len(set(ended)) > 1
        assert torch.equal(ours, expected)


class EvenTokens(StoppingCriteria):
    """Ends a row at its third token that can be divided by 4."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 25:] % 4 == 0).sum(-1) >= 3


@pytest.mark.parametrize("check_every", [1, 6])
def test_stopping_criteria_are_asked(model, scorers, batch, check_every):
    lm, inputs = model("llama"), batch(3, 25, padded=True)
    given = {"stopping_criteria": [EvenTokens()], "do_sample": False, "max_new_tokens": 60}
    for ends in ({}, {"eos_token_id": 1, "pad_token_id": 0}):  # with one, a row that ended waits
        expected, ours, _ = both(
            lm, scorers["Table"](), inputs, "static", check_every, **given, **ends
        )
        assert 25 < expected.shape[1] < 85
        assert bool((expected[:, -4:] == 0).all(-1).any()) == bool(ends)
        assert torch.equal(ours, expected)


class Listener(BaseStreamer):
    def __init__(self):
        self.heard, self.ended = [], 0

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("rows", [1, 3])
def test_a_streamer_hears_what_transformers_would_tell_it(model, scorers, batch, rows):
    lm, inputs, scorer = model("llama"), batch(rows, 25, padded=rows > 1), scorers["Table"]()
    free, _, _ = both(lm, scorer, inputs, "static", do_sample=False)
    given = {"eos_token_id": endings(free, 25, rows), "pad_token_id": 0, "do_sample": False}
    heard = []
    for generate, name in ((lm.generate, "past_key_values"), (partial(fast, lm), "cache")):
        cache = EvictionCache(
            lm, scorer, attention_mask=inputs["attention_mask"], **SMALL, **STATIC["static"]
        )
        listener = Listener()
        text = generate(**inputs, **{name: cache}, streamer=listener, max_new_tokens=20, **given)
        assert listener.ended == 1
        assert len(listener.heard) == 1 + text.shape[1] - 25
        heard.append(listener.heard)
    assert heard[0] == heard[1]


@pytest.mark.parametrize("only_new", [False, True], ids=["whole text", "only new ids"])
@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_second_turn_continues_the_first(model, scorers, batch, run, family, kind, only_new):
    lm, scorer, inputs = model(family), scorers["Table"](), batch(2, 30, padded=True)
    given = {"attention_mask": inputs["attention_mask"], **SMALL, **STATIC[kind]}
    cache = EvictionCache(lm, scorer, **given)
    options = {"do_sample": False, "max_new_tokens": 9, "check_every": 1}
    first = fast(lm, inputs["input_ids"], cache, attention_mask=inputs["attention_mask"], **options)
    assert cache.get_seq_length() == 38
    ids = torch.cat([first, batch(2, 6)["input_ids"]], -1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 15).long()], -1)
    part = ids[:, 38:] if only_new else ids
    second = fast(lm, part, cache, attention_mask=mask, **options)
    text = torch.cat([ids, second[:, part.shape[1] :]], -1)
    by_hand = EvictionCache(lm, scorer, **given)
    whole = torch.cat([mask, torch.ones(2, 9).long()], -1)
    logits = run(lm, by_hand, text, whole, [30, *[1] * 8, 7, *[1] * 8])
    assert torch.equal(logits[:, 44:].argmax(-1), text[:, 45:])
    assert torch.equal(cache.positions(1), by_hand.positions(1))


def test_what_it_refuses(model, scorers, batch):
    lm, inputs = model("llama"), batch(1, 20)
    ids = inputs["input_ids"]
    for ways in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        cache = EvictionCache(
            lm, scorers["Table"](), attention_mask=inputs["attention_mask"], **SMALL
        )
        with pytest.raises(KvenvError, match="decodes one sequence a row"):
            fast(lm, ids, cache, max_new_tokens=4, **ways)
    cache = EvictionCache(lm, scorers["Table"](), **SMALL)
    with pytest.raises(KvenvError, match="check_every is 0: give 1 or more"):
        fast(lm, ids, cache, check_every=0)
    fast(lm, ids, cache, max_new_tokens=4, do_sample=False)
    with pytest.raises(KvenvError, match="has read 23 tokens, the mask covers 20 and 20 are given"):
        fast(lm, ids, cache, max_new_tokens=4)


def test_the_host_looks_only_now_and_then(model, scorers, batch):
    lm, inputs, scorer = model("llama"), batch(1, 25), scorers["Table"]()
    given = {"do_sample": False, "no_repeat_ngram_size": 1}
    free, _, _ = both(lm, scorer, inputs, "static", **given)
    given |= {"eos_token_id": int(free[0, 29]), "pad_token_id": 0}
    read = []
    for check_every in (1, 8):
        _, ours, caches = both(lm, scorer, inputs, "static", check_every, **given)
        assert torch.equal(ours, free[:, :30])
        read.append(caches[1].get_seq_length())
    assert read == [29, 32]  # the end and two pads, as documented


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
@pytest.mark.parametrize("way", ["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cuda_graph_writes_the_same_tokens(model, learned, batch, monkeypatch, rows, way):
    lm = model("wide")
    scorer = learned("wide")
    inputs = {k: v.to(lm.device) for k, v in batch(rows, 40, padded=rows > 1).items()}
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda self: replays.append(1) or replay(self)
    )
    texts, caches = [], []
    for graph in (True, False):
        cache = EvictionCache(lm, scorer, attention_mask=inputs["attention_mask"], **SMALL)
        torch.manual_seed(3)
        given = {"graph": graph, "max_new_tokens": 60, "check_every": 1, **WAYS[way]}
        text = fast(
            lm, inputs["input_ids"], cache, **given | {"attention_mask": inputs["attention_mask"]}
        )
        more = torch.cat([text, text[:, :5]], -1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[:, 40:])], -1)
        texts.append(fast(lm, more, cache, attention_mask=mask, **given))
        caches.append(cache)
        assert len(replays) == 2 * (59 - 2)  # but for the steps that warm up; none without
    assert torch.equal(*texts)
    assert torch.equal(caches[0].positions(0), caches[1].positions(0))


def test_all_layers_read_block_by_block_where_all_heads_compete(model, scorers, batch, calibrated):
    lm, inputs = model("llama"), batch(2, 40, padded=True)
    tables = calibrated([(layer, head) for layer in (0, 1) for head in (0, 1)])
    given = {"attention_mask": inputs["attention_mask"], "calibration": tables, **SMALL}
    whole, parts = (
        EvictionCache(lm, scorers["KeyNorm"](), allocation="adaptive", block=block, **given)
        for block in (None, 6)
    )
    with pytest.raises(KvenvError, match=r"40 tokens and block=6: .* prefill_chunk_size=6"):
        lm.generate(**inputs, past_key_values=parts, max_new_tokens=8)
    parts.reset(attention_mask=inputs["attention_mask"])
    options = {"max_new_tokens": 8, "do_sample": False}
    text = fast(lm, inputs["input_ids"], parts, attention_mask=given["attention_mask"], **options)
    chunked = lm.generate(**inputs, past_key_values=whole, prefill_chunk_size=6, **options)
    assert torch.equal(text, chunked)
    assert torch.equal(whole.positions(1), parts.positions(1))


def test_a_share_is_of_the_whole_prompt(model, scorers, batch):
    lm, inputs = model("llama"), batch(1, 60)
    cache = EvictionCache(lm, scorers["KeyNorm"](), budget=0.5, sinks=1, recent=2)
    assert cache.budget == 0
    fast(lm, inputs["input_ids"], cache, max_new_tokens=4, prefill_chunk_size=7)
    assert cache.budget == 30
