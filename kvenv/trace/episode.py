"""One episode: what the recorder hands over, what a reader gets back, and how it is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from kvenv.errors import KvenvError
from kvenv.trace.hdf5 import create_group, write_dataset
from kvenv.trace.schema import Manifest, to_json

FIELDS = ("keys", "values", "queries", "utility/sum", "utility/max", "past/sum", "past/window")
"""The per-head datasets of an episode."""

STATS = ("stats/query_mean", "stats/query_cov")
"""Those that only sets recorded with query statistics have."""


@dataclass(frozen=True, eq=False)
class EpisodeArrays:
    """An episode as recorded: S = n + T tokens, L recorded layers.

    Attributes:
        tokens: (S,) int32.
        keys: (L, H_kv, S, d) float16, as the cache holds them, after RoPE.
        values: (L, H_kv, S, d) float16.
        queries: (L, H_q, Q, d) float16, of the last Q tokens, T <= Q <= S.
        utility_sum: (L, H_kv, n) float32, future attention, summed over queries and group.
        utility_max: (L, H_kv, n) float32, its maximum over future queries.
        past_sum: (L, H_kv, n) float32, attention from the prompt's own queries.
        past_window: (L, H_kv, n) float32, that of the prompt's last 32 queries alone.
        n: prompt tokens.
        T: future tokens.
        document: what the text came from; splits go by it.
        metadata: JSON-safe facts, e.g. the answer that a task expects.
        seed: the episode's own seed.
        query_mean: (L, H_q, d) float32, expected of the queries to come, or None; see
            `kvenv.scorers.query_stats`.
        query_cov: (L, H_q, d, d) float32, or None.
    """

    tokens: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    utility_sum: np.ndarray
    utility_max: np.ndarray
    past_sum: np.ndarray
    past_window: np.ndarray
    n: int
    T: int
    document: str
    metadata: Mapping[str, Any]
    seed: int
    query_mean: np.ndarray | None = None
    query_cov: np.ndarray | None = None


@dataclass(frozen=True)
class EpisodeInfo:
    """An episode's attributes; ``text_hash`` is the SHA-256 of its int32 token bytes."""

    index: int
    n: int
    T: int
    document: str
    workload: str
    seed: int
    metadata: Mapping[str, Any]
    text_hash: str

    @property
    def S(self) -> int:  # noqa: N802 (the design's own letter)
        """Tokens of prompt and future, n + T."""
        return self.n + self.T


@dataclass(frozen=True, eq=False)
class HeadTrace:
    """One head of one episode.

    Attributes:
        tokens: (S,) int32.
        keys: (S, d) float16.
        values: (S, d) float16.
        queries: (G, Q, d) float16, of the head's group; the last Q tokens.
        utility: (n,) float32, A: future attention summed over queries and group.
        utility_max: (n,) float32.
        past: (n,) float32, attention from the prompt's own queries.
        past_window: (n,) float32, that of its last 32 queries alone.
        n: prompt tokens.
        T: future tokens.
        layer: in the model's own numbers.
        head: KV head.
        episode: index in the set.
    """

    tokens: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    utility: np.ndarray
    utility_max: np.ndarray
    past: np.ndarray
    past_window: np.ndarray
    n: int
    T: int
    layer: int
    head: int
    episode: int

    def __repr__(self) -> str:
        size = f"n={self.n}, T={self.T}, d={self.keys.shape[-1]}"
        return f"HeadTrace(episode={self.episode}, layer={self.layer}, head={self.head}, {size})"


def group_name(index: int) -> str:
    """Name of an episode's HDF5 group."""
    return f"episode_{index:06d}"


