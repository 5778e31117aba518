"""What a trace set says about itself: the manifest, its parts, and how they are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvenv.errors import KvenvError
from kvenv.rotation import Rotation, pack, unpack

FORMAT = "kvenv-traces"
VERSION = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ModelInfo:
    """The recorded model.

    Attributes:
        id: name or path it was loaded by.
        fingerprint: hash of its configuration and weights.
        architecture: transformers' ``model_type``, e.g. "llama".
        tokenizer: hash of the tokenizer.
        num_layers: layers of the model, recorded or not.
        kv_heads: KV heads a layer, H_kv.
        query_heads: query heads a layer, H_q, a multiple of ``kv_heads``.
        head_dim: d.
        layers: the recorded layers in the model's own numbers; axis 0 of the datasets.
        rotations: how each of these layers rotates its keys; a string says why it cannot be
            stated. Empty means that no layer rotates.
    """

    id: str
    fingerprint: str
    architecture: str
    tokenizer: str
    num_layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    layers: tuple[int, ...]
    rotations: tuple[Rotation | str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        rotations = tuple(self.rotations) or (Rotation(),) * len(self.layers)
        object.__setattr__(self, "rotations", rotations)
        for name in ("id", "fingerprint", "architecture", "tokenizer"):
            _check_text(f"model.{name}", getattr(self, name))
        for name in ("num_layers", "kv_heads", "query_heads", "head_dim"):
            _check_count(f"model.{name}", getattr(self, name), 1)
        if self.query_heads % self.kv_heads:
            want = f"a multiple of the {self.kv_heads} KV heads"
            raise _unusable("model.query_heads", self.query_heads, want)
        numbers = all(_is_count(layer, 0) and layer < self.num_layers for layer in self.layers)
        if not numbers or not self.layers or self.layers != tuple(sorted(set(self.layers))):
            want = f"ascending layer numbers in 0..{self.num_layers - 1}"
            raise _unusable("model.layers", self.layers, want)
        if len(self.rotations) != len(self.layers):
            raise _unusable("model.rotations", self.rotations, "one for each recorded layer")

    def rotation(self, layer: int) -> Rotation:
        """How a recorded layer rotates its keys.

        Raises:
            KvenvError: if the layer is not recorded, or its rotation cannot be stated.
        """
        if layer not in self.layers:
            raise KvenvError(
                f"layer {layer} of {self.id} is not recorded: give one of {self.layers}"
            )
        found = self.rotations[self.layers.index(layer)]
        if isinstance(found, str):
            raise KvenvError(
                f"keys of layer {layer} of {self.id} have no frame of now ({found}): use a scorer "
                "that does not need it, such as observed"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**plain, "layers": list(self.layers), "rotations": pack(self.rotations)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> ModelInfo:
        """The other way.

        Raises:
            KeyError, TypeError, KvenvError: if it is not what `to_json` gives.
        """
        given = {name: plain[name] for name in cls.__dataclass_fields__}
        return cls(**{**given, "rotations": unpack(given["rotations"])})

    @property
    def group(self) -> int:
        """Query heads that share a KV head, G."""
        return self.query_heads // self.kv_heads

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Every recorded (layer, KV head), layer by layer."""
        return [(layer, head) for layer in self.layers for head in range(self.kv_heads)]


@dataclass(frozen=True)
class ShardInfo:
    """One finished file of a set: its name, episodes, size in bytes and SHA-256."""

    file: str
    episodes: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _check_count(f"episodes of {self.file}", self.episodes, 1)
        _check_count(f"bytes of {self.file}", self.bytes, 1)
        _check_text(f"sha256 of {self.file}", self.sha256)


