"""Models with random weights, and the caches that they decode with, filled without a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvenv import identity
from kvenv.cache.bench.inputs import ARCHITECTURE, RECENT, SINKS, full_positions, networks
from kvenv.cache.bench.session import require
from kvenv.cache.eviction import EvictionCache
from kvenv.cache.generation import _Step
from kvenv.cache.static import SlotLayer
from kvenv.scorers.bundle import NetworkScorer
from kvenv.trace import ModelInfo

WAYS = {
    "dynamic": "transformers' DynamicCache, eager, as generate() takes it",
    "compiled": "transformers' StaticCache, the forward torch.compile'd (mode='reduce-overhead')",
    "unmasked": "StaticCache in a CUDA graph, every slot visible without a mask, which lets torch "
    "choose its fastest attention: the least that a full cache takes",
    "ours": "EvictionCache, its step in a CUDA graph as kvenv.cache.generate captures it",
}

LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 2**18,
}
"""An 8B Llama's shape."""

BARE = "kvenv_bench_unmasked"

SPARE = 128
"""Tokens that a full cache has room for beyond its context."""

DecodeStep = Callable[[torch.Tensor], torch.Tensor]


def random_model(shape: Mapping[str, Any], device: torch.device) -> PreTrainedModel:
    """A Llama of this shape in bfloat16 (on a CPU float32), made where it runs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(**shape, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    config._attn_implementation = "sdpa"
    size = _parameters(config) * dtype.itemsize
    require(device, size)
    with torch.device(device):
        made = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))
    return made.eval().requires_grad_(False)


def _parameters(config: LlamaConfig) -> int:
    shape, width = identity.shape(config), config.hidden_size
    heads = shape["query_heads"] + shape["kv_heads"]
    layer = 2 * heads * shape["head_dim"] * width + 3 * width * config.intermediate_size
    return config.num_hidden_layers * layer + 2 * config.vocab_size * width


def random_scorer(model: PreTrainedModel) -> NetworkScorer:
    """Networks like the shipped agents', for every head of the model."""
    layers = identity.full_attention_layers(model.config)
    info = ModelInfo(
        "random", "random", tokenizer="none", layers=tuple(layers), **identity.shape(model.config)
    )
    draw = torch.Generator().manual_seed(0)
    return NetworkScorer(
        networks(draw, info.heads, info.head_dim, ARCHITECTURE), ARCHITECTURE, info
    )


def token_bytes(model: PreTrainedModel) -> int:
    """What one token's keys and values take in all layers."""
    shape = identity.shape(model.config)
    return 2 * shape["num_layers"] * shape["kv_heads"] * shape["head_dim"] * model.dtype.itemsize


def contender(
    way: str,
    model: PreTrainedModel,
    scorer: NetworkScorer,
    context: int,
    batch: int,
    budget: int | None,
) -> tuple[Cache, DecodeStep]:
    """A cache that holds random tokens, and how to decode one more for each row.

    Args:
        way: one of `WAYS`.
        model: from `random_model`.
        scorer: from `random_scorer`, for ours.
        context: tokens of text that came before.
        batch: rows.
        budget: tokens that ours holds of them.

    Returns:
        The cache, and the step: tokens (B,) to logits (B, vocabulary).

    Raises:
        TooLargeError: if the device has no memory for it.
    """
    model.config._attn_implementation = "sdpa"
    held = context if way != "ours" else min(context, budget or context)
    size = batch * token_bytes(model) * (held + SPARE * (way != "ours"))
    # Of a layer, a growing cache has the old and the new; masked attention repeats the heads.
    layers = identity.shape(model.config)["num_layers"]
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    work = {"dynamic": 2, "compiled": group, "unmasked": 1, "ours": 0}[way]
    require(model.device, size + work * size // layers)
    if way == "ours":
        return _ours(model, scorer, context, batch, held)
    if way == "dynamic":
        return _dynamic(model, context, batch)
    return _static(model, context, batch, compiled=way == "compiled")


def fill(cache: EvictionCache, model: PreTrainedModel, context: int, batch: int) -> None:
    """Have every head hold as many random tokens as it may, of a text of ``context`` tokens."""
    shape, device = identity.shape(model.config), model.device
    heads = shape["kv_heads"]
    first = torch.empty(batch, heads, 1, shape["head_dim"], dtype=model.dtype, device=device)
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, SlotLayer):
            continue
        layer.lazy_initialization(first, first)
        slots, capacities = layer.slots, cache.capacities[index]
        for numbers in (slots.keys, slots.values, slots.scores):
            numbers.normal_()
        used = torch.tensor([min(capacity, context) for capacity in capacities])
        held = [
            torch.nn.functional.pad(full_positions(1, 1, int(n), context), (0, c - int(n)))
            for n, c in zip(used, capacities, strict=True)
        ]
        slots.positions.copy_(torch.cat(held, 1).expand(batch, -1))
        slots.lengths.copy_(used.expand(batch, -1))
        slots.clock.fill_(context)


