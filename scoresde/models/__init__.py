"""Models: a network with its law and everything needed to use it. ``MODELS`` names the kinds that a file can hold."""

from collections.abc import Mapping

from scoresde.models.score_model import ScoreModel

MODELS: Mapping[str, type[ScoreModel]] = {"score_model": ScoreModel}
"""Name -> class with ``from_config(config)`` and ``config()``: `load_model` builds the kind that a file names."""

__all__ = ["MODELS", "ScoreModel"]
