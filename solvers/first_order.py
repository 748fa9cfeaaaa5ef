r"""First-order solvers: one network call, then a weighted sum of data, noise and fresh noise.

.. math:: x_s = a\,\hat x_0 + b\,\hat\epsilon + c\,z.

Each class states (a, b, c) for a step from t to s, straight from its equation; the sum itself is one formula
(`Prediction.mix`), so that no method pays for forming x_0 and eps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sde_lib import Knot, ReverseSDE, noise_fraction, posterior, transition
from sde_lib import _math as m
from sde_lib._math import Real
from solvers.noise import Draw
from solvers.solver import Past, Solver, Step

VARIANCES = ("small", "large")


class FirstOrder(Solver):
    """Base: a subclass gives `coefficients`."""

    def coefficients(self, t: Knot, s: Knot) -> tuple[Real, Real, Real]:
        """Weights of x_0, eps and z in the state at s."""
        raise NotImplementedError

    def step(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, past: Past, draw: Draw) -> Step:
        """One network call at (x, t)."""
        data, noise, std = self.coefficients(t, s)
        prediction = rev(x, t)
        x_s = prediction.mix(data, noise)
        if isinstance(std, Tensor):
            x_s = x_s + std.to(x.dtype) * draw(t, s)
        elif std != 0.0:
            x_s = x_s.add_(draw(t, s), alpha=std) if x_s is not prediction.raw else x_s + std * draw(t, s)
        return Step(x_s, prediction)


@dataclass(frozen=True)
class EulerMaruyama(FirstOrder):
    r"""Euler-Maruyama on the reverse SDE.

    :math:`x_s = x_t + (s - t)\,[f x - \tfrac{1 + \eta^2}{2} g^2 \nabla\log p_t] + \eta\, g \sqrt{t - s}\; z`.
    Weak order 1. eta = 1 is the reverse SDE (Song et al. 2021, eq. 6), eta = 0 the probability-flow ODE (eq. 13)
    by Euler's method. The step is the grid's own (score_sde uses 1 / N whatever the grid).

    Args:
        eta: factor on the standard deviation of the noise, >= 0.
    """

    eta: float = 1.0
    needs_drift = True
    needs_time = True

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def coefficients(self, t: Knot, s: Knot) -> tuple[Real, Real, Real]:
        h = s.t - t.t
        stay, g2 = 1.0 + h * t.f, t.g2
        noise = stay * t.sigma + 0.5 * (1.0 + self.eta**2) * h * g2 / t.sigma
        return stay * t.alpha, noise, self.eta * m.sqrt(-h * g2) if self.eta else 0.0


@dataclass(frozen=True)
class DDIM(FirstOrder):
    r"""DDIM: exact for a constant data prediction.

    :math:`x_s = \alpha_s \hat x_0 + \sigma_s (\sqrt{1 - \kappa}\,\hat\epsilon + \sqrt\kappa\, z)` with
    :math:`\kappa = \eta^2 (1 - e^{2(\lambda_t - \lambda_s)})`. eta = 0 is the probability-flow ODE by the exponential
    Euler method (also DPM-Solver-1), eta = 1 DDPM's ancestral step with the small variance. Weak order 1.

    Source: Song et al. 2020, arXiv:2010.02502, eqs. 12 and 16, for any SDE. eta multiplies the standard deviation.

    Args:
        eta: 0 … 1.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        if self.eta > 1:
            raise ValueError(f"DDIM's `eta` must be <= 1, got {self.eta}.")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def coefficients(self, t: Knot, s: Knot) -> tuple[Real, Real, Real]:
        if self.eta == 0:
            return s.alpha, s.sigma, 0.0
        kappa = self.eta**2 * noise_fraction(s, t)
        return s.alpha, s.sigma * m.sqrt(1.0 - kappa), s.sigma * m.sqrt(kappa)


@dataclass(frozen=True)
class Ancestral(FirstOrder):
    r"""Ancestral sampling of the chain: the posterior of x_s given x_t and the predicted data.

    Mean :math:`(x_t + \mathrm{Var}(x_t | x_s) \nabla\log p_t) / \alpha_{t|s}`; variance "small" the posterior's own,
    "large" that of the forward kernel. DDPM on ``VPSDE().discretize(n)`` (Ho et al. 2020, Algorithm 2 and section
    3.2), SMLD's on ``VESDE().discretize(n)`` (Song et al. 2021, eqs. 4 and 47), and the same step on every SDE.
    Weak order 1. The step to the data adds no noise.

    Args:
        variance: "small" or "large".
    """

    variance: str = "small"

    def __post_init__(self) -> None:
        if self.variance not in VARIANCES:
            raise ValueError(f'`variance` must be "small" or "large", got {self.variance!r}.')

    @property
    def stochastic(self) -> bool:
        return True

    def coefficients(self, t: Knot, s: Knot) -> tuple[Real, Real, Real]:
        post = posterior(s, t)
        std = post.std if self.variance == "small" else transition(s, t).std
        return post.x_t * t.alpha + post.x_0, post.x_t * t.sigma, std


