"""The best schedule against all there are, and chance against many draws."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvenv.envs.optimum import best_schedule, chance
from kvenv.errors import KvenvError


def brute(gains: np.ndarray, first: np.ndarray, capacity: int, guarded: np.ndarray) -> float:
    """The best of all schedules, one after another."""
    periods, n = gains.shape

    @cache
    def best(k: int, held: frozenset[int]) -> float:
        if k == periods:
            return 0.0
        there = held | {j for j in range(n) if first[j] == k}
        must = {j for j in there if guarded[k, j]}
        free = sorted(there - must)
        found = [
            sum(gains[k, j] for j in kept) + best(k + 1, frozenset(kept))
            for size in range(min(len(free), capacity - len(must)) + 1)
            for kept in ({*must, *some} for some in combinations(free, size))
        ]
        return max(found)

    return best(0, frozenset())


@st.composite
def problems(draw) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    periods, n = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    first = np.sort(rng.integers(0, periods, n))
    capacity = draw(st.integers(1, n))
    guarded = np.zeros((periods, n), dtype=bool)
    guarded[:, : draw(st.integers(0, capacity))] = True  # as sinks are
    return rng.random((periods, n)).round(2), first, capacity, guarded


@settings(max_examples=60)
@given(problems())
def test_the_optimum_is_the_best_of_all_schedules(problem) -> None:
    assert best_schedule(*problem) == pytest.approx(brute(*problem), abs=1e-9)


@settings(max_examples=20)
@given(problems())
def test_chance_is_the_mean_of_random_schedules(problem) -> None:
    gains, first, capacity, guarded = problem
    rng, totals = np.random.default_rng(0), []
    for _ in range(2000):
        held: set[int] = set()
        total = 0.0
        for k, gain in enumerate(gains):
            held |= set(np.flatnonzero(first == k).tolist())
            must = {j for j in held if guarded[k, j]}
            free = sorted(held - must)
            room = min(len(free), capacity - len(must))
            held = must | set(rng.permutation(free)[:room].tolist())
            total += float(gain[sorted(held)].sum())
        totals.append(total)
    spread = np.std(totals) / np.sqrt(len(totals))
    assert chance(*problem) == pytest.approx(np.mean(totals), abs=5 * spread + 1e-9)
    assert chance(*problem) <= best_schedule(*problem) + 1e-9


def test_what_must_stay_has_to_fit() -> None:
    with pytest.raises(KvenvError, match="1 slots cannot hold what must stay"):
        best_schedule(np.ones((1, 2)), np.zeros(2, int), 1, np.ones((1, 2), bool))
