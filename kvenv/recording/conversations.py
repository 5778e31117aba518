"""Conversations from local JSON, JSONL or a Hugging Face dataset, all as lists of messages."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvenv.errors import KvenvError

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_SHAPES = (
    'a list of messages, {"messages": [{"role", "content"}, ...]} or '
    '{"conversations": [{"from", "value"}, ...]}'
)


@dataclass(frozen=True)
class Conversation:
    """Messages by roles system, user and assistant; neighbours of one role are joined.

    Attributes:
        name: the source's own id of it, else its index there.
        messages: {"role", "content"} each, in order.
    """

    name: str
    messages: tuple[dict[str, str], ...]


def load(source: str, hub_split: str = "train") -> list[Conversation]:
    """Read every conversation of a source.

    Args:
        source: a ``.json`` or ``.jsonl`` file, or a Hugging Face dataset: its id or a local folder.
        hub_split: which of a dataset's own splits is read.

    Raises:
        KvenvError: if there is no such source or it has another shape, saying where.
    """
    path = Path(source)
    if path.is_file():
        return [_conversation(row, at, i) for i, (row, at) in enumerate(_local(path))]
    if not path.is_dir() and (path.suffix in (".json", ".jsonl") or source.count("/") != 1):
        raise KvenvError(
            f"conversations {source!r}: no such file; give a .json or .jsonl file, or the id of a "
            "Hugging Face dataset such as OpenAssistant/oasst2"
        )
    rows = _hub(source, hub_split)
    if rows and {"message_id", "parent_id", "role", "text"} <= rows[0].keys():
        return first_ranked(rows)
    return [_conversation(row, f"{source} row {i}", i) for i, row in enumerate(rows)]


def first_ranked(rows: Iterable[Mapping[str, Any]]) -> list[Conversation]:
    """The conversation along the first-ranked replies of each OpenAssistant message tree.

    Args:
        rows: messages with message_id, parent_id (None for a root), role ("prompter" or
            "assistant"), text and rank (0 is best; unranked ones come last), in any order.
    """
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in rows:
        children.setdefault(row["parent_id"], []).append(row)

    def rank(row: Mapping[str, Any]) -> float:
        return float("inf") if row.get("rank") is None else float(row["rank"])

    found = []
    for root in children.get(None, []):
        path = [root]
        while replies := children.get(path[-1]["message_id"]):
            path.append(min(replies, key=rank))
        name = str(root["message_id"])
        messages = [{"role": row["role"], "content": row["text"]} for row in path]
        found.append(Conversation(name, _messages(messages, f"message tree {name}")))
    return found


def _local(path: Path) -> Iterator[tuple[Any, str]]:
    """Rows of a file, each with the words that say where it stands."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise KvenvError(f"{path} is not UTF-8 text: give a JSON or JSONL file") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _parse(line, path, number), f"{path} line {number}"
        return
    rows = _parse(text, path, 1)
    if not isinstance(rows, list):
        raise KvenvError(f"{path} holds a JSON {type(rows).__name__}: it must be a list")
    for i, row in enumerate(rows):
        yield row, f"{path} conversation {i}"


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cure = "" if path.suffix == ".jsonl" else "; name it .jsonl if it has one value a line"
        raise KvenvError(
            f"{path} line {first_line + error.lineno - 1} is not JSON: {error.msg}{cure}"
        ) from error


def _hub(source: str, split: str) -> list[dict[str, Any]]:
    other = "or give a local .json or .jsonl file"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise KvenvError(
            f"dataset {source!r} needs the datasets package: pip install datasets, {other}"
        ) from error
    try:
        return list(datasets.load_dataset(source, split=split))
    except Exception as error:  # the hub's clients raise many kinds, none of them of one family
        reason = " ".join(str(error).split())
        raise KvenvError(
            f"dataset {source!r} split {split!r} cannot be read ({type(error).__name__}: "
            f"{reason[:200]}): check its id and that the hub can be reached, {other}"
        ) from error


def _conversation(row: Any, at: str, index: int) -> Conversation:
    name = str(index)
    if isinstance(row, dict):
        given = next((row[k] for k in ("id", "conversation_id") if row.get(k) is not None), index)
        name, row = str(given), row.get("messages") or row.get("conversations")
    if not isinstance(row, list) or not all(isinstance(turn, dict) for turn in row):
        raise KvenvError(f"{at} is no conversation: it must be {_SHAPES}")
    return Conversation(name, _messages(row, at))


def _messages(turns: Iterable[Mapping[str, Any]], at: str) -> tuple[dict[str, str], ...]:
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        role = _ROLES.get(str(turn.get("role", turn.get("from"))))
        content = turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str):
            shown = turn.get("role", turn.get("from"))
            raise KvenvError(
                f"{at} message {number} (role {shown!r}) must have text and a role of "
                f"{', '.join(_ROLES)}: {_SHAPES}"
            )
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append({"role": role, "content": content})
    return tuple(messages)
