"""What a forward pass leaves on the device, brought to the host while the pass goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvenv.errors import KvenvError

CHUNK = 64 * 2**20
"""Bytes that wait on the device before they leave together: few launches, and bounded memory."""

HALF = frozenset({"keys", "values", "queries"})
"""What is kept as float16; the rest is float32."""


class Offload:
    """Gathers tensors of one forward pass, layer by layer, into arrays of all layers.

    On CUDA a second stream copies them to pinned memory, and the host waits once, in `finish`;
    numbers beyond float16 are found there too.

    Args:
        layers: the layers to come, in the order of the arrays.
        device: where their tensors are.
    """

    def __init__(self, layers: Sequence[int], device: torch.device) -> None:
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: list[tuple[int, Mapping[str, torch.Tensor]]] = []
        self._bytes = 0
        self._host: dict[str, torch.Tensor] = {}
        self._reach: dict[str, list[torch.Tensor]] = {}
        self._came: list[int] = []

    def add(self, layer: int, found: Mapping[str, torch.Tensor]) -> None:
        """Take what one layer left; every layer leaves tensors of the same names and shapes."""
        self._waiting.append((layer, found))
        self._bytes += sum(part.numel() * part.element_size() for part in found.values())
        if self._bytes >= CHUNK:
            self._send()

    def finish(self) -> dict[str, np.ndarray]:
        """All there is, name -> (L, ...), once the device is done.

        Raises:
            KvenvError: if a number does not fit float16, or a layer never came.
        """
        self._send()
        if self._stream is not None:
            self._stream.synchronize()
        if missing := sorted(self._rows.keys() - set(self._came)):
            raise KvenvError(
                f"layers {missing} have no attention of their own to record: leave them out with "
                "--layers"
            )
        reach = {what: torch.cat(parts).float().cpu() for what, parts in self._reach.items()}
        for row, layer in enumerate(self._came):
            for what, largest in reach.items():
                beyond = (~(largest[row] < 65520)).nonzero()  # 65520 is the first to round to inf
                if len(beyond):
                    head = int(beyond[0])
                    raise too_large(what, layer, head, float(largest[row, head]))
        return {name: whole.numpy() for name, whole in self._host.items()}

    def _send(self) -> None:
        """Begin the way to the host of all that waits."""
        layers = [layer for layer, _ in self._waiting]
        for name in self._waiting[0][1] if layers else ():
            block = torch.stack([found[name] for _, found in self._waiting])
            if name in HALF:
                largest = torch.linalg.vector_norm(block, torch.inf, (-2, -1))
                self._reach.setdefault(name, []).append(largest)
                block = block.to(torch.float16)
            self._copy(name, layers, block)
        self._came += layers
        self._waiting, self._bytes = [], 0

    def _copy(self, name: str, layers: Sequence[int], block: torch.Tensor) -> None:
        if name not in self._host:
            shape, pinned = (len(self._rows), *block.shape[1:]), self._stream is not None
            self._host[name] = torch.empty(shape, dtype=block.dtype, pin_memory=pinned)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(block.device))
            block.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            for layer, part in zip(layers, block, strict=True):
                self._host[name][self._rows[layer]].copy_(part, non_blocking=True)


def too_large(what: str, layer: int, head: int, largest: float) -> KvenvError:
    """The error for a layer's numbers that float16 cannot hold."""
    return KvenvError(
        f"{what} of layer {layer} head {head} reach {largest:g}, beyond float16's 65504, and "
        "cannot be recorded: leave that layer out with --layers"
    )
