"""Watching attention: the same numbers as eager attention gives, without its memory."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from kvenv.errors import KvenvError
from kvenv.recording import capture as capturing
from kvenv.recording.capture import blockwise_attention, capture, flash_columns
from kvenv.recording.offload import Offload

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """With weights large enough that attention is far from uniform."""
    for weight in model.parameters():
        weight.data.mul_(4 if weight.ndim > 1 else 1)
    return model.eval()


def llama(query_heads: int = 4, kv_heads: int = 2) -> PreTrainedModel:
    torch.manual_seed(query_heads)
    return sharpened(
        LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=2,
                num_attention_heads=query_heads,
                num_key_value_heads=kv_heads,
                **SIZES,
            )
        )
    )


def gemma3() -> PreTrainedModel:
    torch.manual_seed(0)
    return sharpened(
        Gemma3ForCausalLM(
            Gemma3TextConfig(
                num_hidden_layers=4,
                layer_types=["sliding_attention", "full_attention"] * 2,
                sliding_window=8,
                num_attention_heads=4,
                num_key_value_heads=1,
                **SIZES,
            )
        )
    )


def some_tokens(length: int) -> torch.Tensor:
    return torch.randint(128, (length,), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def eager(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Every layer's attention (H_kv, group, S, S) in float64, from transformers itself."""
    model.set_attn_implementation("eager")
    result = model.double()(tokens[None], output_attentions=True)
    model.float().set_attn_implementation("sdpa")
    kv = model.config.num_key_value_heads
    return [a[0].unflatten(0, (kv, -1)) for a in result.attentions]


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(2, 2), (4, 2), (6, 2)])
@pytest.mark.parametrize(
    ("n", "T", "block"),
    [(32, 16, 8), (33, 14, 8), (20, 27, 64), (1, 12, 4), (37, 1, 5), (1, 1, 1)],
)
def test_capture_agrees_with_eager_attention(
    query_heads: int,
    kv_heads: int,
    n: int,
    T: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens = llama(query_heads, kv_heads), some_tokens(n + T)
    expected = eager(model, tokens)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        own = model(tokens[None], past_key_values=cache).logits
    monkeypatch.setattr(capturing, "blockwise_attention", partial(blockwise_attention, block=block))
    kept, logits = capture(model, tokens, n, query_window=None, logits_to_keep=0)

    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4)
    assert kept.layers == (0, 1)
    for layer, attention in enumerate(expected):
        future = attention[:, :, n:, :n]
        for name, value in (
            ("utility_sum", future.sum((1, 2))),
            ("utility_max", future.amax((1, 2))),
            ("past_sum", attention[:, :, :n, :n].sum((1, 2))),
            ("past_window", attention[:, :, max(0, n - 32) : n, :n].sum((1, 2))),
        ):
            np.testing.assert_allclose(
                getattr(kept, name)[layer], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=name
            )
        # A layer's input carries the rounding of the attention below it; the first has none.
        tolerance = 0 if layer == 0 else 2e-3
        for name in ("keys", "values"):
            held = getattr(cache.layers[layer], name)[0].half().numpy()
            got = getattr(kept, name)[layer]
            assert got.dtype == np.float16
            np.testing.assert_allclose(got, held, rtol=tolerance, atol=tolerance, err_msg=name)
        queries = torch.from_numpy(kept.queries[layer]).double().unflatten(0, (kv_heads, -1))
        keys = torch.from_numpy(kept.keys[layer]).double()
        again = (queries @ keys[:, None].mT * 8**-0.5).masked_fill(
            torch.ones(n + T, n + T).triu(1).bool(), -torch.inf
        )
        torch.testing.assert_close(again.softmax(-1), attention, rtol=0, atol=0.02)


def test_query_window_keeps_the_last_prompt_queries_and_the_future_s() -> None:
    model, tokens = llama(), some_tokens(20)
    every, _ = capture(model, tokens, 15, query_window=None)
    for window, first in ((3, 12), (15, 0), (64, 0)):
        kept, _ = capture(model, tokens, 15, query_window=window)
        np.testing.assert_array_equal(kept.stack("queries"), every.stack("queries")[:, :, first:])


