"""What an agent exports: something that gives every cached token a number."""

from kvenv.scorers.base import Head, Pointwise, Scorer
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.loading import load_scorer

__all__ = ["Head", "NetworkScorer", "Pointwise", "Scorer", "load_scorer"]
