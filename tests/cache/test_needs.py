"""Scorers that want queries or past attention, served by a cache, against scores by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from kvenv.cache import EvictionCache
from kvenv.cache.needs import WINDOW, received
from kvenv.errors import KvenvError
from kvenv.recording.capture import capture
from kvenv.rules import protected, worth
from kvenv.scorers.attention import recent_attention
from kvenv.scorers.loading import load_scorer
from kvenv.scorers.query_stats import QueryStats

AGENTS = ("snapkv", "tova", "recent", "h2o", "observed", "expected")
SMALL = {"budget": 14, "sinks": 2, "recent": 4, "refresh": 3}
FULL = {"llama": (0, 1), "gemma": (1, 3)}


def kept(cache, layer):
    rows = cache.positions(layer).tolist()
    return [[sorted(p for p in head if p >= 0) for head in row] for row in rows]


def best(scores, positions):
    """Places (B, H, 11) of those of most worth, of equals the earlier, in order."""
    newest = positions.amax()
    guarded = protected(positions, newest, SMALL["sinks"], SMALL["recent"])
    value = worth(scores, guarded, positions >= 0)
    order = value.argsort(dim=-1, descending=True, stable=True)
    return order[..., : SMALL["budget"] - SMALL["refresh"]].sort(-1).values


def recorded(lm, ids, n, layer):
    """Keys, values and what scorers need of the prompt, as training and evaluation see it."""
    found, _ = capture(lm, ids, n, stats=True)

    def of(name):
        return torch.from_numpy(getattr(found, name)[layer])[None].float()

    given = {name: of(name) for name in ("query_mean", "query_cov")}
    given["past_attention"] = of("past_sum")
    given["queries"] = of("queries")[:, :, : n - found.query_from]
    return of("keys")[:, :, :n], of("values")[:, :, :n], given


@pytest.mark.parametrize("block", [10**6, None])
@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("family", FULL)
def test_a_prompts_survivors_are_those_of_offline_scores(model, batch, run, family, agent, block):
    lm, scorer = model(family), load_scorer(agent)
    ids, mask = batch(1, 91).values()
    cache = EvictionCache(lm, scorer, block=block, **SMALL)
    run(lm, cache, ids, mask, [90])
    for layer in FULL[family]:
        keys, values, given = recorded(lm, ids[0], 90, layer)
        positions = torch.arange(90).expand(1, 2, -1)
        given["recent_attention"] = recent_attention(given["queries"], keys, positions)
        needs = {name: given[name] for name in scorer.needs}
        scores = scorer.score(layer, keys, values, positions, torch.tensor([89]), **needs)
        assert kept(cache, layer) == best(scores, positions).tolist()


def watch(layer):
    """What a layer gets at every step: keys, values, queries, and the factor on logits."""
    steps = []
    update, attend, read = layer.update, layer.attend, layer.read

    def updated(keys, values, *args, **kwargs):
        steps.append([keys.clone(), values.clone()])
        return update(keys, values, *args, **kwargs)

    def attended(query, scale):
        steps[-1] += [query.unsqueeze(2), scale]
        return attend(query, scale)

    def reading(query, keys, values, scale, *rest):
        steps[-1] += [query, scale]
        return read(query, keys, values, scale, *rest)

    layer.update, layer.attend, layer.read = updated, attended, reading
    return steps


class Held:
    """One row and layer of a cache by hand: keys, values, positions and attention by head."""

    def __init__(self, scorer, layer, statistics):
        self.scorer, self.layer, self.statistics = scorer, layer, statistics
        self.keys = self.values = torch.empty(1, 2, 0, 16, dtype=torch.float64)
        self.positions = torch.empty(1, 2, 0, dtype=torch.int64)
        self.past = torch.empty(1, 2, 0, dtype=torch.float64)
        self.queries = torch.empty(1, 4, 0, 16, dtype=torch.float64)

    def add(self, keys, values, start):
        q = keys.shape[2]
        self.keys = torch.cat([self.keys, keys.double()], 2)
        self.values = torch.cat([self.values, values.double()], 2)
        new = torch.arange(start, start + q).expand(1, 2, q)
        self.positions = torch.cat([self.positions, new], -1)
        self.past = torch.cat([self.past, torch.zeros(1, 2, q)], -1)

    def ask(self, queries, scale, start):
        """Every query attends to what is held and not later."""
        self.queries = torch.cat([self.queries, queries.double() * scale * 4], 2)[:, :, -WINDOW:]
        for head in (0, 1, 2, 3):
            for i in range(queries.shape[2]):
                logits = self.keys[0, head // 2] @ queries[0, head, i].double() * scale
                later = self.positions[0, head // 2] > start + i
                weights = logits.masked_fill(later, -torch.inf).softmax(-1)
                self.past[0, head // 2] += weights

    def cut(self):
        given = {"queries": self.queries, "past_attention": self.past, **self.statistics}
        states = self.keys.float(), self.values.float(), self.positions
        given["recent_attention"] = recent_attention(self.queries.float(), states[0], states[2])
        needs = {name: given[name].float() for name in self.scorer.needs}
        scores = self.scorer.score(self.layer, *states, self.positions.amax().view(1), **needs)
        order = best(scores, self.positions)
        wide = order.unsqueeze(-1).expand(-1, -1, -1, 16)
        self.keys, self.values = self.keys.gather(2, wide), self.values.gather(2, wide)
        self.positions, self.past = self.positions.gather(-1, order), self.past.gather(-1, order)


@pytest.mark.parametrize("block", [10**6, 9], ids=["whole", "blocks"])
@pytest.mark.parametrize("agent", AGENTS)
def test_decoding_keeps_what_scores_by_hand_keep(model, batch, run, agent, block):
    lm, scorer = model("llama"), load_scorer(agent)
    ids = batch(1, 80)["input_ids"]
    cache = EvictionCache(lm, scorer, block=block, **SMALL)
    steps = [watch(cache.layers[layer]) for layer in (0, 1)]
    sizes = [40, *[1] * 15, 6, *[1] * 15]
    kept_then, seen = [], 0
    for q in sizes:
        with torch.no_grad():
            lm(input_ids=ids[:, seen : seen + q], past_key_values=cache)
        seen += q
        kept_then.append([kept(cache, layer)[0] for layer in (0, 1)])
    for layer in (0, 1):
        prompt, attention = steps[layer][0][2][0], lm.model.layers[layer].self_attn
        measured = QueryStats(lm, 40, 40).measure(attention, layer, prompt)
        statistics = {"query_mean": measured[0][None], "query_cov": measured[1][None]}
        held, start = Held(scorer, layer, statistics), 0
        for (keys, values, queries, scale), then in zip(steps[layer], kept_then, strict=True):
            if queries.shape[2] == 1 and held.positions.shape[-1] == SMALL["budget"]:
                held.cut()
            for at in range(0, queries.shape[2], block):
                part = (slice(None), slice(None), slice(at, at + block))
                held.add(keys[part], values[part], start + at)
                held.ask(queries[part], scale, start + at)
                if held.positions.shape[-1] > SMALL["budget"]:
                    held.cut()
            start += queries.shape[2]
            assert held.positions[0].tolist() == then[layer]


@pytest.mark.parametrize("agent", AGENTS)
def test_a_padded_row_is_the_row_alone(model, batch, run, agent):
    lm, scorer = model("gemma"), load_scorer(agent)
    ids, mask = batch(3, 90, padded=True).values()
    sizes = [70, *[1] * 9, 5, *[1] * 6]
    cache = EvictionCache(lm, scorer, attention_mask=mask, **SMALL)
    logits = run(lm, cache, ids, mask, sizes)
    for row in range(3):
        pad, own = 4 * row, slice(row, row + 1)
        alone = EvictionCache(lm, scorer, **SMALL)
        expected = run(lm, alone, ids[own, pad:], mask[own, pad:], [70 - pad, *sizes[1:]])
        torch.testing.assert_close(logits[own, pad:], expected, rtol=1e-4, atol=1e-4)
        for layer in FULL["gemma"]:
            assert kept(cache, layer)[row] == kept(alone, layer)[0]


@pytest.mark.parametrize("agent", AGENTS)
def test_what_is_remembered_follows_rows_copies_and_resets(model, batch, run, agent):
    lm, scorer = model("llama"), load_scorer(agent)
    ids, mask = batch(3, 60, padded=True).values()
    rows, turned = torch.tensor([2, 0]), torch.tensor([1, 2, 0])

    def state(change, chosen):
        cache.reset(attention_mask=mask)  # and remember nothing of what it read
        run(lm, cache, ids, mask, [40, 1, 1])
        changed = change(cache) or cache
        given = mask[chosen]
        with torch.no_grad():
            for i in range(42, 52):
                lm(
                    input_ids=ids[chosen, i : i + 1],
                    attention_mask=given[:, : i + 1],
                    position_ids=given[:, :i].sum(-1, keepdim=True),
                    past_key_values=changed,
                )
        return kept(changed, 1)

    cache = EvictionCache(lm, scorer, attention_mask=mask, **SMALL)
    everyone = torch.arange(3)
    plain = state(lambda cache: None, everyone)
    assert state(lambda cache: None, everyone) == plain
    assert state(copy.deepcopy, everyone) == plain
    reordered = state(lambda cache: cache.reorder_cache(turned), turned)
    assert reordered == [plain[1], plain[2], plain[0]]
    selected = state(lambda cache: cache.batch_select_indices(rows), rows)
    assert selected == [plain[2], plain[0]]


@pytest.mark.parametrize("agent", AGENTS)
def test_every_way_to_decode(model, batch, generate, agent):
    lm, inputs = model("llama"), batch(2, 30, padded=True)
    for ways in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        cache = EvictionCache(
            lm, load_scorer(agent), attention_mask=inputs["attention_mask"], **SMALL
        )
        assert generate(lm, inputs, cache, **ways).shape[1] == 42
        assert {len(head) for row in kept(cache, 0) for head in row} == {13}
    ample = EvictionCache(
        lm, load_scorer(agent), budget=64, attention_mask=inputs["attention_mask"]
    )
    assert torch.equal(generate(lm, inputs, ample), generate(lm, inputs, None))


def test_received_attention_is_the_softmax_summed():
    draw = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 6, 300, 8, generator=draw), torch.randn(2, 2, 11, 8)
    visible = torch.rand(2, 2, 300, 11, generator=draw) > 0.4
    visible[0, 0, 5] = False  # sees nothing, gives nothing
    found = received(queries, keys, visible, 0.7)
    for b in (0, 1):
        for h in (0, 1):
            total = torch.zeros(11, dtype=torch.float64)
            for t in range(300):
                seen = visible[b, h, t]
                for g in range(3 * h, 3 * h + 3):
                    logits = keys[b, h][seen].double() @ queries[b, g, t].double() * 0.7
                    total[seen] += logits.softmax(0)
            torch.testing.assert_close(found[b, h].double(), total, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_served(model, batch, run):
    lm = model("llama")
    with pytest.raises(KvenvError, match="Oracle needs utility, which no cache can know"):
        EvictionCache(lm, load_scorer("oracle"), budget=32)
    with pytest.raises(KvenvError, match="give EvictionCache the model instead of its config"):
        EvictionCache(lm.config, load_scorer("expected"), budget=32)
    ids, mask = batch(1, 30).values()
    for first, message in ((1, "only one was: give a longer prompt"), (4, "a prompt of 4 tokens")):
        cache = EvictionCache(lm, load_scorer("expected"), **SMALL)
        with pytest.raises(KvenvError, match=message):
            run(lm, cache, ids, mask, [first, *[1] * 15])
    cache = EvictionCache(lm, load_scorer("h2o"), budget=32)
    run(lm, cache, ids, mask, [20])
    with pytest.raises(KvenvError, match="what they asked for counts already"):
        cache.crop(-1)
