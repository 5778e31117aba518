"""Scorers by name: a shipped agent, a bundle's folder, a heuristic, or an agent file."""

from __future__ import annotations

import inspect
from pathlib import Path

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.scorers.base import Scorer
from kvenv.scorers.bundle import NetworkScorer


def load_scorer(agent: str | Path) -> Scorer:
    """What ranks a cache's tokens, ready for `EvictionCache` and evaluation.

    Args:
        agent: a heuristic's or a shipped trained agent's name, a bundle's folder, or the path of
            an agent file. A shipped name that gives a scorer wins over a folder of that name.

    Raises:
        KvenvError: if there is none, it is an agent that has to be trained first, or a heuristic
            that has an option without a default.
    """
    shipped = plugins.shipped_folder("agents")
    trained = shipped / "trained" / agent
    if trained.is_dir():
        return NetworkScorer.from_pretrained(trained)
    named = (shipped / f"{agent}.py").is_file()
    if Path(agent).is_dir() and not (named and not plugins.load("agent", str(agent)).trains):
        return NetworkScorer.from_pretrained(agent)
    plugin = plugins.load("agent", str(agent))
    if plugin.trains:
        raise KvenvError(
            f"agent {str(agent)!r} has to be trained first: run `kvenv train {agent} --traces DIR "
            "--out BUNDLE` and give the bundle's folder"
        )
    try:
        inspect.signature(plugin).bind()
    except TypeError as error:
        raise KvenvError(
            f"agent {str(agent)!r} cannot be used by name ({error}): give its options defaults"
        ) from error
    return plugin().fit([])
