"""Loaded episodes side by side in arrays, so that a batch of them is read by indexing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

MEMORY = 2**30
"""Bytes that loaded episodes may take, unless the environments running need more at once."""

Shape = tuple[int, ...]


class Arena:
    """Rows of equal size, one for each loaded entry; what was not used for longest makes room.

    Args:
        entries: how many there are to load.
        environments: how many rows are in use at once, at most.
        fields: name -> shape and dtype of a row.
        load: (entry) -> name -> array; what is smaller than the row is padded with zeros.
    """

    def __init__(
        self,
        entries: int,
        environments: int,
        fields: Mapping[str, tuple[Shape, type[np.generic]]],
        load: Callable[[int], Mapping[str, np.ndarray | float]],
    ) -> None:
        size = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in fields.values())
        capacity = min(entries, max(environments, MEMORY // max(size, 1)))
        # Fresh zeros cost nothing until they are written.
        self._fields = {
            name: np.zeros((capacity, *shape), kind) for name, (shape, kind) in fields.items()
        }
        self._load = load
        self._entry = np.full(capacity, -1)
        self._row = np.full(entries, -1)
        self._used = np.zeros(capacity, dtype=np.int64)
        self._clock = 0

    def __getitem__(self, field: str) -> np.ndarray:
        """All rows of a field, (capacity, ...)."""
        return self._fields[field]

    def rows(self, entries: np.ndarray, busy: np.ndarray) -> np.ndarray:
        """The rows of these entries (m,), loading those that are not there.

        Args:
            entries: what is wanted, (m,).
            busy: rows that must stay, because other environments use them.
        """
        self._clock += 1
        missing = np.unique(entries[self._row[entries] < 0])
        self._used[busy] = self._clock
        here = self._row[entries]
        self._used[here[here >= 0]] = self._clock
        for entry in missing.tolist():
            row = int(self._used.argmin())
            arrays = self._load(entry)
            if self._entry[row] >= 0:
                self._row[self._entry[row]] = -1
            self._entry[row] = -1  # until all of it is written
            for name, array in arrays.items():
                into = self._fields[name][row, ...]
                part = tuple(slice(0, size) for size in np.shape(array))
                into[...] = 0
                into[part] = array
            self._entry[row], self._row[entry], self._used[row] = entry, row, self._clock
        return self._row[entries]
