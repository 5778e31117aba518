"""A tiny recorded trace set: 2 layers, 2 KV heads, 3 episodes of different length."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvenv.registration import register
from kvenv.trace import TraceSet


@pytest.fixture(scope="session")
def folder(tiny_traces: Callable[..., TraceSet], tmp_path_factory: pytest.TempPathFactory) -> str:
    register()
    return str(tiny_traces(tmp_path_factory.mktemp("traces") / "tiny").path)
