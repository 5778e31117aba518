"""Static caches where models, devices and options are not the usual ones."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    __version__,
)
from transformers.integrations import flash_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvenv.cache import EvictionCache, attention
from kvenv.cache.backends import Backend
from kvenv.cache.generation import generate as fast
from kvenv.errors import KvenvError
from kvenv.scorers.loading import load_scorer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"budget": 14, "sinks": 2, "recent": 4}
WHOLE = {"block": 10**6}
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def step(q, rows=1, heads=(4, 2, 2), seed=0):
    """Queries, keys and values of 8 numbers."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, count, q, 8, generator=draw) for count in heads]


def test_a_dropped_cache_gives_its_memory_back_at_once(model, scorers, batch, run):
    lm = model("llama")
    ids, mask = batch(1, 20).values()
    gc.disable()
    try:
        cache = EvictionCache(lm, scorers["KeyNorm"](), **SMALL, **WHOLE)
        run(lm, cache, ids, mask, [18, 1])
        twin = copy.deepcopy(cache)
        keys = [weakref.ref(one.layers[0].slots.keys) for one in (cache, twin)]
        del cache
        assert [key() is None for key in keys] == [True, False]
        run(lm, twin, ids[:, 19:], mask[:, 19:], [1])
        del twin
        assert keys[1]() is None
    finally:
        gc.enable()


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))  # noqa: S301 - our own


@pytest.mark.parametrize("agent", ["knorm", "snapkv"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_written_by_its_own_attention(model, batch, run, agent, copied):
    lm = model("llama")
    ids, mask = batch(1, 30).values()
    cache = EvictionCache(lm, load_scorer(agent), **SMALL, **WHOLE)
    run(lm, cache, ids, mask, [25, 1])
    other = copied(cache)
    for layer in (0, 1):
        assert getattr(other.layers[layer].keys, attention.LAYER)() is other.layers[layer]
    where = cache.positions(1)
    first = run(lm, other, ids[:, 26:], mask[:, 26:], [1, 1, 2])
    assert torch.equal(cache.positions(1), where)
    assert torch.equal(run(lm, cache, ids[:, 26:], mask[:, 26:], [1, 1, 2]), first)
    cache.batch_repeat_interleave(2)
    assert getattr(cache.layers[1].keys, attention.LAYER)() is cache.layers[1]


@pytest.mark.parametrize("agent", ["knorm", "snapkv", "h2o", "expected"])
def test_nothing_held_remembers_how_it_was_computed(model, batch, agent):
    lm = model("llama")
    ids = batch(1, 30)["input_ids"]
    cache = EvictionCache(lm, load_scorer(agent), **SMALL, **WHOLE)
    for part in ids.split([24, 1, 4, 1], 1):  # with gradients on
        lm(part, past_key_values=cache)
    layer = cache.layers[0]
    needs = layer._judge._needs
    held = [*vars(layer.slots).values(), *({} if needs is None else needs._held).values()]
    tensors = [one for one in held if isinstance(one, torch.Tensor)]
    assert len(tensors) >= 7
    assert not any(one.requires_grad for one in tensors)


def test_what_a_reset_forgets_includes_numbers_that_are_none(scorers, static_layer, feed):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :6] = 0
    layer, fresh = (static_layer((16, 16), scorers["Table"](), mask=mask) for _ in range(2))
    query, key, value = step(12, rows=2)
    layer._plan.padding.restart(mask.flip(0))
    feed(layer, query, key, torch.full_like(value, torch.nan))
    layer.reset()
    layer._plan.padding.restart(mask)
    attended = [
        feed(one, *step(q, rows=2, seed=seed))
        for one in (layer, fresh)
        for q, seed in ((12, 1), (3, 2))
    ]
    assert torch.equal(attended[1], attended[3])
    assert attended[1].isfinite().all()


def test_pads_after_a_crop_are_not_held(scorers, static_layer, feed):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :6] = 0
    layer, fresh = (static_layer((16, 16), scorers["Table"](), mask=mask) for _ in range(2))
    states = step(9, rows=2)
    feed(layer, *states)
    layer.crop(-6)  # 3 of the second row's pads are to come again
    assert not layer.static
    for one, sizes in ((layer, [1] * 6), (fresh, [3, *[1] * 6])):
        at = 9 - sum(sizes)
        for q in sizes:
            last = feed(one, *(x[:, :, at : at + q] for x in states))
            at += q
        if one is layer:
            found = last
    torch.testing.assert_close(found, last)
    assert torch.equal(layer.positions, fresh.positions)


def test_models_whose_layers_share_keys_are_refused_and_served_by_torch(scorers, batch, generate):
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        **SIZES,
        num_hidden_layers=4,
        intermediate_size=[32] * 4,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
    )
    lm, inputs = Gemma3nForCausalLM(config).eval(), batch(1, 30)
    for given in ({"block": 8}, {"backend": "triton"}):
        with pytest.raises(KvenvError, match="gemma3n_text share keys, which static slots do not"):
            EvictionCache(lm, scorers["Table"](), **SMALL, **given)
    with pytest.raises(KvenvError, match="nor a scorer that needs queries"):
        EvictionCache(lm, load_scorer("snapkv"), **SMALL)
    ample = EvictionCache(lm, scorers["Table"](), budget=64)
    assert torch.equal(generate(lm, inputs, ample), generate(lm, inputs, None))


