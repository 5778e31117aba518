"""Mean and covariance of a prompt's queries, carried to the positions after it.

Expected attention (Devoto et al. 2025, arXiv 2510.00636) takes the queries to come for normally
distributed ones. Their mean and covariance are measured before the rotary embedding, over the
prompt without its first `SINKS` tokens, and then turned by R, the rotary embedding averaged over
the `FUTURE` positions that follow the prompt: R mean and R cov R^T, as kvpress 0.5.5 does it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvenv.errors import KvenvError

SINKS = 4
"""First tokens left out, whose queries are unlike all others."""

FUTURE = 512
"""Positions after the prompt over which the rotary embedding is averaged."""

UNROTATED = frozenset(
    "cohere2 cohere2_moe exaone4 exaone4_5 exaone4_5_text exaone_moe kolibri1 llama4_text "
    "smollm3".split()
)
"""Model types in which some full-attention layers have no rotary embedding."""


class QueryStats:
    """Measures the queries of one episode, layer by layer, as the attention function sees them.

    Args:
        model: the model that runs; its own rotary embedding is undone.
        length: S, tokens of prompt and future.
        n: prompt tokens, more than `SINKS`.

    Raises:
        KvenvError: if the model's queries carry no rotary embedding that can be undone, or the
            prompt is too short.
    """

    def __init__(self, model: PreTrainedModel, length: int, n: int) -> None:
        if n <= SINKS:
            raise KvenvError(
                f"a prompt of {n} tokens has no query statistics, which leave the first {SINKS} "
                "out: record longer prompts, or without --stats"
            )
        self._config = model.config.get_text_config()
        rotary = getattr(model.get_decoder(), "rotary_emb", None)
        if rotary is None or self._config.model_type in UNROTATED:
            raise _unknown(self._config.model_type)
        self._rotary = copy.deepcopy(rotary)  # asking for later positions may change what it keeps
        self._takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
        self._length, self._n = length, n

    def measure(
        self, module: torch.nn.Module, layer: int, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Statistics of one layer.

        Args:
            module: the layer's attention module.
            layer: its number.
            queries: (H_q, S, d) after the rotary embedding.

        Returns:
            Mean (H_q, d) and covariance (H_q, d, d), float32.

        Raises:
            KvenvError: if the module's rotary embedding cannot be undone.
        """
        apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        chosen = slice(SINKS, self._n)
        past = self._turns(layer, queries.device, 0, self._length)
        if apply is None or past[0].is_complex() or past[0].shape[-1] > queries.shape[-1]:
            raise _unknown(self._config.model_type)

        def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return apply(x[None], x[None], cos[None], sin[None])[0][0]

        cos, sin = (part[chosen] for part in past)
        squared = cos**2 + sin**2  # 1, but for models that scale attention here
        plain = turned(queries[:, chosen].float(), cos / squared, -sin / squared)
        mean = plain.mean(1)
        centred = plain - mean.unsqueeze(1)
        covariance = centred.mT @ centred / centred.shape[1]
        ahead = self._turns(layer, queries.device, self._n, self._n + FUTURE)
        mean_turn = (part.mean(0, keepdim=True) for part in ahead)
        each = torch.eye(queries.shape[-1], device=queries.device).unsqueeze(1)
        rotation = turned(each, *mean_turn).squeeze(1)  # R^T: what R makes of each axis, in rows
        return mean @ rotation, rotation.mT @ covariance @ rotation

    def _turns(
        self, layer: int, device: torch.device, start: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a layer at positions start..end-1, (positions, rotated) float32."""
        like = torch.empty(0, device=device)
        positions = torch.arange(start, end, device=device).unsqueeze(0)
        kind: dict[str, Any] = {}
        if self._takes_type:
            kind["layer_type"] = self._config.layer_types[layer]
        cos, sin = self._rotary(like, positions, **kind)
        return cos[0], sin[0]


def _unknown(model_type: str) -> KvenvError:
    return KvenvError(
        f"model type {model_type} has no rotary embedding that query statistics can undo: record "
        "without --stats (the agent expected cannot be used then)"
    )
