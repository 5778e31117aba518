"""Tiny random models and scorers for the cache tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
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

from kvenv import identity
from kvenv.rotation import rotations_of
from kvenv.scorers import NetworkScorer
from kvenv.scorers.calibration import Calibration
from kvenv.scorers.network import Architecture
from kvenv.trace import ModelInfo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

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


def _everywhere(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scorer's numbers by the kind of device; copied now, since no CUDA graph could."""
    return {kind: numbers.to(kind) for kind in {"cpu", DEVICE}}


class Plain:
    """A scorer of every head that wants nothing more than keys, values and positions."""

    needs = frozenset()
    heads = None


class Table(Plain):
    """A score drawn for every KV head and position, with many ties."""

    table = torch.randint(6, (2, 4096), generator=torch.Generator().manual_seed(0)).float()
    tables = _everywhere(table)

    def score(self, layer, keys, values, positions, now, **needs):
        # `gather`, unlike indexing, refuses the negative positions of pads.
        table = self.tables[positions.device.type]
        return table.expand(positions.shape[0], -1, -1).gather(-1, positions)


class KeyNorm(Plain):
    """Small keys are worth most. Stands for a scorer too large to copy."""

    def __deepcopy__(self, memo):
        raise AssertionError("a copied cache shares its scorer")

    def score(self, layer, keys, values, positions, now, **needs):
        return -keys.float().norm(dim=-1)


class Aged(Plain):
    """Key norms that fade as tokens grow older, and recover every 7: scores that change."""

    def score(self, layer, keys, values, positions, now, **needs):
        return -keys.float().norm(dim=-1) - (now.view(-1, 1, 1) - positions) % 7


class MeanKey(Plain):
    """Keys unlike the mean of those present are worth most."""

    def score(self, layer, keys, values, positions, now, **needs):
        return (keys - keys.mean(dim=-2, keepdim=True)).float().norm(dim=-1)


def _worth_of(scorer, head: int, keys: dict[int, np.ndarray], now: int) -> dict[int, float]:
    """Score the tokens present (position -> key) in float64, by the scorer's name."""
    kind = type(scorer).__name__
    if kind == "MeanKey":
        mean = np.mean(list(keys.values()), axis=0)
        return {p: float(np.linalg.norm(key - mean)) for p, key in keys.items()}
    if kind == "Table":
        return {p: float(scorer.table[head, p]) for p in keys}
    aged = kind == "Aged"
    return {p: -float(np.linalg.norm(key)) - aged * ((now - p) % 7) for p, key in keys.items()}


def _simulate(
    scorer,
    head: int,
    keys: np.ndarray,
    pad: int,
    steps: list[int],
    budget: int,
    sinks: int,
    recent: int,
    refresh: int,
) -> Iterator[list[int]]:
    """Positions that one head of one row holds after every step; keys (S, d) of the padded row."""
    held: dict[int, np.ndarray] = {}
    seen = 0

    def cut(now: int) -> None:
        worth = _worth_of(scorer, head, held, now)
        free = [p for p in held if p >= sinks and p <= now - recent]
        worst_first = sorted(free, key=lambda p: (worth[p], -p))
        for p in worst_first[: len(held) - (budget - refresh)]:
            del held[p]

    for q in steps:
        new = {i - pad: keys[i] for i in range(max(seen, pad), seen + q)}
        if q == 1 and new and len(held) == budget:
            cut(seen - 1 - pad)
        held |= new
        seen += q
        if len(held) > budget:
            cut(seen - 1 - pad)
        yield sorted(held)


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
def simulate() -> Callable[..., Iterator[list[int]]]:
    """`_simulate`: helpers come as fixtures, since tests are not a package."""
    return _simulate


@pytest.fixture(scope="session")
def scorers() -> dict[str, type[Plain]]:
    """Scorers by name."""
    return {one.__name__: one for one in (Table, Aged, KeyNorm, MeanKey)}


@pytest.fixture(scope="session")
def model() -> Callable[[str], PreTrainedModel]:
    """A tiny model by family: llama (2 full layers) or gemma (sliding, full, sliding, full).

    ``wide`` is a llama of one layer with heads that kernels serve, on the GPU if there is one.
    """
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES)).eval()
    layers = ["sliding_attention", "full_attention"] * 2
    gemma = Gemma3ForCausalLM(
        Gemma3TextConfig(num_hidden_layers=4, layer_types=layers, sliding_window=8, **SIZES)
    ).eval()
    wide = LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=1, **(SIZES | {"head_dim": 64, "hidden_size": 32}))
    ).eval()
    families = {"llama": llama, "gemma": gemma, "wide": wide}
    for built in families.values():
        for weight in built.parameters():  # large enough that attention is far from uniform
            weight.data.mul_(4 if weight.ndim > 1 else 1)

    wide.to(DEVICE)

    def get(family: str) -> PreTrainedModel:
        built = families[family]
        built.set_attn_implementation("sdpa")
        return built

    return get


@pytest.fixture(scope="session")
def learned(model) -> Callable[..., NetworkScorer]:
    """A scorer of all heads that evict, whose numbers lie far apart."""

    def learned(family: str, calibrated: bool = False) -> NetworkScorer:
        lm = model(family)
        layers = tuple(identity.full_attention_layers(lm.config))
        parts = {"id": family, "fingerprint": identity.fingerprint(lm), "tokenizer": "t"}
        turns = rotations_of(lm, layers, 512)
        info = ModelInfo(**parts, layers=layers, **identity.shape(lm.config), rotations=turns)
        noise = torch.Generator().manual_seed(1)
        architecture = Architecture(hidden=(8, 6))
        network = architecture.build(info.heads, info.head_dim, noise)
        for weight in network.parameters():
            weight.data.mul_(6)
        tables = calibration(info.heads) if calibrated else None
        return NetworkScorer(network, architecture, info, calibration=tables)

    return learned


def calibration(heads) -> Calibration:
    """Tables that rise, each head's more than the one before it."""
    rise = torch.linspace(1, 2, len(heads)).view(-1, 1)
    scores = torch.linspace(-30, 30, 32).expand(len(heads), -1)
    return Calibration(tuple(heads), scores.contiguous(), (scores / 30 * rise).sigmoid())


@pytest.fixture(scope="session")
def calibrated() -> Callable[..., Calibration]:
    """`calibration` of some heads."""
    return calibration


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
