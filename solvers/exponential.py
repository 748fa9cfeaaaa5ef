r"""One coefficient engine for every exponential and multistep solver.

Between two knots the reverse dynamics are a linear part, solved exactly, and a network prediction q, replaced by a
polynomial through its values at some knots. Every such method is

.. math:: x_s = A\, x_t + \sum_j w_j\, q_j + N z, \qquad
          w_j = \int_{\lambda_t}^{\lambda_s} k(\lambda)\, \ell_j(\xi(\lambda))\, d\lambda,

with :math:`\ell_j` the Lagrange basis on the knots in a variable :math:`\xi`. A `Form` says what q is, hence A, N and
the kernel k; `weights` integrates. Without noise a form is a coordinate (`solvers.coordinates`) whose slope is q: with
x = scale y and dy/du = q, A is the quotient of the scales and k = scale_s du/dlambda.

Which knots are used is the method: earlier ones (DPM-Solver++ 2M and 3M, DEIS, linear multistep, UniPC's predictor,
SDE-DPM-Solver++, SA-Solver), stages between the two (DPM-Solver-2 and -3, DPM-Solver++ 2S and 3S, SEEDS), or the new
one too (UniPC's and SA-Solver's corrector).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sde_lib import Knot, Prediction, lookup
from sde_lib import _math as m
from sde_lib._checks import check_positive
from sde_lib._math import Real
from solvers.coordinates import Angle, Coordinate, HalfLogSNR, NoiseRatio, NoiseShare, SignalRatio

Nodes = Sequence[tuple[Knot, Prediction]]


class End:
    """What the formulas need of the knot a step ends at."""

    __slots__ = ("alpha", "lam", "sigma")

    def __init__(self, alpha: Real, sigma: Real, lam: Real) -> None:
        self.alpha, self.sigma, self.lam = alpha, sigma, lam


class Form:
    r"""What is interpolated, and what is therefore integrated exactly.

    `tau2` is :math:`\tau^2` of the reverse SDE
    :math:`dx = [f x - \tfrac{1 + \tau^2}{2} g^2 \nabla\log p]\,dt + \tau g\,d\bar w`: 0 is the probability-flow ODE, 1
    the reverse SDE.
    """

    coordinate: Coordinate
    """Where q is the slope."""
    noisy: ClassVar[bool] = False
    """Whether the form knows tau2 > 0."""

    @property
    def needs_drift(self) -> bool:
        """Whether lambda must be finite where a run starts."""
        return self.coordinate.needs_drift

    def carry(self, t: Knot, s: Knot, tau2: Real) -> Real:
        """A."""
        return self.coordinate.scale(s) / self.coordinate.scale(t)

    def total(self, lam_t: Real, s: End, tau2: Real) -> Real:
        """The integral of the kernel: the weight of a constant q."""
        raise NotImplementedError

    def kernel(self, lam: Real, s: End, tau2: Real) -> Real:
        """k at lambda, for a step that ends at s."""
        raise NotImplementedError

    def std(self, t: Knot, s: Knot, tau2: Real) -> Real:
        """N."""
        return 0.0


@dataclass(frozen=True)
class Data(Form):
    r"""q = E[x_0 | x]: :math:`A = \tfrac{\sigma_s}{\sigma_t} e^{-\tau^2 h}`,
    :math:`k = \alpha_s (1 + \tau^2) e^{-(1 + \tau^2)(\lambda_s - \lambda)}`,
    :math:`N = \sigma_s\sqrt{1 - e^{-2\tau^2 h}}`, h = lambda_s - lambda_t (Lu et al. 2022, arXiv:2211.01095, eq. 8;
    Xue et al. 2023, arXiv:2309.05019, Proposition 4.2)."""

    coordinate = SignalRatio()
    noisy = True

    def carry(self, t: Knot, s: Knot, tau2: Real) -> Real:
        ratio = super().carry(t, s, tau2)
        if isinstance(tau2, float) and tau2 == 0.0:
            return ratio
        return ratio * m.exp(-tau2 * (s.half_log_snr - t.half_log_snr))

    def total(self, lam_t: Real, s: End, tau2: Real) -> Real:
        return -s.alpha * m.expm1(-(1.0 + tau2) * (s.lam - lam_t))

    def kernel(self, lam: Real, s: End, tau2: Real) -> Real:
        return s.alpha * (1.0 + tau2) * m.exp(-(1.0 + tau2) * (s.lam - lam))

    def std(self, t: Knot, s: Knot, tau2: Real) -> Real:
        return s.sigma * m.sqrt(-m.expm1(-2.0 * tau2 * (s.half_log_snr - t.half_log_snr)))


@dataclass(frozen=True)
class Noise(Form):
    r"""q = E[eps | x]: :math:`A = \alpha_s / \alpha_t`, :math:`k = -(1 + \tau^2)\, \alpha_s e^{-\lambda}`,
    :math:`N = \tau \sigma_s \sqrt{e^{2h} - 1}` (Lu et al. 2022, arXiv:2206.00927, eq. 3.4; Zhang & Chen 2022,
    arXiv:2204.13902)."""

    coordinate = NoiseRatio()
    noisy = True

    def total(self, lam_t: Real, s: End, tau2: Real) -> Real:
        return -(1.0 + tau2) * s.sigma * m.expm1(s.lam - lam_t)

    def kernel(self, lam: Real, s: End, tau2: Real) -> Real:
        return -(1.0 + tau2) * s.alpha * m.exp(-lam)

    def std(self, t: Knot, s: Knot, tau2: Real) -> Real:
        return s.sigma * m.sqrt(tau2 * m.expm1(2.0 * (s.half_log_snr - t.half_log_snr)))


@dataclass(frozen=True)
class V(Form):
    r"""q = v: with :math:`r^2 = \sigma^2 + \alpha^2\sigma_d^2` and :math:`\theta = \arctan(e^{-\lambda} / \sigma_d)`,
    :math:`d(x/r)/d\theta = v = \cos\theta\,\epsilon - \sin\theta\, x_0 / \sigma_d`. Regular at both ends of time.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 1.0
    coordinate: Coordinate = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coordinate", Angle(self.sigma_data))

    def total(self, lam_t: Real, s: End, tau2: Real) -> Real:
        # theta_s - theta_t as one arctangent: no difference of nearly equal angles
        shift = math.log(self.sigma_data)
        a, b = s.lam + shift, lam_t + shift
        if isinstance(b, float) and b == -math.inf:
            angle = -m.atan2(m.exp(a), m.full_like(a, 1.0))
        else:
            u, w = m.exp(-a), m.exp(-b)
            angle = m.atan2(u * -m.expm1(s.lam - lam_t), 1.0 + u * w)
        return self.coordinate.scale(s) * angle

    def kernel(self, lam: Real, s: End, tau2: Real) -> Real:
        a = lam + math.log(self.sigma_data)
        return -self.coordinate.scale(s) / (m.exp(a) + m.exp(-a))


