"""Recorded episodes as batches over heads: what learners read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvenv.errors import KvenvError
from kvenv.rotation import Rotation
from kvenv.trace.reader import TraceSet

Head = tuple[int, int]
"""(layer, KV head), in the model's own layer numbers."""

Index = tuple[int, int]
"""(trace set, episode within it)."""


@dataclass(frozen=True)
class HeadBatch:
    """One episode's prompt of n tokens for H heads at once.

    Attributes:
        keys: (H, n, d) as the cache held them.
        values: (H, n, d).
        utility: (H, n) float32.
        future: T, the queries that the utility is summed over.
        rotations: how each head's keys are rotated.
    """

    keys: torch.Tensor
    values: torch.Tensor
    utility: torch.Tensor
    future: int
    rotations: tuple[Rotation, ...]

    def framed(self) -> torch.Tensor:
        """The keys in the frame of the prompt's last token, (H, n, d) float32."""
        back = torch.full((1,), 1 - self.keys.shape[1], device=self.keys.device)
        kinds = dict.fromkeys(self.rotations)
        if len(kinds) == 1:
            return self.rotations[0].turn(self.keys, back)
        framed = torch.empty_like(self.keys, dtype=torch.float32)
        for kind in kinds:
            rows = [row for row, own in enumerate(self.rotations) if own == kind]
            framed[rows] = kind.turn(self.keys[rows], back)
        return framed


def read_heads(
    traces: TraceSet, index: int, heads: Sequence[Head], dtype: type[np.floating] = np.float32
) -> HeadBatch:
    """Read the prompt of one episode for some heads; only their layers are read.

    Args:
        traces: where the episode is.
        index: which one.
        heads: the H heads, in the order of the rows.
        dtype: of keys and values: float32, or float16 as they are stored.

    Raises:
        KvenvError: if a layer's rotation cannot be stated.
    """
    info, d = traces.info(index), traces.model.head_dim
    keys, values = (np.empty((len(heads), info.n, d), dtype) for _ in range(2))
    utility = np.empty((len(heads), info.n), np.float32)
    by_layer: dict[int, list[int]] = {}
    for row, (layer, _) in enumerate(heads):
        by_layer.setdefault(layer, []).append(row)
    for layer, rows in by_layer.items():
        picked = [heads[row][1] for row in rows]
        keys[rows] = traces.read(index, "keys", layer)[picked, : info.n]
        values[rows] = traces.read(index, "values", layer)[picked, : info.n]
        utility[rows] = traces.read(index, "utility/sum", layer)[picked]
    rotations = tuple(traces.model.rotation(layer) for layer, _ in heads)
    k, v, a = (torch.from_numpy(part) for part in (keys, values, utility))
    return HeadBatch(k, v, a, info.T, rotations)


class Reader:
    """Reads episodes for some heads, one ahead of what is in use.

    On a CPU every episode is read from disk each time, so that memory stays bounded. On a GPU,
    which is done with an episode long before a disk has the next, episodes stay in its memory
    (keys and values as float16) while a quarter of it is free.

    Args:
        traces: the sets.
        heads: the heads, in the order of the rows.
        device: where the batches go.
    """

    def __init__(
        self, traces: Sequence[TraceSet], heads: Sequence[Head], device: torch.device | str = "cpu"
    ) -> None:
        self._traces, self._heads, self._device = traces, heads, torch.device(device)
        self._kept: dict[Index, HeadBatch] = {}

    def stream(self, order: Iterable[Index]) -> Iterator[HeadBatch]:
        """Episodes in the given order."""
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for index in order:
                following = self._kept.get(index) or pool.submit(self._read, index)
                if ahead is not None:
                    yield self._take(ahead)
                ahead = following
            if ahead is not None:
                yield self._take(ahead)

    def _read(self, index: Index) -> HeadBatch:
        where, episode = index
        if self._device.type == "cpu":
            return read_heads(self._traces[where], episode, self._heads)
        batch = read_heads(self._traces[where], episode, self._heads, np.float16)
        moved = {k: x.to(self._device) for k, x in vars(batch).items() if torch.is_tensor(x)}
        batch = replace(batch, **moved)
        if self._roomy():
            self._kept[index] = batch
        return batch

    def _take(self, ahead: HeadBatch | Future[HeadBatch]) -> HeadBatch:
        return ahead if isinstance(ahead, HeadBatch) else ahead.result()

    def _roomy(self) -> bool:
        if self._device.type != "cuda":
            return False
        free, total = torch.cuda.mem_get_info(self._device)
        return free > total / 4


def choose_heads(traces: Sequence[TraceSet], heads: Sequence[Head] | None) -> list[Head]:
    """The heads recorded in every set, or those asked for.

    Raises:
        KvenvError: naming heads that are not recorded.
    """
    recorded = sorted(set.intersection(*(set(t.heads) for t in traces)))
    if heads is None:
        return recorded
    if missing := sorted(set(heads) - set(recorded)):
        raise KvenvError(
            f"heads {missing} are not recorded in {', '.join(str(t.path) for t in traces)}: "
            f"layers there are {sorted({layer for layer, _ in recorded})} with KV heads "
            f"{sorted({head for _, head in recorded})}"
        )
    return sorted(set(heads))


def split_documents(traces: Sequence[TraceSet], every: int = 10) -> tuple[list[Index], list[Index]]:
    """Training and held-out episodes: every ``every``-th document is held out.

    Episodes of one document are never on both sides. With fewer than two documents nothing is
    held out.
    """
    documents: dict[str, list[Index]] = {}
    for where, traces_ in enumerate(traces):
        for index in range(len(traces_)):
            documents.setdefault(traces_.info(index).document, []).append((where, index))
    held = list(documents)[every // 2 :: every] or list(documents)[1:2]
    train = [i for name, indices in documents.items() if name not in held for i in indices]
    return train, [i for name in held for i in documents[name]]


def hold_out(
    traces: Sequence[TraceSet], validation: Sequence[TraceSet], heads: Sequence[Head]
) -> tuple[list[Index], Sequence[TraceSet], list[Index]]:
    """What to train on, and what to hold out: the validation sets, or a tenth of the documents.

    Returns:
        The training episodes; the sets that the held-out episodes are in; those episodes.

    Raises:
        KvenvError: if the validation sets lack one of the heads.
    """
    if not validation:
        train, held = split_documents(traces)
        return train, traces, held
    choose_heads(validation, heads)
    train, held = (
        [(w, i) for w, t in enumerate(s) for i in range(len(t))] for s in (traces, validation)
    )
    return train, validation, held


def moments(inputs: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean square of inputs (H, n, F) over all tokens, (H, 1, F) float64 each."""
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for x in inputs:
        x = x.double()
        count += x.shape[1]
        total = total + x.sum(1, keepdim=True)
        square = square + x.square().sum(1, keepdim=True)
    return total / count, square / count


def deviation(mean: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """The standard deviation; 1 for what never varies, which dividing then leaves at zero."""
    variance = square - mean.square()
    return torch.where(variance > 1e-10, variance, 1.0).sqrt()
