"""What the pictures of the environments are drawn on and with, and texts with words dimmed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDTH, HEIGHT = 960, 540
"""Size of a picture, in pixels."""

# Okabe and Ito's palette, which colour-blind readers can tell apart, with tints for what is minor.
INK, MUTED, GRID, PAPER = (34, 40, 49), (107, 114, 128), (222, 226, 231), (255, 255, 255)
BLUE, PALE_BLUE, ORANGE, EMPTY = (0, 114, 178), (166, 206, 233), (230, 159, 0), (240, 242, 245)

DIM, PLAIN = "\x1b[2m", "\x1b[0m"

BOX = Image.Resampling.BOX
Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a rectangle."""


class Board:
    """A drawing surface in picture coordinates, kept at twice the size to smooth its edges."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def text(self, at: Point, text: str, size: int, colour: Colour, anchor: str = "la") -> None:
        """One line of text; the anchor is Pillow's: "la" sets its upper left corner."""
        self._draw.text((2 * at[0], 2 * at[1]), text, colour, _font(2 * size), anchor)

    def width(self, text: str, size: int) -> float:
        """How wide a line of text is."""
        return _font(2 * size).getlength(text) / 2

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1) -> None:
        """A line through the points."""
        path = [(2 * x, 2 * y) for x, y in points]
        self._draw.line(path, colour, round(2 * width), joint="curve")

    def dot(self, at: Point, radius: float, colour: Colour) -> None:
        """A disc with a thin white rim."""
        x, y = at
        box = (x - radius, y - radius, x + radius, y + radius)
        self._draw.ellipse([2 * edge for edge in box], colour, PAPER, 2)

    def rectangle(self, box: tuple[float, float, float, float], colour: Colour) -> None:
        """A filled rectangle."""
        self._draw.rectangle([2 * edge for edge in box], colour)

    def paste(self, cells: np.ndarray, box: Box) -> None:
        """Cells (rows, columns, 3) uint8, averaged or repeated to fill the box."""
        x0, y0, x1, y1 = (2 * edge for edge in box)
        image = Image.fromarray(cells).resize((x1 - x0, y1 - y0), BOX)
        self._image.paste(image, (x0, y0))

    def tint(self, cells: np.ndarray, box: Box, colour: Colour) -> None:
        """The colour where cells (rows, columns) bool say so, averaged or repeated like `paste`."""
        x0, y0, x1, y1 = (2 * edge for edge in box)
        mask = Image.fromarray(cells * np.uint8(255)).resize((x1 - x0, y1 - y0), BOX)
        self._image.paste(colour, (x0, y0), mask)

    def pixels(self) -> np.ndarray:
        """The picture, (540, 960, 3) uint8."""
        return np.array(self._image.resize((WIDTH, HEIGHT), BOX))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow; loading it takes longer than a line of text."""
    return ImageFont.load_default(size)


def dim_evicted(ids: list[int], kept: list[bool], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The tokens as text for a terminal, those that are not kept dimmed.

    Without a tokenizer the ids themselves are shown.
    """
    parts = []
    for is_kept, run in groupby(range(len(ids)), kept.__getitem__):
        start, *rest = run
        text = _text(ids, start, start + 1 + len(rest), tokenizer)
        parts.append(text if is_kept else f"{DIM}{text}{PLAIN}")
    return "".join(parts)


def _text(ids: list[int], start: int, stop: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of tokens start..stop-1 as it reads after the token before them."""
    if tokenizer is None:
        return "".join(f"{i} " for i in ids[start:stop])
    # A tokenizer drops the space that opens a text, so the token before lends its end.
    before = tokenizer.decode(ids[max(start - 1, 0) : start])
    return str(tokenizer.decode(ids[max(start - 1, 0) : stop]))[len(before) :]
