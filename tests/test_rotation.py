"""Rotations as stated are those that the models make, for every rotary family of transformers."""

from __future__ import annotations

import cmath
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvenv.errors import KvenvError
from kvenv.rotation import TOLERANCE, Rotation, pack, rotations_of, unpack

LENGTH = 96
SHIFT = 37


def scaled(kind: str, **given: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **given}}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "factor": 4.0,
}
DEEPSEEK = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 200}
NO_ROPE = {"no_rope_layers": [1, 0]}
MOE = {"num_local_experts": 2, "intermediate_size_mlp": 32, "attention_chunk_size": 200}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48}

# name: (model type, configuration, width of layer 1, layout, offset)
STATED: dict[str, tuple[str, dict[str, Any], int, str, int]] = {
    "llama": ("llama", {}, 8, "halves", 0),
    "llama3": ("llama", scaled("llama3", **LLAMA3), 8, "halves", 0),
    "linear": ("llama", scaled("linear", factor=4.0), 8, "halves", 0),
    "yarn": (
        "llama",
        scaled("yarn", factor=4.0, original_max_position_embeddings=64),
        *(8, "halves", 0),
    ),
    "longrope": (
        "llama",
        scaled("longrope", original_max_position_embeddings=256, **LONG),
        *(8, "halves", 0),
    ),
    "dynamic": ("llama", scaled("dynamic", factor=2.0), 8, "halves", 0),
    "qwen3": ("qwen3", {}, 8, "halves", 0),
    "phi": (
        "phi",
        scaled("default", partial_rotary_factor=0.5),
        *(4, "halves", 0),
    ),
    "gpt_neox": (
        "gpt_neox",
        scaled("default", partial_rotary_factor=0.25),
        *(2, "halves", 0),
    ),
    "stablelm": (
        "stablelm",
        scaled("default", partial_rotary_factor=0.25),
        *(2, "halves", 0),
    ),
    "cohere": ("cohere", {}, 8, "pairs", 0),
    "glm": (
        "glm",
        scaled("default", partial_rotary_factor=0.5),
        *(4, "pairs", 0),
    ),
    "gptj": ("gptj", {"rotary_dim": 4}, 4, "pairs", 0),
    "gemma3": ("gemma3_text", MIXED, 8, "halves", 0),
    "smollm3": ("smollm3", NO_ROPE, 0, "halves", 0),
    "llama4": ("llama4_text", {**NO_ROPE, **MOE}, 0, "halves", 0),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK, 8, "halves", 8),
    "gpt2": ("gpt2", {}, 0, "halves", 0),
    "opt": ("opt", OPT, 0, "halves", 0),
    "bloom": ("bloom", {}, 0, "halves", 0),
}
UNSHIFTABLE = frozenset({"gpt2", "opt", "bloom"})
"""Models whose positions are in the embeddings, or which take no position_ids."""


def tiny(kind: str, dtype: torch.dtype = torch.float32, **given: Any) -> PreTrainedModel:
    """A random model of 2 layers, 4 query and 2 KV heads of 8."""
    torch.manual_seed(0)
    plain = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind not in ("gpt_neox", "deepseek_v3", "phi", "gpt2", "gptj", "opt", "bloom", "stablelm"):
        plain["head_dim"] = 8
    config = AutoConfig.for_model(kind, **{**plain, **given})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for weight in model.parameters():  # keys that differ from token to token
        if weight.ndim > 1:
            weight.data.mul_(4)
    return model


