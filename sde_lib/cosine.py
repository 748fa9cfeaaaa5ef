"""Variance-preserving SDE with the cosine schedule."""

import math
from dataclasses import dataclass

from sde_lib import _math as m
from sde_lib._checks import check_ordered, check_positive
from sde_lib._math import Real
from sde_lib.sde import SDE


@dataclass(frozen=True)
class CosineVPSDE(SDE):
    r"""Cosine schedule, :math:`\alpha_t = \cos(bt + a) / \cos a` with :math:`b = \tfrac{\pi}{2(1 + s)}, a = b s`.

    :math:`\sigma^2 = 1 - \alpha^2 = \sin(bt) \sin(2a + bt) / \cos^2 a` (no cancellation near t = 0). alpha reaches 0
    and f diverges at t = 1, so t_max < 1.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17; t_max of DPM-Solver, arXiv:2206.00927, appendix D.4.

    Args:
        s: offset, > 0.
        t_min: smallest time of a model.
        t_max: largest time, < 1.

    Raises:
        ValueError: if s or the times are not finite, positive and ordered, or t_max >= 1.
    """

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        check_positive("s", self.s)
        check_ordered("t_min", self.t_min, "t_max", self.t_max)
        if self.t_max >= 1.0:
            raise ValueError(f"`t_max` must be < 1, where the cosine schedule's drift diverges, got {self.t_max}.")

    @property
    def _b(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)

    @property
    def _a(self) -> float:
        return self._b * self.s

    def _log_alpha(self, t: Real) -> Real:
        # log1p of -2 sin^2 keeps the digits that log(cos) loses near t = 0
        half = 0.5 * self._b * t
        return m.log1p(-2.0 * m.sin(half) * m.sin(half + self._a) / math.cos(self._a))

    def _log_sigma(self, t: Real) -> Real:
        u = self._b * t
        return 0.5 * m.log(m.sin(u) * m.sin(u + 2.0 * self._a)) - math.log(math.cos(self._a))

    def _f(self, t: Real) -> Real:
        return -self._b * m.tan(self._b * t + self._a)

    def _g2(self, t: Real) -> Real:
        return 2.0 * self._b * m.tan(self._b * t + self._a)

    def _time_at(self, half_log_snr: Real) -> Real:
        # w = bt + a: cos w = alpha cos a, sin^2 w = sin^2 a + sigma^2 cos^2 a, and bt = w - a by the difference
        # formulas, with sin w cos a - cos w sin a = sigma^2 cos^2 a / (sin w cos a + cos w sin a)
        sin_a, cos_a = math.sin(self._a), math.cos(self._a)
        alpha, sigma2 = m.exp(-0.5 * m.softplus(-2.0 * half_log_snr)), m.sigmoid(-2.0 * half_log_snr)
        cos_w, sin_w = alpha * cos_a, m.sqrt(sin_a**2 + sigma2 * cos_a**2)
        sin_bt = sigma2 * cos_a**2 / (sin_w * cos_a + cos_w * sin_a)
        return m.atan2(sin_bt, cos_w * cos_a + sin_w * sin_a) / self._b