def test_chosen_layers_are_recorded_and_change_nothing() -> None:
    model, tokens = llama(), some_tokens(20)
    both, logits = capture(model, tokens, 12)
    one, same = capture(model, tokens, 12, layers=(1,))
    np.testing.assert_allclose(one.stack("keys")[0], both.keys[1], atol=2e-3)
    np.testing.assert_allclose(one.stack("utility_sum")[0], both.utility_sum[1], rtol=1e-3)
    assert one.keys.keys() == {1}
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-4)


def test_sliding_layers_are_left_alone() -> None:
    model, tokens = gemma3(), some_tokens(40)
    expected = eager(model, tokens)
    with torch.no_grad():
        own = model(tokens[None]).logits
    kept, logits = capture(model, tokens, 30, logits_to_keep=0)
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4)
    assert kept.layers == (1, 3)
    for layer in kept.layers:
        np.testing.assert_allclose(
            kept.utility_sum[layer],
            expected[layer][:, :, 30:, :30].sum((1, 2)).numpy(),
            rtol=1e-4,
            atol=1e-5,
        )


@given(st.data())
def test_blockwise_attention_is_attention(data: st.DataObject) -> None:
    def whole(name: str, low: int, high: int) -> int:
        return data.draw(st.integers(low, high), label=name)

    heads, group, d = whole("heads", 1, 3), whole("group", 1, 3), whole("d", 1, 6)
    length = whole("S", 2, 40)
    n, block = whole("n", 1, length - 1), whole("block", 1, 48)
    scale = data.draw(st.sampled_from([0.3, 1.0, 1e4]), label="scaling")
    random = torch.Generator().manual_seed(whole("seed", 0, 99))
    q = torch.randn(heads * group, length, d, generator=random)
    k, v = (torch.randn(heads, length, d, generator=random) for _ in range(2))

    output, found = blockwise_attention(q, k, v, n, scale, block)
    past, window, total, largest = (
        found[name] for name in ("past_sum", "past_window", "utility_sum", "utility_max")
    )

    for result in (output, *found.values()):
        assert torch.isfinite(result).all()
    # Each future query gives a weight of one, part of it to the future; each past one all of it.
    torch.testing.assert_close(past.sum(-1), torch.full((heads,), float(group * n)))
    assert (total.sum(-1) <= group * (length - n) * (1 + 1e-5)).all()
    assert (largest <= total * (1 + 1e-5)).all()
    if scale > 1:
        return  # rounding of the logits decides which token wins
    logits = q.view(heads, group, length, d).double() @ k[:, None].double().mT * scale
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    expected = (
        (p @ v[:, None].double()).view(heads * group, length, d).transpose(0, 1),
        p[:, :, :n, :n].sum((1, 2)),
        p[:, :, max(0, n - 32) : n, :n].sum((1, 2)),
        p[:, :, n:, :n].sum((1, 2)),
        p[:, :, n:, :n].amax((1, 2)),
    )
    for got, want in zip((output, past, window, total, largest), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "group", "d"), [(2, 1, 8), (1, 3, 64), (2, 2, 80)])
@pytest.mark.parametrize(("n", "T"), [(100, 33), (129, 1), (1, 40)])
def test_fused_and_blockwise_paths_agree(heads: int, group: int, d: int, n: int, T: int) -> None:
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    random = torch.Generator().manual_seed(n)
    q, k, v = (
        torch.randn(h, n + T, d, generator=random).to(DEVICE, dtype)
        for h in (heads * group, heads, heads)
    )
    right = blockwise_attention(*(part.float() for part in (q, k, v)), n, 0.3)
    got = flash_columns(q, k, v, n, 0.3)
    loose = 1e-4 if dtype == torch.float32 else 2e-3
    assert got[1].keys() == right[1].keys()
    for one, other in zip((got[0], *got[1].values()), (right[0], *right[1].values()), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.float(), other, rtol=loose, atol=loose)


def test_capture_in_the_background_and_by_kernels_keeps_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens = llama(), some_tokens(90)
    right, logits = capture(model, tokens, 60, stats=True)
    if DEVICE == "cuda":  # float32 there: blockwise attention, but in the background
        model = model.to(DEVICE)
    else:
        monkeypatch.setattr(capturing, "fused", lambda query: True)
        monkeypatch.setattr(capturing, "_background", lambda model, layers: Offload(layers, CPU))
    kept, same = capture(model, tokens, 60, stats=True)
    torch.testing.assert_close(same.cpu(), logits, rtol=1e-3, atol=1e-3)
    for name in (
        *("keys", "values", "queries", "utility_sum", "utility_max", "past_sum", "past_window"),
        *("query_mean", "query_cov"),
    ):
        ours, theirs = kept.stack(name), right.stack(name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3, err_msg=name)
        np.testing.assert_array_equal(getattr(kept, name)[1], ours[1])


