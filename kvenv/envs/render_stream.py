"""Pictures of a cache over time: which tokens it holds, and the attention it retains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvenv.envs.board import (
    BLUE,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PALE_BLUE,
    Board,
    Box,
    Point,
    dim_evicted,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVICTED = (226, 230, 235)

TOKENS: Box = (64, 106, 700, 358)
CURVES: Box = (64, 404, 700, 484)
SPECK = 1.5
"""An eviction is drawn this large at least."""
ASIDE = (740, 928)
"""Left and right end of the column that explains."""


@dataclass(frozen=True)
class StreamView:
    """What there is to see of an episode of kvenv/Stream-v1 or kvenv/Evict-v1 so far.

    Attributes:
        title: one line.
        held: (steps, S) bool: the tokens held while query t attends. Token t arrives at step t,
            and the steps that fill the cache count too.
        mass: (steps,), attention that each step's queries find in the cache.
        n: tokens of the prompt, of S.
        budget: in tokens.
    """

    title: str
    held: np.ndarray
    mass: np.ndarray
    n: int
    budget: int

    @property
    def retention(self) -> float:
        """Mean attention found since the cache was first full; 1 before."""
        return float(np.mean(self.mass[self.budget :])) if len(self.mass) > self.budget else 1.0


def draw_stream(view: StreamView) -> np.ndarray:
    """A picture of the episode so far, (540, 960, 3) uint8.

    Steps lie on the horizontal axis, all S of them from the start, and tokens on the vertical
    one. A cell tells whether the token is held at that step. Below it, on the same horizontal
    axis, stands the attention that each step finds, and its mean since the cache was full.
    """
    board = Board()
    board.text((TOKENS[0], 22), view.title, 18, INK)
    _draw_tokens(board, view)
    _draw_curves(board, view)
    _draw_prompt_end(board, view)
    _explain(board, view)
    return board.pixels()


def write_stream(
    view: StreamView, tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """The text so far for a terminal, what the cache has evicted dimmed.

    Args:
        view: the episode so far.
        tokens: (S,) ids of the episode's tokens.
        tokenizer: turns ids into text; without one the ids themselves are shown.
    """
    steps = len(view.held)
    kept: list[bool] = view.held[-1, :steps].tolist() if steps else []
    text = dim_evicted(tokens[:steps].tolist(), kept, tokenizer)
    facts = f"budget {view.budget} · held {sum(kept)} · retention {view.retention:.3f}"
    return f"{view.title}\n{facts}\n{text}\n"


def _draw_tokens(board: Board, view: StreamView) -> None:
    """Which tokens (up) are held at which step (across)."""
    x0, y0, x1, y1 = TOKENS
    steps, S = view.held.shape
    board.text((x0, y0 - 28), "tokens in the cache, by position", 13, MUTED, "ls")
    # Token t arrives at step t.
    board.tint(_upright(np.tri(steps, S, dtype=bool)), TOKENS, EVICTED)
    board.tint(_upright(view.held), TOKENS, BLUE)
    present = np.eye(steps, S, dtype=bool)
    present[1:] |= view.held[:-1]
    width, height = (x1 - x0) / S, (y1 - y0) / S
    for step, position in np.argwhere(present & ~view.held).tolist():
        x, y = x0 + width * step, y1 - height * (position + 1)
        board.rectangle((x, y, x + max(width, SPECK), y + max(height, SPECK)), ORANGE)
        if step == steps - 1:
            board.dot((x + width / 2, y + height / 2), 4, ORANGE)
    for position in _ticks(S):
        y = y1 - (y1 - y0) * (position + 0.5) / S
        board.text((x0 - 8, y), f"{position}", 12, MUTED, "rm")
    board.line([(x0, y0), (x0, y1), (x1, y1)], GRID)


def _upright(cells: np.ndarray) -> np.ndarray:
    """Cells (steps, S) as (S, S): steps go right, those to come empty, and positions go up."""
    steps, S = cells.shape
    return np.pad(cells.T[::-1], ((0, 0), (0, S - steps)))


def _draw_curves(board: Board, view: StreamView) -> None:
    """The attention found (up) at each step (across)."""
    x0, y0, x1, y1 = CURVES
    S = view.held.shape[1]
    board.text((x0, y0 - 10), "attention found in the cache", 13, MUTED, "ls")
    for level in (0, 0.5, 1):
        y = y1 - (y1 - y0) * level
        board.line([(x0, y), (x1, y)], GRID)
        board.text((x0 - 8, y), f"{level:g}", 12, MUTED, "rm")
    for step in _ticks(S):
        board.text((x0 + (x1 - x0) * (step + 0.5) / S, y1 + 8), f"{step}", 12, MUTED, "ma")
    board.text(((x0 + x1) / 2, y1 + 28), "step", 13, MUTED, "ma")

    def place(start: int, levels: np.ndarray) -> list[Point]:
        x = x0 + (x1 - x0) * (np.arange(start, start + len(levels)) + 0.5) / S
        return list(zip(x.tolist(), (y1 - (y1 - y0) * levels).tolist(), strict=True))

    board.line(place(0, view.mass), PALE_BLUE)
    since = view.mass[view.budget :]
    if len(since):
        mean = place(view.budget, np.cumsum(since) / np.arange(1, len(since) + 1))
        board.line(mean, BLUE, 3)
        board.dot(mean[-1], 4, BLUE)


def _draw_prompt_end(board: Board, view: StreamView) -> None:
    """A line through both panels where the prompt's last query has been."""
    x0, y0, x1, _ = TOKENS
    x = x0 + (x1 - x0) * view.n / view.held.shape[1]
    board.line([(x, y0 - 8), (x, CURVES[3])], MUTED)
    board.text((x - 6, y0 - 7), "prompt", 13, MUTED, "rs")
    board.text((x + 6, y0 - 7), "future", 13, MUTED, "ls")


def _explain(board: Board, view: StreamView) -> None:
    """The figures so far, and what colours and lines mean."""
    left, right = ASIDE
    steps, S = view.held.shape
    held = int(view.held[-1].sum()) if steps else 0
    y = TOKENS[1] + 6
    for label, figure in (("step", f"{steps} of {S}"), ("cache", f"{held} of {view.budget}")):
        board.text((left, y), label, 13, MUTED, "lm")
        board.text((right, y), figure, 13, INK, "rm")
        y += 20
    y += 20
    for label, colour in (("held", BLUE), ("evicted", ORANGE), ("gone since", EVICTED)):
        board.rectangle((left, y - 5, left + 10, y + 5), colour)
        board.text((left + 20, y), label, 13, INK, "lm")
        y += 20
    y = CURVES[1]
    board.text((left, y - 40), "retention", 13, MUTED, "lm")
    board.text(
        (left, y - 8), f"{view.retention:.3f}", 36, BLUE if steps > view.budget else MUTED, "lm"
    )
    for label, colour, width in (("each step", PALE_BLUE, 1.5), ("mean since full", BLUE, 3)):
        board.line([(left, y + 40), (left + 22, y + 40)], colour, width)
        board.text((left + 30, y + 40), label, 13, INK, "lm")
        y += 20


def _ticks(S: int) -> list[int]:
    """Five positions, from the first of S to the last."""
    return sorted({round(part * (S - 1)) for part in (0, 0.25, 0.5, 0.75, 1)})
