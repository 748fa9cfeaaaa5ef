"""log p(x) of a score model through the probability-flow ODE, with the standard error of the trace estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.likelihood.divergence import divergence, make_probes
from sde_lib import SDE, ReverseSDE
from sde_lib._checks import check_positive, check_state
from solvers import TABLEAUX, Angle, Coordinate, Status
from solvers.adaptive import failure, integrate, row_knot
from solvers.noise import Rng, as_draw
from solvers.runge_kutta import Leaves, rescale

DIVERGENCES = ("auto", "exact", "hutchinson")
EXACT_UP_TO = 16
"""Number of dimensions up to which "auto" takes the exact trace: there it costs about as much as the probes."""


@dataclass
class Likelihood:
    """Log densities in nats, and what they are made of. All per sample, float64, on the CPU.

    Attributes:
        log_prob: log p at t_min of the state, (B,).
        trace_se: standard error of the trace estimate in nats, (B,): 0 for the exact trace, nan for a single probe,
            which cannot tell.
        log_prior: log density of the latent under the prior, (B,).
        latent: the state at t_max, (B, *D), on the device of x.
        nfe: network evaluations, each followed by vector-Jacobian products, (B,).
        vjps: vector-Jacobian products, (B,).
        status: `solvers.Status`, (B,).
        message: what went wrong and where; empty if nothing did.
    """

    log_prob: Tensor
    trace_se: Tensor
    log_prior: Tensor
    latent: Tensor
    nfe: Tensor
    vjps: Tensor
    status: Tensor
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether every sample was solved."""
        return bool((self.status == Status.OK).all())


@dataclass
class _LikelihoodField:
    """d(y, log det)/du in a coordinate, from one network call; probes are fixed along the path."""

    rev: ReverseSDE
    coordinate: Coordinate
    probes: Tensor | None

    def slopes(self, u: Tensor, leaves: Leaves) -> Leaves:
        y = leaves[0]
        knot = row_knot(self.rev.law, self.coordinate, u, y.ndim)
        scale = self.coordinate.scale(knot)
        x = rescale(y, scale)
        weights: list[Any] = []

        def raw(state: Tensor) -> Tensor:
            prediction = self.rev(state, knot)
            weights.extend(prediction.weights(*self.coordinate.slope(knot)))
            return prediction.raw

        output, trace = divergence(raw, x, self.probes)
        a, b = weights
        slope = rescale(x, a) + rescale(output, b)
        # the part of the slope that is linear in x has an exact trace: only the network's is estimated
        d = y[0].numel()
        return slope, _column(scale) * (d * _column(a) + _column(b) * trace)

    def select(self, rows: Tensor) -> _LikelihoodField:
        probes = None if self.probes is None else self.probes[:, rows]
        return _LikelihoodField(self.rev.select(rows), self.coordinate, probes)


