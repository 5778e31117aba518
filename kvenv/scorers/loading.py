"""Scorers by name: a bundle's folder, a shipped trained agent, a heuristic, or an agent file."""

from __future__ import annotations

from pathlib import Path

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.scorers.base import Scorer
from kvenv.scorers.bundle import NetworkScorer


def load_scorer(agent: str | Path) -> Scorer:
    """What ranks a cache's tokens, ready for `EvictionCache` and evaluation.

    Args:
        agent: a bundle's folder, a heuristic's name, or the path of an agent file.

    Raises:
        KvenvError: if there is none, or it is an agent that has to be trained first.
    """
    for folder in (Path(agent), plugins.shipped_folder("agents") / "trained" / agent):
        if folder.is_dir():
            return NetworkScorer.from_pretrained(folder)
    plugin = plugins.load("agent", str(agent))
    if plugin.trains:
        raise KvenvError(
            f"agent {str(agent)!r} has to be trained first: run `kvenv train {agent} --traces DIR "
            "--out BUNDLE` and give the bundle's folder"
        )
    return plugin().fit([])
