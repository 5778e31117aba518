"""Gymnasium environments over recorded traces, one per attention head."""

from kvenv.envs.rank import RankEnv

__all__ = ["RankEnv"]
