"""What several commands share: lists on the command line, devices and result files."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvenv import files
from kvenv.display import console
from kvenv.errors import KvenvError
from kvenv.scorers import Head
from kvenv.trace import TraceSet


def parse_heads(text: str) -> list[Head]:
    """Heads as the command line writes them, layer:head,layer:head.

    >>> parse_heads("0:0,10:1")
    [(0, 0), (10, 1)]
    """
    heads = []
    for part in text.split(","):
        layer, colon, head = part.strip().partition(":")
        if not (colon and layer.isdigit() and head.isdigit()):
            raise KvenvError(f"heads {text!r}: write them as layer:head,layer:head, e.g. 0:0,10:1")
        heads.append((int(layer), int(head)))
    return heads


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write figures to the file that --json names, whole or not at all."""
    write_text(path, jsonlib.dumps(result, indent=1) + "\n", "--json")


def write_text(path: Path, text: str, option: str) -> None:
    """Write the file that an option names, whole or not at all, and say so."""
    files.write(path, text, option)
    console.print(f"wrote {path}", markup=False, soft_wrap=True)


def listed(text: str, what: str) -> list[str]:
    """What a comma-separated option names; an error if nothing."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise KvenvError(f"--{what} {text!r} names nothing: give names separated by commas")
    return names


def trace_sets(text: str) -> list[TraceSet]:
    """The trace sets that a comma-separated option names."""
    return [TraceSet(name) for name in listed(text, "traces")]


def pick_device(name: str) -> str:
    """The device of that name; auto is a GPU if there is one."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
