"""Presses of kvpress as kvenv scorers."""

from __future__ import annotations

import pytest
import torch

from kvenv import KvenvError, plugins
from kvenv.cache import EvictionCache
from kvenv.scorers import load_scorer
from kvenv.testing import check_scorer

N, WINDOW = 60, 8
IDS = torch.randperm(256, generator=torch.Generator().manual_seed(1))[None]


@pytest.fixture
def of_press(kvpress):
    from kvenv.integrations.kvpress import scorer_from_press

    return scorer_from_press


@pytest.fixture
def tokens():
    """What scorers are given, of tokens in shuffled slots, whose positions have a gap."""
    noise = torch.Generator().manual_seed(0)
    order = torch.rand(2, 1, N, generator=noise).argsort(-1).expand(2, 3, N)
    keys, values = (torch.randn(2, 3, N, 8, generator=noise) for _ in range(2))
    queries = torch.randn(2, 6, WINDOW, 8, generator=noise)
    positions = order + 5 * (order >= N // 2)
    return {"keys": keys, "values": values, "positions": positions, "queries": queries}


def asked(scorer, tokens):
    parts = ("keys", "values", "positions", *scorer.needs)
    return scorer.score(0, **{name: tokens[name] for name in parts})


CASES = [
    ("KnormPress", {}, "knorm", {}),
    ("KeyDiffPress", {}, "keydiff", {}),
    ("LagKVPress", {"lag_size": 8}, "lagkv", {"lag": 8}),
    ("SnapKVPress", {"window_size": WINDOW}, "snapkv", {"window": WINDOW}),
    ("TOVAPress", {}, "tova", {}),
]


@pytest.mark.parametrize(("press", "its", "agent", "options"), CASES)
def test_scores_are_those_of_the_agent_of_that_method(
    kvpress, of_press, tokens, record_property, press, its, agent, options
):
    got = asked(of_press(getattr(kvpress, press)(**its)), tokens)
    order = tokens["positions"].argsort(-1)
    places = order.argsort(-1)
    by_place = {  # snapkv smooths over neighbouring slots
        name: x.take_along_dim(order.unsqueeze(-1) if x.ndim == 4 else order, 2)
        for name, x in tokens.items()
        if name != "queries"
    }
    want = asked(plugins.load("agent", agent)(**options), tokens | by_place).gather(-1, places)
    stays = {"lagkv": (places < 4) | (places >= N - 8), "snapkv": places >= N - WINDOW}
    scored = ~stays.get(agent, places == N - 1 if agent == "tova" else places < 0)
    difference = float((got - want)[scored].abs().max() / want[scored].abs().max())
    record_property("difference", difference)
    print(f"{press}: largest difference {difference:.1e} of the largest score")
    assert difference < 2e-6
    assert got.dtype == torch.float32
    if not scored.all():
        lowest = got.masked_fill(scored, torch.inf).amin(-1)
        highest = got.masked_fill(~scored, -torch.inf).amax(-1)
        assert (lowest > highest).all(), "what stays is first in both"


def test_observed_attention_comes_from_past_attention(kvpress, of_press, tokens):
    order = torch.arange(N).expand(2, 3, N)
    given = tokens | {"positions": order, "past_attention": torch.rand(2, 3, N)}
    got = asked(of_press(kvpress.ObservedAttentionPress()), given)
    torch.testing.assert_close(got, asked(load_scorer("observed"), given))


@pytest.mark.parametrize("press", ["KnormPress", "KeyDiffPress", "LagKVPress"])
def test_it_is_a_scorer_by_the_public_check(kvpress, of_press, press):
    check_scorer(of_press(getattr(kvpress, press)(), pointwise=press == "KnormPress"))


@pytest.mark.parametrize("pointwise", [True, False])
def test_an_eviction_cache_decodes_with_a_press(kvpress, of_press, model, pointwise):
    texts, kept = [], []
    for scorer in (of_press(kvpress.KnormPress(), pointwise=pointwise), load_scorer("knorm")):
        cache = EvictionCache(model, scorer, budget=24, sinks=2, recent=4)
        options = {"max_new_tokens": 30, "do_sample": False}
        texts.append(model.generate(IDS[:, :N], past_key_values=cache, **options))
        kept.append(cache.positions(1).sort(-1).values)
    assert torch.equal(*texts)
    assert torch.equal(*kept)


def test_a_press_that_goes_by_slots_sees_tokens_in_the_order_of_the_text(kvpress, of_press, model):
    """While decoding, an EvictionCache writes newcomers where there is room."""
    kept = []
    for scorer in (
        of_press(kvpress.LagKVPress(n_sink=2, lag_size=6)),
        plugins.load("agent", "lagkv")(sinks=2, lag=6),
    ):
        cache = EvictionCache(model, scorer, budget=24, sinks=2, recent=13)
        options = {"max_new_tokens": 30, "do_sample": False}
        model.generate(IDS[:, :N], past_key_values=cache, **options)
        kept.append(cache.positions(0).sort(-1).values)
    assert torch.equal(*kept)


def test_a_press_of_one_s_own_may_ask_for_attention(kvpress, of_press, tokens):
    class Last(kvpress.ScorerPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return attentions[:, :, -1].unflatten(1, (keys.shape[1], -1)).amax(2)

    scorer = of_press(Last(), needs={"queries"})
    assert scorer.needs == {"queries"}
    assert asked(scorer, tokens).shape == (2, 3, N)


def test_what_no_scorer_is_given_is_said(kvpress, of_press, tokens):
    for press, message in (
        (kvpress.ExpectedAttentionPress(), "this press reads"),
        (kvpress.CompactorPress(), "this press reads"),
        (kvpress.NonCausalAttnPress(), "this press reads"),
        (kvpress.SnapKVPress(), "asks for 64 queries and there are 8"),
        (kvpress.StreamingLLMPress(n_sink=N), "refuses 60 tokens: Input should contain more"),
    ):
        with pytest.raises(KvenvError, match=message):
            asked(of_press(press), tokens)
    for given, options, message in (
        (kvpress.KnormPress, {}, "is no ScorerPress"),
        (kvpress.BlockPress(kvpress.KnormPress()), {}, "is no ScorerPress"),
        (kvpress.KnormPress(), {"needs": {"utility"}}, "made from queries or"),
    ):
        with pytest.raises(KvenvError, match=message):
            of_press(given, **options)
