"""What every test run starts from; set before torch, triton or transformers are imported."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from kvenv import plugins
from kvenv.rotation import Rotation
from kvenv.trace import EpisodeArrays, Manifest, ModelInfo, TraceSet, TraceWriter

if TYPE_CHECKING:
    from kvenv.learning.agent import Agent

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a model hub
os.environ.setdefault("MPLBACKEND", "Agg")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Time limits per example would only measure how busy the machine is.
settings.register_profile("kvenv", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("kvenv")


@pytest.fixture(scope="session")
def tiny_traces() -> Callable[..., TraceSet]:
    """`record_tiny`: helpers come as fixtures, since tests are not a package."""
    return record_tiny


SB3 = {"steps": 2, "num_envs": 2, "batch": 2}
QUICK: dict[str, dict[str, Any]] = {
    **{name: {"steps": 2} for name in ("kvp", "pairwise", "listwise", "regression")},
    "ppo": {**SB3, "rollout": 2, "epochs": 1, "budget": 8, "sinks": 1, "recent": 1},
    "maskable_ppo": {**SB3, "rollout": 2, "epochs": 1, "budget": 8, "sinks": 1, "recent": 1},
}
"""Options that make an agent learn in no time, from prompts of a few tokens."""


@pytest.fixture(scope="session")
def quick_agent() -> Callable[..., Agent]:
    """Makes a shipped agent that learns in no time; options as keywords."""

    def make(name: str, **options: Any) -> Agent:
        return plugins.load("agent", name)(**{**QUICK.get(name, {}), **options})

    return make


def record_tiny(
    folder: str | Path,
    lengths: Sequence[tuple[int, int]] = ((40, 6), (24, 5), (33, 7)),
    *,
    documents: Sequence[str] | None = None,
    utility: Callable[[np.ndarray], np.ndarray] | None = None,
    fingerprint: str = "f",
    layers: tuple[int, ...] = (1, 3),
    seed: int = 0,
    stats: bool = False,
    rotation: Rotation | tuple[Rotation | str, ...] | None = None,
) -> TraceSet:
    """Record random episodes of (n, T) tokens: 4 layers, 2 KV and 4 query heads of 8.

    ``utility`` makes the future attention (L, H, n) of the prompt's keys (L, H, n, d); ``stats``
    adds query statistics; ``rotation`` is that of all layers, or of each.
    """
    rotations = rotation if isinstance(rotation, tuple) else (rotation or Rotation(),) * len(layers)
    model = ModelInfo("tiny", fingerprint, "llama", "t", 4, 2, 4, 8, layers, rotations)
    manifest = Manifest(model, "random", {}, seed, len(lengths), "all", {}, stats=stats)
    with TraceWriter(folder, manifest, shard_episodes=2) as writer:
        for index in range(writer.done, len(lengths)):
            n, T = lengths[index]
            rng = np.random.default_rng(seed + index)
            tokens = rng.integers(0, 128, n + T).astype(np.int32)
            keys, values, queries = (
                rng.normal(size=(len(layers), heads, n + T, 8)).astype(np.float16)
                for heads in (2, 2, 4)
            )
            total, largest, past, window = (
                rng.exponential(size=(len(layers), 2, n)).astype(np.float32) ** 3 for _ in range(4)
            )
            if utility is not None:
                total = utility(keys[:, :, :n].astype(np.float32)).astype(np.float32)
            document = documents[index] if documents else f"document {index}"
            moments: list[np.ndarray] = []
            if stats:
                root = rng.normal(size=(len(layers), 4, 8, 8))
                moments = [root[..., 0], root @ root.swapaxes(-1, -2) / 8]
            writer.add(
                EpisodeArrays(
                    *(tokens, keys, values, queries, total, largest, past, window, n, T),
                    *(document, {}, index),
                    *(part.astype(np.float32) for part in moments),
                )
            )
    return TraceSet(folder)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folders of tiny random Llamas with a byte tokenizer, by seed; not to be changed."""
    return functools.cache(lambda seed: save_tiny(tmp_path_factory.mktemp("model"), seed))


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """Save a Llama of 2 layers, 2 KV and 4 query heads of 8, and a tokenizer of 256 bytes."""
    # Here, since the environment above has to be set before transformers is imported.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():  # large enough that attention is far from uniform
        weight.data.mul_(4 if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="a").save_pretrained(folder)
    return folder
