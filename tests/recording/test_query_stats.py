"""Query statistics: those of the queries before the rotary embedding, turned by its mean."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from kvenv.errors import KvenvError
from kvenv.recording.capture import capture
from kvenv.scorers.query_stats import FUTURE, SINKS

N, T, D = 40, 9, 8
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": D,
    "max_position_embeddings": 4096,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 1024,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def made(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config)
    for weight in model.parameters():  # queries far from alike
        weight.data.mul_(4 if weight.ndim > 1 else 1)
    return model.eval()


def llama(**changes: Any) -> PreTrainedModel:
    return made(LlamaForCausalLM, LlamaConfig(num_hidden_layers=2, **{**SIZES, **changes}))


def gemma3() -> PreTrainedModel:
    config = Gemma3TextConfig(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        query_pre_attn_scalar=100,
        **SIZES,
    )
    return made(Gemma3ForCausalLM, config)


def tokens() -> torch.Tensor:
    return torch.randint(128, (N + T,), generator=torch.Generator().manual_seed(1))


def plain_queries(model: Any, layer: int) -> np.ndarray:
    """Before the rotary embedding, (Hq, S, d) float64, as the projection makes them."""
    module = model.model.layers[layer].self_attn
    made = module.q_norm if hasattr(module, "q_norm") else module.q_proj
    caught: list[torch.Tensor] = []
    hook = made.register_forward_hook(lambda _, __, result: caught.append(result))
    with torch.no_grad():
        model(tokens()[None])
    hook.remove()
    queries = caught[0][0]
    if queries.ndim == 2:
        queries = queries.unflatten(-1, (-1, D)).transpose(0, 1)
    return queries.double().numpy()


def rotation(positions: range, theta: float) -> np.ndarray:
    """The mean rotary matrix in float64: pairs (i, i + d/2) turn by position * theta^(-2i/d)."""
    total = np.zeros((D, D))
    for position in positions:
        for i in range(D // 2):
            angle = position * theta ** (-2 * i / D)
            j = i + D // 2
            total[[i, j], [i, j]] += math.cos(angle)
            total[i, j] -= math.sin(angle)
            total[j, i] += math.sin(angle)
    return total / len(positions)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_statistics_are_those_of_the_definition(family: str) -> None:
    model = llama() if family == "llama" else gemma3()
    theta = 10_000.0 if family == "llama" else 1_000_000.0  # Gemma's full-attention layers
    kept, _ = capture(model, tokens(), N, stats=True)
    R = rotation(range(N, N + FUTURE), theta)
    for layer in kept.layers:
        module: Any = model.model.layers[layer].self_attn
        scale = module.scaling * math.sqrt(D)  # logits are q . k / sqrt(d)
        assert (scale == pytest.approx(1)) == (family == "llama")
        queries = plain_queries(model, layer)[:, SINKS:N] * scale
        for head, rows in enumerate(queries):
            mean = R @ rows.mean(0)
            covariance = R @ np.cov(rows.T, bias=True) @ R.T
            close = {"rtol": 1e-3, "atol": 1e-4 * np.abs(rows).max() ** 2}
            np.testing.assert_allclose(kept.query_mean[layer][head], mean, **close)
            np.testing.assert_allclose(kept.query_cov[layer][head], covariance, **close)


def test_one_query_is_found_again_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """With FUTURE = 1 the mean of the last prompt query alone turns on by one position."""
    import kvenv.scorers.query_stats as query_stats

    monkeypatch.setattr(query_stats, "SINKS", N - 1)
    monkeypatch.setattr(query_stats, "FUTURE", 1)
    model = llama()
    kept, _ = capture(model, tokens(), N, stats=True, query_window=1)
    for layer in kept.layers:
        last = kept.queries[layer][:, 0].astype(np.float64)
        on = last @ rotation(range(1, 2), 10_000.0).T
        np.testing.assert_allclose(kept.query_mean[layer], on, atol=5e-3 * np.abs(on).max())
        assert np.abs(kept.query_cov[layer]).max() < 1e-6


def test_what_scales_attention_inside_the_embedding_is_undone_once() -> None:
    """YaRN's cosines carry a factor a: queries without it, times a for the turn ahead."""
    model = llama(rope_parameters=YARN)
    rotary: Any = model.model.rotary_emb
    factor = rotary.attention_scaling
    assert factor > 1.1
    kept, _ = capture(model, tokens(), N, stats=True)
    queries = plain_queries(model, 0)[:, SINKS:N]
    cos, sin = (x[0].mean(0).double().numpy() for x in rotary(torch.empty(0), ahead()))
    R = np.diag(cos)
    half = D // 2
    R[range(half), range(half, D)] = -sin[:half]
    R[range(half, D), range(half)] = sin[half:]
    want = queries.mean(1) @ R.T
    np.testing.assert_allclose(kept.query_mean[0], want, rtol=1e-3, atol=1e-3)


def ahead() -> torch.Tensor:
    return torch.arange(N, N + FUTURE)[None]


def test_dimensions_without_a_rotary_embedding_are_kept_as_they_are() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = Phi3Config(
        num_hidden_layers=2,
        partial_rotary_factor=0.5,
        pad_token_id=0,
        **sizes | {"hidden_size": 32},
    )
    model = made(Phi3ForCausalLM, config)
    kept, _ = capture(model, tokens(), N, stats=True, query_window=None)
    queries = kept.queries[0][:, SINKS:N].astype(np.float64)
    turned = D // 2
    np.testing.assert_allclose(
        kept.query_mean[0][:, turned:], queries.mean(1)[:, turned:], rtol=1e-2, atol=1e-2
    )
    for head, rows in enumerate(queries):
        covariance = np.cov(rows.T, bias=True)
        got = kept.query_cov[0][head][turned:, turned:]
        np.testing.assert_allclose(got, covariance[turned:, turned:], rtol=2e-2, atol=2e-2)


def test_measuring_changes_neither_the_model_nor_what_else_is_recorded() -> None:
    model = llama(rope_parameters=DYNAMIC, max_position_embeddings=256)
    before, logits = capture(model, tokens(), N)
    with_stats, same = capture(model, tokens(), N, stats=True)
    after, again = capture(model, tokens(), N)
    assert not before.query_mean
    assert with_stats.query_mean.keys() == {0, 1}
    for name in ("keys", "queries", "utility_sum"):
        for other in (with_stats, after):
            np.testing.assert_array_equal(other.stack(name), before.stack(name))
    assert torch.equal(same, logits)
    assert torch.equal(again, logits)


def gpt2() -> PreTrainedModel:
    return made(GPT2LMHeadModel, GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4))


def smollm3() -> PreTrainedModel:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = SmolLM3Config(num_hidden_layers=4, pad_token_id=0, **sizes | {"hidden_size": 32})
    return made(SmolLM3ForCausalLM, config)


@pytest.mark.parametrize("make", [gpt2, smollm3])
def test_models_without_a_rotary_embedding_are_refused(make: Any) -> None:
    with pytest.raises(KvenvError, match=r"no rotary embedding that .* record without --stats"):
        capture(make(), tokens(), N, stats=True)


def test_a_prompt_of_sinks_has_no_statistics() -> None:
    with pytest.raises(KvenvError, match="a prompt of 4 tokens has no query statistics"):
        capture(llama(), tokens(), SINKS, stats=True)
    kept, _ = capture(llama(), tokens(), SINKS + 1, stats=True)
    assert np.isfinite(kept.stack("query_mean")).all()
