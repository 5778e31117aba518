"""Gymnasium environments over recorded traces, one per attention head."""

from kvenv.envs.evict import EvictEnv
from kvenv.envs.rank import RankEnv
from kvenv.envs.stream import StreamEnv
from kvenv.envs.vector import EvictVectorEnv, RankVectorEnv, StreamVectorEnv

__all__ = [
    "EvictEnv",
    "EvictVectorEnv",
    "RankEnv",
    "RankVectorEnv",
    "StreamEnv",
    "StreamVectorEnv",
]
