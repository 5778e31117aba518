from __future__ import annotations

import numpy as np
import pytest

from kvenv.envs.board import BLUE, ORANGE, PAPER
from kvenv.envs.render_stream import CURVES, EVICTED, TOKENS, StreamView, draw_stream, write_stream

S, BUDGET = 12, 4


def window(steps: int, size: int = S, budget: int = BUDGET, **changes) -> StreamView:
    """An episode in which the cache holds token 0 and the latest budget - 1 tokens."""
    step, position = np.arange(steps)[:, None], np.arange(size)[None, :]
    held = (position <= step) & ((position == 0) | (position > step - budget + 1))
    mass = np.where(np.arange(steps) < budget, 1.0, 0.5)
    n = max(size - 3, 1)
    return StreamView(
        **{"title": "T", "held": held, "mass": mass, "n": n, "budget": budget} | changes
    )


def cell(picture: np.ndarray, step: int, position: int) -> tuple[int, ...]:
    """The colour near the right end of a cell, where no dot lies."""
    x0, y0, x1, y1 = TOKENS
    x = x0 + (x1 - x0) * (4 * step + 3) // (4 * S)
    y = y1 - (y1 - y0) * (2 * position + 1) // (2 * S)
    return tuple(picture[y, x].tolist())


@pytest.mark.parametrize("steps", [9, S])
def test_every_cell_tells_what_became_of_its_token(steps: int) -> None:
    picture = draw_stream(window(steps))
    assert picture.shape == (540, 960, 3)
    assert picture.dtype == np.uint8
    for step in range(S):
        for position in range(S):
            if step >= steps or position > step:
                expected = PAPER
            elif position == 0 or position > step - BUDGET + 1:
                expected = BLUE
            else:
                expected = ORANGE if position == step - BUDGET + 1 else EVICTED
            assert cell(picture, step, position) == expected, (step, position)


def test_a_newcomer_that_is_not_let_in_is_evicted_when_it_arrives() -> None:
    held = np.tri(7, S, dtype=bool)
    held[:, BUDGET:] = False
    picture = draw_stream(window(7, held=held))
    assert [cell(picture, step, 5) for step in (4, 5, 6)] == [PAPER, ORANGE, EVICTED]


def test_the_retention_curve_is_the_mean_since_the_cache_was_full() -> None:
    mass = np.array([1, 1, 1, 1, 0.75, 0, 0])
    view = window(7, mass=mass)
    assert view.retention == 0.25
    x0, y0, x1, y1 = CURVES
    picture = draw_stream(view)
    last = picture[y1 - (y1 - y0) // 4, round(x0 + (x1 - x0) * 6.5 / S)]
    assert tuple(last.tolist()) == BLUE
    right = slice(TOKENS[2] + 20, None)
    other = draw_stream(window(7, mass=np.ones(7)))
    assert (picture[:, right] != other[:, right]).any()  # the number beside the curve


def test_retention_is_one_until_the_cache_is_full() -> None:
    assert [window(steps).retention for steps in (0, BUDGET, BUDGET + 1)] == [1, 1, 0.5]


def test_frames_differ_only_where_something_happened() -> None:
    before, after = (draw_stream(window(steps)) for steps in (6, 7))
    x0, _, x1, _ = TOKENS
    changed = np.flatnonzero((before != after).any((0, 2)))
    assert changed.size
    past, future = x0 + (x1 - x0) * 5 / S, x0 + (x1 - x0) * 7 / S
    assert all(past <= x <= future + 6 or x > x1 + 20 for x in changed)


@pytest.mark.parametrize(
    ("size", "budget", "steps"), [(1, 1, 0), (1, 1, 1), (2, 1, 2), (48, 8, 9), (1500, 64, 1500)]
)
def test_any_length_can_be_drawn(size: int, budget: int, steps: int) -> None:
    picture = draw_stream(window(steps, size, budget))
    assert picture.shape == (540, 960, 3)
    x0, y0, x1, y1 = TOKENS
    arrived = (picture[y0:y1, x0:x1] != PAPER).any(-1).mean()
    assert arrived == pytest.approx(steps * (steps + 1) / 2 / size**2, abs=0.02)


def test_text_so_far_dims_what_is_evicted() -> None:
    ids = np.arange(10, 10 + S)
    facts = "budget 4 · held 4 · retention 0.500"
    text = "10 \x1b[2m11 12 \x1b[0m13 14 15 "
    assert write_stream(window(6), ids, None) == f"T\n{facts}\n{text}\n"
    nothing_yet = "T\nbudget 4 · held 0 · retention 1.000\n\n"
    assert write_stream(window(0), ids, None) == nothing_yet
