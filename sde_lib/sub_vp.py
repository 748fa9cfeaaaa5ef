"""Sub-variance-preserving SDE."""

from dataclasses import dataclass

from sde_lib import _math as m
from sde_lib._math import Real
from sde_lib.sde import SDE
from sde_lib.vp import LinearBeta


@dataclass(frozen=True)
class SubVPSDE(LinearBeta, SDE):
    r"""Sub-VP SDE, :math:`dx = -\tfrac12 \beta x\,dt + \sqrt{\beta (1 - e^{-2 B(t)})}\,dw`.

    :math:`\alpha_t = e^{-B/2}`, :math:`\sigma_t = 1 - e^{-B}`: the variance stays below the VP SDE's.

    Source: Song et al. 2021, arXiv:2011.13456, eqs. 14, 29-31. Arguments: see `LinearBeta`.
    """

    def _log_alpha(self, t: Real) -> Real:
        return -0.5 * self._integral(t)

    def _log_sigma(self, t: Real) -> Real:
        return m.log(-m.expm1(-self._integral(t)))

    def _f(self, t: Real) -> Real:
        return -0.5 * self._beta(t)

    def _g2(self, t: Real) -> Real:
        return -self._beta(t) * m.expm1(-2.0 * self._integral(t))

    def _time_at(self, half_log_snr: Real) -> Real:
        # sigma / alpha = e^{B/2} - e^{-B/2} = 2 sinh(B / 2)
        return self._time_of_integral(2.0 * m.asinh(0.5 * m.exp(-half_log_snr)))
