"""Finds agents and workloads: one class in one Python file, by name or by path."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

from kvenv.errors import KvenvError

Kind = Literal["agent", "workload"]

FOLDERS: dict[Kind, str] = {"agent": "agents", "workload": "traces"}
METHODS: dict[Kind, str] = {"agent": "fit", "workload": "sample"}


def shipped_folder(name: str) -> Path:
    """The folder ``agents`` or ``traces`` that comes with kvenv: in the wheel, or in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "_data" / name
    return inside if inside.is_dir() else package.parent / name


def available(kind: Kind) -> dict[str, Path]:
    """Names that `load` knows, with their files: shipped ones before the working directory's."""
    folder = FOLDERS[kind]
    found: dict[str, Path] = {}
    for place in (shipped_folder(folder), Path.cwd() / folder):
        for path in sorted(place.glob("*.py")):
            found.setdefault(path.stem, path)
    return found


def trained() -> dict[str, Path]:
    """The trained agents that come with kvenv: their names and bundles' folders."""
    folder = shipped_folder("agents") / "trained"
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}


def is_path(name: str) -> bool:
    """Whether a plug-in is asked for by its file, and not by a bare name."""
    return name.endswith(".py") or "/" in name or "\\" in name


def load(kind: Kind, name: str) -> type:
    """The class that a plug-in defines.

    Args:
        kind: "agent" or "workload".
        name: a bare name (a shipped plug-in, else one in ./agents or ./traces), or the path of a
            Python file.

    Raises:
        KvenvError: if there is no such plug-in, naming those there are, or if its file does not
            define exactly one class with the method that the kind needs.
    """
    if is_path(name):
        path = Path(name)
        if not path.is_file():
            raise KvenvError(f"{kind} file {name!r} does not exist: check the path")
    else:
        known = available(kind)
        if name not in known:
            raise KvenvError(
                f"unknown {kind} {name!r}: choose one of {', '.join(known)}, or give the path of a "
                ".py file"
            )
        path = known[name]
    return _only_class(kind, _execute(kind, path), path)


def _execute(kind: Kind, path: Path) -> ModuleType:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    module_name = f"kvenv_{kind}_{re.sub(r'[^0-9a-zA-Z_]', '_', path.stem)}_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise KvenvError(f"{kind} file {str(path)!r} is not a Python file: rename it to end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise KvenvError(
            f"{kind} file {str(path)!r} failed to load: {type(error).__name__}: {error}"
        ) from error
    return module


def _only_class(kind: Kind, module: ModuleType, path: Path) -> type:
    method = METHODS[kind]
    classes = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and callable(getattr(value, method, None))
    ]
    if len(classes) != 1:
        names = ", ".join(c.__name__ for c in classes) or "none"
        raise KvenvError(
            f"{kind} file {str(path)!r} must define exactly one public class with a {method}() "
            f"method; it defines {names}"
        )
    if kind == "agent" and not isinstance(getattr(classes[0], "trains", None), bool):
        raise KvenvError(
            f"agent file {str(path)!r}: its class must say trains = True if fit() learns from "
            "traces, trains = False if not"
        )
    return classes[0]
