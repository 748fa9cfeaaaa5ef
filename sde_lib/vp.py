"""Variance-preserving SDE with a linear beta schedule."""

import math
from dataclasses import dataclass

from sde_lib import _math as m
from sde_lib._checks import check_count, check_ordered, check_positive
from sde_lib._math import Real
from sde_lib.chain import MOST_LEVELS, Chain
from sde_lib.sde import SDE
from sde_lib.tabulated import TabulatedSDE


@dataclass(frozen=True)
class LinearBeta:
    r"""Rate beta(t) = beta_min + t (beta_max - beta_min) on [0, 1] and its integral B(t): shared by VP and sub-VP.

    Args:
        beta_min: rate at t = 0, per unit time, > 0.
        beta_max: rate at t = 1, >= beta_min.
        t_min: smallest time of a model. 1e-3 is where Song et al. 2021 stop sampling; they train and evaluate
            likelihoods down to 1e-5.
        t_max: largest time.

    Raises:
        ValueError: if rates or times are not finite, positive and ordered.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_positive("beta_min", self.beta_min)
        check_positive("beta_max", self.beta_max)
        if self.beta_max < self.beta_min:
            raise ValueError(f"`beta_max` must be >= `beta_min`, got {self.beta_max} < {self.beta_min}.")
        check_ordered("t_min", self.t_min, "t_max", self.t_max)
        if 0.5 * self._integral(self.t_max) > 300.0:
            raise ValueError(
                f"With beta_max = {self.beta_max} the signal at t_max = {self.t_max} is alpha = "
                f"exp(-{0.5 * self._integral(self.t_max):.4g}), too small for float64: lower `beta_max` (20 is usual) "
                "or `t_max`."
            )

    def _beta(self, t: Real) -> Real:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Real) -> Real:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _time_of_integral(self, b: Real) -> Real:
        """Root of B(t) = b, in the form that does not cancel for small b."""
        slope = self.beta_max - self.beta_min
        return 2.0 * b / (self.beta_min + m.sqrt(self.beta_min**2 + 2.0 * slope * b))


@dataclass(frozen=True)
class VPSDE(LinearBeta, SDE):
    r"""Variance-preserving SDE, :math:`dx = -\tfrac12 \beta(t)\,x\,dt + \sqrt{\beta(t)}\,dw`.

    :math:`\alpha_t = e^{-B(t)/2}` and :math:`\alpha^2 + \sigma^2 = 1`, with B the integral of beta. DDPM is its
    discretization: ``VPSDE().discretize(1000)``.

    Source: Song et al. 2021, arXiv:2011.13456, eqs. 11, 32, 33. Arguments: see `LinearBeta`.
    """

    def _log_alpha(self, t: Real) -> Real:
        return -0.5 * self._integral(t)

    def _log_sigma(self, t: Real) -> Real:
        return 0.5 * m.log(-m.expm1(-self._integral(t)))

    def _f(self, t: Real) -> Real:
        return -0.5 * self._beta(t)

    def _g2(self, t: Real) -> Real:
        return self._beta(t)

    def _time_at(self, half_log_snr: Real) -> Real:
        return self._time_of_integral(m.softplus(-2.0 * half_log_snr))

    def discretize(self, n: int) -> Chain:
        """DDPM's chain: betas linear from beta_min / n to beta_max / n (Ho et al. 2020), level i at t = (i + 1) / n.

        Raises:
            ValueError: unless n > beta_max, for 1 - beta must stay positive.
        """
        check_count("n", n, 2, MOST_LEVELS)
        if n <= self.beta_max:
            raise ValueError(f"DDPM's chain needs n > beta_max = {self.beta_max}, got n = {n}.")
        betas = [(self.beta_min + i / (n - 1) * (self.beta_max - self.beta_min)) / n for i in range(n)]
        log_alpha, total = [], 0.0
        for beta in betas:
            total += 0.5 * math.log1p(-beta)
            log_alpha.append(total)
        log_sigma = [0.5 * math.log(-math.expm1(2.0 * a)) for a in log_alpha]
        return Chain(
            [(i + 1) / n for i in range(n)],
            [a - s for a, s in zip(log_alpha, log_sigma, strict=True)],
            [math.exp(a) for a in log_alpha],
            [math.exp(s) for s in log_sigma],
            self.prior_std,
            TabulatedSDE([math.exp(2.0 * a) for a in log_alpha]),
        )
