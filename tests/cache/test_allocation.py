"""Budgets divided among heads: exact, and as good as any division can be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvenv.cache.allocation import allocate
from kvenv.errors import KvenvError
from kvenv.scorers.curves import Curves

MODES = ("uniform", "heads", "global")


def curves_of(heads, rows, fractions=None) -> Curves:
    rows = np.asarray(rows, float)
    grid = np.linspace(0, 1, rows.shape[1]) if fractions is None else fractions
    return Curves(tuple(heads), grid, rows, 100.0)


@st.composite
def problems(draw, concave: bool = False, most_heads: int = 3, most_context: int = 300):
    """Layers, a floor, a context and curves of some heads of those layers."""
    layers = draw(
        st.dictionaries(st.integers(0, 40), st.integers(1, most_heads), min_size=1, max_size=3)
    )
    context = draw(st.integers(2, most_context))
    floor = draw(st.integers(1, context - 1))
    every = [(layer, head) for layer, count in sorted(layers.items()) for head in range(count)]
    known = every if concave else draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    points = draw(st.integers(2, 6))
    inner = draw(st.sets(st.integers(1, 98), min_size=points - 2, max_size=points - 2))
    fractions = np.array([0, *sorted(inner), 99]) / 99
    rows = []
    for _ in known:
        steps = draw(st.lists(st.integers(0, 9), min_size=points - 1, max_size=points - 1))
        slopes = np.array(sorted(steps, reverse=True) if concave else steps, float)
        rise = np.concatenate([[0], np.cumsum(slopes * np.diff(fractions))])
        rows.append(rise / max(rise[-1], 9))
    return layers, floor, context, curves_of(known, np.minimum(rows, 1), fractions)


def value(curves: Curves, given: dict, floor: int, context: int) -> float:
    """The sum of what heads retain; the protected tokens were not chosen by rank."""
    total = 0.0
    for (layer, head), row in zip(curves.heads, curves.retention, strict=True):
        fraction = (given[layer][head] - floor + 1) / (context - floor + 1)
        total += float(np.interp(fraction, curves.fractions, row))
    return total


@given(problems(), st.integers(0, 400), st.sampled_from(MODES))
def test_totals_are_exact_and_no_head_is_below_the_floor(problem, extra: int, mode) -> None:
    layers, floor, context, curves = problem
    budget = floor + extra
    given_ = allocate(mode, layers, budget, floor, curves, context)
    assert list(given_) == list(layers)
    assert {layer: len(row) for layer, row in given_.items()} == layers
    everyone = [tokens for row in given_.values() for tokens in row]
    assert all(type(tokens) is int for tokens in everyone)
    assert min(everyone) >= floor
    assert max(everyone) <= max(context, budget)
    assert sum(everyone) == budget * sum(layers.values())
    if mode != "global":
        assert all(sum(row) == budget * len(row) for row in given_.values())
    if mode == "uniform" or budget >= context:
        assert set(everyone) == {budget}
    for layer, count in layers.items():
        for head in range(count):
            if (layer, head) not in curves.heads:
                assert given_[layer][head] == budget


@given(problems(concave=True, most_heads=2, most_context=7), st.integers(0, 6))
def test_concave_curves_are_divided_as_well_as_any_division(problem, extra: int) -> None:
    layers, floor, context, curves = problem
    layers = dict(list(layers.items())[:2])
    heads = [head for head in curves.heads if head[0] in layers]
    rows = [curves.heads.index(head) for head in heads]
    curves = curves_of(heads, curves.retention[rows], curves.fractions)
    budget = min(floor + extra, context - 1)
    ours = allocate("global", layers, budget, floor, curves, context)
    best = max(
        value(curves, as_layers(layers, heads, sizes), floor, context)
        for sizes in itertools.product(range(floor, context + 1), repeat=len(heads))
        if sum(sizes) == budget * len(heads)
    )
    assert value(curves, ours, floor, context) == pytest.approx(best, abs=1e-12)


def as_layers(layers, heads, sizes) -> dict[int, list[int]]:
    told = dict(zip(heads, sizes, strict=True))
    return {layer: [told[layer, h] for h in range(count)] for layer, count in layers.items()}


@given(problems(), st.integers(0, 400), st.sampled_from(MODES))
def test_a_larger_budget_takes_from_no_head(problem, extra: int, mode) -> None:
    layers, floor, context, curves = problem
    less, more = (
        allocate(mode, layers, floor + extra + step, floor, curves, context) for step in (0, 1)
    )
    for layer in layers:
        assert all(a <= b for a, b in zip(less[layer], more[layer], strict=True))


@given(problems(), st.integers(0, 400))
def test_the_freer_an_allocation_the_more_of_the_hulls_it_holds(problem, extra: int) -> None:
    layers, floor, context, curves = problem
    rows = np.stack([hull(curves.fractions, row) for row in curves.retention])
    curves = curves_of(curves.heads, rows, curves.fractions)
    held = [
        value(curves, allocate(m, layers, floor + extra, floor, curves, context), floor, context)
        for m in MODES
    ]
    assert held[0] <= held[1] + 1e-9
    assert held[1] <= held[2] + 1e-9


def hull(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The least concave curve above another."""
    upper = [
        max(
            y[i] + (y[j] - y[i]) * (at - x[i]) / (x[j] - x[i]) if i != j else y[i]
            for i in range(len(x))
            for j in range(len(x))
            if x[i] <= at <= x[j]
        )
        for at in x
    ]
    return np.minimum(np.maximum.accumulate(upper), 1)


