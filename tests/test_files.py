"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from kvenv import files
from kvenv.errors import KvenvError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    files.write(path, "one ü")
    files.write(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["b.txt"]
    assert files.sha256(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize(
    ("code", "cure"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "allow writing there")]
)
def test_a_failed_write_keeps_the_old_file_and_names_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, cure: str
) -> None:
    path = tmp_path / "a.txt"
    files.write(path, "old")

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "write", fail)
    with pytest.raises(KvenvError, match=f"a.txt.*{cure}, or give another --out"):
        files.write(path, "new", "--out")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for text in ("one", "two"):
        with files.replacing(folder) as scratch:
            (scratch / text).write_text(text)
        assert names(folder) == [text]
    assert names(tmp_path) == ["set"]


def test_a_failed_folder_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(FileNotFoundError), files.replacing(folder) as scratch:
        (scratch / "new" / "file").touch()
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["set"]


def test_a_folder_that_cannot_take_its_place_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EACCES, "no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"), files.replacing(folder):
        pass
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["set"]
