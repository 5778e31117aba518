"""Writes a trace set so that a kill at any moment costs at most the shard in hand."""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from kvenv import files
from kvenv.errors import KvenvError
from kvenv.trace.episode import EpisodeArrays, check_episode, write_episode
from kvenv.trace.hdf5 import hdf5
from kvenv.trace.schema import (
    MANIFEST,
    Manifest,
    ShardInfo,
    differences,
    load_manifest,
    shard_name,
)

try:
    import fcntl
except ImportError:  # Windows: two recorders on one folder are then not kept apart
    fcntl = None

_OURS = re.compile(r"(shard-\d{5,}\.h5|\.shard-\d{5,}\.h5\.tmp|\.manifest\.json\.tmp)")


class TraceWriter:
    """Creates a trace set, or goes on with one that was interrupted.

    A shard gets its name only once it is whole and on disk, and the manifest names it only then.
    Running to the end after a kill at any moment gives the same bytes as never having stopped.

    Args:
        folder: the set's folder; created if missing.
        manifest: what is being recorded; its ``shards`` are ignored.
        shard_episodes: episodes a file.

    Raises:
        KvenvError: if the folder holds something else, is being written by another process, or
            cannot be written.

    Use it as a context manager: leaving normally commits what is in hand, an exception drops it.

        with TraceWriter(folder, manifest) as writer:
            for index in range(writer.done, manifest.episodes):
                writer.add(record(index))
    """

    def __init__(self, folder: str | Path, manifest: Manifest, shard_episodes: int = 4) -> None:
        if shard_episodes < 1:
            raise KvenvError(f"shard_episodes is {shard_episodes}: give at least 1")
        self.folder = Path(folder).absolute()
        self.manifest = replace(manifest, shards=())
        self._shard_episodes = shard_episodes
        self._pending = 0
        self._unlock: Callable[[], object] | None = None
        if self.folder.exists() and not self.folder.is_dir():
            raise KvenvError(f"{self.folder} is a file: give a folder as --out")
        with self._writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            unlock = _lock(self.folder, self)
            try:
                self._start()
            except BaseException:
                unlock()
                raise
            self._unlock = unlock

    @property
    def done(self) -> int:
        """Episodes safely on disk: record from this one on."""
        return self.manifest.recorded

    def add(self, episode: EpisodeArrays) -> None:
        """Write the next episode; commits a shard when it is full.

        Raises:
            KvenvError: if the episode does not fit the set, or the disk did not take it. The
                shard in hand is then gone; those before it are safe.
        """
        if self._unlock is None:
            raise KvenvError(f"the writer of {self.folder} is closed: make a new one to go on")
        index = self.done + self._pending
        if index >= self.manifest.episodes:
            raise KvenvError(
                f"{self.folder} is complete with its {self.manifest.episodes} episodes: record more"
                " into another folder"
            )
        check_episode(episode, self.manifest, index)
        with self._writing(self._shard):
            with hdf5(files.temporary(self._shard), new=self._pending == 0) as file:
                write_episode(file, index, self.manifest.workload, episode)
            self._pending += 1
            if self._pending == self._shard_episodes or index + 1 == self.manifest.episodes:
                self._commit()

    def close(self) -> None:
        """Commit what is in hand and let go of the folder."""
        if self._pending:
            with self._writing(self._shard):
                self._commit()
        self._release()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._drop()

    def __repr__(self) -> str:
        return (
            f"TraceWriter({str(self.folder)!r}, {self.done} of {self.manifest.episodes} episodes)"
        )

    @property
    def _shard(self) -> Path:
        return self.folder / shard_name(len(self.manifest.shards))

    def _start(self) -> None:
        names = sorted(os.listdir(self.folder))
        if MANIFEST in names:
            there = load_manifest(self.folder)
            if differ := differences(there, self.manifest):
                more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
                raise KvenvError(
                    f"{self.folder} holds another trace set ({'; '.join(differ[:3])}{more}): give"
                    " another --out, or delete that folder"
                )
            whole = _whole(self.folder, there.shards)
            self.manifest = replace(there, shards=whole)
            if whole != there.shards:
                self._write_manifest(self.manifest)
        elif foreign := [name for name in names if not name.startswith(f".{MANIFEST}")]:
            raise KvenvError(
                f"{self.folder} is not empty and no trace set (it holds {foreign[0]!r}): give"
                " another --out"
            )
        else:
            self._write_manifest(self.manifest)
            with contextlib.suppress(OSError):  # the parent may not be ours to open
                files.sync_folder(self.folder.parent)
        named = {shard.file for shard in self.manifest.shards}
        for name in names:
            if _OURS.fullmatch(name) and name not in named:
                (self.folder / name).unlink(missing_ok=True)

    def _commit(self) -> None:
        shard, temporary = self._shard, files.temporary(self._shard)
        size, digest = temporary.stat().st_size, files.sha256(temporary)
        files.commit(shard)
        info = ShardInfo(shard.name, self._pending, size, digest)
        self._write_manifest(replace(self.manifest, shards=(*self.manifest.shards, info)))
        self._pending = 0

    def _write_manifest(self, manifest: Manifest) -> None:
        files.replace(self.folder / MANIFEST, manifest.dumps())
        self.manifest = manifest

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Whatever fails: the shard in hand is cleared away; a failed write is one clear error."""
        try:
            yield
        except OSError as error:
            self._drop()
            resume = f"; it goes on at episode {self.done}" if self.done else ""
            raise KvenvError(
                f"cannot write {path} ({error.strerror or error}): {files.cure(error)} and run the"
                f" same command again{resume}"
            ) from None
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._unlock is not None:
            with contextlib.suppress(OSError):
                files.temporary(self._shard).unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        self._pending = 0
        if self._unlock is not None:
            self._unlock()
            self._unlock = None


def _whole(folder: Path, shards: tuple[ShardInfo, ...]) -> tuple[ShardInfo, ...]:
    """The shards before the first that is missing or has another size; recording resumes there."""
    for index, shard in enumerate(shards):
        path = folder / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            return shards[:index]
    return shards


def _lock(folder: Path, owner: object) -> Callable[[], object]:
    """Keep a second recorder out of the folder; returns what lets go of it.

    A killed process, or an owner that is garbage, lets go by itself.
    """
    if fcntl is None:
        return lambda: None
    handle = os.open(folder, os.O_RDONLY)
    release = weakref.finalize(owner, os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        release()
        raise KvenvError(
            f"{folder} is being recorded already: wait for that recorder, or give another --out"
        ) from None
    except OSError:  # a file system without locks
        pass
    return release
