r"""Coordinates in which the probability-flow ODE is integrated.

The state is scaled, x = scale * y, and followed along u instead of t. In every one of them the slope is a mix of the
data and the noise prediction, a `Parameterization` of the knot:

.. math:: dy/du = a\, \hat x_0 + b\, \hat\epsilon.

Every u but the time itself is a function of :math:`\lambda = \log(\alpha / \sigma)`. Four of them belong to one
prediction each, which they integrate exactly where it is constant:

============== ==================== ========================== ===========
coordinate     u                    scale                      dy/du
============== ==================== ========================== ===========
noise_ratio    sigma / alpha        alpha                      noise
signal_ratio   alpha / sigma        sigma                      data
angle          atan(sigma / alpha)  sqrt(alpha^2 + sigma^2)    v
noise_share    sigma / (alpha+sigma) alpha + sigma             flow
============== ==================== ========================== ===========

They are what the exponential solvers (`solvers.exponential`) are made of, too: a form is such a pair, and predictions
are interpolated in some u.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from sde_lib import (
    DataPrediction,
    FlowPrediction,
    Knot,
    Law,
    NoisePrediction,
    Parameterization,
    Table,
    UnitVPrediction,
    Velocity,
    state_std,
)
from sde_lib import _math as m
from sde_lib._math import Real


class Scales(Protocol):
    """What has alpha and sigma: a knot, or the end of a step."""

    @property
    def alpha(self) -> Real: ...

    @property
    def sigma(self) -> Real: ...


class Coordinate:
    """Base of the coordinates."""

    quantity: Parameterization
    """dy/du."""
    needs_drift: ClassVar[bool] = False
    """Whether u is finite only where f and g are."""
    needs_time: ClassVar[bool] = False
    """Whether the slope needs a law with continuous time."""

    def u(self, half_log_snr: Real) -> Real:
        """u at lambda."""
        raise NotImplementedError

    def half_log_snr(self, u: Real) -> Real:
        """lambda at u."""
        raise NotImplementedError

    def scale(self, at: Scales) -> Real:
        """x = scale * y."""
        raise NotImplementedError

    def of(self, knot: Knot) -> Real:
        """u at a knot."""
        return self.u(knot.half_log_snr)

    def slope(self, knot: Knot) -> tuple[Real, Real]:
        """Weights of x_0 and eps in dy/du."""
        return self.quantity.coefficients(knot)

    def knot(self, law: Any, u: Real) -> Knot:
        """The knot at u (a float, or a tensor shaped to multiply the state)."""
        return law.knot_at(self.half_log_snr(u))


@dataclass(frozen=True)
class Time(Coordinate):
    """y = x along t: dy/dt = alpha' x_0 + sigma' eps (Song et al. 2021, eq. 13)."""

    quantity = Velocity()
    needs_time = True

    def of(self, knot: Knot) -> Real:
        return knot.t

    def scale(self, at: Scales) -> Real:
        return 1.0

    def knot(self, law: Law, u: Real) -> Knot:
        return law.knot(u) if isinstance(u, float) else law.knot(u.reshape(-1), ndim=u.ndim)


@dataclass(frozen=True)
class NoiseRatio(Coordinate):
    """y = x / alpha along sigma / alpha: dy/du = eps, linear-exact for every law (Karras et al. 2022, eq. 4)."""

    quantity = NoisePrediction()
    needs_drift = True  # sigma / alpha is infinite where f is

    def u(self, half_log_snr: Real) -> Real:
        return m.exp(-half_log_snr)

    def half_log_snr(self, u: Real) -> Real:
        return -m.log(u)

    def scale(self, at: Scales) -> Real:
        return at.alpha


@dataclass(frozen=True)
class SignalRatio(Coordinate):
    """y = x / sigma along alpha / sigma: dy/du = x_0; finite at alpha = 0."""

    quantity = DataPrediction()

    def u(self, half_log_snr: Real) -> Real:
        return m.exp(half_log_snr)

    def half_log_snr(self, u: Real) -> Real:
        return m.log(u)

    def scale(self, at: Scales) -> Real:
        return at.sigma


@dataclass(frozen=True)
class HalfLogSNR(Coordinate):
    """y = x / alpha along -lambda: dy/du = (sigma / alpha) eps."""

    needs_drift = True  # lambda is infinite where f is

    def u(self, half_log_snr: Real) -> Real:
        return -half_log_snr

    def half_log_snr(self, u: Real) -> Real:
        return -u

    def scale(self, at: Scales) -> Real:
        return at.alpha

    def slope(self, knot: Knot) -> tuple[Real, Real]:
        return 0.0, knot.sigma / knot.alpha


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
    quantity: Parameterization = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantity", UnitVPrediction(self.sigma_data))

    def u(self, half_log_snr: Real) -> Real:
        ratio = m.exp(-half_log_snr)
        return m.atan2(ratio, m.full_like(ratio, self.sigma_data))

    def half_log_snr(self, u: Real) -> Real:
        return -m.log(m.tan(u) * self.sigma_data)

    def scale(self, at: Scales) -> Real:
        return state_std(at, self.sigma_data)


@dataclass(frozen=True)
class NoiseShare(Coordinate):
    """y = x / (alpha + sigma) along w = sigma / (alpha + sigma): dy/du = eps - x_0, the time and state of rectified
    flow (Liu et al. 2022, arXiv:2209.03003) for every law; finite at both ends."""

    quantity = FlowPrediction()

    def u(self, half_log_snr: Real) -> Real:
        return m.sigmoid(-half_log_snr)

    def half_log_snr(self, u: Real) -> Real:
        return m.log(1.0 - u) - m.log(u)

    def scale(self, at: Scales) -> Real:
        return at.alpha + at.sigma


COORDINATES: Mapping[str, type[Coordinate]] = Table(Coordinate, {
    "time": Time,
    "noise_ratio": NoiseRatio,
    "signal_ratio": SignalRatio,
    "half_log_snr": HalfLogSNR,
    "angle": Angle,
    "noise_share": NoiseShare,
})
"""Name -> class."""
