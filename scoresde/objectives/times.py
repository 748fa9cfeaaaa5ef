"""Where on a law a training sample is noised: laws of the time, or of the level of a chain. See `clocks`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.objectives.clocks import Times
from sde_lib import SDE, Chain, Knot, Table
from sde_lib import _math as m
from sde_lib._checks import check_positive
from sde_lib._math import Real

_SQRT_2PI = math.sqrt(2.0 * math.pi)


@dataclass(frozen=True)
class UniformTimes(Times):
    """Uniform in time, or over the levels of a chain (Song et al. 2021, arXiv:2011.13456, eq. 7; Ho et al. 2020)."""

    def clock(self, knot: Knot) -> Real:
        return knot.t

    def rate(self, knot: Knot) -> Real:
        return m.full_like(knot.t, 1.0)

    def time_at(self, law: SDE, clock: Tensor) -> Tensor:
        return clock

    def probabilities(self, chain: Chain) -> list[float]:
        return [1.0 / chain.n] * chain.n


class _NoiseTimes(Times):
    """Times whose clock is a function of x = log(sigma / alpha) = -lambda."""

    def _cdf(self, x: Real) -> Real:
        """The clock."""
        raise NotImplementedError

    def _pdf(self, x: Real) -> Real:
        """Its derivative."""
        raise NotImplementedError

    def _quantile(self, q: Tensor) -> Tensor:
        """Its inverse."""
        raise NotImplementedError

    def clock(self, knot: Knot) -> Real:
        return self._cdf(-knot.half_log_snr)

    def rate(self, knot: Knot) -> Real:
        return self._pdf(-knot.half_log_snr) * (0.5 * knot.g2 / (knot.sigma * knot.sigma))  # -dlambda/dt

    def time_at(self, law: SDE, clock: Tensor) -> Tensor:
        # where alpha = 0 lies within the range, the last quantiles are infinite
        return law.time_at(-self._quantile(clock).clamp(-300.0, 300.0))


@dataclass(frozen=True)
class HalfLogSNRTimes(_NoiseTimes):
    r"""Uniform in the half log SNR lambda, as the variational bound is an integral over it.

    Since :math:`g^2 / \sigma^2 = -2\, d\lambda / dt`, the weight of "likelihood" is constant at these times (Kingma et
    al. 2021, arXiv:2107.00630).
    """

    corrected: bool = False

    def _cdf(self, x: Real) -> Real:
        return x

    def _pdf(self, x: Real) -> Real:
        return m.full_like(x, 1.0)

    def _quantile(self, q: Tensor) -> Tensor:
        return q


@dataclass(frozen=True)
class ImportanceTimes(HalfLogSNRTimes):
    r"""Density in proportion to :math:`g^2 / \sigma^2`: uniform in lambda, with the objective of uniform times.

    Source: Song et al. 2021b, arXiv:2101.09258, exact here through `SDE.time_at`.
    """

    corrected: bool = True


@dataclass(frozen=True)
class LogNormalTimes(_NoiseTimes):
    r"""log(sigma / alpha) normal, cut off at the ends of the law (Karras et al. 2022, arXiv:2206.00364, Table 1).

    Args:
        mean: of log(sigma / alpha); EDM's for images in [-1, 1]. EDM2: -0.8 for pixels, -0.4 for latents.
        std: its standard deviation. EDM2: 1.6 and 1.0.
        corrected: see `Times`.
    """

    mean: float = -1.2
    std: float = 1.2
    corrected: bool = False

    def __post_init__(self) -> None:
        check_positive("std", self.std)

    def _cdf(self, x: Real) -> Real:
        return _normal_cdf((x - self.mean) / self.std)

    def _pdf(self, x: Real) -> Real:
        return _normal_pdf((x - self.mean) / self.std) / self.std

    def _quantile(self, q: Tensor) -> Tensor:
        return self.mean + self.std * torch.special.ndtri(q)


@dataclass(frozen=True)
class LogitNormalTimes(Times):
    r"""logit(t / t_max) normal, cut off at the ends of the law (Esser et al. 2024, arXiv:2403.03206, section 3.1).

    For flows, whose noise ratio is t / (1 - t), it is `LogNormalTimes` with the same numbers.

    Args:
        mean: of the logit; log(s) shifts the times by a factor s of the noise ratio, as is done for large images.
        std: its standard deviation.
        corrected: see `Times`.
    """

    mean: float = 0.0
    std: float = 1.0
    corrected: bool = False

    def __post_init__(self) -> None:
        check_positive("std", self.std)

    def _fraction(self, knot: Knot) -> Real:
        return knot.t / _law(knot).t_max

    def clock(self, knot: Knot) -> Real:
        t = self._fraction(knot)
        return _normal_cdf((m.log(t) - m.log(1.0 - t) - self.mean) / self.std)

    def rate(self, knot: Knot) -> Real:
        t = self._fraction(knot)
        density = _normal_pdf((m.log(t) - m.log(1.0 - t) - self.mean) / self.std) / self.std
        return density / (t * (1.0 - t) * _law(knot).t_max)

    def time_at(self, law: SDE, clock: Tensor) -> Tensor:
        return law.t_max * torch.sigmoid(self.mean + self.std * torch.special.ndtri(clock))


@dataclass(frozen=True)
class CosineTimes(_NoiseTimes):
    r"""Uniform in the angle atan(sigma / alpha): the times of the cosine schedule, whatever the law's own.

    In lambda the density is in proportion to :math:`1 / \cosh\lambda`. Source: Nichol & Dhariwal 2021,
    arXiv:2102.09672; as a law of noise levels, Kingma & Gao 2023, arXiv:2303.00848; "CosMap" of
    arXiv:2403.03206.
    """

    corrected: bool = False

    def _cdf(self, x: Real) -> Real:
        return m.atan2(m.exp(x), m.full_like(x, 1.0))

    def _pdf(self, x: Real) -> Real:
        return 1.0 / (m.exp(x) + m.exp(-x))

    def _quantile(self, q: Tensor) -> Tensor:
        return torch.log(torch.tan(q))


@dataclass(frozen=True)
class LaplaceTimes(_NoiseTimes):
    r"""lambda with a Laplace law: most samples at middle noise levels, but more at the ends than a normal law gives.

    Source: Hang et al. 2024, arXiv:2407.03297, whose log SNR is twice lambda: its scale 0.5 is 0.25 here.

    Args:
        mean: of log(sigma / alpha).
        scale: mean distance from it.
        corrected: see `Times`.
    """

    mean: float = 0.0
    scale: float = 0.25
    corrected: bool = False

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)

    def _cdf(self, x: Real) -> Real:
        y = (x - self.mean) / self.scale
        distance: Any = abs(y)
        tail: Any = 0.5 * m.exp(-distance)
        if isinstance(y, Tensor):
            return torch.where(y < 0.0, tail, 1.0 - tail)
        return tail if y < 0.0 else 1.0 - tail

    def _pdf(self, x: Real) -> Real:
        distance: Any = abs(x - self.mean)
        return 0.5 / self.scale * m.exp(-distance / self.scale)

    def _quantile(self, q: Tensor) -> Tensor:
        below = q < 0.5
        distance = -torch.log(2.0 * torch.where(below, q, 1.0 - q))
        return self.mean + self.scale * torch.where(below, -distance, distance)


TIMES: Mapping[str, type[Times]] = Table(Times, {
    "uniform": UniformTimes,
    "importance": ImportanceTimes,
    "half_log_snr": HalfLogSNRTimes,
    "lognormal": LogNormalTimes,
    "logit_normal": LogitNormalTimes,
    "cosine": CosineTimes,
    "laplace": LaplaceTimes,
})
"""Name -> class of the laws of times. A new one is a class and a line here."""


def _normal_cdf(x: Real) -> Real:
    return torch.special.ndtr(x) if isinstance(x, Tensor) else 0.5 * math.erfc(-x / math.sqrt(2.0))


def _normal_pdf(x: Real) -> Real:
    return m.exp(-0.5 * x * x) / _SQRT_2PI


def _law(knot: Knot) -> Any:
    assert knot.law is not None  # knots of a law have one; only the data end has none
    return knot.law