@dataclass(frozen=True)
class Flow(Form):
    r"""q = eps - x_0: :math:`d(x / (\alpha + \sigma)) / dw = q` along :math:`w = \sigma / (\alpha + \sigma)`.

    The time of rectified flow (Liu et al. 2022, arXiv:2209.03003), for any law.
    """

    coordinate = NoiseShare()

    def total(self, lam_t: Real, s: End, tau2: Real) -> Real:
        if isinstance(lam_t, float) and lam_t == -math.inf:
            return -s.alpha
        # (alpha_s + sigma_s) (w_s - w_t) without the difference
        return -s.sigma * m.expm1(s.lam - lam_t) / (1.0 + m.exp(-lam_t))

    def kernel(self, lam: Real, s: End, tau2: Real) -> Real:
        half = m.exp(0.5 * lam) + m.exp(-0.5 * lam)
        return -(s.alpha + s.sigma) / (half * half)


PREDICTIONS: Mapping[str, type[Form]] = {"data": Data, "noise": Noise, "v": V, "flow": Flow}
"""What a solver may interpolate, whatever the network was trained to output."""


def form_of(prediction: str, sigma_data: float) -> Form:
    """The form of a name in `PREDICTIONS`; `sigma_data` is for those that have it."""
    check_positive("sigma_data", sigma_data)
    kind = lookup(PREDICTIONS, prediction, "prediction")
    return kind(sigma_data) if kind is V else kind()


VARIABLES: Mapping[str, Coordinate] = {
    "half_log_snr": HalfLogSNR(),
    "noise_ratio": NoiseRatio(),
    "angle": Angle(),
    "noise_share": NoiseShare(),
}
"""Variables in which the prediction is a polynomial: the u of a coordinate."""

# 24 Gauss-Legendre nodes integrate the data and noise kernels to rounding over steps of up to ten units of lambda; the
# v kernel and the angle, with poles at i pi / 2, to 5e-12 over five units and 1e-6 over ten
_POINTS = tuple(zip(*(a.tolist() for a in np.polynomial.legendre.leggauss(24)), strict=True))
_GAUSS = tuple((0.5 * (1.0 + z), 0.5 * w) for z, w in _POINTS)


