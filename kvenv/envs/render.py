"""Pictures of a ranking: what each budget keeps and retains, and the text with words dimmed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvenv import rules as u
from kvenv.envs.board import (
    BLUE,
    EMPTY,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PALE_BLUE,
    PAPER,
    Board,
    Box,
    dim_evicted,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CELLS = np.array([EMPTY, PALE_BLUE, ORANGE, BLUE], dtype=np.uint8)
"""Colour of a token at a budget, by (kept by the ranking) + 2 (kept by the oracle)."""

QUARTER = 1 / 4

STRIP: Box = (64, 92, 640, 136)
TOKENS: Box = (64, 172, 640, 484)
CURVES: Box = (696, 172, 928, 484)
DECADES = 4
"""How far below the largest utility the strip's logarithmic scale reaches."""


@dataclass(frozen=True)
class RankView:
    """What there is to see of one episode of kvenv/Rank-v1.

    Attributes:
        title: one line.
        utility: (n,), of the tokens that count.
        scores: (n,) with protected tokens at +inf, or None before there is a ranking.
        budgets: in tokens, marked in the picture; None where every budget counts.
        first: position of the first token that counts: 4 where sinks are left out.
    """

    title: str
    utility: np.ndarray
    scores: np.ndarray | None
    budgets: list[int] | None
    first: int = 0


def draw_rank(view: RankView) -> np.ndarray:
    """A picture of the ranking, (540, 960, 3) uint8.

    Tokens lie on the horizontal axis and budgets on the vertical one. A cell tells whether the
    ranking keeps the token at that budget, and whether the oracle would. Above it stands each
    token's utility; beside it, on the same vertical axis, the retention of the ranking, of the
    oracle and of chance.
    """
    board = Board()
    board.text((TOKENS[0], 22), view.title, 18, INK)
    _draw_strip(board, view)
    _draw_tokens(board, view)
    _draw_curves(board, view)
    return board.pixels()


def write_rank(
    view: RankView, tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """The prompt as text for a terminal, what the ranking evicts dimmed.

    The budget is the first of the view's, or a quarter of the tokens that count.

    Args:
        view: the episode.
        tokens: (n,) ids of the prompt's tokens.
        tokenizer: turns ids into text; without one the ids themselves are shown.
    """
    ids: list[int] = tokens.tolist()
    if view.scores is None:
        return f"{view.title}\n{dim_evicted(ids, [True] * len(ids), tokenizer)}\n"
    n = len(view.scores)
    budget = view.budgets[0] if view.budgets else u.budget_tokens(QUARTER, n)
    kept = [True] * view.first + (_places(view.scores) < budget).tolist()
    text = dim_evicted(ids, kept, tokenizer)
    return f"{view.title} · budget {budget} of {n} tokens\n{text}\n"


def _draw_strip(board: Board, view: RankView) -> None:
    """The utility of each token as bars on a logarithmic scale."""
    x0, y0, x1, y1 = STRIP
    board.text((x0, y0 - 10), "utility of each token, log scale", 13, MUTED, "ls")
    share = view.utility / max(float(view.utility.max()), np.finfo(np.float32).tiny)
    level = 1 + np.log10(np.maximum(share, 10.0**-DECADES)) / DECADES
    bars = np.linspace(1, 0, 2 * (y1 - y0))[:, None] < level[None, :]
    board.paste(np.array([PAPER, MUTED], dtype=np.uint8)[bars.astype(np.intp)], STRIP)
    board.line([(x0, y1), (x1, y1)], MUTED)


def _draw_tokens(board: Board, view: RankView) -> None:
    """Which tokens are kept (across) at which budget (up)."""
    x0, y0, x1, y1 = TOKENS
    n = len(view.utility)
    board.text((x0, y0 - 7), "cache at each budget", 13, MUTED, "ls")
    if view.scores is None:
        board.rectangle(TOKENS, EMPTY)
        board.text(((x0 + x1) / 2, (y0 + y1) / 2), "no ranking yet", 15, MUTED, "mm")
    else:
        height = 2 * (y1 - y0)
        budgets = np.ceil((np.arange(height, 0, -1) - 0.5) / height * n)[:, None]
        kept = _places(view.scores) < budgets
        best = _places(view.utility) < budgets
        board.paste(CELLS[kept + 2 * best.astype(np.intp)], TOKENS)
        _legend(board)
    for budget in (0, 25, 50, 75, 100):
        y = y1 - (y1 - y0) * budget / 100
        board.text((x0 - 8, y), f"{budget}%", 12, MUTED, "rm")
    for part in (0, 0.25, 0.5, 0.75, 1):
        position = view.first + round(part * (n - 1))
        board.text((x0 + (x1 - x0) * part, y1 + 8), f"{position}", 12, MUTED, "ma")
    board.text(((x0 + x1) / 2, y1 + 28), "position in the prompt", 13, MUTED, "ma")


def _legend(board: Board) -> None:
    """What the cells' colours mean, right-aligned over the token panel."""
    x, y = TOKENS[2], TOKENS[1] - 11
    for label, colour in (
        ("evicted, oracle keeps", ORANGE),
        ("kept, oracle evicts", PALE_BLUE),
        ("evicted", GRID),
        ("kept", BLUE),
    ):
        x -= board.width(label, 12)
        board.text((x, y), label, 12, INK, "lm")
        board.rectangle((x - 15, y - 5, x - 5, y + 5), colour)
        x -= 27


def _draw_curves(board: Board, view: RankView) -> None:
    """Retention (across) at each budget (up), on the token panel's vertical axis."""
    x0, y0, x1, y1 = CURVES
    n = len(view.utility)
    curves = [
        ("random", MUTED, 1.5, np.arange(1, n + 1) / n),
        ("oracle", ORANGE, 2.0, u.retention(view.utility, view.utility)),
    ]
    if view.scores is not None:
        curves.append(("ranking", BLUE, 3.0, u.retention(view.utility, view.scores)))

    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = x0 + (x1 - x0) * part, y1 - (y1 - y0) * part
        board.line([(x, y0), (x, y1)], GRID)
        board.line([(x0, y), (x1, y)], GRID)
        board.text((x, y1 + 8), f"{part:g}", 12, MUTED, "ma")
    board.text(((x0 + x1) / 2, y1 + 28), "retention", 13, MUTED, "ma")

    def place(budget: float, retention: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * retention, y1 - (y1 - y0) * budget / n

    board.text((x1, STRIP[1] - 10), "mean retention", 13, MUTED, "rs")
    for row, (label, colour, width, curve) in enumerate(curves):
        points = [(0, 0.0), *enumerate(curve.tolist(), start=1)]
        board.line([place(b, r) for b, r in points], colour, width)
        y = STRIP[1] + 8 + 18 * (len(curves) - 1 - row)
        board.line([(x0, y), (x0 + 22, y)], colour, width)
        board.text((x0 + 30, y), label, 13, INK, "lm")
        mean = u.mean_over_budgets(curve, view.budgets)
        board.text((x1, y), f"{float(mean):.3f}", 13, INK, "rm")
    for budget in view.budgets or ():
        for _, colour, width, curve in curves[1:]:
            board.dot(place(budget, float(curve[budget - 1])), width + 1, colour)


def _places(scores: np.ndarray) -> np.ndarray:
    """Each token's place in the ranking, (n,): 0 is kept longest."""
    places = np.empty(len(scores), dtype=np.int64)
    places[u.ranking(scores)] = np.arange(len(scores))
    return places
