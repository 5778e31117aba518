"""Reads a trace set: one head's bytes at a time, from many processes, and never silently wrong."""

from __future__ import annotations

import errno
import operator
import os
import threading
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from kvenv.errors import KvenvError
from kvenv.files import sha256
from kvenv.trace.episode import FIELDS, STATS, EpisodeInfo, HeadTrace, read_dataset, read_info
from kvenv.trace.schema import MANIFEST, Manifest, ModelInfo, load_manifest

_PACKAGE = Path(__file__).parents[1]
_OPEN_SHARDS = 8

T = TypeVar("T")


def packaged() -> dict[str, Path]:
    """The trace sets that come with kvenv: id -> folder (in the wheel, or in a checkout)."""
    found: dict[str, Path] = {}
    for root in (_PACKAGE.parent / "traces", _PACKAGE / "_data" / "traces"):
        for path in sorted(root.glob(f"*/{MANIFEST}")):
            found[path.parent.name] = path.parent
    return found


def resolve(source: str | Path) -> Path:
    """The folder of a trace set: a packaged id first, then a path.

    Raises:
        KvenvError: if there is neither, listing the packaged ids.
    """
    if isinstance(source, str) and not {"/", os.sep} & set(source):
        ids = packaged()
        if source in ids:
            return ids[source]
        if not source or not Path(source).exists():
            raise KvenvError(
                f"no trace set {source!r}: give a folder that `kvenv record` wrote, or one of the"
                f" packaged ids ({', '.join(ids) or 'none here'})"
            )
    return Path(source).absolute()


