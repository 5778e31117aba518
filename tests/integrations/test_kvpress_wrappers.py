"""`KvenvPress` inside kvpress's wrappers: right where positions can be told, refused where not."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kvenv import KvenvError
from kvenv.scorers import load_scorer

N = 40
IDS = torch.randperm(256, generator=torch.Generator().manual_seed(1))[None]


@pytest.fixture
def ours(kvpress):
    from kvenv.integrations.kvpress import KvenvPress

    return KvenvPress


def decode(model, cache, press, prompt=N, steps=0):
    with torch.no_grad(), press(model):
        model(IDS[:, :prompt], past_key_values=cache)
        for at in range(prompt, prompt + steps):
            ids = torch.tensor([[at]])
            model(IDS[:, at : at + 1], past_key_values=cache, position_ids=ids)
    return cache


def scores_of(layer, number, scorer):
    """Those of all the tokens ever given to a witness, at their true positions."""
    keys, values = layer.ever
    positions = torch.arange(keys.shape[2]).expand(keys.shape[:3])
    return scorer.score(number, keys, values, positions)


def test_layers_may_have_their_own_ratios(kvpress, ours, model, witness):
    press = kvpress.PerLayerCompressionPress(ours(scorer="random"), [0.25, 0.75])
    cache = decode(model, witness(), press)
    for number, kept in enumerate((30, 10)):
        best = scores_of(cache.layers[number], number, load_scorer("random")).topk(kept).indices
        assert torch.equal(ours.positions(cache, number), best.sort(-1).values)


def test_one_press_after_another_knows_what_the_first_left(kvpress, ours, model, witness, network):
    first, second = load_scorer("random"), network("position", age=True)
    press = kvpress.ComposedPress([ours(0.5, scorer=first), ours(0.5, scorer=second)])
    cache = decode(model, witness(), press)
    for number, layer in enumerate(cache.layers):
        left = scores_of(layer, number, first).topk(20).indices.sort(-1).values
        age = second.age_term(number, N - 1 - left)
        worth = scores_of(layer, number, second).gather(-1, left) + age
        expected = left.gather(-1, worth.topk(10).indices.sort(-1).values)
        assert torch.equal(ours.positions(cache, number), expected)


def test_chunks_are_cut_by_the_tokens_true_positions(kvpress, ours, model, witness):
    cache = decode(model, witness(), kvpress.ChunkPress(ours(0.5, scorer="random"), 16))
    for number, layer in enumerate(cache.layers):
        scores = scores_of(layer, number, load_scorer("random"))
        best = [
            start + scores[..., start : start + 16].topk(kept).indices
            for start, kept in ((0, 8), (16, 8), (32, 4))
        ]
        assert torch.equal(layer.held().sort(-1).values, torch.cat(best, -1).sort(-1).values)


def test_rerotated_keys_are_of_the_right_tokens(kvpress, ours, model, witness):
    cache = decode(model, witness(), kvpress.KeyRerotationPress(ours(0.5, scorer="random")))
    for number, layer in enumerate(cache.layers):
        best = scores_of(layer, number, load_scorer("random")).topk(20).indices.sort(-1).values
        values = layer.ever[1].take_along_dim(best.unsqueeze(-1), 2)
        assert torch.equal(layer.values, values)


def test_what_adakv_masked_stays_masked_while_decoding(kvpress, ours, model, witness):
    """AdaKVPress overwrites the keys of masked slots, which must not be scored again."""
    press = kvpress.AdaKVPress(ours(scorer="knorm"))
    masked = []
    cache, scored = witness(), []
    before = press.press.score

    def watching(module, *args):
        scores = before(module, *args)
        if module.layer_idx == 0:
            scored.append(scores.clone())
        return scores

    press.press.score = watching
    decoding = kvpress.DecodingPress(press, compression_interval=5, target_size=16)
    module = model.model.layers[0].self_attn
    with torch.no_grad(), decoding(model):
        model(IDS[:, :N], past_key_values=cache)
        for at in range(N, N + 20):
            ids = torch.tensor([[at]])
            model(IDS[:, at : at + 1], past_key_values=cache, position_ids=ids)
            if module.masked_key_indices is not None:
                now = set(map(tuple, torch.stack(list(module.masked_key_indices), 1).tolist()))
                masked.append(now)
    assert [len(now) for now in masked[::5]] == [2 * (N + 5 * i - 16) for i in range(1, 5)]
    for earlier, later in pairwise(masked):
        assert earlier <= later
    plain = scores_of(cache.layers[0], 0, load_scorer("knorm"))
    alive = scored[-1].isfinite()
    torch.testing.assert_close(scored[-1][alive], plain[..., : alive.shape[-1]][alive])


def test_a_cut_of_masked_slots_takes_them_first_and_moves_the_rest(kvpress, ours, model, witness):
    cache = witness()
    press = kvpress.PrefillDecodingPress(
        kvpress.AdaKVPress(ours(0.5, scorer="knorm")),
        kvpress.DecodingPress(ours(scorer="random"), compression_interval=4, target_size=30),
    )
    decode(model, cache, press, steps=4)
    for number, layer in enumerate(cache.layers):
        module = model.model.layers[number].self_attn
        slots = torch.zeros(1, 2, 30, dtype=torch.bool)
        slots[module.masked_key_indices] = True
        same = (layer.values.unsqueeze(3) == layer.ever[1].unsqueeze(2)).all(-1)
        held = same.int().argmax(-1)
        fake = (layer.keys != layer.ever[0].take_along_dim(held.unsqueeze(-1), 2)).any(-1)
        assert torch.equal(slots, fake), "masked are the slots whose keys were overwritten"
        assert slots.sum() == 40 - 2 * 14, "of 40 masked ones, those that did not have to go"


def test_a_press_that_shows_copies_of_slots_serves_whoever_needs_no_positions(
    kvpress, ours, model, witness, network
):
    for scorer in (load_scorer("knorm"), network("key", "value")):
        block = kvpress.BlockPress(ours(0.5, scorer=scorer), block_size=8)
        cache = decode(model, witness(), block)
        for number, layer in enumerate(cache.layers):
            best = scores_of(layer, number, scorer).topk(20).indices.sort(-1).values
            assert torch.equal(layer.held().sort(-1).values, best)
    for scorer in (network("position"), network("key", age=True), "random", "snapkv"):
        block = kvpress.BlockPress(ours(0.5, scorer=scorer), block_size=8)
        with pytest.raises(KvenvError, match="true positions are needed"):
            decode(model, witness(), block)
    protected = kvpress.BlockPress(ours(0.5, scorer="knorm", recent=4), block_size=8)
    with pytest.raises(KvenvError, match="true positions are needed"):
        decode(model, witness(), protected)


def test_after_a_cut_of_another_press_positions_are_refused_and_keys_still_scored(
    kvpress, ours, model, witness
):
    """CriticalKVPress cuts by itself; the first cut can be told, the second cannot."""

    def press(scorer):
        return kvpress.DecodingPress(
            kvpress.CriticalKVPress(ours(scorer=scorer)), compression_interval=5, target_size=16
        )

    model.config.head_dim = 8
    assert decode(model, witness(), press("knorm"), steps=10).layers[0].keys.shape[2] == 16
    assert decode(model, witness(), press("random"), steps=5).layers[0].keys.shape[2] == 16
    with pytest.raises(KvenvError, match="another press moved"):
        decode(model, witness(), press("random"), steps=10)
    mixed = kvpress.PrefillDecodingPress(
        kvpress.KnormPress(0.5),
        kvpress.DecodingPress(ours(scorer="random"), compression_interval=5, target_size=16),
    )
    with pytest.raises(KvenvError, match="another press moved"):
        decode(model, witness(), mixed, steps=5)


def test_the_pipeline_answers_from_a_cut_context(kvpress, ours, model, tokenizer, network):
    from transformers import pipeline

    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="a")
    ask = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu")
    context, asked = "It is cold, and the wind blows from the north. " * 3, ["Why?", "Who?"]
    theirs = ask(context, questions=asked, press=kvpress.KnormPress(0.5), max_new_tokens=6)
    mine = ask(context, questions=asked, press=ours(0.5, scorer="knorm"), max_new_tokens=6)
    assert mine == theirs
    whole = ask(context, questions=asked, max_new_tokens=6)
    uncut = ask(context, questions=asked, press=ours(0.0, scorer="knorm"), max_new_tokens=6)
    assert uncut == whole
