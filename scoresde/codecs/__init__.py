"""Codecs: maps between data and the state of a model. ``CODECS`` names them."""

from collections.abc import Mapping

from scoresde.codecs.affine import Affine
from scoresde.codecs.codec import Codec

CODECS: Mapping[str, type[Codec]] = {"affine": Affine}
"""Name -> class. ``CODECS[name].fit(spec, data)`` makes one for data; its options are those of the configuration."""

__all__ = ["CODECS", "Affine", "Codec"]