@dataclass(frozen=True)
class Manifest:
    """What a set is, and which of its shards are finished (``manifest.json``).

    Attributes:
        model: the recorded model.
        workload: name of the workload, or the path it was given by.
        arguments: the recording's arguments, JSON-safe.
        seed: the set's seed.
        episodes: how many are planned.
        queries: "future" (the last prompt queries and all future ones) or "all".
        libraries: versions of the libraries that shaped the numbers and the bytes.
        stats: whether episodes hold query statistics.
        shards: finished files, in order; the i-th is ``shard-%05d.h5``.
    """

    model: ModelInfo
    workload: str
    arguments: Mapping[str, Any]
    seed: int
    episodes: int
    queries: str
    libraries: Mapping[str, str]
    shards: tuple[ShardInfo, ...] = field(default=())
    stats: bool = False

    def __post_init__(self) -> None:
        # Through JSON once, so that tuples and lists compare equal to what a file holds.
        for name in ("arguments", "libraries"):
            value = json.loads(to_json(getattr(self, name), name))
            if not isinstance(value, dict):
                raise _unusable(name, value, "a dict")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "shards", tuple(self.shards))
        _check_text("workload", self.workload)
        _check_count("seed", self.seed, 0)
        _check_count("episodes", self.episodes, 1)
        if not isinstance(self.stats, bool):
            raise _unusable("stats", self.stats, "True or False")
        if self.queries not in ("future", "all"):
            raise _unusable("queries", self.queries, "'future' or 'all'")
        for index, shard in enumerate(self.shards):
            if shard.file != shard_name(index):
                raise _unusable(f"name of shard {index}", shard.file, shard_name(index))
        if self.recorded > self.episodes:
            want = f"at most the {self.episodes} planned"
            raise _unusable("episodes in the shards", self.recorded, want)

    @property
    def origin(self) -> dict[str, Any]:
        """What was recorded, as figures and agents made from it tell: JSON-safe."""
        return {"workload": self.workload, "arguments": dict(self.arguments), "seed": self.seed}

    @property
    def recorded(self) -> int:
        """Episodes safely on disk."""
        return sum(shard.episodes for shard in self.shards)

    @property
    def complete(self) -> bool:
        """Whether every planned episode is on disk."""
        return self.recorded == self.episodes

    def dumps(self) -> bytes:
        """The bytes of ``manifest.json``: the same for equal manifests."""
        plain = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model.to_json(),
            "workload": self.workload,
            "arguments": self.arguments,
            "seed": self.seed,
            "episodes": self.episodes,
            "queries": self.queries,
            "stats": self.stats,
            "dtype": "float16",
            "libraries": self.libraries,
            "shards": [vars(shard) for shard in self.shards],
        }
        return (json.dumps(plain, indent=2) + "\n").encode()


def shard_name(index: int) -> str:
    """File name of a set's shard ``index``."""
    return f"shard-{index:05d}.h5"


def load_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        KvenvError: if the folder holds no trace set that this version can read, naming why.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise KvenvError(f"{folder} does not exist: give a folder that `kvenv record` wrote")
    try:
        plain = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise KvenvError(
            f"{folder} is no trace set (it has no {MANIFEST}): give a folder that `kvenv record`"
            " wrote"
        ) from None
    except OSError as error:
        raise KvenvError(f"cannot read {path} ({error.strerror}): allow reading it") from None
    except (ValueError, RecursionError):
        raise KvenvError(
            f"{path} is damaged (not JSON): restore it from a copy, or record the set again into"
            " another folder"
        ) from None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        found = plain.get("format") if isinstance(plain, dict) else plain
        raise KvenvError(
            f"{path} has format {_short(found)}, not {FORMAT!r}: give a folder that `kvenv record`"
            " wrote"
        )
    version = plain.get("version")
    if version != VERSION:
        cure = "record the set again into another folder" if version == 1 else "upgrade kvenv"
        raise KvenvError(
            f"{path} has format version {_short(version)}, this kvenv reads {VERSION}: {cure}"
        )
    try:
        if plain["dtype"] != "float16":
            raise _unusable("dtype", plain["dtype"], "float16")
        shards = [
            ShardInfo(**{name: shard[name] for name in ShardInfo.__dataclass_fields__})
            for shard in plain["shards"]
        ]
        names = ("workload", "arguments", "seed", "episodes", "queries", "stats", "libraries")
        return Manifest(
            model=ModelInfo.from_json(plain["model"]),
            shards=tuple(shards),
            **{name: plain[name] for name in names},
        )
    except (KeyError, TypeError, KvenvError) as error:
        why = (
            f"{error} is missing" if isinstance(error, KeyError) else str(error).split(": give")[0]
        )
        raise KvenvError(
            f"{path} is damaged ({why}): restore it from a copy, or record the set again into"
            " another folder"
        ) from None


def differences(there: Manifest, here: Manifest) -> list[str]:
    """What two manifests say differently, shards aside, as "seed: 1 there, 2 here"."""
    old, new = (_leaves(json.loads(manifest.dumps())) for manifest in (there, here))
    return [
        f"{name}: {_short(old.get(name))} there, {_short(new.get(name))} here"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name) and name != "shards"
    ]


def to_json(value: Any, name: str) -> str:
    """JSON text, in ASCII, of something that a user's code gave.

    Raises:
        KvenvError: if it is not JSON-safe, with ``name``.
    """
    try:
        return json.dumps(dict(value) if isinstance(value, Mapping) else value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise KvenvError(
            f"{name} is not JSON-safe ({error}): use only dicts with string keys, lists, strings,"
            " finite numbers, booleans and None"
        ) from None


def _leaves(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        inner = _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        flat.update(inner or {prefix + name: value})
    return flat


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_count(name: str, value: object, least: int) -> None:
    if not _is_count(value, least):
        raise _unusable(name, value, f"an integer of at least {least}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise _unusable(name, value, "a string")


def _unusable(name: str, value: object, want: str) -> KvenvError:
    return KvenvError(f"{name} is {_short(value)}: give {want}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
