"""How the checks call a plug-in's code, and what its options must be."""

from __future__ import annotations

import copy
import inspect
import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import numpy as np
import torch

from kvenv.errors import KvenvError
from kvenv.parsing import parse


@contextmanager
def calling(what: str, cure: str) -> Iterator[None]:
    """Around a call of a plug-in's code.

    Args:
        what: the call, for messages.
        cure: what to do if it fails.

    Raises:
        KvenvError: if it raises anything else (which stays chained), or changes a global generator.
    """
    saved = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    # Moved on, so that seeding them as an earlier call did shows too.
    random.random()
    np.random.random()  # noqa: NPY002
    torch.rand(1)
    before = _generators()
    try:
        yield
        after = _generators()
    except KvenvError:  # the plug-in's own message for its users
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise KvenvError(f"{what} raised {said}; {cure}") from error
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])  # noqa: NPY002
        torch.random.set_rng_state(saved[2])
    if changed := [name for name, state in after.items() if state != before[name]]:
        raise KvenvError(
            f"{what} drew from or re-seeded the global generator of {' and '.join(changed)}: use "
            "one of its own, e.g. torch.Generator().manual_seed(seed), or put the state back"
        )


def _generators() -> dict[str, object]:
    """The states of the global random generators, to compare."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "random": random.getstate(),
        "numpy": (np.asarray(keys).tobytes(), rest),
        "torch": torch.random.get_rng_state().numpy().tobytes(),
    }


def check_options(plugin: type, command: Callable[..., None]) -> None:
    """Check that a command line can be made of a plug-in's typed ``__init__`` arguments.

    Raises:
        KvenvError: if an option has no type or one that cannot be read, or has the name of one of
            the command's own options.
    """
    prog = f"kvenv {command.__name__} {plugin.__name__}"
    says_help = calling(f"`{prog} --help`", "give __init__ arguments of types that can be read")
    with says_help, redirect_stdout(io.StringIO()), suppress(SystemExit):
        parse(prog, command, plugin, ["--help"])


def required_options(plugin: type) -> list[str]:
    """The ``__init__`` arguments without a default."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = inspect.signature(plugin).parameters.items()
    return [name for name, a in arguments if a.default is a.empty and a.kind not in several]


def fresh(plugin: Any) -> Any:
    """A new instance of a class, or a copy of an instance, which no check has used yet."""
    if not isinstance(plugin, type):
        return copy.deepcopy(plugin)
    if required := required_options(plugin):
        raise KvenvError(
            f"{plugin.__name__} has options without a default ({', '.join(required)}): check an "
            f"instance, {plugin.__name__}({required[0]}=...)"
        )
    return plugin()
