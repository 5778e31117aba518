"""What the cache refuses, and what it says."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, T5Config

from kvenv.cache import EvictionCache
from kvenv.errors import KvenvError
from kvenv.scorers.base import Pointwise

CONFIG = LlamaConfig(
    num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
dynamic = partial(EvictionCache, backend="torch")  # on a GPU too, where layers would be static


class Zero(Pointwise):
    """Scores nothing above anything, NaN for heads it does not know."""

    def __init__(self, heads=None, level=0.0):
        self.heads, self.level = heads, level

    def score(self, layer, keys, values, positions, **needs):
        known = [self.heads is None or (layer, h) in self.heads for h in range(positions.shape[1])]
        fill = torch.tensor([self.level if k else torch.nan for k in known])
        return fill.view(1, -1, 1).expand(positions.shape)


def feed(cache, rows=1, tokens=8, layer=0):
    return cache.update(*torch.randn(2, rows, 2, tokens, 8), layer)


def refuses(message, scorer=None, config=CONFIG, **arguments):
    with pytest.raises(KvenvError, match=message) as caught:
        EvictionCache(config, scorer or Zero(), **({"budget": 32} | arguments))
    assert "\n" not in str(caught.value)


def test_sizes_that_cannot_be():
    refuses("budget 0 is not a whole number of at least 1: give .* 256", budget=0)
    refuses("budget 0.25 is not a whole number", budget=0.25)
    refuses("recent 0 is not a whole number of at least 1", recent=0)
    refuses("sinks -1 is not a whole number of at least 0", sinks=-1)
    refuses("budget 19 cannot hold sinks 4 \\+ recent 16 = 20", budget=19)
    assert dynamic(CONFIG, Zero(), budget=20).budget == 20


def test_models_that_cannot_be():
    refuses("config is a str: give model.config", config="llama")
    refuses("encoder-decoder", config=T5Config())
    sliding = Gemma3TextConfig(num_hidden_layers=1, layer_types=["sliding_attention"])
    refuses("gemma3_text has no full-attention layer", config=sliding)


def test_scorers_that_cannot_be():
    refuses("None is not a scorer|'knorm' is not a scorer", scorer="knorm")
    wants = Zero()
    wants.needs = frozenset({"queries", "utility"})
    refuses("Zero needs utility, which no cache can know: use a scorer of .*past_attention", wants)
    refuses("Zero needs utility, which no cache can know", fallback=wants)
    wants.needs = frozenset({"query_mean"})
    refuses("needs query_mean and query_cov, .* give EvictionCache the model", scorer=wants)

    class Bound(Zero):
        def check_model(self, model):
            raise KvenvError(f"made for another model than {model.model_type}")

    refuses("made for another model than llama", scorer=Bound())
    refuses("made for another model than llama", fallback=Bound())


def test_static_options_that_cannot_be():
    refuses("block 0 is not a whole number of at least 1: give .* 512", block=0)
    refuses("backend 'cuda': choose one of auto, torch, triton", backend="cuda")
    refuses("allocation 'layers': choose one of uniform, heads, global", allocation="layers")
    refuses('allocation "heads" needs retention curves', allocation="heads")
    refuses("budget 20 is below the 21 tokens", allocation="global", budget=20)


def test_missing_heads_are_named_and_a_fallback_fills_them():
    some = frozenset({(0, 0), (1, 1)})
    refuses(
        r"no scores for 4 of the 6 heads .* \(0, 1\), \(1, 0\), \(2, 0\), \(2, 1\): pass fallback=",
        scorer=Zero(some),
    )
    refuses(
        r"neither .* has scores for 3 of the 6 heads .* \(1, 0\)",
        scorer=Zero(some),
        fallback=Zero(frozenset({(0, 1)})),
    )
    refuses(r"\(0, 0\), \(0, 1\), \(1, 0\), \(1, 1\), \(2, 0\), \.\.\.:", Zero(frozenset()))

    class Old(Zero):
        def score(self, layer, keys, values, positions, **needs):
            return -positions.float()

    class New(Old):
        def score(self, layer, keys, values, positions, **needs):
            fill = Zero.score(self, layer, keys, values, positions)
            return fill + positions

    for filler, age in ((Old(), None), (Zero(), lambda layer, age: age.float())):
        filler.age_term = age  # both rank old tokens first
        cache = dynamic(CONFIG, New(some), fallback=filler, budget=4, sinks=0, recent=1)
        feed(cache, tokens=8)
        feed(cache, tokens=1)
        held = cache.positions(0)[0].sort(-1).values.tolist()
        assert held == [[5, 6, 7, 8], [0, 1, 2, 8]]
        assert "New or " in repr(cache)


def test_batches_need_a_left_padded_mask():
    cache = dynamic(CONFIG, Zero(), budget=32)
    with pytest.raises(KvenvError, match=r"pass attention_mask=inputs\['attention_mask'\] \(all"):
        feed(cache, rows=2)
    for row in ([1, 1, 0], [1, 0, 1], [0, 0, 0]):
        mask = torch.tensor([[1, 1, 1], row])
        refuses('attention_mask row 1 .*tokenizer.padding_side = "left"', attention_mask=mask)
    refuses(r"attention_mask has shape \(3,\)", attention_mask=torch.ones(3))
    mask = torch.ones(2, 8)
    with pytest.raises(KvenvError, match="attention_mask has 2 rows and the batch 3"):
        feed(dynamic(CONFIG, Zero(), budget=32, attention_mask=mask), rows=3)
    with pytest.raises(KvenvError, match="covers 8 tokens and the prompt has 9"):
        feed(dynamic(CONFIG, Zero(), budget=32, attention_mask=mask), rows=2, tokens=9)
    cache = dynamic(CONFIG, Zero(), budget=32, attention_mask=mask)
    feed(cache, rows=2)
    with pytest.raises(KvenvError, match="holds 2 rows and this step has 4"):
        feed(cache, rows=4)


def test_answers_that_cannot_be():
    class Flat(Zero):
        def score(self, layer, keys, values, positions, **needs):
            return positions[:, :1].float()

    with pytest.raises(KvenvError, match=r"shape \(1, 1, 8\) in layer 1: it must be .*\(1, 2, 8\)"):
        feed(dynamic(CONFIG, Flat(), budget=32), layer=1)

    class Broken(Zero):
        def score(self, layer, keys, values, positions, **needs):
            scores = positions.float().clone()
            scores[:, 1, -3] = torch.nan
            return scores

    for pointwise in (True, False):
        Broken.pointwise = pointwise
        cache = dynamic(CONFIG, Broken(), budget=6, recent=1)
        with pytest.raises(KvenvError, match="NaN in layer 2, KV head 1"):
            feed(cache, layer=2)


def test_infinite_scores_neither_push_out_sinks_nor_rank_below_pads():
    class Extreme(Zero):
        def score(self, layer, keys, values, positions, **needs):
            return torch.where(positions % 2 == 0, -torch.inf, torch.inf).expand(positions.shape)

    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    cache = dynamic(CONFIG, Extreme(), budget=9, sinks=1, recent=1, attention_mask=mask)
    feed(cache, tokens=10)
    assert cache.positions(0)[0, 0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, 7]
    feed(cache, tokens=1)
    assert cache.positions(0)[0, 0].tolist() == [8, 0, 1, 2, 3, 4, 5, 6, 7]
    feed(cache, tokens=1)
    assert sorted(cache.positions(0)[0, 0].tolist()) == [0, 1, 2, 3, 4, 5, 6, 7, 9]


def test_positions_of_a_layer_that_does_not_evict():
    config = Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    cache = EvictionCache(config, Zero(), budget=32)
    with pytest.raises(KvenvError, match="layer 0 does not evict: choose one of 1"):
        cache.positions(0)
    assert cache.positions(1).shape == (0, 0, 0)
