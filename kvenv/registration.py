"""Registers kvenv's environments with Gymnasium; importing kvenv calls it."""

from __future__ import annotations

import gymnasium

ENTRY_POINTS = {"kvenv/Rank-v0": "kvenv.envs.rank:RankEnv"}
"""Environment ids and where their classes are, loaded only when one is made."""


def register() -> None:
    """Make the kvenv environments known to ``gymnasium.make``; calling it again changes nothing."""
    for env_id, entry_point in ENTRY_POINTS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(env_id, entry_point=entry_point)
