"""The Haar wavelet transform: an orthogonal map from fine pixels to coarse ones with more channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from scoresde.codecs.affine import Affine, Numbers
from scoresde.codecs.codec import Codec
from scoresde.data.spec import DataSpec
from sde_lib._checks import check_count
from sde_lib._constants import Constants


class Haar(Codec):
    r"""Levels of the orthonormal Haar transform of (z - shift) / scale, in n = 1, 2 or 3 dimensions, as channels.

    A level replaces two neighbours a, b along every dimension by :math:`(a + b) / \sqrt 2` and
    :math:`(a - b) / \sqrt 2`, and the next one goes on with the sums of the last. The state of images (C, H, W) after L
    levels is :math:`(4^L C, H / 2^L, W / 2^L)`: C channels of sums, then for every level, the coarsest first, its three
    kinds of differences of C channels each (along H, along W, along both), those of finer levels with the elements of a
    block as channels. :math:`(C, T)` becomes :math:`(2^L C, T / 2^L)`, a vector (D,) one of the same shape. (Haar 1910,
    Mathematische Annalen 69; Mallat 1989, IEEE TPAMI 11 (7).)

    The transform is orthogonal, so that volumes change with the scales only. In two dimensions its factors are powers
    of two: integers come back exactly.

    Args:
        data_shape: (C, *space), or (*space) with channels=False.
        levels: L >= 1; 2^L divides every dimension of space.
        shift: z that becomes x = 0, as in `Affine`.
        scale: z per unit of x, as in `Affine`.
        bands: what every band is divided by, > 0: the sums, then the kinds of differences of every level, the coarsest
            first: 1 + L (2^n - 1) numbers, e.g. 4 for one level of images. None: nothing.
        channels: whether the first dimension is channels; None: it is, except that of a vector.

    Raises:
        ValueError: for shapes that cannot be halved so often, or bands that do not fit.
    """

    name = "haar"

    def __init__(
        self,
        data_shape: tuple[int, ...],
        levels: int = 1,
        shift: Numbers = 0.0,
        scale: Numbers = 1.0,
        bands: Sequence[float] | None = None,
        channels: bool | None = None,
    ) -> None:
        shape = tuple(data_shape)
        channels = len(shape) > 1 if channels is None else channels
        count, space = (shape[0], shape[1:]) if channels else (1, shape)
        check_count("levels", levels)
        if not 1 <= len(space) <= 3 or any(n % 2**levels for n in space):
            raise ValueError(
                f"{levels} levels of the Haar transform halve 1 to 3 dimensions of space so often: they must be "
                f"multiples of {2**levels}, got {space} (of data of shape {shape})."
            )
        blocks = (2 ** (levels * len(space)) * count, *(n // 2**levels for n in space))
        super().__init__(shape, shape if len(shape) == 1 else blocks)
        self.levels, self.channels, self._blocks, self._grid = levels, channels, blocks, (count, *space)
        self.inner = Affine(shape, shift, scale)
        kinds = 2 ** len(space) - 1
        if bands is not None and (len(bands) != 1 + levels * kinds or not all(0.0 < b < math.inf for b in bands)):
            raise ValueError(f"`bands` must be {1 + levels * kinds} finite numbers > 0 for these data, got {bands!r}.")
        self.bands = None if bands is None else [float(b) for b in bands]
        # channels of each band: those of level l have the elements of blocks of 2^(L - l) as channels
        self._widths = [count, *(count * (kinds + 1) ** k for k in range(levels) for _ in range(kinds))]
        wide = [b for b, n in zip(self.bands or [], self._widths, strict=bands is not None) for _ in range(n)]
        self._bands = Constants(wide)

    @classmethod
    def fit(
        cls,
        spec: DataSpec,
        data: Tensor | None = None,
        levels: int = 1,
        per_band: bool = False,
        per: str = "all",
        shift: float | None = None,
        scale: float | None = None,
    ) -> Self:
        """Shift and scale are `Affine`'s for these data.

        Args:
            spec: of the data; channels, where there are any, come first.
            data: (N, *D) in data units, what means and deviations are taken of.
            levels: L >= 1.
            per_band: divide every band by its root mean square on `data`. Sums are up to 2^(L n / 2) times as large as
                pixels, differences smaller: with it all bands have the size that the first and last noise levels of a
                law are made for.
            per: what shift and scale are measured of, as in `Affine.fit`.
            shift: instead of what is measured.
            scale: instead of what is measured.

        Raises:
            ValueError: for shapes that cannot be halved, per_band without data, or a band that is 0 in all of them.
        """
        if spec.channel_axis not in (None, 0):
            raise ValueError(f"The Haar transform takes channels first, got the layout {spec.layout!r}.")
        inner = Affine.fit(spec, data, per, shift, scale)
        options: dict[str, Any] = {**inner.config(), "channels": spec.channel_axis == 0}
        codec = cls(levels=levels, **options)
        if not per_band:
            return codec
        if data is None:
            raise ValueError("`per_band` measures the bands: it needs data.")
        square = codec.encode(spec.dequantize(data, dtype=torch.float64)).reshape(len(data), *codec._blocks).square()
        sizes = [float(band.mean().sqrt()) for band in square.split(codec._widths, 1)]
        if not all(sizes):
            raise ValueError("A band of these data is 0 everywhere: take fewer `levels`, or leave `per_band` out.")
        return cls(levels=levels, bands=sizes, **options)

    @property
    def log_volume(self) -> float:
        inside = self.inner.log_volume
        if self.bands is None:
            return inside
        elements = math.prod(self._blocks[1:])
        return inside - elements * sum(n * math.log(b) for n, b in zip(self._widths, self.bands, strict=True))

    def scales(self, like: Tensor) -> Tensor | None:
        one = self.bands is None and isinstance(self.inner.scale, float)
        return self.inner.scales(like) if one else None

    def encode(self, z: Tensor, draw: Any = None) -> Tensor:
        x = _analyse(self.inner.encode(z).reshape(len(z), *self._grid), self.levels)
        if self.bands is not None:
            x = x / self._scales(x)
        return x.reshape(len(x), *self.state_shape)

    def decode(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), *self._blocks)
        if self.bands is not None:
            x = x * self._scales(x)
        return self.inner.decode(_synthesise(x, self.levels).reshape(len(x), *self.data_shape))

    def _scales(self, like: Tensor) -> Tensor:
        """Of every channel of the state, (channels, 1, …)."""
        (scales,) = self._bands.on(like.device)
        return scales.to(like.dtype).reshape(-1, *[1] * (like.ndim - 2))

    def config(self) -> dict[str, Any]:
        inner = self.inner.config()
        return {**inner, "levels": self.levels, "bands": self.bands, "channels": self.channels}


def _analyse(x: Tensor, levels: int) -> Tensor:
    """(B, C, *space) -> (B, 2^(L n) C, *space / 2^L), as `Haar` orders it."""
    c, dims = x.shape[1], range(2, x.ndim)
    for dim in dims:
        a, b = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
        x = torch.cat([a + b, a - b], 1)
    x = x * 2.0 ** (-len(dims) / 2)
    if levels == 1:
        return x
    return torch.cat([_analyse(x[:, :c], levels - 1), _fold(x[:, c:], 2 ** (levels - 1))], 1)


def _synthesise(x: Tensor, levels: int) -> Tensor:
    """Inverse of `_analyse`."""
    dims = range(2, x.ndim)
    if levels > 1:
        coarse = x.shape[1] // 2 ** len(dims)
        x = torch.cat([_synthesise(x[:, :coarse], levels - 1), _unfold(x[:, coarse:], 2 ** (levels - 1))], 1)
    for dim in reversed(dims):
        plus, minus = x.chunk(2, 1)
        x = torch.stack([plus + minus, plus - minus], dim + 1).flatten(dim, dim + 1)
    return x * 2.0 ** (-len(dims) / 2)


def _fold(x: Tensor, r: int) -> Tensor:
    """Blocks of r elements along every dimension of space become channels, those of a channel next to each other."""
    for dim in range(2, x.ndim):
        x = x.unflatten(dim, (-1, r)).movedim(dim + 1, 2).flatten(1, 2)
    return x


def _unfold(x: Tensor, r: int) -> Tensor:
    """Inverse of `_fold`."""
    for dim in reversed(range(2, x.ndim)):
        x = x.unflatten(1, (-1, r)).movedim(2, dim + 1).flatten(dim, dim + 1)
    return x
