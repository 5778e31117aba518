"""Rows of local files or Hugging Face datasets, read by the datasets package, and their splits."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvenv.errors import KvenvError
from kvenv.recording.tokens import SPLITS, split_of

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Which of the datasets package's readers a file takes."""

Columns = Mapping[str, type]
"""Names of columns, with the type of what is in them."""

_FILE = f"a {', '.join(FORMATS)} file"


class Rows:
    """Rows picked from datasets, read from disk when asked for.

    Args:
        places: datasets, each with a row's number in it.
    """

    def __init__(self, places: Sequence[tuple[Any, int]]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        rows, i = self._places[number]
        return rows[i]


def load(source: str, name: str | None = None) -> dict[str, Any]:
    """The splits of a dataset.

    Args:
        source: a file (see `FORMATS`), a folder of such files, or a Hugging Face dataset's id.
        name: the dataset's configuration; of a folder, the one inside it of that name, if any.

    Returns:
        ``datasets.Dataset`` by split; a file's only one is train.

    Raises:
        KvenvError: if there is no such source, it cannot be read, or the package is missing.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in FORMATS:
            raise KvenvError(f"dataset {source!r} is no data: give {_FILE} or a folder of such")
        return read(source, FORMATS[path.suffix], data_files=str(path.resolve()))
    if path.is_dir():
        inside = path / (name or "")
        return read(source, str((inside if inside.is_dir() else path).resolve()))
    check_id(source)
    return read(source, source, name)


def check_id(source: str) -> None:
    """Raise `KvenvError` unless a source that is not there locally can be a dataset's id."""
    if Path(source).suffix in (*FORMATS, ".zip") or source.count("/") != 1:
        raise KvenvError(
            f"dataset {source!r}: no such file or folder; give {_FILE}, a folder of such, or the "
            "id of a Hugging Face dataset, owner/name"
        )


def read(source: str, *arguments: str | None, **options: Any) -> dict[str, Any]:
    """``datasets.load_dataset``, whose every error becomes a `KvenvError` about ``source``."""
    datasets = _package(source)
    try:
        return dict(datasets.load_dataset(*arguments, **options))
    except Exception as error:  # the package raises many kinds, none of them of one family
        raise unreadable(source, error) from error


def extract(source: str, path: str | Path) -> Path:
    """The folder, in the datasets package's cache, with what an archive of ``source`` holds."""
    datasets = _package(source)
    try:
        return Path(datasets.DownloadManager().extract(str(Path(path).resolve())))
    except Exception as error:
        raise unreadable(source, error) from error


def _package(source: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise KvenvError(
            f"dataset {source!r} needs the datasets package: pip install datasets"
        ) from error


def unreadable(source: str, error: Exception) -> KvenvError:
    """What to say where a dataset cannot be read."""
    reason = " ".join(str(error).split())
    return KvenvError(
        f"dataset {source!r} cannot be read ({type(error).__name__}: {reason[:200]}): check it and "
        "that the hub can be reached, or give a local copy's file or folder as source"
    )


def check(sets: Mapping[str, Any], columns: Columns, source: str) -> None:
    """Raise `KvenvError` unless all splits have the columns, their first rows the right types."""
    for split, rows in sets.items():
        where = f"{source} split {split}"
        if missing := [name for name in columns if name not in rows.column_names]:
            raise KvenvError(
                f"{where} has no {' and no '.join(missing)}, only {', '.join(rows.column_names)}: "
                f"give rows with {', '.join(columns)}"
            )
        for name, kind in columns.items() if len(rows) else ():
            if not isinstance(value := rows[0][name], kind):
                raise KvenvError(
                    f"{where} has {name} {str(value)[:40]!r} of type {type(value).__name__} in row "
                    f"0: it must be of type {kind.__name__}"
                )


def part(sets: Mapping[str, Any], column: str, split: str, source: str) -> Rows:
    """The rows that belong to a split.

    Of train, validation and test a dataset's own splits are taken where it has all three. Of two,
    the later one is test, and the other is parted into train and validation (80/20) by a hash of
    the document. One alone is parted into all three (80/10/10). A document that a later split
    holds too is left out of the earlier ones.

    Args:
        sets: datasets by their own split.
        column: what makes two rows one document.
        split: train, validation or test; all takes every row.
        source: for messages.

    Raises:
        KvenvError: if there are none.
    """
    own = [name for name in SPLITS if name in sets] or list(sets)
    if split == "all":
        return Rows([(sets[name], i) for name in own for i in range(len(sets[name]))])

    def belongs(name: str, document: str) -> bool:
        if len(own) == 1:
            return split_of(document) == split
        if len(own) == 2:
            rest = "train" if split_of(document) == "train" else "validation"
            return split == (rest if name == own[0] else "test")
        return split == name

    taken: set[str] = set()
    known = len(own) == 1 or set(own) <= set(SPLITS)
    for name in reversed(own) if known else ():
        documents = [digest(row[column]) for row in sets[name].select_columns([column])]
        found = [i for i, d in enumerate(documents) if d not in taken and belongs(name, d)]
        if found:
            return Rows([(sets[name], i) for i in found])
        taken.update(documents)
    sizes = ", ".join(f"{name} ({len(sets[name])} rows)" for name in own)
    raise KvenvError(
        f"{source} has no row for split {split}, only {sizes}: give more rows, or split all"
    )


def digest(value: object) -> str:
    """A short name for a document: 16 hexadecimal digits of its text's SHA-256."""
    return hashlib.sha256(str(value).encode()).hexdigest()[:16]
