"""What an environment step costs: our vector environments against loops over single ones."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from stable_baselines3.common.vec_env import DummyVecEnv

from kvenv.errors import KvenvError
from kvenv.registration import register
from kvenv.trace import EpisodeArrays, Manifest, ModelInfo, TraceWriter

SIZES = {"small": 2, "medium": 32, "large": 256}
"""KiB of an observation."""

NUM_ENVS = (1, 8, 64, 256)

SECONDS = 0.3
"""How long each timed run takes at least."""

GOALS = {"small": 20.0, "medium": 6.0, "large": 3.0}
"""How many times SyncVectorEnv's rate ours is to reach with `GOAL_ENVS` environments."""

GOAL_ENVS = 64

CONTENDERS = {
    "sync": "Gymnasium's SyncVectorEnv over single environments",
    "dummy": "stable-baselines3's DummyVecEnv over single environments",
    "ours": "kvenv's vector environment",
    "shared": "the same with copy=False",
}

EPISODES, KV_HEADS, ACTIONS = 2, 2, 16


@dataclass(frozen=True)
class Case:
    """An environment, and random traces that make its observations so large."""

    env_id: str
    size: str
    n: int
    T: int
    head_dim: int
    arguments: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    Case("kvenv/Rank-v0", "small", 27, 1, 8),
    Case("kvenv/Rank-v0", "medium", 62, 1, 64),
    Case("kvenv/Rank-v0", "large", 500, 1, 64),
    Case("kvenv/Stream-v0", "small", 200, 56, 255, {"budget": 64}),
    Case("kvenv/Evict-v0", "small", 200, 56, 8, {"budget": 26}),
    Case("kvenv/Evict-v0", "medium", 200, 56, 64, {"budget": 61}),
    Case("kvenv/Evict-v0", "large", 700, 56, 64, {"budget": 499}),
)
"""Stream sees one token at a time, which is never large."""


class Contender(NamedTuple):
    """A vector environment, whatever its interface."""

    reset: Callable[[dict[str, int]], object]
    step: Callable[[np.ndarray], tuple[Any, ...]]


def run(
    sizes: Sequence[str], num_envs: Sequence[int], repeats: int, console: Console
) -> dict[str, Any]:
    """Environment steps a second of four ways to step N environments, interleaved.

    All read the same random traces, loaded beforehand, play the same actions, drawn beforehand,
    start the next episode in the step that ends one, and run on one thread. A fifth rate is a bare
    copy's: the bytes of N observations from one array to another.

    Args:
        sizes: of the observations, from `SIZES`.
        num_envs: how many environments, each N.
        repeats: timed runs of each; the medians count, of the rates and of the runs' ratios.
        console: where the table goes.

    Raises:
        KvenvError: on no repeats, an unknown size or no environments.
    """
    if repeats < 1:
        raise KvenvError(f"repeats is {repeats}: it must be at least 1")
    if unknown := [size for size in sizes if size not in SIZES]:
        raise KvenvError(f"unknown size {unknown[0]!r}: choose from {', '.join(SIZES)}")
    if wrong := [num for num in num_envs if num < 1]:
        raise KvenvError(f"num-envs is {wrong[0]}: it must be at least 1")
    register()
    rows = []
    cases = [case for case in CASES if case.size in sizes]
    # A bar that refreshes itself would take time from what is timed.
    bar = Progress(console=console, auto_refresh=False, transient=True)
    with _one_thread(), bar:
        task = bar.add_task("", total=len(cases) * len(num_envs))
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                write_traces(folder, case)
                for num in num_envs:
                    name = f"{_short(case.env_id)} {SIZES[case.size]} KiB, {num} environments"
                    bar.update(task, description=name, refresh=True)
                    rows.append(_row(case, folder, num, repeats))
                    bar.advance(task)
    goals = _goals(rows)
    _show(rows, goals, console)
    settings = {"repeats": repeats, "seconds": SECONDS, "contenders": CONTENDERS}
    return {"bench": "env", **settings, "rows": rows, "goals": goals}


def write_traces(folder: str | Path, case: Case) -> None:
    """Record random numbers as the traces of a model of one layer."""
    model = ModelInfo("random", "0", "llama", "0", 1, KV_HEADS, 2 * KV_HEADS, case.head_dim, (0,))
    length = case.n + case.T
    with TraceWriter(folder, Manifest(model, "bench", {}, 0, EPISODES, "all", {})) as writer:
        for index in range(EPISODES):
            random = np.random.default_rng(index)
            keys, values, queries = (
                random.normal(size=(1, heads, length, case.head_dim)).astype(np.float16)
                for heads in (KV_HEADS, KV_HEADS, 2 * KV_HEADS)
            )
            total, largest, past = random.exponential(size=(3, 1, KV_HEADS, case.n)).astype(
                np.float32
            )
            tokens, document = np.arange(length, dtype=np.int32), f"document {index}"
            arrays = (tokens, keys, values, queries, total, largest, past)
            writer.add(EpisodeArrays(*arrays, case.n, case.T, document, {}, index))


