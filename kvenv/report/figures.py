"""Figures in words: numbers, intervals, budgets and metrics, and the cells of a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

Figures = Mapping[str, Any]
MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Glyph:
    """An interval drawn against zero, in a box of 120 by 14.

    Attributes:
        zero, low, middle, high: where they are, 0 to 120.
        verdict: "above", "below" or "unclear", of the interval against zero.
    """

    zero: float
    low: float
    middle: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Cell:
    """One figure: its text, its interval's, and the number it sorts by."""

    text: str
    interval: str = ""
    number: float | None = None
    best: bool = False
    span: int = 1
    glyph: Glyph | None = None


@dataclass(frozen=True)
class Row:
    """A row's heading, the kind of agent it is about and its cells."""

    heading: str
    cells: Sequence[Cell]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table as the template lays it out; ``view`` is "full", "sink_free" or "" for both."""

    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[Row]
    view: str = ""
    facts: Sequence[str] = field(default=())


def budget_label(budget: str | float) -> str:
    """A budget in words.

    >>> [budget_label(b) for b in ("0.25", 0.09375, 1.0, "256")]
    ['1/4', '3/32', '1', '256 tokens']
    """
    value = float(budget)
    if value > 1:
        return f"{value:,.0f} tokens"
    near = Fraction(value).limit_denominator(64)
    return str(near) if abs(near - value) < 1e-9 else f"{value:.3g}"


def metric_label(metric: str) -> str:
    """A metric in words.

    >>> metric_label("retention@1/16")
    'retention at 1/16'
    """
    return metric.replace("@", " at ").replace("_", " ")


def number(value: float | None, digits: int = 3, *, signed: bool = False, suffix: str = "") -> str:
    """A number as the tables print it.

    >>> number(0.01234, signed=True), number(1.5, 1, suffix=" %")
    ('+0.012', '1.5 %')
    """
    if value is None:
        return MISSING
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    if re.fullmatch(r"[-+]0\.?0*", text):
        text = text[1:]
    return text.replace("-", "\N{MINUS SIGN}") + suffix


def figure(
    interval: Figures | None, digits: int = 3, *, middle: str = "mean", percent: bool = False
) -> Cell:
    """A cell of a mean and its interval; of a difference, or in per cent, with its sign."""
    if interval is None:
        return Cell(MISSING)
    signed, scale = percent or middle == "difference", 100 if percent else 1
    low, value, high = (
        None if interval[key] is None else interval[key] * scale for key in ("low", middle, "high")
    )
    suffix = " %" if percent else ""
    text = number(value, digits, signed=signed, suffix=suffix)
    if low is None or high is None or low == high:
        return Cell(text, number=value)
    joint = " to " if signed or low < 0 else "\N{EN DASH}"
    ends = [number(end, digits, signed=signed) for end in (low, high)]
    return Cell(text, joint.join(ends), value)
