"""Windows of local text and source files."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvenv.errors import KvenvError
from kvenv.recording import tokens
from kvenv.recording.workload import Sample

_STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_KEPT = 64  # tokenised files held in memory


@dataclass
class Text:
    """Windows of local text files: prompt and future are consecutive tokens of one file.

    Files come in an order shuffled by the set's seed, one window of each; when every file that is
    long enough was used, a second round draws new windows. Files that are not UTF-8 are skipped.

    Args:
        paths: files and folders (searched at every depth, save for hidden folders and caches).
            Default: the Python sources of the running interpreter's standard library.
        suffixes: which files of a folder are taken.
        split: a file belongs to train, validation or test (80/10/10) by a hash of its name
            relative to the given folder; splits never share a file. all takes every file.
    """

    paths: list[str] | None = None
    suffixes: list[str] = field(default_factory=lambda: [".py", ".md", ".txt", ".rst"])
    split: Literal["train", "validation", "test", "all"] = "train"

    def __post_init__(self) -> None:
        tokens.check_choice("split", self.split, (*tokens.SPLITS, "all"))
        if self.paths is None:
            found = _files(Path(sysconfig.get_path("stdlib")), {".py"}, _STDLIB_SKIPS)
        else:
            found = [pair for p in self.paths for pair in _files(Path(p), set(self.suffixes))]
        unique = {file.resolve(): (name, file) for name, file in reversed(found)}
        chosen = [p for p in unique.values() if self.split in ("all", tokens.split_of(p[0]))]
        if not chosen:
            where = "the standard library" if self.paths is None else ", ".join(self.paths)
            raise KvenvError(
                f"no file of split {self.split} among {len(unique)} found in {where or 'no paths'}:"
                f" give more paths or suffixes (now {' '.join(self.suffixes)}), or split all"
            )
        self._files = sorted(chosen)
        self._tokens = lru_cache(_KEPT)(_tokenise)
        self._long: dict[tuple[PreTrainedTokenizerBase, int, int], _Found] = {}

    def sample(
        self,
        index: int,
        *,
        tokenizer: PreTrainedTokenizerBase,
        rng: np.random.Generator,
        prompt_tokens: int,
        future_tokens: int,
        seed: int,
    ) -> Sample:
        """Episode ``index``: see `kvenv.recording.workload.Workload.sample`."""
        start = tokens.opening(tokenizer)
        need = prompt_tokens - len(start) + future_tokens
        if min(prompt_tokens - len(start), future_tokens) < 1:
            raise KvenvError(
                f"prompt_tokens {prompt_tokens} with future_tokens {future_tokens} leaves no text "
                "to record: give more"
            )
        name, file = self._file(index, tokenizer, seed, need)
        ids = self._tokens(tokenizer, file)
        first = int(rng.integers(len(ids) - need + 1))
        window = [*start, *ids[first : first + need].tolist()]
        return Sample(
            prompt=window[:prompt_tokens],
            future=window[prompt_tokens:],
            document=name,
            metadata={"first_token": first},
        )

    def _file(
        self, index: int, tokenizer: PreTrainedTokenizerBase, seed: int, need: int
    ) -> tuple[str, Path]:
        """The file of episode ``index``, looking no further than to the first that serves."""
        key = (tokenizer, seed, need)
        if key not in self._long:
            self._long[key] = [], self._long_enough(*key)
        found, rest = self._long[key]
        found.extend(islice(rest, max(0, index + 1 - len(found))))
        if not found:
            largest = sorted((file for _, file in self._files), key=_size)[-8:]
            longest = max(len(self._tokens(tokenizer, file)) for file in largest)
            raise KvenvError(
                f"no file has the {need} tokens that prompt and future take, the longest has "
                f"{longest}: give smaller prompt_tokens or future_tokens, or longer files"
            )
        return found[index % len(found)]

    def _long_enough(
        self, tokenizer: PreTrainedTokenizerBase, seed: int, need: int
    ) -> Iterator[tuple[str, Path]]:
        for i in np.random.default_rng(seed).permutation(len(self._files)):
            name, file = self._files[i]
            # A token is at least a byte, so small files need no tokenising to be passed over.
            if _size(file) >= need and len(self._tokens(tokenizer, file)) >= need:
                yield name, file


_Found = tuple[list[tuple[str, Path]], Iterator[tuple[str, Path]]]


def _files(root: Path, suffixes: set[str], skips: Iterable[str] = ()) -> list[tuple[str, Path]]:
    """Names relative to ``root`` (posix) and paths of the files in it; ``root`` may be a file."""
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise KvenvError(f"path {str(root)!r} does not exist: check the spelling")
    found = []
    for folder, inside, names in os.walk(root):
        inside[:] = [
            d for d in inside if not d.startswith(".") and d not in {"__pycache__", *skips}
        ]
        paths = [Path(folder, name) for name in names if Path(name).suffix in suffixes]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found)


def _size(file: Path) -> int:
    return file.stat().st_size


def _tokenise(tokenizer: PreTrainedTokenizerBase, file: Path) -> np.ndarray:
    """Token ids of a file, int32; none if it is not text."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = ""
    return np.array([] if "\0" in text else tokens.encode(tokenizer, text), dtype=np.int32)
