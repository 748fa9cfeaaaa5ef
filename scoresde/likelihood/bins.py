"""Bins of integers: independent noise of the elements of a state, in widths of a bin of every element of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.codecs import Affine, Codec
from scoresde.data.spec import DataSpec
from sde_lib import Knot


@dataclass(frozen=True)
class Bins:
    """Integer k of 0 … L - 1 owns [k, k + 1), for every element of the data, under independent noise.

    Args:
        levels: L.
        codec: of states; independent noise of their elements is independent noise of the data's.
    """

    levels: int
    codec: Codec

    @classmethod
    def of(cls, spec: DataSpec, codec: Codec, variance: bool = False) -> Bins:
        """The bins of integer data.

        Args:
            spec: of the data, with levels.
            codec: of the states.
            variance: whether the elements of the state have variances of their own.

        Raises:
            ValueError: for a codec that mixes the noise of the elements, or mixes the elements where their variances
                differ.
        """
        assert spec.levels is not None
        noise_scales("The decoder of integers", codec, torch.empty(0))
        if variance and not isinstance(codec, Affine):
            raise ValueError(
                "The decoder of integers with a learned variance needs every element of the state to be one of the "
                f'data, and the codec {codec.name!r} mixes them: take variance="small" or "large".'
            )
        return cls(spec.levels, codec)

    def data(self, x: Tensor) -> Tensor:
        """States in data units, (B, *data_shape), float64: those in the bin of k are in [k, k + 1)."""
        return self.codec.decode(x.double())

    def spread(self, std: Tensor | float, z: Tensor) -> Tensor:
        """Standard deviations of all elements of the data, like z = `data(x)`, under noise of deviation `std` in the
        state: a number, one of every row, or like x."""
        scales = noise_scales("The decoder of integers", self.codec, z)
        if isinstance(std, Tensor) and std.ndim:
            each = std.numel() == len(std)
            std = std.reshape(-1, *[1] * (z.ndim - 1)) if each else std
        return (scales * std).expand_as(z)

    def check_middles(self, x: Tensor) -> None:
        """Raise unless x, states (B, …), are the middles of bins."""
        k = self.data(x) - 0.5
        off = (k - k.round()).abs() > 0.02
        if bool((off | (k.round() < 0) | (k.round() >= self.levels)).any()):
            raise ValueError(
                f"With {self.levels} levels `x` must be the middles of the bins, model.encode(data): these are other "
                "values (dequantized, or scaled otherwise?)."
            )


def noise_scales(asked: str, codec: Codec, like: Tensor) -> Tensor:
    """`Codec.scales`, of a codec that has them.

    Raises:
        ValueError: for one that has none, with what to do.
    """
    scales = codec.scales(like)
    if scales is None:
        raise ValueError(
            f"{asked} needs independent noise of all elements, and the codec {codec.name!r} mixes it: take "
            'dequantization="uniform", which is exact under every bijection.'
        )
    return scales


def noise_in_bins(codec: Codec, knot: Knot) -> float:
    """The noise of a knot, sigma / alpha, in widths of a bin: of the element where it is narrowest; 0 for a codec that
    mixes the noise of the elements."""
    scales = codec.scales(torch.empty((), dtype=torch.float64))
    return 0.0 if scales is None else float(scales.min()) * math.exp(-float(knot.half_log_snr))
