"""One token into each row's and head's slots: find the lowest slot, overwrite it, score tokens.

With p the newcomer's position and w[s] = score[s] + age_term(p - position[s]) the worth of slot s
(NaN counts as lowest; sinks, position < sinks, and recent ones, position > p - recent, stay),

    slot = length if length < capacity else argmin (w[s], -position[s]) over what may go
    keys[slot], values[slot], positions[slot], scores[slot] = key, value, p, network(key, value, p)

and nothing if no slot may go. One program per row and head. Where at least two tokens are recent,
no score is asked for before the next launch has begun, and it may be ``pending``: then that next
launch makes it, in more programs, one per head and eight rows (`kvenv.cache.kernels.newcomer`).
For every row and head ``pending`` holds the slots (-1 for none) written at even and at odd turns,
and two counts of turns: what finds slots and what scores never wait for each other.

It is bound by latency, not by bytes: all loads are issued before the first sum, which needs a
barrier. Bytes: the scores and positions of the slots and the head's weights in; a key, a value
and two numbers in and out. FLOPs: those of one score, and the age term's for each slot. See
`cost`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from kvenv.cache.kernels import newcomer
from kvenv.cache.kernels.insert_reference import check_pending, check_shapes
from kvenv.cache.kernels.network import Packed
from kvenv.cache.kernels.newcomer import GROUP, score_latest, score_newcomer
from kvenv.cache.kernels.worth import LAST_KNOT, STAYS, lower, worth_of
from kvenv.errors import KvenvError

WARPS = 8  # half of them would have no registers left for the loads in flight
BLOCK = 4096  # slots at a time: 16 a thread keep enough loads in flight
TILE = 4096  # first-layer weights at a time of one token: 16 numbers a thread
HELD = 2**16  # bytes of second-layer weights fetched ahead for it: 64 registers a thread

SCHEMA = (
    "(Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, "
    "Tensor(d!) scores, Tensor offsets, Tensor(e!) lengths, Tensor(f!) clock, "
    "Tensor(g!)? pending, Tensor[] network, Tensor? arrived, Tensor? worth, Tensor? age, "
    "int sinks, int recent, int largest, str activation, int scalars, int budget) -> ()"
)


@triton.jit
def _insert(
    key: tl.tensor, value: tl.tensor, keys: tl.tensor, values: tl.tensor, positions: tl.tensor,
    scores: tl.tensor, offsets: tl.tensor, lengths: tl.tensor, clock: tl.tensor,
    pending: tl.tensor, arrived: tl.tensor, worth: tl.tensor, table: tl.tensor, w_key: tl.tensor,
    w_value: tl.tensor, w_scalar: tl.tensor, b1: tl.tensor, w2: tl.tensor, b2: tl.tensor,
    w_out: tl.tensor, b_out: tl.tensor, key_affine: tl.tensor, value_affine: tl.tensor,
    scalar_affine: tl.tensor, B: tl.tensor, H: tl.tensor, T: tl.tensor, key_b: tl.tensor,
    key_h: tl.tensor, value_b: tl.tensor, value_h: tl.tensor, sinks: tl.tensor, recent: tl.tensor,
    largest: tl.tensor, groups: tl.tensor,
    BUDGET: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, W1: tl.constexpr,
    W2: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SCALARS: tl.constexpr,
    ACT: tl.constexpr, NETWORK: tl.constexpr, PENDING: tl.constexpr, ARRIVED: tl.constexpr,
    AGE: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, AHEAD: tl.constexpr, INPUTS: tl.constexpr, UNITS: tl.constexpr,
) -> None:  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1) - groups
    if PENDING:  # noqa: SIM102 - the inner one is not known when this is compiled
        if row < 0:  # they take longest and begin first
            score_latest(
                head, (row + groups) * GROUP, pending, keys, values, positions, scores, w_key,
                w_value, w_scalar, b1, w2, b2, w_out, b_out, key_affine, value_affine,
                scalar_affine, B, H, T, BUDGET, D, PADDED_D, W1, W2, KEY, VALUE, SCALARS, ACT,
                INPUTS, UNITS,
            )  # fmt: skip
    if row >= 0:
        pid = row.to(tl.int64) * H + head
        now, length = tl.load(clock + pid), tl.load(lengths + pid)
        if EVEN:  # every head has as many slots, and no load need wait for another one
            start = head * largest
            capacity = largest
        else:
            start = tl.load(offsets + head)
            capacity = tl.load(offsets + head + 1) - start
        if PENDING:
            turn = tl.load(pending + pid * 4 + 2)
        if ARRIVED:
            score = tl.load(arrived + pid)
        lane = tl.arange(0, PADDED_D)
        real = lane < D
        key += row.to(tl.int64) * key_b + head * key_h
        value += row.to(tl.int64) * value_b + head * value_h
        new_key = tl.load(key + lane, mask=real, other=0.0)
        new_value = tl.load(value + lane, mask=real, other=0.0)
        tl.debug_barrier()  # loads that are needed last begin here, not after all others

        base = row.to(tl.int64) * T + start
        worth += base
        table += head * (LAST_KNOT + 1)
        free = length < capacity
        last = tl.where(free, -1, now - recent)  # the last position that may go
        slot = tl.arange(0, BLOCK)
        number, position = worth_of(
            worth, positions + base, table, slot, capacity, now, sinks, last, AGE
        )
        if BLOCKS > 1:
            for first in range(BLOCK, capacity, BLOCK):
                more = first + tl.arange(0, BLOCK)
                others, where = worth_of(
                    worth, positions + base, table, more, capacity, now, sinks, last, AGE
                )
                number, position, slot = lower(number, position, slot, others, where, more)
        if NETWORK and not PENDING:
            score = score_newcomer(
                key, value, head, now, new_key, new_value, w_key, w_value, w_scalar, b1, w2, b2,
                w_out, b_out, key_affine, value_affine, scalar_affine, BUDGET, D, W1, W2, KEY,
                VALUE, SCALARS, ACT, ROWS, AHEAD,
            )  # fmt: skip
        least, _, place = tl.reduce((number, position, slot), 0, lower)

        writes = free | (least < STAYS)
        place = tl.where(free, length, place)
        target = base + place
        tl.debug_barrier()  # every warp has read what is written now
        tl.store(keys + target * D + lane, new_key, mask=real & writes)
        tl.store(values + target * D + lane, new_value, mask=real & writes)
        tl.store(positions + target, now, mask=writes)
        if PENDING:
            tl.store(
                pending + pid * 4 + (turn & 1), tl.where(writes, start.to(tl.int32) + place, -1)
            )
            tl.store(pending + pid * 4 + 2, turn + 1)
        elif NETWORK or ARRIVED:
            tl.store(scores + target, score, mask=writes)
        tl.store(lengths + pid, length + free.to(tl.int32))
        tl.store(clock + pid, now + 1)


def _launch(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    clock: Tensor,
    pending: Tensor | None,
    network: list[Tensor],
    arrived: Tensor | None,
    worth: Tensor | None,
    age: Tensor | None,
    sinks: int,
    recent: int,
    largest: int,
    activation: str,
    scalars: int,
    budget: int,
) -> None:
    B, H, D = key.shape
    T = keys.shape[1]
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    network = network or [scores] * 11  # pointers that are not followed
    w_key, w_value, _, b1, w2, b2 = network[:6]
    learned = w_key is not scores
    W1 = b1.shape[-1] if learned else 16
    W2 = b2.shape[-1] if learned and w2.numel() else 0
    large = [w.element_size() for w in (w_key, w_value, w2) if w.numel()]
    piece = newcomer.PIECE // (W1 * max(large, default=4))
    block = min(BLOCK, max(16, triton.next_power_of_2(largest)))
    padded = max(16, triton.next_power_of_2(D))
    groups = 0 if pending is None else triton.cdiv(B, GROUP.value)
    launch: Any = _insert[(H, groups + B)]
    with torch.cuda.device_of(keys):
        launch(
            *(key, value, keys, values, positions, scores, offsets, lengths, clock),
            *(scores if one is None else one for one in (pending, arrived, worth, age)),
            *network,
            *(B, H, T, *key.stride()[:2], *value.stride()[:2], sinks, recent, largest, groups),
            BUDGET=budget,
            D=D,
            PADDED_D=padded,
            W1=W1,
            W2=W2,
            KEY=learned and w_key.numel() > 0,
            VALUE=learned and w_value.numel() > 0,
            SCALARS=scalars,
            ACT=activation,
            NETWORK=learned,
            PENDING=pending is not None,
            ARRIVED=arrived is not None,
            AGE=age is not None and worth is None,
            EVEN=H * largest == T,
            BLOCK=block,
            BLOCKS=triton.cdiv(largest, block),
            ROWS=min(padded, TILE // W1),
            AHEAD=min(W2, HELD // (W1 * w2.element_size())) if W2 else 16,
            INPUTS=min(padded, piece),
            UNITS=min(W2, piece) if W2 else 16,
            num_warps=WARPS if block > 512 or W1 > 32 else 4,
        )


_op = library.custom_op(
    "kvenv::insert",
    _launch,
    mutates_args=("keys", "values", "positions", "scores", "lengths", "clock", "pending"),
    schema=SCHEMA,
)


@_op.register_fake
def _fake(*_: object) -> None:
    return None


def insert(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    clock: Tensor,
    pending: Tensor | None = None,
    *,
    sinks: int,
    recent: int,
    largest: int,
    packed: Packed | None = None,
    arrived: Tensor | None = None,
    worth: Tensor | None = None,
    age: Tensor | None = None,
) -> None:
    """Put the next token of every row and head into its slots, in place.

    It takes the next free slot, else that of the lowest worth among those that may go (of equals
    the later position), else none. The clock moves on by one in any case.

    Args:
        key: (B, H, D) of the newcomers, which are at the positions of ``clock``; any strides.
        value: (B, H, D).
        keys: slots (B, T, D), contiguous; head h owns [offsets[h], offsets[h + 1]). Written.
        values: (B, T, D). Written.
        positions: (B, T) int32. Written.
        scores: (B, T) float32. Written where ``packed`` or ``arrived`` gives the newcomers'.
        offsets: (H + 1,) int32.
        lengths: (B, H) int32, used slots. Written.
        clock: (B, H) int32, the position of the next token. Written.
        pending: (B, H, 4) int32, all -1 at first: leave these newcomers' scores to the next
            launch, or to `kvenv.cache.kernels.insert_reference.settle`. Only with ``packed`` and
            ``recent`` of 2 at least. Written.
        sinks: tokens at positions below stay.
        recent: the last tokens, the newcomer among them, that stay.
        largest: the largest capacity of a head.
        packed: the layer's networks, to score the newcomers.
        arrived: (B, H) float32, their scores where there are no networks.
        worth: (B, T) float32 to decide by instead of scores and age.
        age: (H, 17) float32, what to add for ages; None takes that of ``packed``.

    Raises:
        KvenvError: if shapes do not fit, both ``packed`` and ``arrived`` are given, or
            ``pending`` without what it takes.
    """
    per_slot, per_head = (positions, scores, worth), (lengths, clock, arrived)
    check_shapes(key, value, keys, values, offsets, per_slot, per_head)
    check_pending(pending, lengths, recent, packed)
    if keys.shape != values.shape:
        raise KvenvError("insert takes keys and values of one size: use insert_reference")
    if packed is None:
        network, activation, scalars, budget = [], "gelu", 0, 1
    elif arrived is None:
        network, activation, scalars = packed.tensors(), packed.activation, packed.scalars
        budget, age = packed.budget, packed.age if age is None else age
    else:
        raise KvenvError("insert got packed and arrived: give the newcomers' scores one way")
    _op(
        *(key, value, keys, values, positions, scores, offsets, lengths, clock, pending),
        *(network, arrived, worth, age, sinks, recent, largest, activation, scalars, budget),
    )


def cost(keys: Tensor, heads: int, packed: Packed | None = None) -> tuple[int, int]:
    """Bytes that `insert` must move for full slots (B, T, D) of H heads, and its FLOPs."""
    B, T, D = keys.shape
    newcomers = B * heads
    moved = 8 * B * T + newcomers * (4 * D * keys.element_size() + 4 * 6) + 4 * (heads + 1)
    if packed is None:
        return moved, 0
    flops = newcomers * packed.flops_per_token() + (0 if packed.age is None else 8 * B * T)
    return moved + heads * packed.bytes_per_head(), flops