@torch.no_grad()
def keys_at(model: PreTrainedModel, shift: int) -> list[torch.Tensor]:
    """Keys of a whole text, layer by layer, as cached when it begins at position ``shift``."""
    ids = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    where = torch.arange(shift, shift + 24).unsqueeze(0)
    model(input_ids=ids, position_ids=where, past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", STATED)
def test_stated(name: str, dtype: torch.dtype) -> None:
    kind, given, width, layout, offset = STATED[name]
    model = tiny(kind, dtype, **given)
    found = rotations_of(model, [0, 1], LENGTH)
    rotation = found[1]
    if name == "deepseek_v3" and keys_at(model, 0)[1].shape[1] == 1:
        # Newer transformers cache latents, which are not the keys that attention meets.
        assert found == ("deepseek_v3 caches something else than the keys of its heads",) * 2
        return
    assert isinstance(rotation, Rotation), rotation
    assert (rotation.width, rotation.layout, rotation.offset) == (width, layout, offset)
    if name in UNSHIFTABLE:
        return
    # The proof that the library does not make: a whole text, moved. Attention is relative.
    pairs = zip(found, keys_at(model, 0), keys_at(model, SHIFT), strict=True)
    for rotation, here, there in pairs:
        assert isinstance(rotation, Rotation), rotation
        turned = rotation.turn(here, torch.tensor(SHIFT))
        scale = there.float().abs().amax()
        assert (turned - there.float()).abs().max() <= 2 * TOLERANCE[dtype] * scale
        if rotation.width:  # the test can fail: without turning the keys are elsewhere
            assert (here - there).abs().max() > 0.1 * scale


def test_layers_of_one_model_differ() -> None:
    found = rotations_of(tiny("gemma3_text", **MIXED), [0, 1], LENGTH)
    assert found[0] != found[1]
    found = rotations_of(tiny("smollm3", **NO_ROPE), [0, 1], LENGTH)
    assert found[1] == Rotation()
    assert isinstance(found[0], Rotation)
    assert found[0].width == 8


def test_the_factor_is_stated() -> None:
    _, given, *_ = STATED["yarn"]
    (found,) = rotations_of(tiny("llama", **given), [1], LENGTH)
    assert isinstance(found, Rotation)
    assert found.factor == pytest.approx(1.138629, abs=1e-6)  # 0.1 ln 4 + 1


@pytest.mark.parametrize(("name", "most"), [("longrope", 256), ("dynamic", 512)])
def test_beyond_the_switch_there_is_a_reason(name: str, most: int) -> None:
    kind, given, *_ = STATED[name]
    model = tiny(kind, **given)
    assert isinstance(rotations_of(model, [1], most)[0], Rotation)
    (why,) = rotations_of(model, [1], most + 1)
    assert isinstance(why, str)
    assert f"beyond {most} tokens" in why


def test_an_unknown_rotation_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    rotary: Any = model.get_decoder().rotary_emb
    right = rotary.forward

    def wrong(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return right(x, position_ids**2)

    monkeypatch.setattr(rotary, "forward", wrong)
    (why,) = rotations_of(model, [1], LENGTH)
    assert isinstance(why, str)
    assert "no formula here fits" in why


def test_asking_leaves_the_model_as_it_was() -> None:
    kind, given, *_ = STATED["dynamic"]
    model = tiny(kind, **given)
    before = keys_at(model, 0)[1]
    rotations_of(model, [0, 1], 512)
    assert torch.equal(keys_at(model, 0)[1], before)


@pytest.mark.parametrize("layout", ["halves", "pairs"])
def test_frame_with_a_now_for_each_row(layout: Any) -> None:
    rotation = Rotation((1.0, 0.25), layout, offset=1)
    torch.manual_seed(0)
    keys = torch.randn(3, 2, 5, 6)
    now = torch.tensor([0, 7, 100_000])
    framed = rotation.frame(keys, now)
    for row, at in enumerate(now):
        for token in range(5):
            expected = keys[row, :, token].clone()
            for plane, speed in enumerate(rotation.frequencies):
                a, b = (plane, plane + 2) if layout == "halves" else (2 * plane, 2 * plane + 1)
                z = torch.complex(keys[row, :, token, 1 + a], keys[row, :, token, 1 + b])
                z = z * cmath.exp(-1j * int(at) * speed)
                expected[:, 1 + a], expected[:, 1 + b] = z.real, z.imag
            torch.testing.assert_close(framed[row, :, token], expected, atol=1e-5, rtol=1e-5)
    by_matrix = keys @ rotation.matrix(now, 6).unsqueeze(1)
    torch.testing.assert_close(by_matrix, framed, atol=1e-5, rtol=1e-5)


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(KvenvError, match="4 channels from 3 on are rotated and heads have 6"):
        Rotation((1.0, 0.5), offset=3).turn(torch.zeros(1, 6), torch.zeros(1))


def test_json_round_trip() -> None:
    one, other = Rotation((0.1 + 0.2, 1e-7), "pairs", 3, 1.138629), Rotation()
    given = (one, other, "rotates otherwise", one)
    plain = json.loads(json.dumps(pack(given)))
    assert unpack(plain) == given
    assert len(plain["kinds"]) == 3


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"kinds": [], "layers": [0]},
        {"kinds": [{}], "layers": ["x"]},
        {"kinds": [{"speed": 1}], "layers": [0]},
        {"kinds": [{"layout": "thirds"}], "layers": [0]},
        {"kinds": [{"frequencies": [float("nan")]}], "layers": [0]},
        {"kinds": [{"frequencies": ["x"]}], "layers": [0]},
        {"kinds": [{"offset": -1}], "layers": [0]},
        {"kinds": [{"factor": 0}], "layers": [0]},
        {"kinds": 3, "layers": [0]},
    ],
)
def test_damaged_json_is_refused(plain: dict[str, Any]) -> None:
    with pytest.raises(KvenvError, match="record the set again"):
        unpack(plain)