@dataclass(frozen=True)
class Interpolation:
    """How predictions become a step: what is interpolated, in which variable, by which rule.

    Args:
        form: what is interpolated.
        variable: a name in `VARIABLES`.
        midpoint: with two knots, weight the difference quotient with half the kernel's integral times the step, as
            dpm-solver's "midpoint" and UniPC's B_2(h) do, instead of the kernel's first moment. Same order.
        half_d2: with three knots, halve the second divided difference: DPM-Solver's third-order multistep as published
            in code, which is of second order (the factor two of the Taylor coefficient is missing).
    """

    form: Form
    variable: str = "half_log_snr"
    midpoint: bool = False
    half_d2: bool = False

    def weights(self, t: Knot, s: Knot, knots: Sequence[Knot], base: int, tau2: Real = 0.0) -> Sequence[Real]:
        """w_j for a step from t to s with the prediction known at `knots`, of which number `base` is t."""
        lams = [k.half_log_snr for k in knots]
        if isinstance(t.half_log_snr, float) and not torch.compiler.is_compiling():
            return _cached(self, base, tau2, s.alpha, s.sigma, s.half_log_snr, *lams)
        return _weights(self, base, tau2, End(s.alpha, s.sigma, s.half_log_snr), lams)

    def advance(
        self, x: Tensor, t: Knot, s: Knot, nodes: Nodes, base: int, tau2: Real = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """The state at s from the state x at t, the predictions at `nodes` (number `base` at t) and the noise term."""
        ws = self.weights(t, s, [k for k, _ in nodes], base, tau2)
        scale, terms = self.form.carry(t, s, tau2), []
        for (knot, prediction), w in zip(nodes, ws, strict=True):
            a, b = self.form.coordinate.slope(knot)
            of_x, of_raw = prediction.weights(w * a, w * b)
            if prediction.x is x:
                scale = scale + of_x
            elif isinstance(of_x, Tensor) or of_x != 0.0:
                terms.append((prediction.x, of_x))
            terms.append((prediction.raw, of_raw))
        out = rescaled(x, scale)
        for tensor, c in terms:
            out = out.add_(c.to(x.dtype) * tensor) if isinstance(c, Tensor) else out.add_(tensor, alpha=c)
        return out if noise is None else out.add_(noise)

    def noise(self, t: Knot, s: Knot, tau2: Real, z: Tensor) -> Tensor:
        """N z."""
        return rescaled(z, self.form.std(t, s, tau2))

    def usable(self, nodes: Nodes) -> Nodes:
        """Without knots where the variable is infinite (alpha = 0), unless there is no other."""
        if len(nodes) == 1 or not VARIABLES[self.variable].needs_drift:
            return nodes
        kept = [n for n in nodes if not (isinstance(n[0].half_log_snr, float) and math.isinf(n[0].half_log_snr))]
        return kept or nodes[-1:]


def rescaled(x: Tensor, c: Real) -> Tensor:
    """c x, a new tensor of the dtype of x."""
    return x * (c.to(x.dtype) if isinstance(c, Tensor) else c)


@lru_cache(maxsize=16384)
def _cached(
    rule: Interpolation, base: int, tau2: float, alpha: float, sigma: float, lam: float, *lams: float
) -> tuple[Real, ...]:
    """Grids repeat: a run on one that was walked before finds its weights."""
    return tuple(_weights(rule, base, tau2, End(alpha, sigma, lam), lams))


def _weights(rule: Interpolation, base: int, tau2: Real, s: End, lams: Sequence[Real]) -> list[Real]:
    form, lam_t, n = rule.form, lams[base], len(lams)
    total = form.total(lam_t, s, tau2)
    if n == 1:
        return [total]
    h = s.lam - lam_t
    if n == 2 and rule.midpoint:
        other = 0.5 * total * h / (lams[1 - base % 2] - lam_t)
        return [total - other, other] if base % 2 == 0 else [other, total - other]
    variable = VARIABLES[rule.variable].u
    at = [variable(lam) for lam in lams]
    base %= n
    others = [j for j in range(n) if j != base]
    out: list[Real] = [0.0] * n
    spread: list[Real] = [1.0] * n
    for j in others:
        for k in range(n):
            if k != j:
                spread[j] = spread[j] * (at[j] - at[k])
    half = rule.half_d2 and n == 3
    for z, w in _GAUSS:
        lam = lam_t + h * z
        u, mass = variable(lam), form.kernel(lam, s, tau2) * (h * w)
        for j in others:
            value: Real = 1.0
            for k in range(n):
                if k != j:
                    value = value * (u - at[k])
            if half:
                value = value - 0.5 * (u - at[base]) * (u - at[base])
            out[j] = out[j] + mass * value
    rest = total
    for j in others:
        out[j] = out[j] / spread[j]
        rest = rest - out[j]
    out[base] = rest  # the weights of a constant prediction add up to the closed form
    return out