@contextmanager
def contenders(case: Case, folder: str, num: int) -> Iterator[dict[str, Contender]]:
    """`CONTENDERS` over the same traces, with N environments each; closed in the end."""
    arguments = {"traces": folder, **case.arguments}
    same_step = {"autoreset_mode": "SameStep"}
    make = partial(gym.make, case.env_id, **arguments)
    make_vec = partial(gym.make_vec, case.env_id, num, **arguments)
    with ExitStack() as closing:
        made: dict[str, Contender] = {}
        for name, vector in {
            "sync": make_vec(vectorization_mode="sync", vector_kwargs=same_step),
            "ours": make_vec(**same_step),
            "shared": make_vec(**same_step, copy=False),
        }.items():
            closing.callback(vector.close)
            made[name] = Contender(partial(_reset, vector), vector.step)
        dummy = DummyVecEnv([make] * num)
        closing.callback(dummy.close)
        made["dummy"] = Contender(partial(_reset_dummy, dummy), dummy.step)
        yield {name: made[name] for name in CONTENDERS}


def draw_actions(case: Case, folder: str, num: int) -> list[np.ndarray]:
    """Actions for N environments; with nothing protected, all of a space's are valid."""
    env = gym.make(case.env_id, traces=folder, **case.arguments)
    space = gym.vector.utils.batch_space(env.action_space, num)
    env.close()
    space.seed(0)
    return [space.sample() for _ in range(ACTIONS)]


def _reset(env: gym.vector.VectorEnv[Any, Any, Any], options: dict[str, int]) -> None:
    env.reset(seed=0, options=options)


def _reset_dummy(env: DummyVecEnv, options: dict[str, int]) -> None:
    env.seed(0)
    env.set_options(options)
    env.reset()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _row(case: Case, folder: str, num: int, repeats: int) -> dict[str, Any]:
    actions = draw_actions(case, folder, num)
    with contenders(case, folder, num) as made:
        for contender in made.values():
            for episode in range(EPISODES):
                for head in range(KV_HEADS):
                    contender.reset({"episode": episode, "head": head})
            contender.reset({})
        observations = np.asarray(made["ours"].step(actions[0])[0])
        steps = {name: contender.step for name, contender in made.items()}
        there = np.zeros_like(observations)
        steps["copy"] = lambda _: np.copyto(there, observations)  # pyright: ignore[reportArgumentType]
        for step in steps.values():
            _rate(step, actions, SECONDS / 10)
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            for name, step in steps.items():
                # A copy is many times faster, and so is measured well in less time.
                enough = SECONDS / 5 if name == "copy" else SECONDS
                rates[name].append(num * _rate(step, actions, enough))
    return {
        "env": case.env_id,
        "size": case.size,
        "bytes": observations[0].nbytes,
        "num_envs": num,
        "steps_per_second": {name: statistics.median(rates[name]) for name in rates},
        "ratios": {
            f"{ours}/{other}": statistics.median(
                a / b for a, b in zip(rates[ours], rates[other], strict=True)
            )
            for ours in ("ours", "shared")
            for other in ("sync", "dummy", "copy")
        },
    }


def _rate(step: Callable[[np.ndarray], Any], actions: list[np.ndarray], seconds: float) -> float:
    """Calls a second; the last result is held while the next is made, as learners hold it."""
    calls, began = 0, time.perf_counter()
    held = None
    while (spent := time.perf_counter() - began) < seconds or not calls:
        held = step(actions[calls % len(actions)])
        calls += 1
    del held
    return calls / spent


def _goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "env": row["env"],
            "size": row["size"],
            "goal": GOALS[row["size"]],
            "ratio": row["ratios"]["ours/sync"],
            "met": row["ratios"]["ours/sync"] >= GOALS[row["size"]],
        }
        for row in rows
        if row["num_envs"] == GOAL_ENVS
    ]


def _show(
    rows: Sequence[Mapping[str, Any]], goals: Sequence[Mapping[str, Any]], console: Console
) -> None:
    lines = [f"{GOAL_ENVS} environments against SyncVectorEnv:"] if goals else []
    for goal in goals:
        ratio, wanted = goal["ratio"], goal["goal"]
        verdict = "met" if goal["met"] else f"missed by {wanted - ratio:.1f}x"
        size = f"{SIZES[goal['size']]} KiB"
        name = _short(goal["env"])
        lines.append(f"  {name:<6} {size:>7}: {ratio:.1f}x, goal {wanted:.0f}x: {verdict}")
    table = Table(
        title="thousand environment steps a second; obs. in KiB",
        caption="\n".join(lines),
        caption_justify="left",
        box=box.SIMPLE,
        padding=(0, 0, 0, 1),
    )
    columns = ("env", "obs.", "envs", "copy", "Sync", "Dummy", "ours", "copy=False")
    for column in (*columns, "/Sync", "/Dummy"):
        table.add_column(column, justify="left" if column == "env" else "right")
    for row in rows:
        rates = [row["steps_per_second"][name] for name in ("copy", *CONTENDERS)]
        ratios = [row["ratios"][f"ours/{other}"] for other in ("sync", "dummy")]
        table.add_row(
            *(_short(row["env"]), str(SIZES[row["size"]]), str(row["num_envs"])),
            *(f"{rate / 1000:,.1f}" for rate in rates),
            *(f"{ratio:.1f}" for ratio in ratios),
        )
    console.print(table)


def _short(env_id: str) -> str:
    return env_id.removeprefix("kvenv/").removesuffix("-v0")
