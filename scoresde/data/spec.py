"""What data are: their shape, levels and conditions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_lib._checks import check_positive


@dataclass(frozen=True)
class DataSpec:
    r"""How data are laid out and how they become the state of a model.

    Model units x and data units z are related by :math:`x = (z - \mathrm{shift}) / \mathrm{scale}`. With `levels` = L
    the data are integers k in 0 … L - 1, and z = k + u with u in [0, 1) uniform: each integer owns the bin [k, k + 1),
    so a density of z integrates to the probability of k. u = 1/2 stands for the integer when no noise is wanted.

    Args:
        shape: D, of one sample.
        shift: z that maps to x = 0.
        scale: z per unit of x, > 0.
        levels: number of integer levels, or None for continuous data.
        num_classes: number of class labels, 0 without.

    Raises:
        ValueError: for a shape, scale, or number of levels that makes no sense.
    """

    shape: tuple[int, ...]
    shift: float = 0.0
    scale: float = 1.0
    levels: int | None = None
    num_classes: int = 0

    def __post_init__(self) -> None:
        shape = tuple(self.shape) if isinstance(self.shape, list | tuple) else (self.shape,)
        if not all(isinstance(n, int) and n >= 1 for n in shape) or shape == (self.shape,):
            raise ValueError(f"`shape` must be a tuple of positive ints, e.g. (3, 32, 32) or (2,), got {self.shape!r}.")
        object.__setattr__(self, "shape", shape)
        check_positive("scale", self.scale)
        if not (isinstance(self.shift, int | float) and math.isfinite(self.shift)):
            raise ValueError(f"`shift` must be a finite number, got {self.shift!r}.")
        if self.levels is not None and (not isinstance(self.levels, int) or self.levels < 2):
            raise ValueError(f"`levels` must be an int >= 2, or None for continuous data, got {self.levels!r}.")
        if not isinstance(self.num_classes, int) or self.num_classes < 0:
            raise ValueError(f"`num_classes` must be an int >= 0, got {self.num_classes!r}.")

    @classmethod
    def integers(cls, shape: tuple[int, ...], levels: int, num_classes: int = 0) -> DataSpec:
        """Integer data 0 … levels - 1 spread over [-1, 1)."""
        return cls(shape, shift=levels / 2, scale=levels / 2, levels=levels, num_classes=num_classes)

    @property
    def dims(self) -> int:
        """Number of elements of one sample."""
        return math.prod(self.shape)

    def check(self, data: Tensor) -> None:
        """Raise unless `data` is a tensor of this shape, finite and, with levels, of their integers."""
        if not isinstance(data, Tensor):
            raise TypeError(f"Data must be a tensor (torch.as_tensor), got {type(data).__name__}.")
        if tuple(data.shape[1:]) != self.shape:
            raise ValueError(f"Data must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(data.shape)}.")
        if data.shape[0] == 0:
            raise ValueError("Data are empty: B must be at least 1.")
        if data.is_floating_point() and not bool(torch.isfinite(data).all()):
            raise ValueError("Data contain NaN or infinite values.")
        if self.levels is not None:
            if data.is_floating_point() and not bool((data == data.round()).all()):
                raise ValueError(f"Data must be integers 0 … {self.levels - 1}; got fractions (already scaled?).")
            low, high = int(data.min()), int(data.max())
            if low < 0 or high >= self.levels:
                raise ValueError(f"Data must be integers 0 … {self.levels - 1}, got values from {low} to {high}.")

    def check_classes(self, labels: Any) -> None:
        """Raise unless `labels` are classes: an integer tensor, 0 … num_classes (the last stands for no class)."""
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"Class labels must be an int64 tensor (B,), e.g. torch.tensor([0, 3]), got {kind}.")
        if labels.numel() == 0:
            raise ValueError("Class labels are empty: there must be one per sample.")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > self.num_classes:
            raise ValueError(
                f"Class labels must be in 0 … {self.num_classes - 1} ({self.num_classes} stands for none), got values "
                f"from {low} to {high}."
            )

    def encode(self, data: Tensor, u: Tensor | float | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Data units to model units. `u` dequantizes integer data; 1/2 (the middle of the bin) if None."""
        z = data.to(dtype)
        if self.levels is not None:
            z = z + (0.5 if u is None else u)
        return (z - self.shift) / self.scale

    def decode(self, x: Tensor) -> Tensor:
        """Model units to data units: integers (int64) where there are levels."""
        z = x * self.scale + self.shift
        return z if self.levels is None else z.floor().clamp(0, self.levels - 1).long()
