"""Tiny random models and scorers for the cache tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from kvenv.scorers.base import Pointwise

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": None,
}


class Table(Pointwise):
    """A score drawn for every KV head and position, with many ties."""

    table = torch.randint(6, (2, 4096), generator=torch.Generator().manual_seed(0)).float()

    def score(self, layer, keys, values, positions, **needs):
        # `gather`, unlike indexing, refuses the negative positions of pads.
        return self.table.expand(positions.shape[0], -1, -1).gather(-1, positions)


class AgedTable(Table):
    """A table whose scores fade with age and recover every 7 tokens, for head 0 more than 1."""

    fade = torch.tensor([-1.25, -0.5])

    def age_term(self, layer, age):
        return age % 7 * self.fade.view(1, -1, 1)


class KeyNorm(Pointwise):
    """Small keys are worth most. Stands for a scorer too large to copy."""

    def __deepcopy__(self, memo):
        raise AssertionError("a copied cache shares its scorer")

    def score(self, layer, keys, values, positions, **needs):
        return -keys.float().norm(dim=-1)


class MeanKey(Pointwise):
    """Keys unlike the mean of those present are worth most: not pointwise."""

    pointwise = False

    def score(self, layer, keys, values, positions, **needs):
        return (keys - keys.mean(dim=-2, keepdim=True)).float().norm(dim=-1)


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for the device to tell it a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def no_waiting() -> type[TorchDispatchMode]:
    """A context of steps that a GPU could run ahead of."""
    return NoWaiting


@pytest.fixture(scope="session")
def scorers() -> dict[str, type[Pointwise]]:
    """Scorers by name."""
    return {one.__name__: one for one in (Table, AgedTable, KeyNorm, MeanKey)}


@pytest.fixture(scope="session")
def model() -> Callable[[str], PreTrainedModel]:
    """A tiny model by family: llama (2 full layers) or gemma (sliding, full, sliding, full)."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES)).eval()
    layers = ["sliding_attention", "full_attention"] * 2
    gemma = Gemma3ForCausalLM(
        Gemma3TextConfig(num_hidden_layers=4, layer_types=layers, sliding_window=8, **SIZES)
    ).eval()
    for built in (llama, gemma):
        for weight in built.parameters():  # large enough that attention is far from uniform
            weight.data.mul_(4 if weight.ndim > 1 else 1)

    def get(family: str) -> PreTrainedModel:
        built = {"llama": llama, "gemma": gemma}[family]
        built.set_attn_implementation("sdpa")
        return built

    return get


@pytest.fixture(scope="session")
def batch() -> Callable[..., dict[str, torch.Tensor]]:
    """Random token ids and their mask, each row but the first padded if ``padded``."""

    def batch(rows: int, tokens: int, padded: bool = False) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(rows)
        ids = torch.randint(1, 128, (rows, tokens), generator=draw)
        mask = torch.ones_like(ids)
        for row in range(1, rows) if padded else ():
            mask[row, : 4 * row] = 0
            ids[row, : 4 * row] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return batch


@pytest.fixture(scope="session")
def generate() -> Callable[..., torch.Tensor]:
    """What a model writes after a batch with a cache."""

    def generate(model, inputs, cache, **ways):
        torch.manual_seed(5)
        ways = {"max_new_tokens": 12, "do_sample": False} | ways
        return model.generate(**inputs, past_key_values=cache, **ways)

    return generate


@pytest.fixture(scope="session")
def run() -> Callable[..., torch.Tensor]:
    """Logits (rows, tokens, vocabulary) of forward passes over ``steps`` tokens at a time."""

    def run(lm, cache, ids, mask, steps):
        seen, logits = 0, []
        for q in steps:
            upto = mask[:, : seen + q]
            position_ids = (upto.cumsum(-1) - 1).clamp(min=0)[:, seen:]
            with torch.no_grad():
                step = lm(
                    input_ids=ids[:, seen : seen + q],
                    attention_mask=upto,
                    position_ids=position_ids,
                    past_key_values=cache,
                )
            logits.append(step.logits)
            seen += q
        return torch.cat(logits, 1)

    return run