def check_episode(episode: EpisodeArrays, manifest: Manifest, index: int) -> None:
    """Refuse an episode that does not fit its set.

    Raises:
        KvenvError: naming the episode and the array or value; for numbers that are not finite
            (or attention below zero), the layer and head as well.
    """
    model, where = manifest.model, f"episode {index}"
    for name in ("n", "T"):
        value = getattr(episode, name)
        if not isinstance(value, int) or value < 1:
            raise KvenvError(f"{where}: {name} is {value!r}: give an integer, at least 1")
    if not isinstance(episode.seed, int) or not 0 <= episode.seed < 2**63:
        raise KvenvError(f"{where}: seed is {episode.seed!r}: give an integer in 0..2**63-1")
    if not _is_text(episode.document):
        raise KvenvError(f"{where}: document is {episode.document!r}: give UTF-8 text without NUL")
    to_json(episode.metadata, f"{where}: metadata")
    n, length = episode.n, episode.n + episode.T
    tail = episode.queries.shape[2] if episode.queries.ndim == 4 else 0
    if not episode.T <= tail <= length or (manifest.queries == "all" and tail != length):
        want = f"{length}" if manifest.queries == "all" else f"{episode.T}..{length}"
        raise KvenvError(
            f"{where}: queries {episode.queries.shape} are of {tail} tokens: give those of {want}"
        )
    layers, kv, d = len(model.layers), model.kv_heads, model.head_dim
    half, single, per_token = np.float16, np.float32, (layers, kv, n)
    expected: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "tokens": ((length,), np.int32),
        "keys": ((layers, kv, length, d), half),
        "values": ((layers, kv, length, d), half),
        "queries": ((layers, model.query_heads, tail, d), half),
        "utility_sum": (per_token, single),
        "utility_max": (per_token, single),
        "past_sum": (per_token, single),
        "past_window": (per_token, single),
    }
    attention = {"utility_sum", "utility_max", "past_sum", "past_window"}
    statistics = {"query_mean": (d,), "query_cov": (d, d)}
    for name, shape in statistics.items():
        if manifest.stats:
            expected[name] = ((layers, model.query_heads, *shape), single)
        elif getattr(episode, name) is not None:
            raise KvenvError(
                f"{where}: {name} is given, but the manifest has no stats: leave it out"
            )
    for name, (shape, dtype) in expected.items():
        array: np.ndarray | None = getattr(episode, name)
        if array is None:
            raise KvenvError(f"{where}: {name} is None: give {dtype.__name__} {shape}")
        if array.shape != shape or array.dtype != dtype:
            raise KvenvError(
                f"{where}: {name} is {array.dtype} {array.shape}: give {dtype.__name__} {shape}"
            )
        if name != "tokens":
            _check_numbers(array, f"{where}: {name}", model.layers, attention=name in attention)


def _check_numbers(array: np.ndarray, what: str, layers: tuple[int, ...], attention: bool) -> None:
    for row, layer in enumerate(layers):
        for head, values in enumerate(array[row]):
            if not np.isfinite(values).all():
                raise KvenvError(
                    f"{what} of layer {layer}, head {head} has numbers that are not finite"
                    " (float16 reaches 65504): leave that layer out, or record another text"
                )
            if attention and values.min() < 0:
                raise KvenvError(
                    f"{what} of layer {layer}, head {head} is {values.min()} somewhere: attention"
                    " is never below 0"
                )


def write_episode(file: h5py.File, index: int, workload: str, episode: EpisodeArrays) -> None:
    """Store an episode as the group ``episode_%06d`` of a shard."""
    group = create_group(file, group_name(index))
    _write_text(group, "workload", workload)
    for name in ("n", "T", "seed"):
        group.attrs.create(name, getattr(episode, name), dtype="<i8")
    _write_text(group, "document", episode.document)
    little = episode.tokens.astype("<i4", copy=False)
    _write_text(group, "text_hash", hashlib.sha256(little.tobytes()).hexdigest())
    _write_text(group, "metadata", to_json(episode.metadata, "metadata"))
    write_dataset(group, "tokens", episode.tokens)
    for name in ("utility", "past"):
        create_group(group, name)
    for name in FIELDS:
        write_dataset(group, name, getattr(episode, name.replace("/", "_")))
    if episode.query_mean is not None and episode.query_cov is not None:
        create_group(group, "stats")
        for name, array in zip(STATS, (episode.query_mean, episode.query_cov), strict=True):
            write_dataset(group, name, array)


def read_info(file: h5py.File, index: int) -> EpisodeInfo:
    """An episode's attributes; h5py's own errors where the file is damaged."""
    attributes: dict[str, Any] = dict(file[group_name(index)].attrs)
    text = {
        name: bytes(attributes[name]).decode()
        for name in ("workload", "document", "text_hash", "metadata")
    }
    return EpisodeInfo(
        index=index,
        n=int(attributes["n"]),
        T=int(attributes["T"]),
        document=text["document"],
        workload=text["workload"],
        seed=int(attributes["seed"]),
        metadata=json.loads(text["metadata"]),
        text_hash=text["text_hash"],
    )


def read_dataset(file: h5py.File, index: int, name: str, part: Any = ()) -> np.ndarray:
    """A dataset of an episode, or the ``part`` of it that an index names."""
    dataset = file[f"{group_name(index)}/{name}"]
    if not isinstance(dataset, h5py.Dataset):
        raise KeyError(f"{dataset.name} is no dataset")
    return np.asarray(dataset[part])


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _write_text(group: h5py.Group, name: str, text: str) -> None:
    # Of fixed length: it then lies in the checksummed header, not in HDF5's unchecked heap.
    data = text.encode()
    group.attrs.create(name, np.bytes_(data), dtype=h5py.string_dtype("utf-8", max(1, len(data))))
