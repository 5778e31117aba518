"""Correctness of every kernel against its float64 reference, on fresh random inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from kvenv.cache.bench.inputs import (
    RECENT,
    SINKS,
    State,
    moved,
    networks,
    normal,
    ragged_state,
)
from kvenv.cache.bench.session import Session, poisoned
from kvenv.cache.kernels.admit import admit
from kvenv.cache.kernels.admit_reference import admit_reference
from kvenv.cache.kernels.attend import attend
from kvenv.cache.kernels.attend_reference import attend_reference
from kvenv.cache.kernels.columns import columns, columns_reference
from kvenv.cache.kernels.insert import insert
from kvenv.cache.kernels.insert_reference import insert_reference
from kvenv.cache.kernels.network import Packed, pack
from kvenv.cache.kernels.score import score, score_reference
from kvenv.errors import KvenvError
from kvenv.scorers.network import Architecture

TOLERANCES = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 2e-5}
"""Of an output in this dtype: |output - reference| / |reference|, in norms."""

EXACT = TOLERANCES[torch.float32]
"""Of what is computed and given in float32, whatever dtype the inputs have."""

SIZES = (128, 64, 80, 96, 256)
GROUPS = (4, 3, 1, 7, 8)
STEPS = 4


class Case(NamedTuple):
    """One comparison: an error of NaN counts as missed."""

    what: str
    error: float
    tolerance: float


def check_kernels(session: Session, seed: int) -> list[dict[str, Any]]:
    """The largest error of each kernel in units of what it may be.

    Sizes are small where Triton's interpreter runs the kernels.

    Args:
        session: the device, among others.
        seed: of the inputs.
    """
    device, small = session.device, session.device.type != "cuda"
    rows = []
    for name, cases in (
        ("attend", _attend),
        ("insert", _insert),
        ("score", _score),
        ("admit", _admit),
        ("columns", _columns),
    ):
        draw = torch.Generator().manual_seed(seed)

        def worst(cases: Any = cases, draw: torch.Generator = draw) -> dict[str, Any]:
            with poisoned():
                found = list(cases(draw, device, small))
            most = max(found, key=lambda case: _excess(case))
            met = all(case.error <= case.tolerance for case in found)
            return {"cases": len(found), "met": met, **most._asdict()}

        rows.append({"kernel": name, **session.measure(f"checking {name}", worst)})
    return rows


def one_at_a_time(*axes: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Every axis' first value, and then what differs from that in one: few kernels to compile."""
    lists = [list(axis) for axis in axes]
    first = tuple(values[0] for values in lists)
    yield first
    for place, values in enumerate(lists):
        for value in values[1:]:
            yield (*first[:place], value, *first[place + 1 :])


def _excess(case: Case) -> float:
    part = case.error / case.tolerance if case.tolerance else case.error
    return part if part == part else float("inf")


def _relative(out: torch.Tensor, right: torch.Tensor) -> float:
    return float((out.double() - right.double()).norm() / right.double().norm())


def _different(state: State, other: State, names: tuple[str, ...]) -> int:
    """Elements that differ; two NaN are equal."""
    count = 0
    for name in names:
        a, b = getattr(state, name).double(), getattr(other, name).double()
        count += int((~((a == b) | (a.isnan() & b.isnan()))).sum())
    return count


def _attend(draw: torch.Generator, device: torch.device, small: bool) -> Iterator[Case]:
    capacities = [1, 90, 37] if small else [1, 4096, 700, 33]
    sizes, groups = (SIZES[:2], GROUPS[:2]) if small else (SIZES, GROUPS)
    for size, group, dtype in one_at_a_time(sizes, groups, TOLERANCES):
        state = moved(ragged_state(draw, 3, capacities, size, dtype), device)
        query = normal(draw, 3, len(capacities) * group, size).to(device, dtype)
        rest = state.offsets, state.lengths, size**-0.5, state.largest
        out = attend(query, state.keys, state.values, *rest)
        wide = query.double(), state.keys.double(), state.values.double()
        error = _relative(out, attend_reference(*wide, *rest))
        yield Case(f"D={size}, G={group}, {_short(dtype)}", error, TOLERANCES[dtype])


def _packed(
    draw: torch.Generator, heads: int, size: int, architecture: Architecture, device: torch.device
) -> Packed:
    network = networks(draw, [(0, head) for head in range(heads)], size, architecture)
    packed = pack(network, architecture, size, device)
    if packed is None:
        raise KvenvError(f"no kernel serves {architecture} with heads of size {size}")
    return packed


def _insert(draw: torch.Generator, device: torch.device, small: bool) -> Iterator[Case]:
    capacities = [1, 60, 33] if small else [1, 4096, 700, 9000]
    shapes = ((128, (128, 128), False), (64, (128, 128), True), (80, (40,), True))
    for (size, hidden, age), dtype in one_at_a_time(shapes, TOLERANCES):
        architecture = Architecture(("key", "value"), hidden, age=age)
        packed = _packed(draw, len(capacities), size, architecture, device)
        ours = moved(ragged_state(draw, 3, capacities, size, dtype), device)
        right = ours.double()
        for _ in range(STEPS):
            for state, run in ((ours, insert), (right, insert_reference)):
                run(
                    *_newcomer(state, len(capacities), size, dtype, device),
                    *(state.keys, state.values, state.positions, state.scores, state.offsets),
                    *(state.lengths, state.clock),
                    sinks=SINKS,
                    recent=RECENT,
                    largest=state.largest,
                    packed=packed,
                )
        names = ("keys", "values", "positions", "lengths", "clock")
        what = f"D={size}, {len(hidden)} layers, {_short(dtype)}"
        yield Case(f"{what}: slots that differ", _different(ours, right, names), 0)
        known = ~right.scores.isnan()
        error = _relative(ours.scores[known], right.scores[known])
        yield Case(f"{what}: scores", error, EXACT)


def _newcomer(
    state: State, heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same token for any state of the same clock, in the dtype of its slots."""
    draw = torch.Generator().manual_seed(int(state.clock[0, 0]))
    key, value = normal(draw, 2, len(state.lengths), heads, size).to(device, dtype)
    return key.to(state.keys.dtype), value.to(state.keys.dtype)


def _score(draw: torch.Generator, device: torch.device, small: bool) -> Iterator[Case]:
    heads, n = (2, 70) if small else (8, 3001)
    every = Architecture(("key", "value", "position", "key_norm", "value_norm"), (256, 64))
    shapes = ((128, Architecture()), (64, every), (80, Architecture(("key",), (64,))))
    for (size, architecture), dtype in one_at_a_time(shapes, TOLERANCES):
        packed = _packed(draw, heads, size, architecture, device)
        keys, values = normal(draw, 2, 2, heads, n, size).to(device, dtype)
        positions = torch.randint(0, 10**5, (2, heads, n), generator=draw).to(device)
        out = score(keys, values, positions, packed)
        right = score_reference(keys.double(), values.double(), positions, packed)
        what = f"D={size}, {'+'.join(architecture.features)}, {_short(dtype)}"
        yield Case(what, _relative(out, right), EXACT)


def _admit(draw: torch.Generator, device: torch.device, small: bool) -> Iterator[Case]:
    capacities = [1, 60, 33] if small else [1, 4096, 700]
    for q, dtype in one_at_a_time((50, 1) if small else (50, 1, 9001), TOLERANCES):
        ours = moved(ragged_state(draw, 3, capacities, 64, dtype), device)
        right = ours.copy()
        heads = len(capacities)
        keys, values = normal(draw, 2, 3, heads, q, 64).to(device, dtype)
        places = (ours.clock.unsqueeze(-1) + torch.arange(q, device=device)).int()
        scores, fresh = normal(draw, 2, 3, heads, q).to(device)
        worth = normal(draw, 3, sum(capacities)).to(device)
        for state, run in ((ours, admit), (right, admit_reference)):
            run(
                *(keys, values, places, scores, fresh),
                *(state.keys, state.values, state.positions, state.scores, worth),
                *(state.offsets, state.lengths, state.largest),
            )
        names = ("keys", "values", "positions", "scores", "lengths")
        what = f"{q} newcomers, {_short(dtype)}: elements that differ"
        yield Case(what, _different(ours, right, names), 0)


def _columns(draw: torch.Generator, device: torch.device, small: bool) -> Iterator[Case]:
    length, n = (140, 101) if small else (1500, 1403)
    for (size, group), dtype in one_at_a_time(((128, 4), (64, 1), (80, 3)), TOLERANCES):
        query = normal(draw, 1, 2 * group, length, size).to(device, dtype)
        key = normal(draw, 1, 2, length, size).to(device, dtype)
        logits = query.double() @ key.double().repeat_interleave(group, 1).mT * size**-0.5
        later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        lse = logits.masked_fill(later, -torch.inf).logsumexp(-1).float()
        for start in (0, n):
            asked, level = query[:, :, start:], lse[:, :, start:]
            out = columns(asked, key, level, start, n, size**-0.5)
            right = columns_reference(
                asked.double(), key.double(), level.double(), start, n, size**-0.5
            )
            errors = [_relative(a, b) for a, b in zip(out, right, strict=True)]
            error = float(torch.tensor(errors).max())  # NaN if one is, unlike Python's
            what = f"D={size}, G={group}, from {start}, {_short(dtype)}"
            yield Case(what, error, EXACT)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
