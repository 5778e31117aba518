"""What the cache reaches on a GPU, beside the caches of transformers: ``kvenv bench cache``."""

from __future__ import annotations

from kvenv.cache.bench.benchmark import PARTS, Settings, run
from kvenv.cache.bench.decoding import Grid

__all__ = ["PARTS", "Grid", "Settings", "run"]