@dataclass(frozen=True)
class ERSDE(FirstOrder):
    r"""ER-SDE-Solver-1: DDIM's step with as much noise as an extended reverse SDE with kernel phi leaves.

    :math:`\kappa = 1 - r^2`, :math:`r = \phi(u_s) u_t / (\phi(u_t) u_s)` with :math:`u = \sigma / \alpha` and
    :math:`\phi(u) = u\,(e^{u^{0.3}} + 10)`: much noise where u is large, little near the data. Weak order 1.

    Source: Cui et al. 2023, arXiv:2309.06169: the first-order solver, with the noise function of the authors' code.
    """

    @property
    def stochastic(self) -> bool:
        return True

    def coefficients(self, t: Knot, s: Knot) -> tuple[Real, Real, Real]:
        log_10 = math.log(10.0)
        high, low = (m.softplus(m.exp(-0.3 * k.half_log_snr) - log_10) for k in (t, s))
        kept = m.exp(low - high)
        return s.alpha, s.sigma * kept, s.sigma * m.sqrt(-m.expm1(2.0 * (low - high)))


@dataclass(frozen=True)
class AnalyticAncestral(FirstOrder):
    r"""Ancestral sampling with the optimal isotropic covariance (Analytic-DPM).

    The reverse transition of a chain has the posterior's variance *plus* what is not known of x_0:
    :math:`\mathrm{std}^2 + c_0^2\, \gamma_t` with :math:`c_0` the posterior's weight of x_0 and
    :math:`\gamma_t = E\,\mathrm{tr}\,\mathrm{Cov}(x_0 | x_t) / d`, which `denoising_error` measures. With isotropic
    Gaussian data the step is exact in law, however long; "small" and "large" variances are its limits for data at a
    point and white data.

    Source: Bao et al. 2022, arXiv:2201.06503, Theorem 1. Deviation: gamma from the denoising error of data, which is
    positive by itself, not from the norm of the score.

    Args:
        half_log_snr: lambda where gamma was measured, increasing.
        gamma: gamma there, >= 0; the logarithm is interpolated linearly in lambda and kept constant outside.
    """

    half_log_snr: tuple[float, ...]
    gamma: tuple[float, ...]

    def __post_init__(self) -> None:
        lams, gammas = tuple(map(float, self.half_log_snr)), tuple(map(float, self.gamma))
        if not lams or len(lams) != len(gammas) or any(b <= a for a, b in itertools.pairwise(lams)):
            raise ValueError("`half_log_snr` must increase, with one `gamma` each.")
        if not all(0 <= g < math.inf for g in gammas):
            raise ValueError("`gamma` must be finite and >= 0.")
        object.__setattr__(self, "half_log_snr", lams)
        object.__setattr__(self, "gamma", gammas)

    @property
    def stochastic(self) -> bool:
        return True

    def unknown(self, lam: Real) -> Real:
        """gamma at lambda."""
        logs = np.log(np.maximum(self.gamma, 1e-300))
        if isinstance(lam, Tensor):
            values = np.exp(np.interp(lam.detach().cpu().numpy(), self.half_log_snr, logs))
            return torch.from_numpy(values).to(lam)
        return float(np.exp(np.interp(lam, self.half_log_snr, logs)))

    def coefficients(self, t: Knot, s: Knot) -> tuple[Real, Real, Real]:
        post = posterior(s, t)
        std = m.sqrt(post.std * post.std + post.x_0 * post.x_0 * self.unknown(t.half_log_snr))
        return post.x_t * t.alpha + post.x_0, post.x_t * t.sigma, std


def denoising_error(rev: ReverseSDE, x_0: Tensor, half_log_snr: Sequence[float], seed: int = 0) -> tuple[float, ...]:
    r"""gamma for `AnalyticAncestral`: :math:`E\|x_0 - \hat x_0(x_t)\|^2 / d` at each lambda, by one draw per sample.

    Args:
        rev: reverse SDE with continuous time.
        x_0: states without noise, in model units, (B, *D).
        half_log_snr: where to measure.
        seed: of the noise.
    """
    generator = torch.Generator(x_0.device).manual_seed(seed)
    out = []
    with torch.no_grad():
        for lam in half_log_snr:
            knot = rev.law.knot_at(float(lam))
            z = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)
            out.append(float((rev(knot.alpha * x_0 + knot.sigma * z, knot).data - x_0).square().mean()))
    return tuple(out)


@dataclass(frozen=True)
class ReverseDiffusion(FirstOrder):
    r"""The reverse-diffusion predictor: the reverse SDE discretized like the forward one.

    With the forward kernel :math:`x_t = a x_s + \sqrt v\, z` of the interval,
    :math:`x_s = (2 - a) x_t + v \nabla\log p_t + \sqrt v\, z`. Weak order 1.

    Source: Song et al. 2021, eq. 46 (probability flow: eq. 47's discretization, half the score and no noise), with
    the kernel of the grid's own interval, so that any grid of any SDE can be walked.

    Args:
        probability_flow: half the score term and no noise.
    """

    probability_flow: bool = False
    # the kernel from alpha = 0 keeps nothing of the state however short the step: start where f is finite
    needs_drift = True

    @property
    def stochastic(self) -> bool:
        return not self.probability_flow

    def coefficients(self, t: Knot, s: Knot) -> tuple[Real, Real, Real]:
        stay = 2.0 - t.alpha / s.alpha
        if self.probability_flow:  # the signed variance: this form also runs upward
            added = -t.sigma * m.expm1(2.0 * (t.half_log_snr - s.half_log_snr))
            return stay * t.alpha, stay * t.sigma - 0.5 * added, 0.0
        std = transition(s, t).std
        return stay * t.alpha, stay * t.sigma - std * std / t.sigma, std


def _check_eta(eta: float) -> None:
    if not isinstance(eta, int | float) or not 0 <= eta < math.inf:
        raise ValueError(f"`eta` must be a finite number >= 0, got {eta!r}.")
