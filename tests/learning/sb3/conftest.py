from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvenv.trace import TraceSet


@pytest.fixture(scope="session")
def traces(
    tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory
) -> TraceSet:
    """Three episodes, four heads of 8; the future attends by the key's first entry."""
    return tiny_traces(
        tmp_path_factory.mktemp("learnable"), utility=lambda keys: np.exp(2 * keys[..., 0])
    )


@pytest.fixture(autouse=True)
def global_generators():
    """SB3 draws from the global generators: each test starts from the same ones."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield
