"""Solvers side by side: accuracy, network calls and time on the same start and the same noise."""

from scoresde.comparison.compare import compare
from scoresde.comparison.result import Comparison
from scoresde.comparison.specs import parse_spec
from solvers.words import describe

__all__ = ["Comparison", "compare", "describe", "parse_spec"]
