"""`run`: all that ``kvenv bench cache`` measures, the most important first."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from kvenv.cache.backends import has_triton, interpreted
from kvenv.cache.bench.contenders import WAYS
from kvenv.cache.bench.decoding import Decoding, Grid, memory_over_time
from kvenv.cache.bench.goals import GOAL_BUDGET, find_goals
from kvenv.cache.bench.report import show
from kvenv.cache.bench.session import Session, copy_bandwidth
from kvenv.errors import KvenvError

PARTS = ("correctness", "kernels", "decoding", "real")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        parts: some of `PARTS`.
        minutes: after which nothing more is begun.
        sweep: whether to try other tiles for `attend`, too.
        batches: of a layer's decode step.
        slots: its budgets.
        prompts: tokens at which kernels read prompts.
        grid: of the model's decoding.
        seed: of the checks' inputs; None draws one.
    """

    parts: Sequence[str] = PARTS
    minutes: float = 6.0
    sweep: bool = False
    batches: Sequence[int] = (1, 4, 16, 32, 64)
    slots: Sequence[int] = (512, 1024, 2048, 4096, 8192)
    prompts: Sequence[int] = (4096, 32768, 131072)
    grid: Grid = field(default_factory=Grid)
    seed: int | None = None

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise KvenvError(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
        if self.minutes <= 0:
            raise KvenvError(f"minutes is {self.minutes:g}: give more than 0, such as 6")
        grid = self.grid
        for name, numbers in (
            ("contexts", grid.contexts),
            ("batches", grid.batches),
            ("budgets", grid.budgets),
        ):
            if not numbers or min(numbers) < 1:
                raise KvenvError(f"{name} {list(numbers)}: give numbers of at least 1")


def run(
    settings: Settings, console: Console, save: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Measure kernels and decoding on this machine's GPU, and compare them with their baselines.

    Without a GPU, kernels are only checked, and that where Triton's interpreter runs them.

    Args:
        settings: what is measured.
        console: where progress and tables go.
        save: takes the results so far, after every part.

    Raises:
        KvenvError: without an NVIDIA GPU and the interpreter, if a kernel is wrong, or if
            something could not be measured because of an error; the rest is saved before.
    """
    device = _device()
    results: dict[str, Any] = {"bench": "cache", "ways": WAYS}
    if device.type == "cuda":
        results["driver"] = _driver()

    def keep(so_far: Mapping[str, Any]) -> None:
        save({**so_far, "goals": find_goals(so_far)})

    session = Session(device, console, 60 * settings.minutes, keep, results)
    parts = settings.parts if device.type == "cuda" else ("correctness",)
    if "correctness" in parts:
        _check(session, settings)
    others: list[Callable[[], None]] = []
    if "kernels" in parts:
        others.append(_kernels(session, settings))
    if "real" in parts:
        others.append(lambda: _real(session))
    if "decoding" in parts:
        decode_all(session, settings.grid, others)
    else:
        for other in others:
            other()
    results["goals"] = find_goals(results)
    show(results, results["goals"], console)
    save(results)
    wrong = [
        row["kernel"]
        for row in results.get("correctness", {}).get("kernels", ())
        if row.get("met") is False
    ]
    if wrong:
        raise KvenvError(f"{', '.join(wrong)} differ from the float64 references: see the table")
    if session.failures:
        raise KvenvError(f"not measured because of errors: {'; '.join(session.failures)}")
    return results


def _device() -> torch.device:
    if has_triton() and torch.cuda.is_available() and torch.version.cuda:
        return torch.device("cuda", torch.cuda.current_device())
    if has_triton() and interpreted():
        return torch.device("cpu")
    raise KvenvError(
        "bench cache needs an NVIDIA GPU, and Triton; to check only that the kernels compute the "
        "right thing, set TRITON_INTERPRET=1"
    )


def _driver() -> str | None:
    """The version of the NVIDIA driver, if its tool tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return told[0] if told else None


def _check(session: Session, settings: Settings) -> None:
    from kvenv.cache.bench.checks import check_kernels

    seed = secrets.randbits(32) if settings.seed is None else settings.seed
    with session.part("correctness"):
        rows = check_kernels(session, seed)
        session.results["correctness"] = {"seed": seed, "kernels": rows}


def _real(session: Session) -> None:
    from kvenv.cache.bench.small import real_model

    with session.part("SmolLM2"):
        real_model(session)


def _kernels(session: Session, settings: Settings) -> Callable[[], None]:
    """Measure the kernels' points that have goals; calling the result measures the others."""
    from kvenv.cache.bench import kernels

    results, batches = session.results, settings.batches
    with session.part("copy bandwidth"):
        results["copy"] = copy_bandwidth(session.device)
    copy = results["copy"]["bytes_per_second"]
    steps = results["step"] = []
    first = [(b, GOAL_BUDGET) for b in (16, 64) if b in batches and GOAL_BUDGET in settings.slots]

    def decode_steps(points: Sequence[tuple[int, int]]) -> None:
        for batch, budget in points:
            found = session.measure(
                f"a step of batch {batch}, budget {budget}",
                lambda b=batch, s=budget: kernels.decode_step(session, b, s, copy),
            )
            steps.append({"batch": batch, "budget": budget, **found})

    def others() -> None:
        with session.part("kernels: other steps"):
            every = [(batch, budget) for batch in batches for budget in settings.slots]
            decode_steps([point for point in every if point not in first])
        with session.part("kernels: prompts"):
            rows = results["prompt"] = []
            for n in settings.prompts:
                for name, call in (
                    ("score", lambda n=n: kernels.score_prompt(session, n, copy)),
                    ("admit", lambda n=n: kernels.admit_prompt(session, n, 2048, copy)),
                    ("columns", lambda n=n: kernels.columns_prompt(session, n, copy)),
                ):
                    found = session.measure(f"{name} of {n} tokens", call)
                    rows.append({"kernel": name, "tokens": n, **found})

    with session.part("kernels: steps with goals"):
        decode_steps(first)
    if settings.sweep:
        with session.part("kernels: tiles of attend"):
            points = [*first, (1, GOAL_BUDGET), (4, GOAL_BUDGET), (16, 512)]
            results["sweep"] = kernels.sweep(session, points, copy)
    return others


def decode_all(session: Session, grid: Grid, between: Sequence[Callable[[], None]]) -> None:
    """The model's decoding: what has goals, then ``between``, then all other points."""
    with session.part("decoding: an 8B-shaped model"):
        made: list[Decoding] = []
        # Without a model nothing of this part can be measured, and everything else can.
        session.measure("the model", lambda: made.append(Decoding(session, grid)) or {})
    for decoding in made:
        with session.part("decoding: points with goals"):
            decoding.decode(grid.first())
    for other in between:
        other()
    for decoding in made:
        with session.part("decoding: memory over time"):
            memory = session.measure(f"{grid.long} tokens", lambda: memory_over_time(session, grid))
            session.results["decoding"]["memory"] = memory
        with session.part("decoding: prompts"):
            decoding.prefill()
        with session.part("decoding: other points"):
            decoding.decode(grid.rest())
