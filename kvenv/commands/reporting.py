"""``kvenv report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvenv.commands.common import listed, write_text
from kvenv.errors import KvenvError


def report(files: str, out: Path = Path("report.html")) -> None:
    """Show evaluations in one HTML page: curves, heads, tables and the tokens that are kept.

    The page stands alone: it can be mailed, and opened without a network.

    Args:
        files: what `kvenv evaluate --json` wrote, separated by commas.
        out: the page to write.
    """
    from kvenv.report import render

    names = listed(files, "files")
    write_text(out, render([_read(Path(name)) for name in names], names), "--out")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KvenvError(
            f"{str(path)!r} could not be read ({error.strerror}): give a file that "
            "`kvenv evaluate --json` wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise KvenvError(
            f"{str(path)!r} is no JSON ({error}): give a file that `kvenv evaluate --json` wrote"
        ) from error
