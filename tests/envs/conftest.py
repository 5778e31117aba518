"""A tiny recorded trace set: 2 layers, 2 KV heads, 3 episodes of different length."""

from __future__ import annotations

import numpy as np
import pytest

from kvenv.registration import register
from kvenv.trace import EpisodeArrays, Manifest, ModelInfo, TraceWriter

LENGTHS = ((40, 6), (24, 5), (33, 7))
LAYERS, KV_HEADS, QUERY_HEADS, DIM = (1, 3), 2, 4, 8


def episode(index: int, n: int, future: int) -> EpisodeArrays:
    rng = np.random.default_rng(index)
    length, kv = n + future, (len(LAYERS), KV_HEADS)

    def half(heads: int) -> np.ndarray:
        return rng.normal(size=(len(LAYERS), heads, length, DIM)).astype(np.float16)

    def mass() -> np.ndarray:
        return rng.exponential(size=(*kv, n)).astype(np.float32) ** 3

    return EpisodeArrays(
        tokens=rng.integers(0, 128, length).astype(np.int32),
        keys=half(KV_HEADS),
        values=half(KV_HEADS),
        queries=half(QUERY_HEADS),
        utility_sum=mass(),
        utility_max=mass(),
        past_sum=mass(),
        n=n,
        T=future,
        document=f"document {index}",
        metadata={},
        seed=index,
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    register()
    path = tmp_path_factory.mktemp("traces") / "tiny"
    model = ModelInfo("tiny", "f", "llama", "t", 4, KV_HEADS, QUERY_HEADS, DIM, LAYERS)
    manifest = Manifest(model, "random", {}, 0, len(LENGTHS), "all", {})
    with TraceWriter(path, manifest, shard_episodes=2) as writer:
        for index, (n, future) in enumerate(LENGTHS):
            writer.add(episode(index, n, future))
    return str(path)
