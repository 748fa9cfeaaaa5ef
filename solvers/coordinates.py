r"""Coordinates in which the probability-flow ODE is integrated.

The state is scaled, x = scale * y, and followed along u instead of t. In every one of them the slope is a mix of the
data and the noise prediction:

.. math:: dy/du = a\, \hat x_0 + b\, \hat\epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sde_lib import Knot, Law, Table
from sde_lib import _math as m
from sde_lib._checks import check_positive
from sde_lib._math import Real


class Coordinate:
    """Base of the coordinates."""

    needs_drift = False
    """Whether u is finite only where f and g are."""
    needs_time = False
    """Whether the slope needs a law with continuous time."""

    def of(self, knot: Knot) -> Real:
        """u at a knot."""
        raise NotImplementedError

    def scale(self, knot: Knot) -> Real:
        """x = scale * y."""
        raise NotImplementedError

    def slope(self, knot: Knot) -> tuple[Real, Real]:
        """Weights of x_0 and eps in dy/du."""
        raise NotImplementedError

    def knot(self, law: Any, u: Real) -> Knot:
        """The knot at u (a float, or a tensor shaped to multiply the state)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Time(Coordinate):
    """y = x along t: dy/dt = alpha' x_0 + sigma' eps (Song et al. 2021, eq. 13)."""

    needs_time = True

    def of(self, knot: Knot) -> Real:
        return knot.t

    def scale(self, knot: Knot) -> Real:
        return 1.0

    def slope(self, knot: Knot) -> tuple[Real, Real]:
        return knot.rates

    def knot(self, law: Law, u: Real) -> Knot:
        return law.knot(u) if isinstance(u, float) else law.knot(u.reshape(-1), ndim=u.ndim)


@dataclass(frozen=True)
class NoiseRatio(Coordinate):
    """y = x / alpha along sigma / alpha: dy/du = eps, linear-exact for every law (Karras et al. 2022, eq. 4)."""

    needs_drift = True  # sigma / alpha is infinite where f is

    def of(self, knot: Knot) -> Real:
        return m.exp(-knot.half_log_snr)

    def scale(self, knot: Knot) -> Real:
        return knot.alpha

    def slope(self, knot: Knot) -> tuple[Real, Real]:
        return 0.0, 1.0

    def knot(self, law: Law, u: Real) -> Knot:
        return law.knot_at(-m.log(u))


@dataclass(frozen=True)
class HalfLogSNR(Coordinate):
    """y = x / alpha along -lambda: dy/du = (sigma / alpha) eps."""

    needs_drift = True  # lambda is infinite where f is

    def of(self, knot: Knot) -> Real:
        return -knot.half_log_snr

    def scale(self, knot: Knot) -> Real:
        return knot.alpha

    def slope(self, knot: Knot) -> tuple[Real, Real]:
        return 0.0, knot.sigma / knot.alpha

    def knot(self, law: Law, u: Real) -> Knot:
        return law.knot_at(-u)


@dataclass(frozen=True)
class Angle(Coordinate):
    r"""y = x / r along :math:`\theta = \arctan(\sigma / (\alpha \sigma_d))`.

    With :math:`r^2 = \sigma^2 + \alpha^2\sigma_d^2`,
    :math:`dy/d\theta = \cos\theta\, \epsilon - \sin\theta\, x_0 / \sigma_d`: state and slope stay of order one from
    the data to the prior of every law, alpha = 0 included.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_positive("sigma_data", self.sigma_data)

    def of(self, knot: Knot) -> Real:
        return m.atan2(knot.sigma, knot.alpha * self.sigma_data)

    def scale(self, knot: Knot) -> Real:
        signal = knot.alpha * self.sigma_data
        return m.sqrt(knot.sigma * knot.sigma + signal * signal)

    def slope(self, knot: Knot) -> tuple[Real, Real]:
        r = self.scale(knot)
        return -knot.sigma / (r * self.sigma_data), knot.alpha * self.sigma_data / r

    def knot(self, law: Law, u: Real) -> Knot:
        return law.knot_at(-m.log(m.tan(u) * self.sigma_data))


COORDINATES: Mapping[str, type[Coordinate]] = Table(Coordinate, {
    "time": Time,
    "noise_ratio": NoiseRatio,
    "half_log_snr": HalfLogSNR,
    "angle": Angle,
})
"""Name -> class."""