@pytest.mark.skipif(
    Version(__version__) < Version("5.23"),
    reason="older transformers run this model's attention in classes of its own",
)
def test_keys_that_are_attended_to_twice_in_a_step_are_noticed(scorers, batch, run):
    torch.manual_seed(0)
    lm = DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES, num_hidden_layers=1, intermediate_size=32))
    cache = EvictionCache(lm.eval(), scorers["Table"](), **SMALL, **WHOLE)
    with pytest.raises(KvenvError, match="layer 0 are attended to more than once in a step"):
        run(lm, cache, *batch(1, 20).values(), [20])


@pytest.mark.parametrize("block", [10**6, 7])
def test_sinks_that_a_model_learns_are_kept(scorers, batch, generate, block):
    torch.manual_seed(0)
    config = GptOssConfig(
        **SIZES,
        num_hidden_layers=4,
        intermediate_size=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    lm, inputs = GptOssForCausalLM(config).eval(), batch(3, 30, padded=True)
    for weight in lm.parameters():
        weight.data.mul_(4)
    mask = inputs["attention_mask"]
    expected = generate(lm, inputs, None)
    cache = EvictionCache(lm, scorers["Table"](), budget=64, attention_mask=mask, block=block)
    assert torch.equal(generate(lm, inputs, cache), expected)


def test_flash_attention_runs_under_its_own_name(monkeypatch):
    config = LlamaConfig(**SIZES)
    config._attn_implementation = "flash_attention_2"
    attention.serve(config)
    name = config._attn_implementation
    assert name.startswith(attention.PREFIX)
    assert "flash" not in name  # transformers would look for a package of that name
    assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
    asked = []

    def flash(query, key, value, mask, *, attn_implementation, **kwargs):
        asked.append(attn_implementation)
        return query

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash)
    module = torch.nn.Linear(2, 2)
    module.config, module.is_causal = config, True
    states = step(3, heads=(2, 2, 2))
    output, _ = ALL_ATTENTION_FUNCTIONS[name](module, *states, None, scaling=1.0)
    assert torch.equal(output, states[0].transpose(1, 2))
    assert asked == ["flash_attention_2"]
    assert config._attn_implementation == name


def test_the_backend_is_chosen_anew_for_another_kind_of_states(scorers, static_layer, feed):
    layer = static_layer((16, 16), scorers["KeyNorm"](), backend="triton")
    states = torch.randn(8, 1, 20, 64).transpose(0, 1).to(DEVICE).split([4, 2, 2], 1)
    feed(layer, *states)
    assert layer._backend.name == "triton"
    layer.reset()
    with pytest.warns(UserWarning, match=r"heads of size 64 in torch\.float64"):
        feed(layer, *(x.double() for x in states))
    assert layer._backend.name == "torch"
    assert isinstance(layer._backend, Backend)


def test_slots_of_a_model_on_several_devices_are_not_all_asked_of_one(scorers, monkeypatch):
    lm = EvictionCache(LlamaConfig(**SIZES), scorers["KeyNorm"](), **SMALL, **WHOLE)
    plan = lm.layers[0]._plan
    asked = []
    monkeypatch.setattr(type(plan), "_check_memory", lambda *_: asked.append(1))
    for spread in (False, True):
        plan.spread, plan.chosen = spread, {}
        plan.begin(*step(4)[1:])
    assert asked == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_dict_in_generate": True, "output_scores": True}, "returns tokens alone"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "is asked for contrastive_search"),
        ({"dola_layers": "high"}, "is asked for dola_generation"),
        ({"inputs_embeds": torch.zeros(1, 20, 64)}, "got inputs_embeds: use model.generate"),
        ({"position_ids": torch.arange(20)[None]}, "got position_ids: use model.generate"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_would_be_passed_over_are_refused(model, scorers, batch, options, message):
    lm, ids = model("llama"), batch(1, 20)["input_ids"]
    cache = EvictionCache(lm, scorers["Table"](), **SMALL, **WHOLE)
    with pytest.raises(KvenvError, match=message):
        fast(lm, ids, cache, max_new_tokens=4, **options)
    assert cache.get_seq_length() == 0


def test_models_that_cannot_keep_the_last_logits_alone(model, scorers, batch, monkeypatch):
    lm, inputs = model("llama"), batch(1, 20)
    caches = [EvictionCache(lm, scorers["Table"](), **SMALL, **WHOLE) for _ in range(2)]
    expected = lm.generate(**inputs, past_key_values=caches[0], max_new_tokens=4, do_sample=False)
    forward = type(lm).forward

    def plain(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
              use_cache=None):  # fmt: skip
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        cache = {"past_key_values": past_key_values, "use_cache": use_cache}
        return SimpleNamespace(logits=forward(self, input_ids, **given, **cache).logits)

    monkeypatch.setattr(type(lm), "forward", plain)
    found = fast(lm, inputs["input_ids"], caches[1], max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_statistics_of_a_chunk_of_pads_are_refused_by_their_number(model, batch, run):
    lm = model("llama")
    ids, mask = (one[1:] for one in batch(3, 40, padded=True).values())
    cache = EvictionCache(lm, load_scorer("expected"), attention_mask=mask, **SMALL)
    with pytest.raises(KvenvError, match="a prompt of 0 tokens has no query statistics"):
        run(lm, cache, ids, mask, [3])
