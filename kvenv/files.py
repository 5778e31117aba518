"""Files and folders that are whole or not there: the one place that writes atomically."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvenv.errors import KvenvError

_CURES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "allow writing there",
    errno.EROFS: "allow writing there",
}


def cure(error: OSError) -> str:
    """What the user can do about a failed write."""
    return _CURES.get(error.errno or 0, "mend that")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    block = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a no-op where folders cannot be opened)."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def temporary(path: Path) -> Path:
    """The hidden name that ``path`` is written under until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def commit(path: Path) -> None:
    """Sync the finished temporary file of ``path``, then give it its name."""
    with temporary(path).open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary(path), path)
    sync_folder(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: afterwards the old file or the new one is there, never a mix."""
    try:
        with temporary(path).open("wb", buffering=0) as file:
            write_all(file.fileno(), data)
        commit(path)
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise


def write_all(handle: int, data: bytes | memoryview) -> None:
    """``os.write`` until every byte is written or the system says why not."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def write(path: Path, data: bytes | str, option: str = "path") -> None:
    """`replace`, whose failure is a `KvenvError` that names the file and the cure.

    Args:
        path: the file; its folder is made if need be.
        data: bytes, or text that is written as UTF-8.
        option: what named the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise KvenvError(
            f"{str(path)!r} could not be written ({error.strerror or error}): {cure(error)}, or "
            f"give another {option}"
        ) from error


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A scratch folder beside ``folder`` that takes its place once the block ends without error.

    What was there comes back if that fails; a scratch folder that is left is removed.

    Raises:
        OSError: if it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        if not folder.exists():
            new.rename(folder)
            return
        folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise
