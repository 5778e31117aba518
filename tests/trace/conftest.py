"""Small random episodes and the sets they make."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvenv.trace import FIELDS, EpisodeArrays, Manifest, ModelInfo, TraceSet, TraceWriter

MODEL = ModelInfo(
    id="tiny",
    fingerprint="f" * 8,
    architecture="llama",
    tokenizer="t" * 8,
    num_layers=6,
    kv_heads=2,
    query_heads=4,
    head_dim=8,
    layers=(1, 4),
)


def manifest(episodes: int = 5, **changes: Any) -> Manifest:
    plain = {
        "model": MODEL,
        "workload": "text",
        "arguments": {"prompt_tokens": 9},
        "seed": 3,
        "episodes": episodes,
        "queries": "future",
        "libraries": {"h5py": "3"},
    }
    return Manifest(**(plain | changes))


def episode(
    index: int,
    n: int = 9,
    T: int = 3,
    tail: int | None = None,
    model: ModelInfo = MODEL,
    stats: bool = False,
) -> EpisodeArrays:
    rng = np.random.default_rng(index)
    layers, kv, d, tail = len(model.layers), model.kv_heads, model.head_dim, tail or n + T

    def half(heads: int, length: int) -> np.ndarray:
        return rng.standard_normal((layers, heads, length, d)).astype(np.float16)

    def attention() -> np.ndarray:
        return rng.random((layers, kv, n), dtype=np.float32)

    def moment(*shape: int) -> np.ndarray:
        return rng.standard_normal((layers, model.query_heads, *shape), dtype=np.float32)

    return EpisodeArrays(
        tokens=rng.integers(0, 128, n + T, dtype=np.int32),
        keys=half(kv, n + T),
        values=half(kv, n + T),
        queries=half(model.query_heads, tail),
        utility_sum=attention(),
        utility_max=attention(),
        past_sum=attention(),
        past_window=attention(),
        n=n,
        T=T,
        document=f"dok-{index // 2}-ü",
        metadata={"answer": ["4", index], "note": "ü\0" * index},
        seed=100 + index,
        query_mean=moment(d) if stats else None,
        query_cov=moment(d, d) if stats else None,
    )


def write(folder: str | Path, episodes: int = 5, pause: float = 0) -> Path:
    """Record, or go on recording, in shards of two."""
    with TraceWriter(folder, manifest(episodes), shard_episodes=2) as writer:
        for index in range(writer.done, episodes):
            time.sleep(pause)
            writer.add(episode(index))
    return Path(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def everything(traces: TraceSet) -> list[object]:
    """All that can be read, in a form that compares."""
    return [
        (traces.info(i), traces.tokens(i).tobytes(), *(traces.read(i, f).tobytes() for f in FIELDS))
        for i in range(len(traces))
    ]


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """This module: tests are not a package, so helpers come as a fixture."""
    return sys.modules[__name__]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of five episodes in three shards that nothing has happened to; not to be changed."""
    return write(tmp_path_factory.mktemp("undisturbed") / "set")
