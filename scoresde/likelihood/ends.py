r"""The terms beyond the ODE, from quantities at its ends: truncation at t_min and the mismatch of the prior.

Both are biases: signed, estimated to first order, and correctable. `log_likelihood` says what they are; here are their
values, as a constant and a slope times the trace at one end, and the size of what a correction leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.likelihood.divergence import EXACT_UP_TO
from scoresde.likelihood.path import Groups, evaluate
from scoresde.likelihood.settings import Settings
from sde_lib import SDE, Knot, Prediction, ReverseSDE
from solvers.noise import Draw

SECOND_ORDER = 2.0
"""The bar of a correction in units of its second-order term: where the series converges, that and no more is left."""
ISOTROPIC = 4
"""Sign vectors for the size of the prior's second-order terms in many dimensions, where each tells its norm well."""


@dataclass
class Term:
    """constant + slope * (trace of the raw output's Jacobian at one end)."""

    constant: Tensor
    slope: float

    def at(self, trace: Tensor) -> Tensor:
        return self.constant + self.slope * trace


def terms(rev: ReverseSDE, settings: Settings, first: Prediction, last: Prediction) -> tuple[Term, Term]:
    """Truncation and prior mismatch by the predictions at both ends, up to the traces there."""
    return _truncation(first), _mismatch(rev, last, settings.law.prior_std, settings.prior is not None)


def remainder(
    rev: ReverseSDE, settings: Settings, first: Prediction, last: Prediction, draw: Draw
) -> tuple[Tensor, int, int]:
    """A bound on what the corrections leave, (B,), and the network calls and products that it took."""
    x, calls, products = first.x.detach(), 0, 0
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with torch.no_grad():
        if "truncation" in settings.correct:
            group = None if settings.exact else [settings.group(draw, "remainder")]
            total = total + _truncation_remainder(rev, settings.law, first, group, settings.chunk)
            calls, products = calls + 3, products + 3 * settings.products(x.shape[1:], 1)
        if "prior" in settings.correct and settings.prior is None and float(last.knot.alpha) > 0.0:
            vectors = _isotropic(x, draw)
            total = total + _mismatch_remainder(rev, last, settings.law.prior_std, vectors)
            calls, products = calls + 3, products + 2 * len(vectors)
    return total, calls, products


def _rows(x: Tensor) -> Tensor:
    """Sum over the elements of a sample, float64."""
    return x.reshape(len(x), -1).sum(1, dtype=torch.float64)


# --- truncation ------------------------------------------------------------------------------------------------------


def _heat(prediction: Prediction) -> Term:
    """(sigma div eps - |eps|^2) / 2: minus s^2 times the slope of log q_s(y) in s^2, with y = x / alpha,
    s = sigma / alpha, and q_s the law of y, which solves the heat equation."""
    noise, d, sigma = prediction.noise, prediction.x[0].numel(), float(prediction.knot.sigma)
    a, b = (float(c) for c in prediction.weights(0.0, 1.0))
    return Term(0.5 * (sigma * a * d - _rows(noise.square())), 0.5 * sigma * b)


def _truncation(first: Prediction) -> Term:
    """log p_0(x) - log p_t(x) to first order in sigma^2; see `log_likelihood`."""
    heat, knot = _heat(first), first.knot
    alpha, sigma = float(knot.alpha), float(knot.sigma)
    # log p_t at alpha x in place of x, by its score
    moved = (1.0 - alpha) / sigma * _rows(first.x * first.noise) + first.x[0].numel() * math.log(alpha)
    return Term(heat.constant + moved, heat.slope)


def _truncation_remainder(rev: ReverseSDE, law: SDE, first: Prediction, group: Groups, chunk: int) -> Tensor:
    r"""Size of what a correction for truncation leaves, (B,): `SECOND_ORDER` times its next two terms.

    By three more calls with a trace, at x as data under 1, 2 and 4 times the noise variance of t_min. The correction is
    the integral from 0 to s^2 of f, the slope of log q in the variance, as if f were constant; a line through f at s^2
    and 2 s^2, and a parabola through all three, give the next two terms (both, because either may vanish by chance).
    The second order of going from x to alpha x is half the change of the first when the score is taken there.
    """
    x, knot = first.x, first.knot
    alpha, sigma, half_log_snr = float(knot.alpha), float(knot.sigma), float(knot.half_log_snr)
    slopes = []  # times s^2
    for factor in (1.0, 2.0, 4.0):
        at = knot if factor == 1.0 else law.knot(float(law.time_at(half_log_snr - 0.5 * math.log(factor))))
        prediction, traces = evaluate(rev, at, float(at.alpha) * x, group, chunk)
        slopes.append(_heat(prediction).at(traces.values[:, 0]) / factor)
        if factor == 1.0:
            moved = 0.5 * (1.0 - alpha) / sigma * _rows(x * (prediction.noise - first.noise))
    one, two, four = slopes
    line, parabola = 0.5 * (one - two), 5.0 / 18.0 * (0.5 * (four - two) - (two - one))
    return SECOND_ORDER * (line.abs() + parabola.abs() + moved.abs())


