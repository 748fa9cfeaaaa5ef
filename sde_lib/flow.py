"""Rectified flow as an SDE."""

from dataclasses import dataclass

from sde_lib import _math as m
from sde_lib._checks import check_ordered
from sde_lib._math import Real
from sde_lib.sde import SDE


@dataclass(frozen=True)
class FlowSDE(SDE):
    r"""Straight paths, :math:`\alpha = 1 - t`, :math:`\sigma = t`: :math:`f = -1/(1-t)`, :math:`g^2 = 2t/(1-t)`.

    t = 0 is the data (many flow codes run time the other way). At t = 1 the kernel is exactly the prior; f and g
    diverge there, the rates alpha' = -1, sigma' = 1 do not, so steps between knots and the probability-flow velocity
    start at 1 while solvers that use f and g start at `drift_t_max` = 0.999.

    Source: Lipman et al. 2023, arXiv:2210.02747, optimal-transport path; Liu et al. 2022, arXiv:2209.03003.

    Args:
        t_min: smallest time of a model.
        t_max: largest time, <= 1.

    Raises:
        ValueError: if the times are not finite, positive and ordered, or t_max > 1.
    """

    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_ordered("t_min", self.t_min, "t_max", self.t_max)
        if self.t_max > 1.0:
            raise ValueError(f"`t_max` must be <= 1, got {self.t_max}.")

    @property
    def drift_t_max(self) -> float:
        return min(self.t_max, 0.999)

    def _log_alpha(self, t: Real) -> Real:
        return m.log1p(-t) if not isinstance(t, float) or t < 1.0 else float("-inf")

    def _log_sigma(self, t: Real) -> Real:
        return m.log(t)

    def _f(self, t: Real) -> Real:
        return -1.0 / self._remaining(t)

    def _g2(self, t: Real) -> Real:
        return 2.0 * t / self._remaining(t)

    def _remaining(self, t: Real) -> Real:
        if isinstance(t, float) and t >= 1.0:
            raise ValueError(
                "The flow SDE's drift and diffusion diverge at t = 1: start at sde.drift_t_max, or use a solver that "
                "steps between knots or along the velocity (DDIM, Heun)."
            )
        return 1.0 - t

    def _rates(self, t: Real) -> tuple[Real, Real]:
        return m.full_like(t, -1.0), m.full_like(t, 1.0)

    def _time_at(self, half_log_snr: Real) -> Real:
        return m.sigmoid(-half_log_snr)