def _ours(
    model: PreTrainedModel, scorer: NetworkScorer, context: int, batch: int, budget: int
) -> tuple[Cache, DecodeStep]:
    mask = torch.ones(batch, context, dtype=torch.long, device=model.device)
    backend = "triton" if model.device.type == "cuda" else "torch"
    cache = EvictionCache(
        model.config,
        scorer,
        budget=budget,
        sinks=SINKS,
        recent=RECENT,
        backend=backend,
        block=None if backend == "triton" else context,  # what makes torch's slots static
        attention_mask=mask[:, :1],
    )
    fill(cache, model, context, batch)
    return cache, _Step(model, cache, mask, graph=True)


def _dynamic(model: PreTrainedModel, context: int, batch: int) -> tuple[Cache, DecodeStep]:
    cache = DynamicCache(config=model.config)
    for layer, states in enumerate(_states(model, context, batch)):
        cache.update(*states, layer)
    position = torch.full((batch, 1), context, device=model.device)

    def step(token: torch.Tensor) -> torch.Tensor:
        logits = model(
            token.unsqueeze(-1), position_ids=position, past_key_values=cache, use_cache=True
        ).logits[:, -1]
        position.add_(1)
        return logits

    return cache, step


def _states(model: PreTrainedModel, tokens: int, batch: int) -> Any:
    shape = identity.shape(model.config)
    sizes = batch, shape["kv_heads"], tokens, shape["head_dim"]
    for _ in range(shape["num_layers"]):
        yield (
            torch.randn(*sizes, dtype=model.dtype, device=model.device),
            torch.randn(*sizes, dtype=model.dtype, device=model.device),
        )


def _static(
    model: PreTrainedModel, context: int, batch: int, compiled: bool
) -> tuple[Cache, DecodeStep]:
    shape, device, length = identity.shape(model.config), model.device, context + SPARE
    cache: Any = StaticCache(config=model.config, max_cache_len=length)
    cache.early_initialization(
        batch, shape["kv_heads"], shape["head_dim"], model.dtype, torch.device(device)
    )
    for layer in cache.layers:
        # Older transformers count the slots that are not zero.
        for states in (layer.keys, layer.values):
            (states[:, :, :context] if compiled else states).normal_()
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(context)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
    position = torch.full((batch, 1), context, device=device)
    index = torch.arange(length, device=device).view(1, 1, 1, -1)
    forward: Any = model.forward
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    else:
        AttentionInterface.register(BARE, sdpa_attention_forward)
        model.config._attn_implementation = BARE  # it has no mask function: no mask is made

    def run() -> torch.Tensor:
        # generate() too makes a compiled step's mask outside of it.
        mask = (index <= position.view(-1, 1, 1, 1)) if compiled else None
        logits = forward(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        position.add_(1)
        return logits

    if not compiled and device.type == "cuda":
        run = _captured(run)

    def step(token: torch.Tensor) -> torch.Tensor:
        ids.copy_(token.unsqueeze(-1))
        return run()

    return cache, step


def _captured(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same as a CUDA graph; its result is overwritten by the next."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay
