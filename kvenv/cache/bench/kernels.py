"""What each kernel takes: seconds, bytes a second, and that as a share of a copy's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from kvenv.cache.bench.inputs import (
    ARCHITECTURE,
    RECENT,
    SINKS,
    State,
    full_state,
    networks,
    normal,
)
from kvenv.cache.bench.session import Session, require, seconds_a_call, sets_for
from kvenv.cache.kernels import admit as admitting
from kvenv.cache.kernels import attend as attending
from kvenv.cache.kernels import columns as summing
from kvenv.cache.kernels import insert as inserting
from kvenv.cache.kernels import score as scoring
from kvenv.cache.kernels.flash import flash
from kvenv.cache.kernels.network import Packed, pack
from kvenv.errors import KvenvError

HEADS, GROUP, SIZE, DTYPE = 8, 4, 128, torch.bfloat16
"""KV heads, query heads of each and head size of an 8B model."""

SCALE = SIZE**-0.5

Point = tuple[int, int]
"""Batch and budget."""

VARIANTS = {"block": (32, 64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4)}
SPLITS = (1, 2, 3, 4, 6, 8, 16, 32, 64)
"""What a sweep tries: these tiles, each with the best split of the default ones."""

Calls = list[Callable[[], object]]


def random(device: torch.device, seed: int = 0) -> torch.Generator:
    """A generator on the device itself."""
    return torch.Generator(device).manual_seed(seed)


def figures(seconds: float, cost: tuple[int, int], copy: float) -> dict[str, Any]:
    """Time, bytes and FLOPs of a call, and how they compare with a copy of ``copy`` bytes/s."""
    moved, flops = cost
    rate = moved / seconds
    return {
        "seconds": seconds,
        "bytes": moved,
        "bytes_per_second": rate,
        "share_of_copy": rate / copy,
        "flops_per_second": flops / seconds,
    }


@functools.cache
def packed_layer(device: torch.device, seed: int = 0) -> Packed:
    """A layer's random networks."""
    draw = torch.Generator().manual_seed(seed)
    network = networks(draw, [(0, head) for head in range(HEADS)], SIZE, ARCHITECTURE)
    packed = pack(network, ARCHITECTURE, SIZE, device)
    if packed is None:
        raise KvenvError(f"no kernel serves {ARCHITECTURE}")
    return packed


def decode_step(session: Session, batch: int, budget: int, copy: float) -> dict[str, Any]:
    """`attend` and `insert` of one layer with full slots, and a StaticCache's bare write.

    Args:
        session: the device, among others.
        batch: rows.
        budget: slots of every head.
        copy: bytes a second that a copy reaches.
    """
    device, itemsize = session.device, DTYPE.itemsize
    slots = HEADS * budget
    cost = attending.cost(batch, HEADS * GROUP, HEADS, slots, SIZE, itemsize)
    states = make_states(session, batch, budget, cost[0])
    query = normal(random(device), batch, HEADS * GROUP, SIZE, dtype=DTYPE)
    calls = [functools.partial(_attend, query, state) for state in states]
    attend = figures(seconds_a_call(calls, device), cost, copy)
    # Insertion reads no keys: sets of scores and positions rotate, over the keys of one.
    cost = inserting.cost(states[0].keys, HEADS, packed_layer(device))
    key, value = normal(random(device, 1), 2, batch, HEADS, SIZE, dtype=DTYPE)
    calls = []
    for index in range(sets_for(cost[0])):
        own = State(**{**vars(states[0]), **_beside(states[0])})
        packed = packed_layer(device, index % 8)
        calls.append(functools.partial(_insert, key, value, own, packed))
    insert = figures(seconds_a_call(calls, device), cost, copy)
    place = torch.tensor([0], device=device)
    calls = [functools.partial(_write, key, value, state, place) for state in states]
    return {
        "attend": attend,
        "insert": insert,
        "insert_share_of_attend": insert["seconds"] / attend["seconds"],
        "write_seconds": seconds_a_call(calls, device),
    }


def make_states(session: Session, batch: int, budget: int, moved: int) -> list[State]:
    """As many full layers as rotate; raises `TooLargeError` where they do not fit."""
    sets = sets_for(moved)
    require(session.device, int(1.2 * sets * moved))
    draw = random(session.device, batch)
    return [full_state(draw, batch, HEADS, budget, SIZE, DTYPE) for _ in range(sets)]


def _beside(state: State) -> dict[str, torch.Tensor]:
    names = ("positions", "scores", "lengths", "clock", "pending")
    return {name: getattr(state, name).clone() for name in names}


def _attend(query: torch.Tensor, state: State, **tiles: int) -> torch.Tensor:
    rest = state.offsets, state.lengths, SCALE, state.largest
    if tiles:
        return attending.launch(query, state.keys, state.values, *rest, **tiles)
    return attending.attend(query, state.keys, state.values, *rest)


def _insert(key: torch.Tensor, value: torch.Tensor, state: State, packed: Packed) -> None:
    inserting.insert(
        *(key, value, state.keys, state.values, state.positions, state.scores),
        *(state.offsets, state.lengths, state.clock, state.pending),
        sinks=SINKS,
        recent=RECENT,
        largest=state.largest,
        packed=packed,
    )


def _write(key: torch.Tensor, value: torch.Tensor, state: State, place: torch.Tensor) -> None:
    """What transformers' StaticCache does with a step's keys and values."""
    for new, slots in ((key, state.keys), (value, state.values)):
        slots.unflatten(1, (HEADS, -1)).index_copy_(2, place, new.unsqueeze(2))


