"""Scorers with random weights for a model that is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvenv.errors import KvenvError
from kvenv.rotation import Rotation
from kvenv.scorers import NetworkScorer
from kvenv.scorers.network import Architecture
from kvenv.trace import ModelInfo

TURNS = (Rotation((1.0, 0.3, 0.1, 0.02)), Rotation((1.0, 0.1), "pairs", 4))
INFO = ModelInfo("tiny/llama", "f00d", "llama", "t0k", 4, 2, 4, 8, (1, 3), rotations=TURNS)
ALL = ((1, 0), (1, 1), (3, 0), (3, 1))


@dataclass(frozen=True)
class Maker:
    """Makes scorers; ``info`` and ``heads`` are the model and the heads that it takes."""

    info: ModelInfo = INFO
    heads: tuple = ALL

    def __call__(
        self, heads: tuple = ALL, seed: int = 0, model: ModelInfo = INFO, **architecture: object
    ) -> NetworkScorer:
        shape = Architecture(**{"hidden": (6, 5), **architecture})
        noise = torch.Generator().manual_seed(seed)
        network = shape.build(heads, model.head_dim, noise)
        network.mean.normal_(generator=noise)
        network.std.uniform_(0.5, 2, generator=noise)
        return NetworkScorer(
            network, shape, model, {"agent": "kvp", "seed": seed}, {"normalized_score": 0.5}
        )


@pytest.fixture(scope="session")
def make() -> Maker:
    return Maker()


@pytest.fixture(scope="session")
def tokens() -> Callable[..., tuple[torch.Tensor, ...]]:
    """Keys, values, positions and now, always the same."""

    def tokens(batch: int = 2, heads: int = 2, n: int = 9, d: int = 8) -> tuple[torch.Tensor, ...]:
        noise = torch.Generator().manual_seed(7)
        keys, values = (torch.randn(batch, heads, n, d, generator=noise) for _ in range(2))
        now = n - 1 + torch.arange(batch)
        return keys, values, torch.arange(n).expand(batch, heads, n), now

    return tokens


@pytest.fixture
def saved(make: Maker, tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "kvp")
    return tmp_path / "kvp"


@pytest.fixture(scope="session")
def error_of() -> Callable[..., str]:
    """What an action is refused with, in one line."""

    def error_of(action: Callable[[], object]) -> str:
        with pytest.raises(KvenvError) as caught:
            action()
        message = str(caught.value)
        assert "\n" not in message
        return message

    return error_of
