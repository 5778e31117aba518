"""What static layers take of memory and of the host's time, and what they refuse."""

from __future__ import annotations

import gc
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from kvenv.cache import EvictionCache, backends
from kvenv.errors import KvenvError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUFFERS = ("keys", "values", "positions", "scores", "lengths", "clock", "offsets")


def config(head_dim: int, layers: int = 1) -> LlamaConfig:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim}
    return LlamaConfig(num_hidden_layers=layers, hidden_size=32, **heads)


def step(q, head_dim, *, rows=1, seed=0, dtype=torch.float32):
    """Queries of 4 heads, keys and values of 2."""
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(8, rows, q, head_dim, generator=draw).to(DEVICE, dtype)
    return [x.transpose(0, 1) for x in states.split([4, 2, 2])]


def tensors():
    """Bytes of all tensors alive."""
    gc.collect()
    alive = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())


def addresses(layer):
    return [getattr(layer.slots, name).data_ptr() for name in BUFFERS]


@pytest.mark.parametrize("capacities", [(60, 60), (97, 23)], ids=["uniform", "ragged"])
def test_memory_is_the_budgets_and_stays_so_over_thousands_of_tokens(
    scorers, static_layer, feed, capacities
):
    cache = EvictionCache(config(128), scorers["KeyNorm"](), budget=60, block=64)
    cache.layers[0] = layer = static_layer(capacities, scorers["KeyNorm"]())
    budget = 2 * 60 * 2 * 128 * 2  # heads, tokens, keys and values of 128 in two bytes
    states = step(150, 128, dtype=torch.float16)
    before = tensors()
    feed(layer, *states)
    assert cache.nbytes == budget
    held = tensors() - before
    assert budget <= held <= 1.02 * budget
    address = addresses(layer)
    for i in range(2000):
        feed(layer, *(x[:, :, i % 150 : i % 150 + 1] for x in states))
    assert layer.get_seq_length() == 2150
    assert cache.nbytes == budget
    assert tensors() - before == held
    assert addresses(layer) == address


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_reset_keeps_the_buffers_and_forgets_the_rest(scorers, static_layer, feed, backend):
    layer, fresh = (static_layer((9, 5), scorers["AgedTable"](), backend=backend) for _ in range(2))
    sizes = (12, 1, 1, 4, 1)
    for q in sizes:
        feed(layer, *step(q, 64, seed=q))
    address = addresses(layer)
    layer.reset()
    assert (layer.get_seq_length(), layer.held, layer.positions.numel()) == (0, 0, 0)
    for q in sizes:
        again, expected = (feed(one, *step(q, 64, seed=50 + q)) for one in (layer, fresh))
        assert torch.equal(again, expected)
        assert torch.equal(layer.positions, fresh.positions)
    assert addresses(layer) == address
    layer.reset()
    feed(layer, *step(1, 64))
    assert layer.positions.tolist() == [[[0, *[-1] * 8]] * 2]


def test_another_batch_needs_another_cache(scorers, static_layer, feed):
    layer = static_layer((9, 5), scorers["KeyNorm"](), mask=torch.ones(2, 4))
    feed(layer, *step(4, 8, rows=2))
    with pytest.raises(KvenvError, match="holds 2 rows and this step has 3: make a new"):
        layer.update(*step(4, 8, rows=3)[1:])
    queries = step(4, 8)[0]
    with pytest.raises(KvenvError, match="has 4 KV heads here and 2 in the configuration"):
        static_layer((9, 5), scorers["KeyNorm"]()).update(queries, queries)


def test_attention_that_passes_by_the_cache_is_noticed(scorers, static_layer):
    layer = static_layer((9, 5), scorers["KeyNorm"]())
    layer.update(*step(6, 8)[1:])
    with pytest.raises(KvenvError, match=r"layer 0 did not come to the cache: .*kvenv\|\*"):
        layer.update(*step(1, 8)[1:])
    layer.reset()
    layer.update(*step(6, 8)[1:])  # a reset forgets that too
    assert layer.get_seq_length() == 0  # what waits for its attention is not read yet


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("capacities", [(8, 8), (11, 5)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("kind", ["Table", "AgedTable", "KeyNorm"])
def test_a_step_of_one_token_never_waits_for_the_device(
    scorers, static_layer, feed, no_waiting, kind, capacities, backend
):
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :12] = 0
    layer = static_layer(capacities, scorers[kind](), mask=mask, backend=backend)
    feed(layer, *step(24, 64, rows=2))
    assert layer.static
    for seed in range(3):
        query, key, value = step(1, 64, rows=2, seed=seed)
        if backend == "torch" or DEVICE == "cuda":
            with no_waiting():
                layer.update(key, value)
                layer.get_mask_sizes(1)
                layer.attend(query[:, :, 0], 0.125)
        else:  # the interpreter itself reads numbers; what goes before it must not
            with no_waiting():
                layer._judge.newcomer(key[:, :, 0], value[:, :, 0], layer.slots)
            feed(layer, query, key, value)
        assert layer.slots.clock.tolist() == [[25 + seed] * 2, [13 + seed] * 2]


def test_scorers_that_see_all_tokens_are_not_static(scorers, static_layer, feed):
    layer = static_layer((8, 8), scorers["MeanKey"]())
    feed(layer, *step(9, 8))
    assert not layer.static


def test_slots_that_do_not_fit_the_device_say_how_many_bytes_are_missing(
    scorers, static_layer, monkeypatch
):
    keys = SimpleNamespace(
        device=torch.device("cuda", 0), shape=(3, 2, 7, 128), element_size=lambda: 2
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50_000, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10_000)
    asked = 3 * (60 + 40) * (2 * 128 * 2 + 4 + 4)  # positions and scores beside each slot
    message = f"take {asked:,} bytes and cuda:0 has 70,000 free: {asked - 70_000:,} bytes are miss"
    plan = static_layer((60, 40), scorers["KeyNorm"]())._plan
    with pytest.raises(KvenvError, match=message):
        plan._check_memory(keys, keys)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked - 20_000, 10**9))
    plan._check_memory(keys, keys)


def test_triton_asked_for_where_it_cannot_run(scorers, static_layer, monkeypatch):
    states = torch.randn(2, 1, 2, 4, 64)
    layer = static_layer((9, 5), scorers["KeyNorm"](), backend="triton")
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    with pytest.raises(
        KvenvError, match=r"runs on cpu: move it to an NVIDIA GPU .*backend='torch'"
    ):
        layer.update(*states)
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(KvenvError, match=r"Triton is not installed .* use backend='torch'"):
        layer.update(*states)


def test_a_head_size_without_kernels_runs_on_torch_with_one_warning(scorers, feed):
    three = config(48, layers=3)
    cache, expected = (
        EvictionCache(three, scorers["KeyNorm"](), budget=32, backend=backend, block=64)
        for backend in ("triton", "torch")
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for q in (40, 1, 1):
            for layer in cache.layers:
                feed(layer, *step(q, 48))
            feed(expected.layers[2], *step(q, 48))
    assert ["heads of size 48" in str(one.message) for one in caught] == [True]
    assert cache.positions(2).shape == (1, 2, 32)
    assert torch.equal(cache.positions(2), expected.positions(2))
