"""Embeddings of a noise level, and what all networks build with."""

import math

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    r"""cos and sin of the noise level at geometric frequencies :math:`\omega_i = P^{-i / (n - 1)}`, n = dim / 2.

    The shortest wavelength is :math:`2\pi` units and the longest :math:`2\pi P`, so the noise level must move by about
    one unit wherever the network is to see a difference: levels such as 999 t (range 0 … 999, resolution about 1e-3 in
    t), or `log sigma` with a small P. Evaluated in the dtype of the noise level, never below float32.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5; Ho et al. 2020 for times.

    Args:
        dim: number of features, even and >= 4.
        max_period: P > 1. 10000 is the value of both sources.

    Raises:
        ValueError: for an odd or too small `dim`, or `max_period` <= 1.
    """

    def __init__(self, dim: int, max_period: float = 10000.0) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"`dim` must be an even number >= 4, got {dim}.")
        if not max_period > 1.0:
            raise ValueError(f"`max_period` must be > 1, got {max_period}.")
        self.dim, self.max_period = dim, float(max_period)

    def forward(self, noise_level: Tensor) -> Tensor:
        """(B,) -> (B, dim)."""
        level = noise_level if noise_level.dtype in (torch.float32, torch.float64) else noise_level.float()
        half = self.dim // 2
        # made here rather than stored: a buffer would be rounded when the module is cast to bfloat16
        ramp = torch.arange(half, dtype=level.dtype, device=level.device) / (half - 1)
        angle = level[:, None] * torch.exp(-math.log(self.max_period) * ramp)
        return torch.cat([angle.cos(), angle.sin()], 1)


class FourierEmbedding(nn.Module):
    r"""cos and sin of :math:`2\pi w_i` times the noise level, with fixed :math:`w_i \sim N(0, scale^2)`.

    For levels of order one, such as `log sigma`; the resolution is about 1 / (2 pi scale) of their units.

    Source: Tancik et al. 2020, arXiv:2006.10739; Song et al. 2021 (NCSN++) with scale 16.

    Args:
        dim: number of features, even and >= 2.
        scale: standard deviation of the frequencies, > 0.

    Raises:
        ValueError: for an odd or too small `dim`, or `scale` <= 0.
    """

    frequencies: Tensor

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"`dim` must be an even number >= 2, got {dim}.")
        if not scale > 0.0:
            raise ValueError(f"`scale` must be > 0, got {scale}.")
        self.register_buffer("frequencies", torch.randn(dim // 2) * scale)

    def forward(self, noise_level: Tensor) -> Tensor:
        """(B,) -> (B, dim)."""
        level = noise_level if noise_level.dtype in (torch.float32, torch.float64) else noise_level.float()
        angle = 2.0 * math.pi * level[:, None] * self.frequencies.to(level.dtype)
        return torch.cat([angle.cos(), angle.sin()], 1)


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with all parameters set to zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    for part in module.modules():
        part.starts_at_zero = True  # type: ignore[assignment]
    return module


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise unless `value` is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")


def check_dropout(value: float) -> None:
    """Raise unless 0 <= `value` < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"`dropout` must be in [0, 1), got {value}.")


def check_inputs(x: Tensor, noise_level: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless `x` is (B, *shape) and `noise_level` is (B,)."""
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"x must have shape (B, *{shape}), got {tuple(x.shape)}.")
    if noise_level.shape != x.shape[:1]:
        raise ValueError(f"`noise_level` must have shape ({x.shape[0]},), got {tuple(noise_level.shape)}.")
