"""Variance-exploding SDE with a geometric noise schedule."""

import math
from dataclasses import dataclass

from sde_lib import _math as m
from sde_lib._checks import check_count, check_ordered
from sde_lib._math import Real
from sde_lib.chain import MOST_LEVELS, Chain
from sde_lib.sde import SDE, _linspace


@dataclass(frozen=True)
class VESDE(SDE):
    r"""Variance-exploding SDE, :math:`dx = \sigma(t) \sqrt{2 \ln(\sigma_{max} / \sigma_{min})}\,dw`.

    :math:`\alpha = 1`, :math:`\sigma(t) = \sigma_{min} (\sigma_{max} / \sigma_{min})^t` on [0, 1]. At t = 0 the state
    already carries sigma_min: x_0 in the kernel is the data, and x(t = 0) is not. SMLD/NCSN is its discretization.

    Source: Song et al. 2021, arXiv:2011.13456, eqs. 9, 30; technique 1 of arXiv:2006.09011 for sigma_max (the largest
    distance between training points).

    Args:
        sigma_min: noise scale at t = 0, > 0.
        sigma_max: noise scale at t = 1, > sigma_min.
        t_min: smallest time of a model (Song et al. use 1e-5).
        t_max: largest time.

    Raises:
        ValueError: if scales or times are not finite, positive and ordered.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_ordered("sigma_min", self.sigma_min, "sigma_max", self.sigma_max)
        check_ordered("t_min", self.t_min, "t_max", self.t_max)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @property
    def prior_std(self) -> float:
        return self.sigma(self.t_max)

    def _log_alpha(self, t: Real) -> Real:
        return m.full_like(t, 0.0)

    def _log_sigma(self, t: Real) -> Real:
        return math.log(self.sigma_min) + t * self._log_ratio

    def _f(self, t: Real) -> Real:
        return m.full_like(t, 0.0)

    def _g2(self, t: Real) -> Real:
        return 2.0 * self._log_ratio * m.exp(2.0 * self._log_sigma(t))

    def _time_at(self, half_log_snr: Real) -> Real:
        return (-half_log_snr - math.log(self.sigma_min)) / self._log_ratio

    def discretize(self, n: int) -> Chain:
        """SMLD's chain: n geometric noise levels from sigma_min to sigma_max, level i at t = i / (n - 1).

        Level 0 is called t_min, the smallest time a continuous network knows.
        """
        check_count("n", n, 2, MOST_LEVELS)
        times = _linspace(0.0, 1.0, n)
        log_sigma = [math.log(self.sigma_min) + t * self._log_ratio for t in times]
        return Chain(
            [max(t, self.t_min) for t in times],
            [-v for v in log_sigma],
            [1.0] * n,
            [math.exp(v) for v in log_sigma],
            self.sigma_max,
            self if self.t_max == 1.0 else None,
        )