# --- prior mismatch --------------------------------------------------------------------------------------------------


def _gradient(prediction: Prediction, std: float) -> tuple[float, float]:
    """Weights of x_0 and eps in the gradient of rho = log p_T - log N(0, std^2)."""
    alpha, sigma = float(prediction.knot.alpha), float(prediction.knot.sigma)
    return alpha / std**2, (sigma**2 - std**2) / (sigma * std**2)


def _mismatch(rev: ReverseSDE, last: Prediction, std: float, known: bool) -> Term:
    """log p_T - log prior at the latent, for data small beside the noise; see `log_likelihood`."""
    z, d = last.x, last.x[0].numel()
    if known or float(last.knot.alpha) == 0.0:
        return Term(torch.zeros(len(z), dtype=torch.float64, device=z.device), 0.0)
    weights = _gradient(last, std)
    middle = rev(torch.zeros_like(z), last.knot).mix(*weights)  # the gradient of rho at 0
    a, b = (float(c) for c in last.weights(*weights))
    rise = 0.5 * _rows(z * (middle + last.mix(*weights)))
    norm = 0.5 * std**2 * (a * d + _rows(middle.square()))
    return Term(rise - norm, -0.5 * std**2 * b)


def _mismatch_remainder(rev: ReverseSDE, last: Prediction, std: float, probes: Sequence[Tensor]) -> Tensor:
    r"""Size of what a correction for the prior leaves, (B,): `SECOND_ORDER` times its second-order terms.

    Where rho is quadratic with Hessian H, the norm of p_T is known to first order in H; the next terms are
    :math:`\mathrm{std}^4 \|H\|_F^2 / 4` and :math:`\mathrm{std}^4 g^T H g / 2`, with g the gradient at 0. Where it is
    not, Simpson's rule, by the gradient half-way to the latent, tells by how much its rise is not the trapezoid's; and
    the trace of H, which the norm wants as it is at 0, is not the one at the latent. Three calls, two with products.

    Args:
        rev, last, std: as in `_mismatch`, at an alpha above 0.
        probes: vectors v, (B, *D), with :math:`E[v v^T] = I`: :math:`\|H\|_F^2 = E |H^T v|^2`,
            :math:`\mathrm{tr} H = E[v^T H v]`. The unit vectors times :math:`\sqrt{D}` make both exact.
    """
    z, weights = last.x, _gradient(last, std)
    low, rows = _hessian(rev, last.knot, torch.zeros_like(z), weights, probes)
    _, there = _hessian(rev, last.knot, z, weights, probes)
    middle = rev(0.5 * z, last.knot).mix(*weights)
    bent = (2.0 / 3.0) * _rows(z * (middle - 0.5 * (low + last.mix(*weights))))
    turns = [_rows(v * (b - a)) for v, a, b in zip(probes, rows, there, strict=True)]
    turned = 0.5 * std**2 * torch.stack(turns).mean(0)
    hessian = std**4 * torch.stack([_rows(row.square()) for row in rows]).mean(0)
    norm = 0.25 * hessian + 0.5 * std**2 * _rows(low.square()) * hessian.sqrt()
    return SECOND_ORDER * (bent.abs() + turned.abs() + norm)


def _hessian(
    rev: ReverseSDE, knot: Knot, z: Tensor, weights: tuple[float, float], probes: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of rho at z and the products of its Hessian with the probes."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        gradient = rev(z, knot).mix(*weights)
        products = [torch.autograd.grad(gradient, z, v, retain_graph=True)[0] for v in probes]
    return gradient.detach(), products


def _isotropic(x: Tensor, draw: Draw) -> list[Tensor]:
    """Vectors with E[v v^T] = I: all units times sqrt(D) in few dimensions, a few of signs in many."""
    d = x[0].numel()
    if d > EXACT_UP_TO:
        return [torch.where(draw.normal("prior remainder", k) >= 0, 1.0, -1.0).to(x) for k in range(ISOTROPIC)]
    units = math.sqrt(d) * torch.eye(d, dtype=x.dtype, device=x.device)
    return [unit.reshape(x.shape[1:]).expand_as(x) for unit in units]
