"""Codecs: maps between data and the state of a model. ``CODECS`` names them."""

from scoresde.codecs.codec import Codec

__all__ = ["Codec"]