@pytest.mark.parametrize("weight", ["k_proj", "v_proj"])
def test_overflow_in_the_background_names_layer_and_head(
    weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    getattr(model.model.layers[1].self_attn, weight).weight.data[8:] *= 1e6
    if DEVICE == "cuda":
        model = model.to(DEVICE)
    else:
        monkeypatch.setattr(capturing, "_background", lambda model, layers: Offload(layers, CPU))
    with pytest.raises(KvenvError, match=r"s of layer 1 head 1 reach .* --layers"):
        capture(model, some_tokens(20), 12)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_capture_on_a_gpu_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = SIZES | {"head_dim": 64, "hidden_size": 256}
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **shape)
    model, tokens = LlamaForCausalLM(config).to(dtype).eval(), some_tokens(700)
    right, _ = capture(model.float(), tokens, 600)
    kept, _ = capture(model.to(DEVICE, dtype), tokens, 600)
    for name in (
        "keys",
        "values",
        "queries",
        "utility_sum",
        "utility_max",
        "past_sum",
        "past_window",
    ):
        np.testing.assert_allclose(
            *(part.stack(name).astype(np.float32) for part in (kept, right)),
            rtol=0.05,
            atol=0.02,
            err_msg=name,
        )


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("length", [400, 1600])
def test_no_tensor_is_larger_than_a_block_of_queries(length: int) -> None:
    q, k, v = torch.randn(4, length, 8), torch.randn(2, length, 8), torch.randn(2, length, 8)
    with Largest() as largest:
        blockwise_attention(q, k, v, length - 50, 1.0, block=32)
    assert largest.elements <= 4 * 32 * length


def test_capture_holds_no_attention_matrix() -> None:
    model, tokens = llama(), some_tokens(1500)
    with Largest() as largest:
        capture(model, tokens, 1400)
    assert largest.elements <= 4 * capturing.BLOCK * 1500  # one block of 4 heads' attention


@pytest.mark.parametrize(("what", "weight"), [("keys", "k_proj"), ("values", "v_proj")])
def test_float16_overflow_names_layer_and_head(what: str, weight: str) -> None:
    model = llama()
    projection = getattr(model.model.layers[1].self_attn, weight).weight
    projection.data[8:] *= 1e6  # KV head 1 of two
    with pytest.raises(KvenvError, match=f"{what} of layer 1 head 1 reach .* --layers"):
        capture(model, some_tokens(20), 12)
    kept, _ = capture(model, some_tokens(20), 12, layers=(0,))
    assert np.isfinite(kept.stack("keys")).all()


def test_the_attention_implementation_comes_back() -> None:
    model = llama()
    for before in ("sdpa", "eager"):
        model.set_attn_implementation(before)
        capture(model, some_tokens(20), 12)
        assert model.config._attn_implementation == before
        with pytest.raises(IndexError):
            capture(model, torch.tensor([1, 2, 999]), 2)
        assert model.config._attn_implementation == before


@pytest.mark.parametrize("n", [0, 20, 21, -1])
def test_prompt_and_future_must_have_a_token(n: int) -> None:
    with pytest.raises(KvenvError, match=f"20 tokens cannot have {n} prompt tokens"):
        capture(llama(), some_tokens(20), n)


def test_soft_capped_attention_is_refused() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SIZES)
    ).eval()
    with pytest.raises(KvenvError, match="layer 0 soft-caps"):
        capture(model, some_tokens(20), 12)


def test_queries_carry_a_model_s_own_scale() -> None:
    model, tokens, n = gemma3(), some_tokens(30), 20
    assert model.model.layers[1].self_attn.scaling != model.config.head_dim**-0.5
    expected = eager(model, tokens)
    kept, _ = capture(model, tokens, n, query_window=None)
    for layer in kept.layers:
        queries = torch.from_numpy(kept.queries[layer]).double()
        logits = queries @ torch.from_numpy(kept.keys[layer]).double().mT * 8**-0.5
        hidden = torch.ones(30, 30, dtype=torch.bool).triu(1)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        torch.testing.assert_close(weights[None], expected[layer], rtol=0, atol=0.02)
