"""Tiny models of two families and small sets recorded from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from kvenv import models
from kvenv.recording import recorder
from kvenv.recording.workload import Sample
from kvenv.trace import TraceSet


class Windows:
    """Random tokens; lengths and metadata by episode."""

    def __init__(
        self, lengths: Sequence[tuple[int, int]], facts: Sequence[dict[str, Any]] = ()
    ) -> None:
        self._lengths, self._facts = lengths, facts

    def sample(self, index, *, tokenizer, rng, prompt_tokens, future_tokens, seed):
        n, T = self._lengths[index]
        ids = rng.integers(0, 256, n + T).tolist()
        facts = self._facts[index] if self._facts else {}
        ids[n : n + len(facts.get("future", ()))] = facts.get("future", ())
        kept = {key: value for key, value in facts.items() if key != "future"}
        return Sample(ids[:n], ids[n:], f"document {index}", kept)


@pytest.fixture(scope="session")
def families(checkpoints) -> Callable[[str], tuple[Any, Any]]:
    """Model and tokenizer: llama (2 full layers) or gemma (sliding, full, sliding, full)."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    @functools.cache
    def get(family: str) -> tuple[Any, Any]:
        llama, tokenizer = models.load(str(checkpoints(0)))
        if family == "llama":
            return llama, tokenizer
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        model = Gemma3ForCausalLM(config).eval()
        for weight in model.parameters():  # large enough that attention is far from uniform
            weight.data.mul_(4 if weight.ndim > 1 else 1)
        model.config._name_or_path = "tiny-gemma"
        return model, tokenizer

    return get


@pytest.fixture(scope="session")
def recorded(families, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TraceSet]:
    """Records episodes of (n, T) tokens; ``facts`` are their metadata, "future" its first ids."""

    def record(
        family: str = "llama",
        lengths: Sequence[tuple[int, int]] = ((44, 12), (37, 9), (44, 12)),
        facts: Sequence[dict[str, Any]] = (),
        **options: Any,
    ) -> TraceSet:
        return recorder.record(
            *families(family),
            Windows(lengths, facts),
            tmp_path_factory.mktemp("sets") / "set",
            episodes=len(lengths),
            prompt_tokens=max(n for n, _ in lengths),
            future_tokens=max(T for _, T in lengths),
            name="windows",
            **options,
        )

    return record


@pytest.fixture(scope="session")
def sets(recorded) -> Callable[[str], TraceSet]:
    """The default set of a family, recorded once."""
    return functools.cache(recorded)
