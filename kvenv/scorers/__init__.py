"""What an agent exports: something that gives every cached token a number."""

from kvenv.scorers.base import Head, Scorer
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.calibration import Calibration
from kvenv.scorers.loading import load_scorer

__all__ = ["Calibration", "Head", "NetworkScorer", "Scorer", "load_scorer"]
