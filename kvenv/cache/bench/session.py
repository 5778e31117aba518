"""A benchmark under a time limit: what is measured, skipped or failed, and how calls are timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

L2_BYTES = 60 * 2**20
"""Cache of the largest GPUs. Inputs that a launch finds there look faster than they are."""

SETS = 64
"""Input sets at most, among which launches rotate."""

LAUNCHES = 20
"""Launches at least that one graph replays, unless they are long."""

SECONDS = 0.15
"""Timed for about so long, so that a median has enough replays behind it."""


class TooLargeError(Exception):
    """A measurement that the device has no memory for."""


@dataclass
class Session:
    """What one run of the benchmark shares.

    Attributes:
        device: where everything runs.
        console: gets progress.
        seconds: after which nothing more is begun.
        save: writes the results so far.
        results: by part.
        failures: what could not be measured because of an error, and which.
    """

    device: torch.device
    console: Console
    seconds: float
    save: Callable[[Mapping[str, Any]], None]
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether the time is spent."""
        return time.monotonic() - self.began > self.seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Announces a part, and keeps the results once it has ended, however it did."""
        spent = time.monotonic() - self.began
        self.console.print(f"{spent:5.0f} s  {name}", highlight=False, markup=False)
        try:
            yield
        finally:
            self.save(self.results)

    def measure(self, what: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a call, or why there are none: one point must not cost the others."""
        if self.over:
            return {"skipped": f"the time of {self.seconds / 60:g} minutes was over"}
        try:
            return call()
        except TooLargeError as error:
            return {"skipped": str(error)}
        except torch.OutOfMemoryError as error:
            return {"skipped": str(error).split(". ")[0]}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            why = f"{type(error).__name__}: {lines[0][:200]}"
            self.failures.append(f"{what} ({why})")
            self.console.print(f"         {what} failed: {why}", highlight=False, markup=False)
            return {"failed": why}
        finally:
            free(self.device)


def free(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available(device: torch.device) -> int:
    """Bytes that can be allocated."""
    if device.type != "cuda":
        return 2**62
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def require(device: torch.device, needed: int) -> None:
    """Raise `TooLargeError` unless so many bytes can be allocated."""
    if needed > (there := available(device)):
        raise TooLargeError(f"needs {needed:,} bytes, {there:,} free")


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sets_for(size: int) -> int:
    """How many input sets of so many bytes leave nothing of one in the cache till its next turn."""
    return max(2, min(SETS, -(-4 * L2_BYTES // max(1, size))))


def seconds_a_call(
    calls: Sequence[Callable[[], object]], device: torch.device, captured: bool = True
) -> float:
    """Median time of one call, in seconds, without what launching it from the host takes.

    On a GPU all calls, repeated until there are `LAUNCHES`, are captured in one CUDA graph.

    Args:
        calls: the same work on different inputs.
        device: where it is done.
        captured: False launches each from the host, for work that a graph would do otherwise.
    """
    for call in calls[:2]:  # compiles kernels
        call()
    wait(device)
    began = time.perf_counter()
    calls[0]()
    wait(device)
    once = time.perf_counter() - began
    if device.type != "cuda":
        return once
    rounds = 1 if once > SECONDS / LAUNCHES else -(-LAUNCHES // len(calls))

    def replay() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replay()
        replay = graph.replay
    replay()
    wait(device)
    launches = rounds * len(calls)
    repeats = int(min(50, max(5, SECONDS / (once * launches))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for mark in marks[:-1]:
        mark.record()
        replay()
    marks[-1].record()
    wait(device)
    times = [a.elapsed_time(b) for a, b in pairwise(marks)]
    return statistics.median(times) / 1000 / launches


def copy_bandwidth(device: torch.device, size: int = 2**31) -> dict[str, Any]:
    """Bytes a second, read and written, that copying ``size`` bytes on the device reaches.

    A graph would leave it to the copy engine, at two thirds of what the multiprocessors reach.
    """
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_a_call([lambda: target.copy_(source)], device, captured=False)
    return {"bytes": 2 * size, "seconds": seconds, "bytes_per_second": 2 * size / seconds}


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors of floats hold NaN, so that what a kernel does not write shows."""

    def spoil(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    with (
        patch.object(torch, "empty", spoil(torch.empty)),
        patch.object(torch, "empty_like", spoil(torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", spoil(torch.Tensor.new_empty)),
    ):
        yield
