"""A model's attention, watched: keys, values, queries and column sums without an S x S matrix.

Attention is computed in blocks of queries. Each block's softmax is used three times while it is
there: for the output, for the column sums that make the utility, and for the column maxima. On a
GPU, torch's own fused attention makes the output, and kernels make the columns from its
log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvenv.errors import KvenvError
from kvenv.identity import full_attention_layers
from kvenv.recording.offload import HALF, Offload, too_large
from kvenv.scorers.base import RECENT_QUERIES
from kvenv.scorers.query_stats import QueryStats

NAME = "kvenv_capture"
BLOCK = 128
"""Queries whose attention is held at once."""

TRITON = find_spec("triton") is not None


@dataclass
class Capture:
    """What one forward pass over prompt + future leaves behind, per recorded layer.

    Attributes:
        n: prompt tokens.
        layers: recorded layers, in the model's own numbers.
        query_from: the first position whose queries are kept.
        keys, values: layer -> (H_kv, S, d) float16 on the CPU.
        queries: layer -> (H_q, Q, d) float16 on the CPU, scaled so that the attention logits are
            q . k / sqrt(d) whatever the model's own factor is.
        utility_sum, utility_max, past_sum, past_window: layer -> (H_kv, n) float32 on the CPU.
        stats: measures the prompt's queries, if that is wanted.
        query_mean, query_cov: layer -> (H_q, d) and (H_q, d, d) float32 on the CPU, scaled as the
            queries are; empty without ``stats``.
        offload: brings all of it to the host in the background, if that is wanted; then the
            dictionaries are filled by `settle`.
    """

    n: int
    layers: tuple[int, ...]
    query_from: int
    keys: dict[int, np.ndarray] = field(default_factory=dict)
    values: dict[int, np.ndarray] = field(default_factory=dict)
    queries: dict[int, np.ndarray] = field(default_factory=dict)
    utility_sum: dict[int, np.ndarray] = field(default_factory=dict)
    utility_max: dict[int, np.ndarray] = field(default_factory=dict)
    past_sum: dict[int, np.ndarray] = field(default_factory=dict)
    past_window: dict[int, np.ndarray] = field(default_factory=dict)
    stats: QueryStats | None = None
    query_mean: dict[int, np.ndarray] = field(default_factory=dict)
    query_cov: dict[int, np.ndarray] = field(default_factory=dict)
    offload: Offload | None = None
    _whole: dict[str, np.ndarray] = field(default_factory=dict)

    def keep(self, layer: int, found: Mapping[str, torch.Tensor]) -> None:
        """Take a layer's quantities by name, as they are on the device."""
        if self.offload is not None:
            self.offload.add(layer, found)
            return
        for name, tensor in found.items():
            there = _float16(tensor, layer, name) if name in HALF else tensor.cpu().numpy()
            getattr(self, name)[layer] = there

    def settle(self) -> None:
        """Wait for what is on its way to the host. Raises KvenvError as `Offload.finish`."""
        if self.offload is not None:
            self._whole = self.offload.finish()
        for name, whole in self._whole.items():
            getattr(self, name).update(zip(self.layers, whole, strict=True))

    def stack(self, name: str) -> np.ndarray:
        """One quantity for all recorded layers, (L, ...)."""
        if name in self._whole:
            return self._whole[name]
        per_layer: dict[int, np.ndarray] = getattr(self, name)
        return np.stack([per_layer[layer] for layer in self.layers])


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    n: int,
    scaling: float,
    block: int = BLOCK,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Causal attention with grouped queries, and what each prompt token received.

    With p[g, t, i] the softmax weight that query t of query head g gives token i:
    past_sum[i] = sum of p over g and t < n, past_window[i] that over n - 32 <= t < n;
    utility_sum[i] and utility_max[i] are the sum and the largest of p over g and t >= n.

    Args:
        query: (H_q, S, d); query heads of one KV head are adjacent.
        key: (H_kv, S, d).
        value: (H_kv, S, d).
        n: prompt tokens; positions n..S-1 are the future.
        scaling: factor on the logits.
        block: queries held at once; memory is O(block * S) for each query head of a group.

    Returns:
        output (S, H_q, d) in the input's dtype; by name past_sum, past_window, utility_sum and
        utility_max, (H_kv, n) float32 each.
    """
    heads, length, d = key.shape
    group = query.shape[0] // heads
    output = query.new_empty(length, heads * group, d)
    past, window, total, largest = (torch.zeros(heads, n, device=key.device) for _ in range(4))
    recent = max(0, n - RECENT_QUERIES)
    # No block straddles the window's beginning or n.
    starts = sorted({*range(0, n, block), recent, *range(n, length, block)})
    later = torch.full((block, block), -torch.inf, device=key.device).triu_(1)
    ones = torch.ones(group * block, device=key.device)
    # One block's attention at a time, always in the same memory: fresh pages cost time.
    held = torch.empty(group * block * length, device=key.device)
    for head, (start, end) in product(range(heads), pairwise([*starts, length])):
        rows, mine = end - start, slice(head * group, (head + 1) * group)
        packed = (query[mine, start:end] * scaling).reshape(group * rows, d)
        weights = held[: group * rows * end].view(group * rows, end)
        _product(packed, key[head, :end].t(), weights)
        square = weights.view(group, rows, end)[..., start:]
        square += later[:rows, :rows]
        torch.softmax(weights, dim=-1, out=weights)
        mixed = weights.to(value.dtype) @ value[head, :end]
        output[start:end, mine] = mixed.view(group, rows, d).transpose(0, 1)
        seen = weights[:, :n].t()
        if start < n:
            into = past if start < recent else window
            into[head, :end].addmv_(seen, ones[: group * rows])
        else:
            total[head].addmv_(seen, ones[: group * rows])
            torch.maximum(largest[head], seen.amax(1), out=largest[head])
    found = {"past_sum": past.add_(window), "past_window": window}
    return output, {**found, "utility_sum": total, "utility_max": largest}


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """The matrix product of a and b in their own dtype, written as float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def flash_columns(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, n: int, scaling: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`blockwise_attention` by torch's fused attention and the column kernel, in O(S) memory."""
    # Here, since Triton is not everywhere.
    from kvenv.cache.kernels.columns import column_sums, columns
    from kvenv.cache.kernels.flash import flash

    output, lse = flash(query, key, value, scaling)
    recent = max(0, n - RECENT_QUERIES)
    window = column_sums(query[:, recent:n], key, lse[:, recent:n], recent, n, scaling)
    past = window
    if recent:
        past = window + column_sums(query[:, :recent], key, lse[:, :recent], 0, n, scaling)
    total, largest = columns(query[:, n:], key, lse[:, n:], n, n, scaling)
    found = {"past_sum": past, "past_window": window, "utility_sum": total, "utility_max": largest}
    return output.transpose(0, 1), found


def fused(query: torch.Tensor) -> bool:
    """Whether `flash_columns` serves these queries."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return TRITON and query.is_cuda and half and query.shape[-1] in range(8, 257, 8)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,  # in sdpa's place: kvpress, once imported, passes it by position
    scaling: float | None = None,
    kvenv_capture: Capture | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls while `capture` is on."""
    layer = int(getattr(module, "layer_idx", -1))
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise KvenvError(
            f"layer {layer} soft-caps its attention logits or has learned sinks, which recording "
            "does not support: record another model"
        )
    if kvenv_capture is None or layer not in kvenv_capture.layers:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling=scaling, **kwargs
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    kept = kvenv_capture
    attend = flash_columns if fused(query) else blockwise_attention
    output, columns = attend(query[0], key[0], value[0], kept.n, scale)
    factor = scale * query.shape[-1] ** 0.5
    found = {
        "keys": key[0],
        "values": value[0],
        "queries": query[0, :, kept.query_from :] * factor,
        **columns,
    }
    if kept.stats is not None:
        mean, covariance = kept.stats.measure(module, layer, query[0])
        found |= {"query_mean": mean * factor, "query_cov": covariance * factor**2}
    kept.keep(layer, found)
    return output.unsqueeze(0), None


def _float16(tensor: torch.Tensor, layer: int, what: str) -> np.ndarray:
    half = tensor.to(torch.float16)
    if not math.isfinite(half.sum(dtype=torch.float32)):  # one pass; infinities and NaN survive it
        head = int((~torch.isfinite(half)).any(-1).any(-1).nonzero()[0])
        raise too_large(what, layer, head, float(tensor[head].abs().max()))
    return half.cpu().numpy()


AttentionInterface.register(NAME, _attention)
# Sliding-window layers are not captured and need their mask, made as for sdpa.
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the model with another of transformers' attention implementations for a while."""
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def capture(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    n: int,
    *,
    layers: tuple[int, ...] | None = None,
    query_window: int | None = 64,
    logits_to_keep: int = 1,
    stats: bool = False,
) -> tuple[Capture, torch.Tensor]:
    """Run the model once over an episode and keep what eviction needs to know.

    Args:
        model: a causal language model of transformers.
        tokens: (S,) token ids: the prompt's n, then the future.
        n: prompt tokens, 1 <= n < S.
        layers: full-attention layers to record; None means all.
        query_window: how many of the prompt's last queries to keep beside the future's; None
            keeps every query.
        logits_to_keep: for how many of the last positions logits are computed (0: all).
        stats: measure the prompt's queries too (`QueryStats`).

    Returns:
        The capture, and the logits (1, logits_to_keep or S, vocabulary).

    Raises:
        KvenvError: on a prompt or future of no tokens, values beyond float16, or query statistics
            that the model or so short a prompt does not have.
    """
    length = int(tokens.shape[0])
    if not 1 <= n < length:
        raise KvenvError(
            f"an episode of {length} tokens cannot have {n} prompt tokens: need 1 <= n < S"
        )
    layers = tuple(full_attention_layers(model.config)) if layers is None else layers
    kept = Capture(
        n=n,
        layers=layers,
        query_from=0 if query_window is None else max(0, n - query_window),
        stats=QueryStats(model, length, n) if stats else None,
        offload=_background(model, layers),
    )
    with torch.inference_mode(), attention_of(model, NAME):
        ids = tokens.to(model.device).unsqueeze(0)
        result = model(ids, use_cache=False, logits_to_keep=logits_to_keep, kvenv_capture=kept)
        kept.settle()
    return kept, result.logits


def _background(model: PreTrainedModel, layers: tuple[int, ...]) -> Offload | None:
    """For a model on one GPU, a way to the host that does not hold it up."""
    devices = {parameter.device for parameter in model.parameters()}
    alone = len(devices) == 1 and model.device.type == "cuda"
    return Offload(layers, model.device) if alone else None
