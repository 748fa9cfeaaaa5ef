"""Principal axes: an orthogonal map that data themselves choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from scoresde.codecs.codec import Codec
from scoresde.data.spec import DataSpec
from sde_lib._checks import as_number, check_nonnegative

NULL = 1e-6
"""A direction whose standard deviation is below this fraction of the largest is null: in float32 it is rounding."""
ROWS = 8192
"""Rows that are in float64 at a time while a covariance is added up."""


class PCA(Codec):
    r"""x = Q^T (z - mean) / s, the columns of Q the principal axes of the data, the widest first; x is (D,).

    With equal widths s, the default, the map is a rotation and one scale: volumes change by :math:`\prod_i s_i^{-1}`
    everywhere and densities, bits/dim included, are as good as those of z itself. Encoding and decoding are D^2
    multiplications per sample.

    The tensors `mean` (D,), `axes` Q (D, D) and `widths` s (D,) are float64 whatever dtype the model is moved to, as
    are the products: a state is rounded once, to its own dtype, and neither mixed precision nor TF32 takes digits from
    data. A codec that is not fitted is the identity.

    Args:
        data_shape: of one sample of data; D elements.
        log_volume: log |det dx / dz| in nats: what `fit` measured on the stored tensors in float64,
            log |det Q| - sum_i log s_i, the first term of which is rounding.
        whitened: whether the widths differ.
    """

    name = "pca"
    mean: Tensor
    axes: Tensor
    widths: Tensor

    def __init__(self, data_shape: tuple[int, ...], log_volume: float = 0.0, whitened: bool = False) -> None:
        d = math.prod(data_shape)
        super().__init__(data_shape, (d,))
        self._log_volume, self.whitened = as_number("log_volume", log_volume), bool(whitened)
        self.register_buffer("mean", torch.zeros(d, dtype=torch.float64))
        self.register_buffer("axes", torch.eye(d, dtype=torch.float64))
        self.register_buffer("widths", torch.ones(d, dtype=torch.float64))

    @classmethod
    def fit(cls, spec: DataSpec, data: Tensor | None = None, whiten: bool = False, floor: float = 0.0) -> Self:
        """Axes of the covariance of z, from its eigenvectors in float64 (D^3 operations: 0.2 s for 28 x 28 pixels, 9 s
        for 32 x 32 colours, on one core). Of each axis the largest element is positive.

        Integers k are k + u: the variance 1/12 of u is counted, so that no direction of theirs is null.

        Args:
            spec: of the data.
            data: (N, *D) in data units.
            whiten: scale every axis to standard deviation 1, instead of all of them to an overall one of 1.
            floor: least scale of a whitened axis, in data units; 0: null directions are refused.

        Raises:
            ValueError: without data, for constant data, or for null directions that are to be whitened.
        """
        check_nonnegative("floor", floor)
        if data is None:
            raise ValueError("PCA measures its axes: it needs data.")
        mean, covariance = _moments(spec, data)
        variances, axes = (found.flip(-1) for found in torch.linalg.eigh(covariance))
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        total = float(variances.mean())
        if not total > 0.0:
            raise ValueError("The data are constant: they have no axes, and no scale to divide by.")
        stds = variances.clamp(min=0.0).sqrt()
        widths = torch.full_like(stds, math.sqrt(total))
        if whiten:
            null = int((stds <= NULL * stds[0]).sum())
            if null and floor == 0.0:
                raise ValueError(
                    f"{null} of the {len(stds)} directions of these data are null: whitening would divide by 0; give "
                    "`floor`, a least scale in data units, or leave `whiten` out."
                )
            widths = stds.clamp(min=floor)
        codec = cls(spec.shape, float(torch.linalg.slogdet(axes).logabsdet - widths.log().sum()), whiten)
        codec.mean, codec.axes, codec.widths = (t.contiguous().cpu() for t in (mean, axes, widths))
        return codec

    @property
    def log_volume(self) -> float:
        return self._log_volume

    def scales(self, like: Tensor) -> Tensor | None:
        one = math.exp(-self._log_volume / self.state_shape[0])
        return None if self.whitened else like.new_full(self.data_shape, one)

    def encode(self, z: Tensor, draw: Any = None) -> Tensor:
        return ((z.flatten(1).double() - self.mean) @ self.axes / self.widths).to(z.dtype)

    def decode(self, x: Tensor) -> Tensor:
        return ((x.double() * self.widths) @ self.axes.T + self.mean).unflatten(1, self.data_shape).to(x.dtype)

    def config(self) -> dict[str, Any]:
        return {"data_shape": list(self.data_shape), "log_volume": self._log_volume, "whitened": self.whitened}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to a device and keeps float64: ``model.half()`` is about the network."""
        wide = {name: buffer for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != torch.float64:
                setattr(self, name, wide[name].to(buffer.device))
        return self


def _moments(spec: DataSpec, data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of z in float64, divided by N; the uniform noise of integers is in it."""
    pieces = data.flatten(1).split(ROWS)
    mean = sum(spec.dequantize(piece, dtype=torch.float64).sum(0) for piece in pieces) / len(data)
    covariance = torch.zeros(spec.dims, spec.dims, dtype=torch.float64, device=data.device)
    for piece in pieces:
        centred = spec.dequantize(piece, dtype=torch.float64) - mean
        covariance += centred.T @ centred
    covariance /= len(data)
    if spec.levels is not None:
        covariance.diagonal().add_(1.0 / 12.0)
    return torch.as_tensor(mean), covariance
