"""What the cache refuses, and what it says."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, T5Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvenv.cache import EvictionCache
from kvenv.errors import KvenvError
from kvenv.scorers.calibration import Calibration

CONFIG = LlamaConfig(
    num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
dynamic = partial(EvictionCache, backend="torch")  # on a GPU too


class Zero:
    """Scores nothing above anything, NaN for heads it does not know."""

    needs = frozenset()

    def __init__(self, heads=None, level=0.0):
        self.heads, self.level = heads, level

    def score(self, layer, keys, values, positions, now, **needs):
        known = [self.heads is None or (layer, h) in self.heads for h in range(positions.shape[1])]
        fill = torch.tensor([self.level if k else torch.nan for k in known])
        return fill.view(1, -1, 1).expand(positions.shape)


def feed(cache, rows=1, tokens=8, layer=0):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    pads = torch.tensor(cache.policy.padding._rows or [0] * rows).view(-1, 1, 1, 1)
    mask = None
    if tokens > 1 and pads.any():
        mask = torch.ones(tokens, tokens).tril().bool() & (torch.arange(tokens) >= pads)
    states = cache.update(*torch.randn(2, rows, 2, tokens, 8), layer)
    serve = ALL_ATTENTION_FUNCTIONS["kvenv|sdpa"]
    serve(module, torch.randn(rows, 4, tokens, 8), *states, mask, scaling=1.0)


def refuses(message, scorer=None, config=CONFIG, **arguments):
    with pytest.raises(KvenvError, match=message) as caught:
        EvictionCache(config, scorer or Zero(), **({"budget": 32} | arguments))
    assert "\n" not in str(caught.value)


def test_sizes_that_cannot_be():
    refuses("budget 0 holds no token", budget=0)
    refuses("budget 1.5 is not in", budget=1.5)
    refuses("recent 0 is not a whole number of at least 1", recent=0)
    refuses("sinks -1 is not a whole number of at least 0", sinks=-1)
    refuses("budget 19 cannot hold sinks and recent tokens, 20 together", budget=19)
    refuses("budget 20 holds sinks 4 and recent 16 and no other token", budget=20)
    refuses("refresh 13 does not fit: budget 32 has room for 12", refresh=13)
    refuses("refresh 0 is not a number of tokens", refresh=0)
    assert dynamic(CONFIG, Zero(), budget=21).budget == 21
    short = dynamic(CONFIG, Zero(), budget=0.5)
    with pytest.raises(KvenvError, match=r"budget 0\.5 of 30 prompt tokens is 15, which cannot"):
        feed(short, tokens=30)


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


def test_options_that_cannot_be():
    refuses("block 0 is not a whole number of at least 1: give .* 512", block=0)
    refuses("backend 'cuda': choose one of auto, torch, triton", backend="cuda")
    refuses("allocation 'heads': choose one of uniform, layerwise, adaptive", allocation="heads")
    refuses("Zero has no calibration, which allocation='adaptive'", allocation="adaptive")
    refuses("Zero has no calibration", threshold=0.1)
    refuses("threshold -1 is no attention mass", threshold=-1)
    some = Calibration(((0, 0),), torch.zeros(1, 2), torch.zeros(1, 2))
    refuses(r"heads \[\(0, 1\)\] have no calibration", calibration=some, allocation="layerwise")


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
        def score(self, layer, keys, values, positions, now, **needs):
            return -positions.float()

    class New(Old):
        def score(self, layer, keys, values, positions, now, **needs):
            fill = Zero.score(self, layer, keys, values, positions, now)
            return fill + positions

    cache = dynamic(CONFIG, New(some), fallback=Old(), budget=4, sinks=0, recent=1, refresh=1)
    feed(cache, tokens=8)
    feed(cache, tokens=1)
    assert cache.positions(0)[0].tolist() == [[5, 6, 7, 8], [0, 1, 7, 8]]
    assert "New or Old" in repr(cache)


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
        def score(self, layer, keys, values, positions, now, **needs):
            return positions[:, :1].float()

    with pytest.raises(KvenvError, match=r"shape \(1, 1, 8\) in layer 1: it must be .*\(1, 2, 8\)"):
        feed(dynamic(CONFIG, Flat(), budget=6, recent=1), layer=1)

    class Broken(Zero):
        def score(self, layer, keys, values, positions, now, **needs):
            scores = positions.float().clone()
            scores[:, 1, -3] = torch.nan
            return scores

    cache = dynamic(CONFIG, Broken(), budget=6, recent=1)
    with pytest.raises(KvenvError, match="NaN in layer 2, KV head 1"):
        feed(cache, layer=2)


def test_infinite_scores_neither_push_out_sinks_nor_rank_below_pads():
    class Extreme(Zero):
        def score(self, layer, keys, values, positions, now, **needs):
            return torch.where(positions % 2 == 0, -torch.inf, torch.inf).expand(positions.shape)

    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    sizes = {"budget": 9, "sinks": 1, "recent": 1, "refresh": 1}
    cache = dynamic(CONFIG, Extreme(), attention_mask=mask, **sizes)
    feed(cache, tokens=10)
    assert cache.positions(0)[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    feed(cache, tokens=1)
    assert cache.positions(0)[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    feed(cache, tokens=1)
    assert cache.positions(0)[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]


def test_masks_that_cannot_be_kept_are_named():
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    causal = torch.ones(1, 1, 8, 8).tril().bool()
    hole, ahead = causal.clone(), causal.clone()
    hole[..., 3] = False
    ahead[..., 2, 6] = True
    slope = torch.zeros(1, 1, 8, 8).masked_fill(~causal, -1e9) - torch.arange(8.0)
    for mask, message, more in (
        (hole, "the mask hides token 3 of row 0", {}),
        (ahead, "lets tokens see later ones, beyond a block of 4", {"block": 4}),
        (slope, "adds a bias", {}),
        (torch.ones(1, 1, 8, 9).bool(), "a 4D mask of 8 x 9 tokens for a step of 8", {}),
    ):
        cache = dynamic(CONFIG, Zero(), budget=32, **more)
        states = cache.update(*torch.randn(2, 1, 2, 8, 8), 0)
        with pytest.raises(KvenvError, match=message):
            ALL_ATTENTION_FUNCTIONS["kvenv|sdpa"](
                module, torch.randn(1, 4, 8, 8), *states, mask, scaling=1.0
            )


def test_attention_that_passes_by_the_cache_is_noticed():
    cache = dynamic(CONFIG, Zero(), budget=32)
    cache.update(*torch.randn(2, 1, 2, 8, 8), 0)
    with pytest.raises(KvenvError, match="attention of layer 0 did not come to the cache"):
        cache.update(*torch.randn(2, 1, 2, 1, 8), 0)


def test_positions_of_a_layer_that_does_not_evict():
    config = Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    cache = EvictionCache(config, Zero(), budget=32)
    with pytest.raises(KvenvError, match="layer 0 does not evict: choose one of 1"):
        cache.positions(0)
    assert cache.positions(1).shape == (0, 0, 0)
