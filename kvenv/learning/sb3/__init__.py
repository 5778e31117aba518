"""stable-baselines3 on kvenv's environments: adapter, policies, held-out episodes and export.

``MaskablePPO`` and its `SlotPolicy` are here as well and need sb3-contrib: they are imported when
they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from kvenv.learning.sb3.callbacks import HeldOut, Progress
from kvenv.learning.sb3.export import export
from kvenv.learning.sb3.policies import TokenPolicy, standardise
from kvenv.learning.sb3.vec_env import KvenvVecEnv, make_vec

if TYPE_CHECKING:
    from kvenv.learning.sb3.slots import MaskablePPO, SlotPolicy

__all__ = [
    "HeldOut",
    "KvenvVecEnv",
    "MaskablePPO",
    "Progress",
    "SlotPolicy",
    "TokenPolicy",
    "export",
    "make_vec",
    "standardise",
]


def __getattr__(name: str) -> Any:
    if name not in ("MaskablePPO", "SlotPolicy"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvenv.learning.sb3 import slots

    return getattr(slots, name)
