from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvenv.trace import TraceSet


def linear(keys: np.ndarray) -> np.ndarray:
    """Future attention that grows along a direction of the keys, another for each head."""
    directions = np.random.default_rng(42).normal(size=(*keys.shape[:2], 8, 1))
    projected = (keys @ directions)[..., 0]
    return projected - projected.min(-1, keepdims=True)


@pytest.fixture(scope="session")
def planted(
    tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TraceSet, TraceSet]:
    """A set to learn from, and another to measure on."""
    folder = tmp_path_factory.mktemp("planted")
    return (
        tiny_traces(folder / "train", [(64, 1)] * 24, utility=linear),
        tiny_traces(folder / "test", [(64, 1), (48, 1), (80, 1)], utility=linear, seed=1000),
    )
