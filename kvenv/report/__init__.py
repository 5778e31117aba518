"""One self-contained HTML page from evaluation results: `render`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kvenv.errors import KvenvError
from kvenv.report.schema import checked
from kvenv.report.view import view

__all__ = ["render"]

SCRIPTS = ("common.js", "curves.js", "heads.js", "tokens.js", "page.js")
"""The page's one script, in its order."""


def render(results: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> str:
    """The page that shows evaluations: curves, heads, tables and the tokens that are kept.

    It needs nothing else: no network, no other file, and no script for the tables. What the
    results hold is untrusted: it is escaped, and the page's own policy runs no other script and
    loads nothing.

    Args:
        results: what ``kvenv evaluate --json`` writes, of version 1 or 2.
        names: what to call each in errors and on the page, e.g. its file's name.

    Returns:
        HTML, to be stored as UTF-8.

    Raises:
        KvenvError: if there is no result, or one is malformed, naming the place and the cure.
    """
    if not results:
        raise KvenvError("no evaluation was given: give at least one result")
    called = names if names is not None else [f"result {i + 1}" for i in range(len(results))]
    pairs = zip(results, called, strict=True)
    views = [view(checked(result, name), i, name) for i, (result, name) in enumerate(pairs)]
    titles = [v.title for v in views]
    labels = [
        title if titles.count(title) == 1 else f"{title} · {PurePath(name).stem}"
        for title, name in zip(titles, called, strict=True)
    ]
    style, script = _packaged("style.css"), "\n".join(map(_packaged, SCRIPTS))
    environment = Environment(
        loader=PackageLoader("kvenv", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    page = environment.get_template("page.html").render(
        results=views,
        labels=labels,
        view_names={"full": "all tokens", "sink_free": "sink-free"},
        data={v.id: v.data for v in views},
        style=style,
        style_hash=_digest(style),
        script=script,
        script_hash=_digest(script),
    )
    # A text cut inside a character may hold half of it, which UTF-8 cannot store.
    return page.encode("utf-8", "replace").decode("utf-8")


def _packaged(name: str) -> str:
    return files("kvenv.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What the page's policy knows an inline style or script by."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
