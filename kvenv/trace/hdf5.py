"""HDF5 through a file of our own, and the one place where a shard's low-level form is chosen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from h5py import h5f, h5fd, h5g, h5p  # pyright: ignore[reportAttributeAccessIssue]

from kvenv.files import write_all


class _Sink:
    """The file that HDF5 writes to, made so that HDF5 never sees a write fail.

    HDF5 cannot close a file whose last write failed: it leaks the handle, and complains or
    crashes when the interpreter exits. So the first error is kept here, HDF5 is told that all
    went well from then on, and `hdf5` raises the kept error once the file is closed.
    """

    def __init__(self, path: Path, new: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if new else 0) | getattr(os, "O_BINARY", 0)
        self.handle = os.open(path, flags, 0o666)
        self.size = os.fstat(self.handle).st_size
        self.position = 0
        self.error: BaseException | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (self.size if whence == os.SEEK_END else 0)
        return self.position

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        pass

    def readinto(self, block: memoryview) -> int:
        with self._kept():
            os.lseek(self.handle, self.position, os.SEEK_SET)
            data = os.read(self.handle, len(block))
            block[:] = data.ljust(len(block), b"\0")
        return len(block)

    def write(self, data: memoryview) -> int:
        with self._kept():
            if self.error is None:
                os.lseek(self.handle, self.position, os.SEEK_SET)
                write_all(self.handle, data)
        self.size = max(self.size, self.position + len(data))
        return len(data)

    def truncate(self, size: int) -> None:
        with self._kept():
            if self.error is None:
                os.ftruncate(self.handle, size)
        self.size = size

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # KeyboardInterrupt too: HDF5 must not meet it
            # Without its traceback, whose frames show a buffer that HDF5 is about to free.
            self.error = self.error or error.with_traceback(None)


def _open(sink: _Sink, new: bool) -> h5py.File:
    # A function of its own, so that no traceback keeps `access` alive: HDF5 crashes at exit if a
    # property list that names a Python file outlives the interpreter.
    access = h5p.create(h5p.FILE_ACCESS)
    # A fixed version, and one (>= 1.10) whose headers and chunk indices carry checksums.
    access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5fd.fileobj_driver, sink)
    name = f"{id(sink):#x}".encode()
    if not new:
        return h5py.File(h5f.open(name, h5f.ACC_RDWR, access))
    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    return h5py.File(h5f.create(name, h5f.ACC_TRUNC, creation, access))


@contextlib.contextmanager
def hdf5(path: Path, new: bool) -> Iterator[h5py.File]:
    """An HDF5 file open for writing, whose bytes depend on nothing but what is written.

    Args:
        path: the file.
        new: start it empty; otherwise go on with what is there.

    Raises:
        OSError: the first write that failed; the file is then closed, and useless.
    """
    sink = _Sink(path, new)
    try:
        with _open(sink, new) as file:
            yield file
    except Exception as error:
        raise (sink.error or error) from None
    finally:
        os.close(sink.handle)
    if sink.error is not None:
        raise sink.error


def create_group(parent: h5py.Group, name: str) -> h5py.Group:
    """A group without timestamps (h5py's own ``create_group`` learned that only lately)."""
    creation = h5p.create(h5p.GROUP_CREATE)
    creation.set_obj_track_times(False)
    return h5py.Group(h5g.create(parent.id, name.encode(), gcpl=creation))


def write_dataset(group: h5py.Group, name: str, array: np.ndarray) -> None:
    """Store an array, one checksummed chunk for each index of all but its last two axes.

    Per-token arrays of fewer than four axes have one chunk for each row of the last axis.
    """
    rows = 2 if array.ndim == 4 else 1
    chunks = (1,) * (array.ndim - rows) + array.shape[-rows:]
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    group.create_dataset(name, data=little, chunks=chunks, fletcher32=True, track_times=False)
