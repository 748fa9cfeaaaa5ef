r"""Random probe vectors for traces: :math:`E[z z^T] = I`, so that :math:`z^T J z` is an unbiased estimate of tr J.

With S the symmetric part of J, the variance of one estimate is

* signs (Rademacher): :math:`2 (\|S\|_F^2 - \sum_i S_{ii}^2)`;
* Gaussian: :math:`2 \|S\|_F^2`;
* signs in an orthogonal basis U: the first formula for :math:`U^T S U`, small where U nearly diagonalizes J, as the
  cosine basis does for images;
* signs diluted over m colours: :math:`2 \sum_{i \ne j,\, c_i = c_j} S_{ij}^2`, at m products per estimate.

`scoresde.likelihood.scatter` says how this variance is measured from a few estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sde_lib import lookup


class Probes:
    """Base: turns standard normal noise of the state's shape into the vectors of one estimate."""

    def group(self, z: Tensor) -> list[Tensor]:
        """The vectors (B, *D) of one estimate from z, (B, *D) standard normal: the estimate is the sum over them."""
        raise NotImplementedError

    def signs(self, v: Tensor) -> Tensor | None:
        """A vector (B, *D) in the orthogonal basis in which those of `group` are independent signs (or 0, where another
        of the group has its sign); None for a law without one."""
        return None

    def size(self, shape: Sequence[int]) -> int:
        """How many vectors an estimate takes for states of shape D."""
        return 1

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError if these probes do not fit states of shape D."""


def _signs(z: Tensor) -> Tensor:
    return torch.where(z >= 0, 1.0, -1.0).to(z)


@dataclass(frozen=True)
class RademacherProbes(Probes):
    """Independent signs: they see no diagonal element of the Jacobian at all (Hutchinson 1990)."""

    def group(self, z: Tensor) -> list[Tensor]:
        return [_signs(z)]

    def signs(self, v: Tensor) -> Tensor:
        return v


@dataclass(frozen=True)
class GaussianProbes(Probes):
    """Independent normals: more variance than signs for every matrix."""

    def group(self, z: Tensor) -> list[Tensor]:
        return [z]


class _Rotated(Probes):
    """Signs in an orthogonal basis that is a product of one orthogonal matrix per data dimension."""

    channels: Tensor | None

    def _matrix(self, n: int, device: torch.device) -> Tensor:
        """The basis along a dimension of length n, vectors in the rows, float64."""
        raise NotImplementedError

    def check(self, shape: Sequence[int]) -> None:
        if self.channels is not None:
            _check_orthogonal("channels", self.channels, shape[0])

    def _factors(self, shape: Sequence[int], device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """The dimensions of the batch that are transformed, and by what."""
        for axis, n in enumerate(shape, 1):
            if axis > 1 or len(shape) == 1:
                yield axis, self._matrix(n, device)
            elif self.channels is not None:
                yield axis, self.channels
            elif n == 3:
                yield axis, cosine_matrix(3, device)

    def group(self, z: Tensor) -> list[Tensor]:
        v = _signs(z)
        for axis, factor in self._factors(z.shape[1:], z.device):
            v = torch.movedim(torch.movedim(v, axis, -1) @ factor.to(v), -1, axis)
        return [v]

    def signs(self, v: Tensor) -> Tensor:
        for axis, factor in self._factors(v.shape[1:], v.device):
            v = torch.movedim(torch.movedim(v, axis, -1) @ factor.to(v).T, -1, axis)
        return v


@dataclass(frozen=True)
class CosineProbes(_Rotated):
    """Signs in the discrete cosine basis (DCT-II) of the pixels, times a rotation of the channels.

    Natural images are nearly uncorrelated in it, and so is the Jacobian of their denoiser: one estimate has 3 to 6
    times less variance than pixel signs. For states (C, H, W); of any other number of dimensions all but the first are
    transformed, and a vector (D,) along its one.

    Args:
        channels: an orthogonal (C, C) matrix of channel directions in its rows; by default the cosine basis of length
            3 (brightness and two colour differences) for three channels, and the channels themselves otherwise.
    """

    channels: Tensor | None = field(default=None, compare=False)

    def _matrix(self, n: int, device: torch.device) -> Tensor:
        return cosine_matrix(n, device)


@dataclass(frozen=True)
class HaarProbes(_Rotated):
    """Signs in the Haar wavelet basis of the pixels; channels as `CosineProbes`. Sides need not be powers of two."""

    channels: Tensor | None = field(default=None, compare=False)

    def _matrix(self, n: int, device: torch.device) -> Tensor:
        return haar_matrix(n, device)


@dataclass(frozen=True)
class BasisProbes(Probes):
    """Signs in a basis of one's own, such as the principal components of the data.

    Args:
        matrix: orthogonal, (d, d), basis vectors in its rows; d is the number of elements of a sample.
    """

    matrix: Tensor = field(compare=False)

    @classmethod
    def principal(cls, data: Tensor) -> BasisProbes:
        """The eigenvectors of the covariance of data (N, *D)."""
        flat = data.detach().flatten(1).double()
        if len(flat) < 2:
            raise ValueError(f"Principal components need at least two samples, got {len(flat)}.")
        return cls(torch.linalg.eigh(torch.cov(flat.T))[1].T.contiguous())

    def check(self, shape: Sequence[int]) -> None:
        _check_orthogonal("matrix", self.matrix, math.prod(shape))

    def group(self, z: Tensor) -> list[Tensor]:
        return [(_signs(z).flatten(1) @ self.matrix.to(z)).reshape(z.shape)]

    def signs(self, v: Tensor) -> Tensor:
        return (v.flatten(1) @ self.matrix.to(v).T).reshape(v.shape)


@dataclass(frozen=True)
class DilutedProbes(Probes):
    """Signs on one colour class of pixels at a time: an estimate sums over all classes.

    Pixels `block` apart share a colour, and every channel has colours of its own, so that the strong entries of a
    local Jacobian cancel out of the variance: 4 x 4 x 3 = 48 products for RGB images leave 11 to 16 times less
    variance than 48 independent signs. Probing by colouring: Tang & Saad 2012.

    Args:
        block: distance of equal colours along every data dimension after the channels.
        channels: whether channels (the first of two or more data dimensions) have colours of their own; without,
            dilution does harm, for most of the weight is between the channels of one pixel.
    """

    block: int = 4
    channels: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"`block` must be an int >= 1, got {self.block!r}.")

    def _periods(self, shape: Sequence[int]) -> list[int]:
        if len(shape) == 1:
            return [min(self.block, shape[0])]
        return [shape[0] if self.channels else 1, *(min(self.block, n) for n in shape[1:])]

    def size(self, shape: Sequence[int]) -> int:
        return math.prod(self._periods(shape))

    def group(self, z: Tensor) -> list[Tensor]:
        signs, shape = _signs(z), z.shape[1:]
        colour = torch.zeros(shape, dtype=torch.int64, device=z.device)
        for axis, (n, period) in enumerate(zip(shape, self._periods(shape), strict=True)):
            along = torch.arange(n, device=z.device) % period
            colour = colour * period + along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        return [signs * (colour == c) for c in range(self.size(shape))]

    def signs(self, v: Tensor) -> Tensor:
        return v


PROBES: Mapping[str, type[Probes]] = {
    "rademacher": RademacherProbes,
    "gaussian": GaussianProbes,
    "cosine": CosineProbes,
    "haar": HaarProbes,
    "dilution": DilutedProbes,
}
"""Name -> class; `BasisProbes` needs its matrix and is handed over as an object."""


def as_probes(probes: Probes | str, shape: Sequence[int]) -> Probes:
    """Probes, or those of a name; "adapted": `CosineProbes` for images, (C, H, W), `RademacherProbes` for all else."""
    if probes == "adapted":
        return CosineProbes() if len(shape) == 3 else RademacherProbes()
    if isinstance(probes, str):
        kind: Any = lookup(PROBES, probes, "probe")
        return kind()
    if not isinstance(probes, Probes):
        raise TypeError(f"`probes` must be a name or a Probes object, got {probes!r}.")
    probes.check(shape)
    return probes


def cosine_matrix(n: int, device: torch.device | str = "cpu") -> Tensor:
    """The orthonormal DCT-II: basis vectors in the rows, (n, n), float64."""
    k = torch.arange(n, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi / n * k[:, None] * (k[None, :] + 0.5)) * math.sqrt(2.0 / n)
    matrix[0] /= math.sqrt(2.0)
    return matrix


def haar_matrix(n: int, device: torch.device | str = "cpu") -> Tensor:
    """The orthonormal Haar basis: basis vectors in the rows, (n, n), float64; an odd length is not halved further."""
    if n % 2:
        return torch.eye(n, dtype=torch.float64, device=device)
    sums = (torch.eye(n // 2, dtype=torch.float64, device=device) / math.sqrt(2.0)).repeat_interleave(2, 1)
    signs = 1.0 - 2.0 * (torch.arange(n, device=device) % 2)
    return torch.cat([haar_matrix(n // 2, device) @ sums, sums * signs])


def _check_orthogonal(name: str, matrix: Tensor, n: int) -> None:
    if matrix.shape != (n, n):
        raise ValueError(f"`{name}` must be ({n}, {n}) for these states, got {tuple(matrix.shape)}.")
    matrix = matrix.detach().double().cpu()
    gap = float((matrix @ matrix.T - torch.eye(n, dtype=torch.float64)).abs().max())
    if not gap < 1e-4:
        raise ValueError(f"`{name}` must be orthogonal; its rows' products are off the identity by {gap:.1e}.")
