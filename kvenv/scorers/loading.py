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
        agent: a heuristic's or a shipped trained agent's name (`kvenv.plugins.trained`), a
            bundle's folder, or the path of an agent file. A shipped name that gives a scorer wins
            over a folder of that name.

    Raises:
        KvenvError: if there is none, it is an agent that has to be trained first, or a heuristic
            that has an option without a default.
    """
    name, trained = str(agent), plugins.trained()
    if name in trained:
        return NetworkScorer.from_pretrained(trained[name])
    named = (plugins.shipped_folder("agents") / f"{name}.py").is_file()
    if Path(agent).is_dir() and not (named and not plugins.load("agent", name).trains):
        return NetworkScorer.from_pretrained(agent)
    known = plugins.available("agent")
    if name not in known and not plugins.is_path(name):
        raise KvenvError(
            f"unknown agent {name!r}: choose one of {', '.join([*known, *trained])}, or give a "
            "bundle's folder or the path of a .py file"
        )
    plugin = plugins.load("agent", name)
    if plugin.trains:
        shipped = f", or use one that is: {', '.join(trained)}" if trained else ""
        raise KvenvError(
            f"agent {name!r} has to be trained first: run `kvenv train {agent} --traces DIR "
            f"--out BUNDLE` and give the bundle's folder{shipped}"
        )
    try:
        inspect.signature(plugin).bind()
    except TypeError as error:
        raise KvenvError(
            f"agent {name!r} cannot be used by name ({error}): give its options defaults"
        ) from error
    return plugin().fit([])
