"""Bins of integers in the state of a model, where its axes are those of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.codecs import Affine, Codec
from scoresde.data.spec import DataSpec
from sde_lib import Knot


@dataclass(frozen=True)
class Bins:
    """Element by element, integer k of 0 … L - 1 owns the states that the codec makes of [k, k + 1).

    Args:
        levels: L.
        codec: shift and scale, of all elements or of each.
    """

    levels: int
    codec: Affine

    @classmethod
    def of(cls, spec: DataSpec, codec: Codec) -> Bins:
        """The bins of integer data.

        Raises:
            ValueError: for data without levels, or a codec that mixes the elements: its bins are no boxes of the state.
        """
        if spec.levels is None:
            raise ValueError("These data are real numbers: they have no levels, and so no bins.")
        return cls(spec.levels, aligned("The decoder of integers", codec))

    def check_middles(self, x: Tensor) -> None:
        """Raise unless x, (B, *D), are the middles of bins."""
        k = self.codec.decode(x.double()) - 0.5
        off = (k - k.round()).abs() > 0.02
        if bool((off | (k.round() < 0) | (k.round() >= self.levels)).any()):
            raise ValueError(
                f"With {self.levels} levels `x` must be the middles of the bins, model.encode(data): these are other "
                "values (dequantized, or scaled otherwise?)."
            )

    def index(self, x: Tensor) -> Tensor:
        """k of a state in the bin of k."""
        return self.codec.decode(x).floor()

    def half_width(self, x: Tensor) -> Tensor:
        """Of the bins of every element, (*D)."""
        return 0.5 / self.codec.scales(x)

    def middles(self, x: Tensor) -> Iterator[Tensor]:
        """The middle of every bin, for all elements, (*D) each, like x."""
        shape = self.codec.data_shape
        return (self.codec.encode(x.new_full(shape, k + 0.5)) for k in range(self.levels))


def aligned(asked: str, codec: Codec) -> Affine:
    """The codec, if every element of the state is one of the data, shifted and scaled.

    Raises:
        ValueError: if it is not, with what to do.
    """
    if not isinstance(codec, Affine):
        raise ValueError(
            f"{asked} needs every element of the state to be one of the data, scaled, and the codec {codec.name!r} "
            'mixes them: take dequantization="uniform", which is exact under every bijection.'
        )
    return codec


def noise_in_bins(codec: Codec, knot: Knot) -> float:
    """The noise of a knot, sigma / alpha, in widths of a bin: of the element where it is narrowest; 0 for a codec that
    mixes the noise of the elements."""
    scales = codec.scales(torch.empty((), dtype=torch.float64))
    return 0.0 if scales is None else float(scales.min()) * math.exp(-float(knot.half_log_snr))