def log_likelihood(
    rev: ReverseSDE,
    x: Tensor,
    *,
    divergence: str = "auto",
    probes: int = 2,
    probe: str = "rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    atol_nats: float = 1e-3,
    prior: Callable[[Tensor], Tensor] | None = None,
    rng: Rng = None,
    condition: Mapping[str, Any] | None = None,
    sigma_data: float = 1.0,
    max_steps: int = 2000,
) -> Likelihood:
    r"""log p_{t_min}(x) of the model's probability-flow ODE, in nats per sample.

    The instantaneous change of variables (Song et al. 2021, arXiv:2011.13456, eq. 39),
    :math:`\log p_{t_{min}}(x) = \log \pi(x_T) + \int \nabla\cdot \dot x\, dt`, is integrated per sample and adaptively
    in the angle coordinate, where state and integrand stay of order one and the scale terms (thousands of nats) are
    added in closed form. Velocity and divergence come from one network call. A sample's result does not depend on its
    batch mates, and nothing is evaluated outside [t_min, t_max].

    It is the density at the model's smallest noise level, evaluated at x as handed over: data are not noised first
    (the convention of Song et al.).

    Args:
        rev: reverse SDE of a continuous law.
        x: states in model units, (B, *D), finite.
        divergence: "exact" (one vector-Jacobian product per dimension), "hutchinson", or "auto": exact up to
            `EXACT_UP_TO` dimensions.
        probes: number of Hutchinson probes, fixed along the path; two or more give a standard error.
        probe: "rademacher" or "gaussian".
        rtol: relative tolerance on the state.
        atol: absolute tolerance on the state.
        atol_nats: absolute tolerance per step on log p, in nats.
        prior: log density of the latent, (B, *D) -> (B,); the law's prior N(0, prior_std^2 I) by default.
        rng: noise of the probes, as in `solvers.solve`; a list of ints gives every sample its own.
        condition: keyword arguments for the network, batch first.
        sigma_data: standard deviation of the data in model units, for the coordinate.
        max_steps: steps tried before a sample gives up.

    Raises:
        ValueError: for x that is not finite, a chain, or options that make no sense.
    """
    if not isinstance(rev, ReverseSDE):
        raise TypeError(f"`rev` must be a ReverseSDE (model.reverse()), got {type(rev).__name__}.")
    law = rev.law
    if not isinstance(law, SDE):
        raise ValueError(
            "A likelihood through the ODE needs continuous time; this model lives on a chain. Interpolate it with "
            "TabulatedSDE(chain.alphas_cumprod)."
        )
    check_state("x", x)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("`x` contains NaN or infinite values.")
    for name, value in (("rtol", rtol), ("atol", atol), ("atol_nats", atol_nats)):
        check_positive(name, value)
    if divergence not in DIVERGENCES:
        raise ValueError(f"`divergence` must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    if not isinstance(probes, int) or probes < 1:
        raise ValueError(f"`probes` must be an int >= 1, got {probes!r}.")
    d = x[0].numel()
    exact = divergence == "exact" or (divergence == "auto" and d <= EXACT_UP_TO)
    if condition:
        rev = rev.given(**condition)
    vectors = None
    if not exact:
        draw = as_draw(rng, x)
        vectors = torch.stack([make_probes(draw.normal("probe", k), probe) for k in range(probes)])

    coordinate = Angle(sigma_data)
    start, stop = law.knot(law.t_min), law.knot(law.t_max)
    y = rescale(x.detach(), 1.0 / coordinate.scale(start))
    log_det = torch.zeros(len(x), 1 if exact else probes, dtype=torch.float64, device=x.device)
    result = integrate(
        _LikelihoodField(rev, coordinate, vectors),
        float(coordinate.of(start)),
        float(coordinate.of(stop)),
        (y, log_det),
        TABLEAUX["dormand_prince"],
        (rtol, 1e-12),
        (atol, atol_nats),
        max_steps,
    )
    y, log_det = result.leaves
    latent = rescale(y, coordinate.scale(stop))
    log_prior = (prior or law.prior_logp)(latent.double()).double().cpu()
    scales = d * (math.log(float(coordinate.scale(stop))) - math.log(float(coordinate.scale(start))))
    per_probe = log_det.cpu()
    if exact:
        trace_se = torch.zeros(len(x), dtype=torch.float64)
    else:
        trace_se = per_probe.std(1) / math.sqrt(probes) if probes > 1 else torch.full((len(x),), math.nan)
    log_prob = log_prior + scales + per_probe.mean(1)
    log_prob = torch.where(result.status == Status.OK, log_prob, math.nan)
    nfe = result.calls * rev.nfe_per_call
    return Likelihood(
        log_prob=log_prob,
        trace_se=trace_se,
        log_prior=log_prior,
        latent=latent,
        nfe=nfe,
        vjps=result.calls * (d if exact else probes),
        status=result.status,
        message=failure(result, coordinate, law),
    )


def _column(value: Any) -> Any:
    """A coefficient of shape (n, 1, …) as a float64 column (n, 1)."""
    return value.reshape(-1, 1) if isinstance(value, Tensor) else value
