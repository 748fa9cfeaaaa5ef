"""The parameterization of Karras et al.: time is the noise scale."""

from dataclasses import dataclass

from sde_lib import _math as m
from sde_lib._checks import check_ordered
from sde_lib._math import Real
from sde_lib.sde import SDE


@dataclass(frozen=True)
class EDMSDE(SDE):
    r""":math:`dx = \sqrt{2 t}\,dw`: :math:`\alpha = 1`, :math:`\sigma_t = t`.

    Source: Karras et al. 2022, arXiv:2206.00364, Table 1, sigma(t) = t, s(t) = 1.

    Args:
        t_min: smallest noise scale, > 0 (their sigma_min).
        t_max: largest noise scale (their sigma_max).

    Raises:
        ValueError: if the times are not finite, positive and ordered.
    """

    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self) -> None:
        check_ordered("t_min", self.t_min, "t_max", self.t_max)

    @property
    def prior_std(self) -> float:
        return self.t_max

    def _log_alpha(self, t: Real) -> Real:
        return m.full_like(t, 0.0)

    def _log_sigma(self, t: Real) -> Real:
        return m.log(t)

    def _f(self, t: Real) -> Real:
        return m.full_like(t, 0.0)

    def _g2(self, t: Real) -> Real:
        return 2.0 * t

    def _time_at(self, half_log_snr: Real) -> Real:
        return m.exp(-half_log_snr)
