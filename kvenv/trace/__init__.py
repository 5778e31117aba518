"""Traces: what a model's caches held and what attention they got, in HDF5."""

from kvenv.trace.describe import summary
from kvenv.trace.episode import FIELDS, STATS, EpisodeArrays, EpisodeInfo, HeadTrace
from kvenv.trace.reader import TraceSet, packaged, same_model
from kvenv.trace.schema import Manifest, ModelInfo, ShardInfo
from kvenv.trace.writer import TraceWriter

__all__ = [
    "FIELDS",
    "STATS",
    "EpisodeArrays",
    "EpisodeInfo",
    "HeadTrace",
    "Manifest",
    "ModelInfo",
    "ShardInfo",
    "TraceSet",
    "TraceWriter",
    "packaged",
    "same_model",
    "summary",
]
