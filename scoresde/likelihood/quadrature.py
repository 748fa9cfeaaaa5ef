"""Integrals over the knots of a trajectory: between two knots the integrand, in lambda, is the cubic through four."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sde_lib import Knot
from solvers import Angle


def quadrature(knots: Sequence[Knot], sigma_data: float, coarse: bool = False) -> list[float]:
    """Weights w with sum_k w_k g(theta_k) = the integral of g over the angle, cubic in lambda between knots.

    A last knot at alpha = 0, where lambda is infinite, is joined by a trapezoid in the angle; `coarse`, by a rectangle.
    """
    angle = Angle(sigma_data)
    finite = [k for k in knots if k.alpha > 0]
    u = [-float(k.half_log_snr) for k in finite]
    n = len(u)
    weights = [0.0] * len(knots)
    points = min(4, n)
    for i in range(n - 1):
        low = max(0, min(i - (points - 2) // 2, n - points))
        for j, w in enumerate(_cubic_weights(u[low : low + points], u[i], u[i + 1]), low):
            weights[j] += w
    for k, knot in enumerate(finite):
        turned = float(angle.of(knot))
        weights[k] *= math.sin(turned) * math.cos(turned)
    if len(finite) < len(knots):
        step = float(angle.of(knots[-1])) - float(angle.of(knots[-2]))
        weights[-2] += step if coarse else step / 2
        weights[-1] += 0.0 if coarse else step / 2
    return weights


_GAUSS = ((-math.sqrt(0.6), 5 / 9), (0.0, 8 / 9), (math.sqrt(0.6), 5 / 9))
"""Gauss points and weights on [-1, 1], exact to degree five."""


def _cubic_weights(at: Sequence[float], a: float, b: float) -> list[float]:
    """Integrals over [a, b] of the Lagrange polynomials through a few points."""
    out = []
    for j, here in enumerate(at):
        total = 0.0
        for x, w in _GAUSS:
            u = 0.5 * (a + b) + 0.5 * (b - a) * x
            total += 0.5 * (b - a) * w * math.prod((u - v) / (here - v) for i, v in enumerate(at) if i != j)
        out.append(total)
    return out