class TraceSet:
    """A recorded set of episodes, opened for reading.

    Picklable (handles are dropped), safe after a fork (handles are opened anew) and from threads.

    Args:
        source: a trace set's folder, or the id of a packaged one.

    Attributes:
        path: the folder.
        manifest: what the set is.

    Raises:
        KvenvError: if there is no such set, it has no episode yet, or a shard is missing or
            truncated. A set whose recorder was killed opens with what is there, with a warning.

    ``len()`` is the number of recorded episodes; they are numbered from 0.
    """

    path: Path
    manifest: Manifest

    def __init__(self, source: str | Path = "sample") -> None:
        self.path = resolve(source)
        self.manifest = load_manifest(self.path)
        planned, recorded = self.manifest.episodes, self.manifest.recorded
        if not recorded:
            raise KvenvError(
                f"{self.path} has 0 of {planned} episodes: run the same record command again"
            )
        for shard in self.manifest.shards:
            file = self.path / shard.file
            size = file.stat().st_size if file.is_file() else None
            if size is None:
                raise KvenvError(f"{file} is missing: {self._cure()}")
            if size != shard.bytes:
                raise KvenvError(
                    f"{file} is damaged ({size} bytes, not {shard.bytes}): {self._cure()}"
                )
        if not self.manifest.complete:
            warnings.warn(
                f"{self.path} has {recorded} of {planned} episodes: run the same record command"
                " again for the rest",
                stacklevel=2,
            )
        self._reset()

    @property
    def model(self) -> ModelInfo:
        """The recorded model."""
        return self.manifest.model

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Every recorded (layer, KV head), in the model's own layer numbers."""
        return self.model.heads

    def __len__(self) -> int:
        return self.manifest.recorded

    def __repr__(self) -> str:
        return (
            f"TraceSet({str(self.path)!r}: {len(self)} episodes of {self.manifest.workload},"
            f" {len(self.heads)} heads of {self.model.id})"
        )

    def info(self, i: int) -> EpisodeInfo:
        """Episode ``i``'s attributes; its ``metadata`` is shared between calls."""
        i = self._index(i)
        if i not in self._infos:
            self._infos[i] = self._from_shard(i, lambda file: read_info(file, i))
        return self._infos[i]

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of prompt and future, (S,) int32."""
        return self._from_shard(i, lambda file: read_dataset(file, i, "tokens"))

    def read(
        self, i: int, field: str, layer: int | None = None, head: int | None = None
    ) -> np.ndarray:
        """One dataset of an episode, or a part of it; only that part's bytes are read.

        Args:
            i: episode.
            field: one of `FIELDS`, or of `STATS` if the set was recorded with query statistics.
            layer: in the model's own numbers; None for all recorded layers (a leading axis L).
            head: KV head; None for all (an axis H). Of queries, its group's G query heads.

        Returns:
            A new array: keys and values (..., S, d), queries (..., Q, d) float16; float32
            query_mean (..., d), query_cov (..., d, d) and the others (..., n).

        Raises:
            KvenvError: if there is no such episode, field, layer or head, or the file is damaged.
        """
        if field not in FIELDS + STATS:
            raise KvenvError(f"no field {field!r}: give one of {', '.join(FIELDS + STATS)}")
        if field in STATS and not self.manifest.stats:
            raise KvenvError(f"{self.path} has no {field}: record it again with --stats")
        chosen = (self._layer(layer), self._head(head, field))
        return self._from_shard(i, lambda file: read_dataset(file, i, field, chosen))

    def head(self, i: int, layer: int, head: int) -> HeadTrace:
        """Everything about one head of one episode."""
        info = self.info(i)
        keys, values, queries, utility, utility_max, past, past_window = (
            self.read(i, field, layer, head) for field in FIELDS
        )
        return HeadTrace(
            tokens=self.tokens(i),
            keys=keys,
            values=values,
            queries=queries,
            utility=utility,
            utility_max=utility_max,
            past=past,
            past_window=past_window,
            n=info.n,
            T=info.T,
            layer=int(layer),
            head=int(head),
            episode=info.index,
        )

    def verify(self) -> None:
        """Hash every shard anew.

        Raises:
            KvenvError: naming the first file that is not what was recorded.
        """
        for shard in self.manifest.shards:
            file = self.path / shard.file
            try:
                same = sha256(file) == shard.sha256
            except OSError as error:
                raise KvenvError(f"cannot read {file} ({error}): {self._cure()}") from None
            if not same:
                raise KvenvError(f"{file} is damaged (other SHA-256): {self._cure()}")

    def close(self) -> None:
        """Close open files; reading opens them again."""
        self._own()
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._ends = list(accumulate(shard.episodes for shard in self.manifest.shards))
        self._infos: dict[int, EpisodeInfo] = {}
        self._files: OrderedDict[int, h5py.File] = OrderedDict()
        self._lock = threading.RLock()
        self._process = os.getpid()

    def _own(self) -> None:
        """After a fork, let go of the parent's handles, and of a lock a lost thread may hold."""
        if os.getpid() != self._process:
            inherited = self._files
            self._reset()
            for file in inherited.values():
                file.close()

    def _from_shard(self, i: int, read: Callable[[h5py.File], T]) -> T:
        shard = bisect_right(self._ends, self._index(i))
        with self._opened(shard) as file:
            return read(file)

    @contextmanager
    def _opened(self, shard: int) -> Iterator[h5py.File]:
        self._own()
        path = self.path / self.manifest.shards[shard].file
        with self._lock:
            try:
                if shard not in self._files:
                    if len(self._files) >= _OPEN_SHARDS:
                        self._files.popitem(last=False)[1].close()
                    self._files[shard] = h5py.File(path, "r", locking=False)
                self._files.move_to_end(shard)
                yield self._files[shard]
            except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
                raise self._damaged(path, error) from None

    def _damaged(self, path: Path, error: Exception) -> KvenvError:
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ENOENT:
            return KvenvError(f"{path} is missing: {self._cure()}")
        if number:
            return KvenvError(f"cannot read {path} ({os.strerror(number)}): make it readable")
        reason = str(error).strip("'\"").split("\n")[0]
        return KvenvError(f"{path} is damaged ({reason}): {self._cure()}")

    def _cure(self) -> str:
        if self.path in packaged().values():
            return "install kvenv again"
        return (
            "restore it from a copy, or delete it and run the same record command again (that"
            " keeps the shards before it)"
        )

    def _index(self, i: int) -> int:
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise KvenvError(f"no episode {i}: {self.path} has 0..{len(self) - 1}")
        return i

    def _layer(self, layer: int | None) -> int | slice:
        if layer is None:
            return slice(None)
        if layer not in self.model.layers:
            names = ", ".join(map(str, self.model.layers))
            raise KvenvError(f"layer {layer} is not in {self.path}: recorded are {names}")
        return self.model.layers.index(layer)

    def _head(self, head: int | None, field: str) -> int | slice:
        if head is None:
            return slice(None)
        if head not in range(self.model.kv_heads):
            raise KvenvError(
                f"KV head {head} is not in {self.path}: it has 0..{self.model.kv_heads - 1}"
            )
        group = self.model.group
        return slice(head * group, (head + 1) * group) if "quer" in field else int(head)


def same_model(traces: Sequence[TraceSet]) -> None:
    """Check that trace sets are of one model.

    Raises:
        KvenvError: if there are none, or naming two sets and their different models.
    """
    if not traces:
        raise KvenvError("no trace sets given: name at least one")
    first = traces[0]
    for other in traces[1:]:
        if other.model.fingerprint != first.model.fingerprint:
            raise KvenvError(
                f"trace sets are of different models: {first.path} of {first.model.id}, "
                f"{other.path} of {other.model.id}; use sets of one model"
            )
