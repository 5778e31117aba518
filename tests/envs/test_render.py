from __future__ import annotations

import numpy as np
import pytest

from kvenv.envs import RankEnv
from kvenv.envs.render import BLUE, CURVES, ORANGE, TOKENS, RankView, draw_rank, write_rank
from kvenv.errors import KvenvError

UTILITY = np.float32([9, 1, 2, 3, 4, 5, 6, 7, 8, 10])


class Words:
    """A tokenizer whose words carry their space, except where a text begins."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" w{i}" for i in ids).removeprefix(" ")


def view(scores: np.ndarray | None, **changes) -> RankView:
    return RankView(
        **{"title": "T", "utility": UTILITY, "scores": scores, "budgets": None} | changes
    )


def share(picture: np.ndarray, box: tuple[int, int, int, int], colour: tuple) -> float:
    x0, y0, x1, y1 = box
    inside = picture[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].astype(int)
    return float((np.abs(inside - colour).max(-1) < 8).mean())


def test_picture_tells_what_is_kept_and_missed() -> None:
    before, best, worst = (draw_rank(view(s)) for s in (None, UTILITY, -UTILITY))
    for picture in (before, best, worst):
        assert picture.shape == (540, 960, 3)
        assert picture.dtype == np.uint8
    assert share(before, TOKENS, BLUE) == 0
    # The oracle's cells are a triangle: on average half the tokens are kept.
    assert share(best, TOKENS, BLUE) == pytest.approx(0.5, abs=0.08)
    assert share(best, TOKENS, ORANGE) == 0
    # The reverse ranking misses the best token up to the last budget, and so on.
    assert share(worst, TOKENS, ORANGE) == pytest.approx(0.25, abs=0.05)


def test_cells_stand_at_their_token_and_budget() -> None:
    picture = draw_rank(view(UTILITY))
    x0, y0, x1, y1 = TOKENS

    def cell(token: int, budget: int) -> tuple[int, ...]:
        x = x0 + (x1 - x0) * (2 * token + 1) // 20
        y = y1 - (y1 - y0) * (2 * budget - 1) // 20
        return tuple(picture[y, x].tolist())

    assert cell(9, 1) == BLUE
    assert cell(0, 1) != BLUE
    assert cell(0, 2) == BLUE
    assert cell(1, 9) != BLUE
    assert cell(1, 10) == BLUE


def test_retention_curve_is_drawn_where_it_belongs() -> None:
    marked = draw_rank(view(UTILITY, budgets=[5]))
    x0, y0, x1, y1 = CURVES
    retention = UTILITY[np.argsort(-UTILITY)][:5].sum() / UTILITY.sum()
    dot = marked[(y0 + y1) // 2, round(x0 + (x1 - x0) * retention)]
    assert tuple(dot.tolist()) == BLUE


@pytest.mark.parametrize("n", [1, 3, 5000])
def test_any_length_and_no_utility_can_be_drawn(n: int) -> None:
    scores = np.linspace(1, 0, n)
    assert draw_rank(view(scores, utility=np.zeros(n, np.float32))).shape == (540, 960, 3)


def test_text_dims_what_is_evicted() -> None:
    scores = np.array([3.0, 0, 0, 2, 1])
    shown = write_rank(view(scores, budgets=[2]), np.arange(5), Words())
    assert shown == "T · budget 2 of 5 tokens\nw0\x1b[2m w1 w2\x1b[0m w3\x1b[2m w4\x1b[0m\n"
    assert write_rank(view(None), np.arange(3), Words()) == "T\nw0 w1 w2\n"


def test_text_shows_a_quarter_ids_without_a_tokenizer_and_keeps_uncounted_sinks() -> None:
    shown = write_rank(view(np.arange(4.0), first=2), np.arange(10, 16), None)
    assert shown == "T · budget 1 of 4 tokens\n10 11 \x1b[2m12 13 14 \x1b[0m15 \n"


def test_environment_renders_before_and_after_the_step(folder: str) -> None:
    for mode in ("rgb_array", "ansi"):
        env = RankEnv(folder, render_mode=mode, layer=1, head=1, sink_free=True)
        env.reset(seed=0, options={"episode": 1})
        before = env.render()
        _, reward, _, _, info = env.step(np.linspace(-1, 1, 40))
        after = env.render()
        if mode == "rgb_array":
            assert before.shape == after.shape == (540, 960, 3)
            assert (before != after).any()
            continue
        title = "kvenv/Rank-v1 · layer 1 head 1 · episode 1"
        assert before.splitlines()[0] == title
        result = f"retention {reward:.2f} · normalized score {info['normalized_score']:.2f}"
        assert after.splitlines()[0] == f"{title} · {result} · budget 5 of 20 tokens"
        ids = env.traces.tokens(1)[:24].tolist()
        assert before.split("\n")[1].split() == [str(i) for i in ids]
        assert after.count("\x1b[2m") == 1


def test_a_tokenizer_that_was_asked_for_must_be_there(folder: str) -> None:
    env = RankEnv(folder, render_mode="ansi", tokenizer="no/such-model")
    env.reset(seed=0)
    with pytest.raises(KvenvError, match="no/such-model"):
        env.render()


def test_render_without_a_mode_warns(folder: str) -> None:
    env = RankEnv(folder)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None
