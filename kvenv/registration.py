"""Registers kvenv's environments with Gymnasium; importing kvenv calls it."""

from __future__ import annotations

import gymnasium

ENVIRONMENTS = {
    "kvenv/Rank-v1": ("kvenv.envs.rank:RankEnv", "kvenv.envs.vector:RankVectorEnv"),
    "kvenv/Stream-v1": ("kvenv.envs.stream:StreamEnv", "kvenv.envs.vector:StreamVectorEnv"),
    "kvenv/Evict-v1": ("kvenv.envs.evict:EvictEnv", "kvenv.envs.vector:EvictVectorEnv"),
}
"""Ids, and where the single and the vector environment are; loaded only when one is made."""


def register() -> None:
    """Make the kvenv environments known to ``gymnasium.make``; calling it again changes nothing."""
    for env_id, (single, vector) in ENVIRONMENTS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(env_id, entry_point=single, vector_entry_point=vector)
