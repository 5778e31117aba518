"""Scorers at work: a transformers cache that holds a fixed number of tokens per head."""

from __future__ import annotations

from kvenv.cache.eviction import EvictionCache
from kvenv.cache.generation import generate

__all__ = ["EvictionCache", "generate"]
