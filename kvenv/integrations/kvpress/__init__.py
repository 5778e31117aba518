"""kvenv's scorers as presses of kvpress, and the presses of kvpress as scorers of kvenv."""

from kvenv.integrations.kvpress.package import MissingKvpressError
from kvenv.integrations.kvpress.press import KvenvPress
from kvenv.integrations.kvpress.scorer import PressScorer, scorer_from_press

__all__ = ["KvenvPress", "MissingKvpressError", "PressScorer", "scorer_from_press"]
