"""What identifies a model: its shape, its weights' fingerprint, its tokenizer's hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvenv.errors import KvenvError
from kvenv.rotation import rotations_of
from kvenv.trace import ModelInfo


def full_attention_layers(config: Any) -> list[int]:
    """The layers that keep the whole context, in the model's own numbers.

    Sliding-window layers are bounded by their own rule and left alone.
    """
    layers = DynamicCache(config=config.get_text_config()).layers
    return [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]


def shape(config: Any) -> dict[str, Any]:
    """The parts of a `ModelInfo` that a transformers configuration tells."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {
        "architecture": text.model_type,
        "num_layers": text.num_hidden_layers,
        "kv_heads": text.num_key_value_heads,
        "query_heads": text.num_attention_heads,
        "head_dim": head_dim,
    }


def fingerprint(model: PreTrainedModel) -> str:
    """A short hash of the weights: equal for float32 and bfloat16 copies of one checkpoint.

    A fixed sample of every parameter is rounded to bfloat16 and hashed, so that it costs
    milliseconds at any model size.
    """
    digest = hashlib.sha256()
    for key, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{key}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of the tokenizer's vocabulary and chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    text = json.dumps([vocabulary, tokenizer.chat_template])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: list[int] | None = None,
    length: int = 1024,
) -> ModelInfo:
    """What a trace set or a bundle keeps of a model.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        layers: the recorded layers; None means every full-attention layer.
        length: the longest text, in tokens, for which rotations are stated and proved.

    Raises:
        KvenvError: if a layer is not a full-attention layer of the model.
    """
    full = full_attention_layers(model.config)
    chosen = full if layers is None else sorted(set(layers))
    if wrong := [layer for layer in chosen if layer not in full]:
        raise KvenvError(
            f"layers {wrong} are not full-attention layers of the model: choose from {full}"
        )
    return ModelInfo(
        id=str(model.config._name_or_path),
        fingerprint=fingerprint(model),
        tokenizer=tokenizer_hash(tokenizer),
        layers=tuple(chosen),
        rotations=rotations_of(model, chosen, length),
        **shape(model.config),
    )
