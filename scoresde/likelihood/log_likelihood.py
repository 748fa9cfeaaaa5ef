"""log p(x) of a score model through the probability-flow ODE, with an error bar split by cause."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from scoresde.likelihood.adaptive import adaptively
from scoresde.likelihood.divergence import CHUNK
from scoresde.likelihood.fixed import by_fixed_steps
from scoresde.likelihood.precision import allow_tf32
from scoresde.likelihood.probes import Probes
from scoresde.likelihood.result import Likelihood
from scoresde.likelihood.settings import Adaptive, Settings
from scoresde.likelihood.target import Refinement, reached
from scoresde.likelihood.words import enough_memory, shown
from sde_lib import ReverseSDE
from solvers import Grid, Solver
from solvers.noise import Rng, as_draw


def log_likelihood(
    rev: ReverseSDE,
    x: Tensor,
    *,
    steps: int | None = None,
    tol: float | None = None,
    divergence: str = "auto",
    probes: Probes | str = "adapted",
    num_probes: int | None = None,
    target_se: float | None = None,
    doubling: bool = True,
    correct: Collection[str] = (),
    prior: Callable[[Tensor], Tensor] | None = None,
    rng: Rng = None,
    condition: Mapping[str, Any] | None = None,
    sigma_data: float = 1.0,
    solver: Solver | str | None = None,
    grid: Grid | str | None = None,
    joint: bool | None = None,
    chunk: int = CHUNK,
    batch_rows: int = 1024,
    max_steps: int = 2000,
    tf32: bool = False,
    differentiable: bool = False,
    check: bool = True,
    keep: bool = True,
    progress: bool | None = False,
) -> Likelihood:
    r"""log p_{t_min}(x) of the model's probability-flow ODE, in nats per sample.

    The instantaneous change of variables (Song et al. 2021, arXiv:2011.13456, eq. 39),
    :math:`\log p_{t_{min}}(x) = \log \pi(x_T) + \int \nabla\cdot \dot x\, dt`, along the angle
    (`solvers.Angle`), where state and integrand stay of order one and the scale terms (thousands of nats) are added in
    closed form. It is the density at the model's smallest noise level, evaluated at x as handed over: data are not
    noised first (the convention of Song et al.). Nothing is evaluated outside [t_min, t_max], and a sample's result
    does not depend on its batch mates.

    *Fixed steps* (`steps`; the default where the trace is estimated): a multistep method, one network call per step,
    and a quadrature of the divergence over the knots, with fresh probes at each: for the same number of products 6 to
    7 times less variance than one probe that is kept along the path, and no host synchronisation.
    *Adaptive* (`tol`; the default where the trace is exact): Dormand-Prince with steps of each sample's own; probes
    are kept along the path, as an adaptive method must.

    The terms beyond the ODE, from quantities at its ends that are known anyway:

    * truncation: p_t solves a heat equation in :math:`\sigma^2 / \alpha^2`, so that to first order
      :math:`\log p_0(x) - \log p_t(x) = \tfrac12 [\sigma\, \nabla\cdot\hat\epsilon - \|\hat\epsilon\|^2] + D \log\alpha
      + (1 - \alpha)\, x\cdot\hat\epsilon / \sigma` at t = t_min: good where sigma is below a third of the smallest
      scale of the data, and only then does p_0 mean anything to a network that was never trained below t_min;
    * prior mismatch: the model's score at T differs from the prior's by :math:`\nabla\rho` with :math:`\rho = \log p_T
      - \log\pi`; for data that are small beside the noise rho is quadratic and follows from its gradients at the
      latent and at 0, its trace, and the norm of p_T.

    Args:
        rev: reverse SDE of a continuous law, under the score of a density.
        x: states in model units, (B, *D), finite.
        steps: number of steps of the fixed grid, a multiple of 4 (for the two coarser runs of `doubling`).
        tol: tolerance on log p, in nats, of the adaptive integration: a run with that tolerance per step is followed by
            one with 1/32 of it, and by further ones (at most `ROUNDS` after the first) for samples where a quarter of
            the change of log p, an estimate of what is left, exceeds `tol`; NOT_CONVERGED says that it still does. (The
            errors of steps add up, over hundreds of steps to hundreds of times their tolerance.) A change of less than
            three times `Likelihood.precision` always passes: the arithmetic tells no more. On the state the tolerance
            per step is a hundredth. With ``doubling=False`` there is the first run alone, and its error is not known.
        divergence: "exact" (one vector-Jacobian product per dimension), "hutchinson", or "auto": exact up to
            `EXACT_UP_TO` dimensions.
        probes: law of the probe vectors: a name in `PROBES`, an object, or "adapted": the cosine basis for images
            (C, H, W), signs for all else.
        num_probes: estimates per knot (fixed steps), 2 by default, and 2 or more give an error bar; or along the path
            (adaptive), where it takes `KEPT`, the default.
        target_se: nats (fixed steps only): as many probes as each sample needs for that standard error, see
            `Likelihood.refine`. The pilot's `PILOT` estimates are taken first, or `num_probes`, if that is more.
        doubling: estimate the discretisation error: with fixed steps by two more runs, of half and of a quarter of the
            steps, on one more probe that is kept along the path (0.75 times the products of one probe, and as many
            more at the knots); adaptively by further runs, see `tol`, the last of which is reported.
        correct: which of "truncation" and "prior" are added to `log_prob`.
        prior: terminal log density where it is known, (B, *D) -> (B,); the law's prior N(0, prior_std^2 I) by default.
        rng: noise of the probes, as in `solvers.solve`; a list of ints gives every sample its own.
        condition: keyword arguments for the network, batch first.
        sigma_data: standard deviation of the data in model units, for the coordinate.
        solver: of the trajectory on the fixed grid: any deterministic one; by default the multistep method of order 5
            in the flow prediction, which was measured best (``benchmarks/likelihood.py``).
        grid: a grid or its name; ``Blended(mix=0.15)`` by default.
        joint: take the divergence in the calls the solver makes at the knots (default where it makes just these), or
            after the trajectory, several knots per call.
        chunk: products of the exact trace taken together; 1 for networks that `torch.vmap` cannot differentiate.
        batch_rows: rows per network call where several knots share one.
        max_steps: adaptive steps tried before a sample gives up.
        tf32: allow TF32 in float32 products on NVIDIA GPUs, while this runs: about 0.03 nats at D = 768.
        differentiable: record a graph, so that ``log_prob.sum().backward()`` gives gradients with respect to x and the
            network's parameters (fixed steps only; keep x.requires_grad as you need it).
        check: look whether results are finite, the one time the host waits for the device; without it they stay on the
            device and `status` is not known.
        keep: store the trajectory for `Likelihood.refine`: steps + 1 states.
        progress: whether to show a bar that counts network calls; None: on a terminal.

    Raises:
        ValueError: for x that is not finite, a chain, what is no density's (`rev.describes`), or options that make no
            sense.
        MemoryError: if the device's memory does not hold the batch, with what to change.
    """
    asked = dict(
        steps=steps, tol=tol, divergence=divergence, probes=probes, num_probes=num_probes, target_se=target_se,
        doubling=doubling, correct=correct, prior=prior, sigma_data=sigma_data, solver=solver, grid=grid, joint=joint,
        chunk=chunk, batch_rows=batch_rows, max_steps=max_steps, tf32=tf32, differentiable=differentiable, check=check,
        keep=keep,
    )  # fmt: skip
    settings = Settings.of(rev, x, asked)
    way, draw = settings.way, as_draw(rng, x.detach())
    rev = rev.given(**condition) if condition else rev
    with enough_memory(x), allow_tf32(tf32, x.device), shown(rev, progress) as watched:
        if isinstance(way, Adaptive):
            return adaptively(watched, x.detach(), settings, way, draw)
        sums = by_fixed_steps(watched, x, settings, way, draw)
        if way.target_se is not None:
            sums = reached(sums, way.target_se)
    if not way.keep or not way.check or way.differentiable:
        return sums.likelihood()
    sums.rev = rev  # later probes move no bar that is closed
    return replace(sums.likelihood(), _more=Refinement(sums))
