"""Models whose attention is not the usual one: served, or refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from kvenv.cache import EvictionCache
from kvenv.cache.generation import generate as fast
from kvenv.errors import KvenvError

SMALL = {"budget": 14, "sinks": 2, "recent": 4, "refresh": 3}


def family(name):
    torch.manual_seed(0)
    if name == "bloom":
        config = BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=2)
        lm = BloomForCausalLM(config)
    elif name == "gpt_neo":
        sizes = {"vocab_size": 128, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
        kinds = [[["global", "local"], 1]]
        lm = GPTNeoForCausalLM(GPTNeoConfig(attention_types=kinds, window_size=8, **sizes))
    elif name == "falcon":
        sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "new_decoder_architecture": True, "num_kv_heads": 2}
        lm = FalconForCausalLM(FalconConfig(alibi=False, **heads, **sizes))
    else:
        kinds = ["full_attention", "sliding_attention"] * 2
        lm = Gemma3nForCausalLM(
            Gemma3nTextConfig(
                vocab_size=128,
                vocab_size_per_layer_input=128,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                layer_types=kinds,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                sliding_window=8,
                num_kv_shared_layers=2,
                laurel_rank=4,
                activation_sparsity_pattern=[0.0] * 4,
                hidden_size_per_layer_input=8,
            )
        )
    for parameter in lm.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    lm.generation_config.pad_token_id, lm.generation_config.eos_token_id = 0, None
    return lm.eval()


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "falcon", "gemma3n"])
def test_an_ample_budget_gives_the_default_caches_tokens(scorers, batch, generate, name, padded):
    lm, inputs = family(name), batch(2, 20, padded)
    mask = inputs["attention_mask"]
    expected = generate(lm, inputs, DynamicCache(config=lm.config))
    caches = [
        EvictionCache(lm, scorers["KeyNorm"](), budget=40, attention_mask=mask) for _ in range(2)
    ]
    assert torch.equal(generate(lm, inputs, caches[0]), expected)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    assert torch.equal(fast(lm, inputs["input_ids"], caches[1], **options), expected)


@pytest.mark.parametrize("name", ["bloom", "gpt_neo"])
def test_attention_by_order_of_slots_refuses_to_evict(scorers, batch, generate, name):
    cache = EvictionCache(family(name), scorers["KeyNorm"](), **SMALL)
    with pytest.raises(KvenvError, match=f"{name} .*slots, so that nothing can be evicted"):
        generate(family(name), batch(1, 20), cache)


@pytest.mark.parametrize("name", ["falcon", "gemma3n"])
def test_others_evict(scorers, batch, generate, name):
    lm, inputs = family(name), batch(1, 20)
    cache = EvictionCache(lm, scorers["KeyNorm"](), **SMALL)
    generate(lm, inputs, cache)
    assert cache.positions(0).shape == (1, 2, 13)
    if name == "falcon":
        inputs = batch(2, 20, padded=True)
        cache = EvictionCache(
            lm, scorers["KeyNorm"](), attention_mask=inputs["attention_mask"], **SMALL
        )
        with pytest.raises(KvenvError, match="passes by transformers' attention interface"):
            generate(lm, inputs, cache)
