"""Codecs: maps between data and the state of a model. ``CODECS`` names them."""

from collections.abc import Mapping

from scoresde.codecs.affine import Affine
from scoresde.codecs.codec import Codec
from scoresde.codecs.haar import Haar
from scoresde.codecs.pca import PCA
from sde_lib import Table

CODECS: Mapping[str, type[Codec]] = Table(Codec, {"affine": Affine, "pca": PCA, "haar": Haar})
"""Name -> class. ``CODECS[name].fit(spec, data)`` makes one for data; its options are those of the configuration.
"module:Class" names one of your own."""

__all__ = ["CODECS", "PCA", "Affine", "Codec", "Haar"]