def score_prompt(session: Session, n: int, copy: float) -> dict[str, Any]:
    """`score` of a prompt of n tokens, against its plain torch."""
    device = session.device
    packed = packed_layer(device)
    size = 2 * HEADS * n * SIZE * DTYPE.itemsize
    sets = sets_for(size)
    require(device, sets * size)
    draw = random(device)
    keys = [normal(draw, 2, 1, HEADS, n, SIZE, dtype=DTYPE) for _ in range(sets)]
    positions = torch.arange(n, dtype=torch.int32, device=device).expand(1, HEADS, n)
    calls: Calls = [functools.partial(scoring.score, *pair, positions, packed) for pair in keys]
    row = figures(seconds_a_call(calls, device), scoring.cost(keys[0][0], packed), copy)
    plain: Calls = [
        functools.partial(scoring.score_reference, *pair, positions, packed) for pair in keys[:2]
    ]
    return {**row, "torch_seconds": seconds_a_call(plain, device)}


def admit_prompt(session: Session, n: int, budget: int, copy: float) -> dict[str, Any]:
    """`admit` of a prompt of n tokens to empty slots, against topk and gather of torch."""
    device, capacity = session.device, min(budget, n)
    row = SIZE * DTYPE.itemsize
    size = 2 * HEADS * row * (n + budget)
    sets = sets_for(size)
    require(device, sets * size)
    draw = random(device)
    states = [full_state(draw, 1, HEADS, budget, SIZE, DTYPE) for _ in range(sets)]
    pairs = [normal(draw, 2, 1, HEADS, n, SIZE, dtype=DTYPE) for _ in range(sets)]
    positions = torch.arange(n, dtype=torch.int32, device=device).expand(1, HEADS, n)
    worth = normal(draw, 1, HEADS, n)

    def ours(state: State, pair: torch.Tensor) -> None:
        state.lengths.zero_()
        admitting.admit(
            *(*pair, positions, worth, worth, state.keys, state.values, state.positions),
            *(state.scores, state.scores, state.offsets, state.lengths, budget),
        )

    def plain(pair: torch.Tensor) -> list[torch.Tensor]:
        best = worth.topk(capacity, sorted=False).indices
        wide = best.unsqueeze(-1).expand(-1, -1, -1, SIZE)
        return [*(x.gather(2, wide) for x in pair), worth.gather(2, best)]

    calls: Calls = [functools.partial(ours, *both) for both in zip(states, pairs, strict=True)]
    cost = admitting.cost(1, HEADS, n, 0, capacity, row)
    result = figures(seconds_a_call(calls, device), cost, copy)
    baseline: Calls = [functools.partial(plain, pair) for pair in pairs]
    return {**result, "budget": budget, "torch_seconds": seconds_a_call(baseline, device)}


def columns_prompt(session: Session, n: int, copy: float) -> dict[str, Any]:
    """Column sums of a prompt of n tokens, against the flash forward that they follow."""
    device = session.device
    require(device, 8 * HEADS * GROUP * n * SIZE * DTYPE.itemsize)
    draw = random(device)
    query = normal(draw, 1, HEADS * GROUP, n, SIZE, dtype=DTYPE)
    key, value = normal(draw, 2, 1, HEADS, n, SIZE, dtype=DTYPE)
    lse = flash(query, key, value, SCALE)[1]
    forward: Calls = [lambda: flash(query, key, value, SCALE)]
    sums: Calls = [lambda: summing.column_sums(query, key, lse, 0, n, SCALE)]
    row = figures(seconds_a_call(sums, device), summing.cost(query, key, 0, n), copy)
    return {**row, "flash_seconds": seconds_a_call(forward, device)}


def sweep(session: Session, points: Sequence[Point], copy: float) -> list[dict[str, Any]]:
    """Tiles and splits of `attend`: each point's rates by variant, and the best one."""
    rows = []
    for batch, budget in points:
        best = session.measure(
            f"sweeping batch {batch}, budget {budget}",
            functools.partial(_sweep, session, batch, budget, copy),
        )
        rows.append({"batch": batch, "budget": budget, **best})
    return rows


def _sweep(session: Session, batch: int, budget: int, copy: float) -> dict[str, Any]:
    cost = attending.cost(batch, HEADS * GROUP, HEADS, HEADS * budget, SIZE, DTYPE.itemsize)
    states = make_states(session, batch, budget, cost[0])
    query = normal(random(session.device), batch, HEADS * GROUP, SIZE, dtype=DTYPE)
    default = {"block": attending.TILES[SIZE * DTYPE.itemsize].block}

    def time(tiles: Mapping[str, int]) -> dict[str, Any]:
        calls = [functools.partial(_attend, query, state, **tiles) for state in states]
        try:
            seconds = seconds_a_call(calls, session.device)
        except Exception as error:  # tiles that take more than a multiprocessor has
            return {**tiles, "failed": type(error).__name__}
        return {**tiles, "seconds": seconds, "share_of_copy": cost[0] / seconds / copy}

    usual = time(default)
    shares = [s for s in SPLITS if s == 1 or s * 32 <= budget]
    tried = [time({**default, "splits": splits}) for splits in shares]
    splits = min(tried, key=_seconds)["splits"]
    for block, warps, stages in product(*VARIANTS.values()):
        if session.over:
            break
        tiles = {"block": block, "warps": warps, "stages": stages}
        tried += [time(tiles), time({**tiles, "splits": splits})]
    return {"default": usual, "best": min(tried, key=_seconds), "variants": tried}


def _seconds(row: Mapping[str, Any]) -> float:
    return row.get("seconds", float("inf"))