@given(st.integers(1, 20), st.integers(0, 200), st.sampled_from(MODES))
def test_equal_curves_are_uniform(floor: int, extra: int, mode) -> None:
    heads = [(layer, head) for layer in (3, 4) for head in range(3)]
    curves = curves_of(heads, [[0, 0.2, 0.9, 0.9, 1]] * 6)
    given_ = allocate(mode, {3: 3, 4: 3}, floor + extra, floor, curves, 128)
    assert given_ == {3: (floor + extra,) * 3, 4: (floor + extra,) * 3}


def test_tokens_go_where_they_gain_most() -> None:
    # Head (0, 0) has all within a quarter, head (0, 1) gains evenly, layer 1 gains nothing.
    steep, even, flat = [0, 1, 1, 1, 1], [0, 0.25, 0.5, 0.75, 1], [0, 0, 0, 0, 0]
    curves = curves_of([(0, 0), (0, 1), (1, 0), (1, 1)], [steep, even, flat, flat])
    layers = {0: 2, 1: 2}
    assert allocate("heads", layers, 40, 1, curves, 100) == {0: (25, 55), 1: (40, 40)}
    assert allocate("global", layers, 40, 1, curves, 100) == {0: (25, 100), 1: (18, 17)}
    assert allocate("global", layers, 10, 1, curves, 100) == {0: (25, 13), 1: (1, 1)}
    # Sinks and recent tokens come on top of what the curve tells of.
    assert allocate("heads", {0: 2}, 50, 21, curves, 120) == {0: (45, 55)}


def test_a_curve_that_rises_late_is_judged_by_its_hull() -> None:
    late, early = [0, 0, 0, 0, 1], [0, 0.2, 0.4, 0.6, 0.8]
    curves = curves_of([(0, 0), (0, 1)], [late, early])
    assert allocate("heads", {0: 2}, 50, 1, curves, 100) == {0: (99, 1)}


def test_heads_are_told_apart_by_layer_and_order() -> None:
    curves = curves_of([(7, 1), (2, 0)], [[0, 1, 1], [0, 0.1, 0.2]])
    assert allocate("global", {7: 2, 2: 1}, 30, 1, curves, 100) == {7: (30, 50), 2: (10,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "layers"}, "allocation 'layers': choose one of uniform, heads, global"),
        ({"budget": 20}, r"budget 20 is below the 21 tokens .*raise the budget, or lower sinks"),
        ({"mode": "uniform", "budget": 20}, "budget 20 is below the 21 tokens"),
        ({"curves": None}, r'"heads" needs retention curves .*`kvenv curves .*"uniform"'),
        ({"floor": 0}, "floor 0, context 100 and heads"),
        ({"context": 0}, "floor 21, context 0 and heads"),
        ({"heads_by_layer": {0: 0}}, r"heads \{0: 0\}: each must be at least 1"),
    ],
)
def test_what_cannot_be_divided_is_refused(change: dict, message: str) -> None:
    options = {"mode": "heads", "heads_by_layer": {0: 2}, "budget": 40, "floor": 21}
    options |= {"curves": curves_of([(0, 0)], [[0, 1]]), "context": 100, **change}
    with pytest.raises(KvenvError, match=message):
        allocate(**options)


def test_uniform_needs_no_curves() -> None:
    assert allocate("uniform", {5: 2, 9: 1}, 40, 21, None, 10) == {5: (40, 40), 9: (40,)}
