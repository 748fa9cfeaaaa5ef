"""log p(x) of a score model through the probability-flow ODE, with an error bar split by cause."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from scoresde.likelihood.divergence import (
    CHUNK,
    EXACT_UP_TO,
    Traces,
    check_trace_options,
    is_exact,
    value_and_traces,
)
from scoresde.likelihood.ends import Term, mismatch, mismatch_remainder, truncation, truncation_remainder
from scoresde.likelihood.intervals import half_width
from scoresde.likelihood.path import Groups, Nodes, Tracer, ascending_knots, evaluate, measure
from scoresde.likelihood.pool import Pool
from scoresde.likelihood.precision import allow_tf32
from scoresde.likelihood.probes import Probes, as_probes, variance
from scoresde.likelihood.words import density, described, sentences, shown, unknown_noise
from sde_lib import SDE, Prediction, ReverseSDE
from sde_lib._checks import check_count, check_positive, check_state
from solvers import TABLEAUX, Angle, Blended, Coordinate, Grid, Multistep, Solver, Status, as_solver
from solvers.adaptive import failure, integrate, row_knot
from solvers.noise import Draw, Rng, as_draw
from solvers.runge_kutta import Leaves, rescale

CORRECTIONS = ("truncation", "prior")
SETTLED = 0.1
"""Bits/dim: a sample whose discretisation bar is longer is NOT_CONVERGED. Of those that are not flagged at most 1 %
were off by more, on exact scores of six Gaussians in 8 dimensions under VP, VE and flow SDEs at 16 to 64 steps."""
STEPS = 32
"""Steps of the fixed grid by default."""
TOLERANCE = 1e-3
"""Tolerance of the adaptive integration by default, in nats: on log p, not per step (see `log_likelihood`)."""
FINER = 32.0
"""Between two adaptive runs: twice the steps of a method of order five."""
LEFT = 4.0
"""The change between two adaptive runs in units of what is left. On smooth scores it is 20 and more; on random networks
that are rough in time errors fell 5 to 30 times with a tolerance 32 times smaller."""
ROUNDS = 3
"""Adaptive runs after the first, at most: with the last, steps are eight times as many."""
PILOT = 4
"""Estimates per knot that decide how many a target takes: their variance has 3 degrees of freedom or more at every knot
that matters, so that with three such knots the number is at most 1.3 times what it need be."""
FEWEST = 4
"""Estimates per knot that a target takes at the least: fewer may agree by chance where one knot rules."""
KEPT = 6
"""Estimates by probes kept along the path that tell their noise: where one coupling of two elements rules, an estimate
takes one of two values, and K of them agree, at a standard error of 0, in 2^(1 - K) of the cases: 3 % for 6."""
TOGETHER = 16
"""Estimates taken from one network call at a knot: each holds its products until their scatter is known."""


@dataclass(repr=False)
class Likelihood:
    r"""Log densities in nats, and how far off they may be, by cause. Per sample, float64, on the CPU.

    Attributes:
        log_prob: log p at t_min of the state, (B,), or at t = 0 with ``correct=("truncation",)``; nan where it failed.
        trace_se: standard error of the trace estimate, (B,): 0 for the exact trace, nan for a single probe or for less
            than `KEPT` kept ones, which cannot tell. Statistical: multiply by the t-quantile of `trace_dof` degrees of
            freedom, as `trace_bar` does. See `scoresde.likelihood.probes.squares`.
        trace_dof: degrees of freedom of `trace_se`, (B,) (Welch and Satterthwaite); inf for the exact trace.
        discretization: difference between the result and the one with half as many steps (fixed grids; or, if larger,
            1/32 of the difference between half and a quarter) or with a tolerance per step 32 times larger
            (adaptive), (B,); nan without doubling. Three times this is a bar; the result is usually closer by the order
            of the method.
        truncation: a bias, known to first order: what leads from the density at t_min to that at t = 0, signed, (B,).
            See `log_likelihood`.
        prior_mismatch: a bias, known to first order: the model's own estimate of log p_T - log prior at the latent,
            signed, (B,); 0 where the terminal density was handed over.
        remainder: a bound on what the terms in `corrected` leave, (B,): twice their next orders, which take three more
            calls for each; 0 where nothing is corrected. Too small where sigma at t_min is above a third of the
            smallest scale of the data: there the series of truncation does not converge.
        precision: what the arithmetic leaves uncertain, (B,): an order of magnitude.
        log_prior: log density of the latent under the prior, (B,).
        latent: the state at t_max, (B, *D), on the device of x.
        nfe: network evaluations, (B,).
        vjps: vector-Jacobian products, (B,).
        status: `solvers.Status`, (B,).
        corrected: which of `CORRECTIONS` are part of `log_prob`.
        kept_log_prob: log p on the one probe that `doubling` keeps along the path, (B,): noisier than `log_prob`, but
            smooth in everything else, so that runs can be compared; None without one.
        message: what went wrong and where, or why the noise of the trace is unknown; empty if nothing is to be said.
        what: what log p is the logarithm of.
    """

    log_prob: Tensor
    trace_se: Tensor
    trace_dof: Tensor
    discretization: Tensor
    truncation: Tensor
    prior_mismatch: Tensor
    remainder: Tensor
    precision: Tensor
    log_prior: Tensor
    latent: Tensor
    nfe: Tensor
    vjps: Tensor
    status: Tensor
    corrected: tuple[str, ...] = ()
    kept_log_prob: Tensor | None = None
    message: str = ""
    what: str = "density"
    _path: _Sums | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return described(self)

    @property
    def ok(self) -> bool:
        """Whether every sample was solved."""
        return bool((self.status == Status.OK).all())

    def trace_bar(self, confidence: float = 0.95) -> Tensor:
        """Half width of the confidence interval for the noise of the trace: t-quantile times standard error, (B,)."""
        return half_width(self.trace_se, self.trace_dof, confidence)

    def error(self, confidence: float = 0.95) -> Tensor:
        r"""Half width of the interval about `log_prob` for the density that `log_prob` is of, (B,), in nats.

        :math:`\sqrt{\mathrm{trace}^2 + (3\,\mathrm{disc})^2} + \mathrm{remainder} + \mathrm{precision}`: a random bar
        with the confidence asked for, a difference of runs, and bounds. As long as nothing is corrected that density is
        the ODE's, from the prior to t_min. With ``correct=["prior"]`` it is p at t_min, with ``"truncation"`` too p at
        t = 0. What is not corrected is a bias with a sign, not a bar: see `bias`. A model's own error, the distance of
        its density from the data's, is not and cannot be part of it.
        """
        trace = self.trace_bar(confidence)
        return (trace.square() + 9.0 * self.discretization.square()).sqrt() + self.remainder + self.precision

    @property
    def bias(self) -> Tensor:
        """Truncation and prior mismatch as far as they are not corrected, signed, (B,): ``log_prob + bias`` is the
        estimate of log p at t = 0. Known to first order, without a bound on what that leaves: for one use `correct`."""
        terms = {"truncation": self.truncation, "prior": self.prior_mismatch}
        left = [term for name, term in terms.items() if name not in self.corrected]
        return torch.stack([torch.zeros_like(self.truncation), *left]).sum(0)

    def refine(self, num_probes: int | None = None, target_se: float | None = None) -> Likelihood:
        """More probes at the stored knots, without solving the trajectory again.

        Args:
            num_probes: add so many per knot and sample.
            target_se: give each sample what it needs for a standard error of so many nats; the exact trace where that
                is cheaper. How many that is, is decided by a pilot, the first `PILOT` estimates per knot; the result is
                that of the others alone, so that it is unbiased and its bar covers (`nfe` and `vjps` count the pilot).
                The standard error it reports is measured anew and scatters about the target.

        Raises:
            ValueError: after an adaptive run, whose probes are fixed along the path, and with ``keep=False``.
        """
        if (num_probes is None) == (target_se is None):
            raise ValueError("Give `num_probes` or `target_se`.")
        if self._path is None:
            raise ValueError(
                "Nothing is stored to refine: use fixed steps (steps=…), not `tol`, with keep=True and check=True."
            )
        path = self._path.copy()
        with _memory(self.latent), allow_tf32(path.setup.tf32, self.latent.device):
            if target_se is not None:
                path.reach(target_se)
            elif num_probes is not None:
                check_trace_options("auto", num_probes, 1)
                path.add(num_probes)
        result = path.likelihood()
        result._path = path
        return result


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
        rev: reverse SDE of a continuous law.
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
        ValueError: for x that is not finite, a chain, or options that make no sense.
        MemoryError: if the device's memory does not hold the batch, with what to change.
    """
    law = _check(rev, x, correct, divergence, num_probes, chunk, check)
    check_count("batch_rows", batch_rows)
    check_count("max_steps", max_steps)
    if prior is not None and not callable(prior):
        raise TypeError(f"`prior` must be a function, latents (B, *D) -> log density (B,), or None, got {prior!r}.")
    exact = is_exact(divergence, x.shape[1:])
    if steps is not None and tol is not None:
        raise ValueError(f"Give `steps` (a fixed grid) or `tol` (adaptive), not both; got {steps} and {tol}.")
    check_positive("sigma_data", sigma_data)
    adaptive = tol is not None or (steps is None and exact and not differentiable and check)
    if condition:
        rev = rev.given(**condition)
    if num_probes is None:
        num_probes = KEPT if adaptive else 2 if target_se is None else PILOT
    setup = _Setup(rev, law, as_probes(probes, x.shape[1:]), num_probes, exact, doubling, tuple(correct), prior,
                   sigma_data, chunk, tf32)  # fmt: skip
    draw = as_draw(rng, x.detach())
    with _memory(x), allow_tf32(tf32, x.device), shown(rev, progress) as setup.rev:
        if adaptive:
            for name, value in (("target_se", target_se), ("solver", solver), ("grid", grid), ("joint", joint)):
                if value is not None:
                    raise ValueError(f"`{name}` needs fixed steps: give steps=… instead of tol.")
            if differentiable or not check:
                raise ValueError("`differentiable` and check=False need fixed steps: give steps=… instead of tol.")
            tol = TOLERANCE if tol is None else tol
            check_positive("tol", tol)
            return _adaptive(setup, x.detach(), tol, draw, max_steps)
        steps = STEPS if steps is None else steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 4 or (doubling and steps % 4):
            raise ValueError(f"`steps` must be a multiple of 4 (an int >= 4 without doubling), got {steps!r}.")
        if target_se is not None and (differentiable or not check):
            raise ValueError("`target_se` looks at the results: it does not go with `differentiable` or check=False.")
        stored = keep or target_se is not None
        result = _fixed(setup, x, steps, draw, solver, grid, joint, batch_rows, differentiable, check, stored)
        if target_se is not None:
            result = result.refine(target_se=target_se)
            result._path = result._path if keep else None
        if result._path is not None:  # later probes move no bar that is closed
            result._path.setup = replace(setup, rev=rev)
        return result


def _check(
    rev: Any, x: Any, correct: Collection[str], divergence: str, num_probes: int | None, chunk: int, check: bool
) -> SDE:
    if not isinstance(rev, ReverseSDE):
        raise TypeError(f"`rev` must be a ReverseSDE (model.reverse()), got {type(rev).__name__}.")
    if not isinstance(rev.law, SDE):
        raise ValueError(
            "A likelihood through the ODE needs continuous time; this model lives on a chain. Go on between its"
            " levels with chain.continuous(), or take the chain's own bound: elbo()."
        )
    check_state("x", x)
    if check and not bool(torch.isfinite(x).all()):
        raise ValueError("`x` contains NaN or infinite values.")
    check_trace_options(divergence, 1 if num_probes is None else num_probes, chunk)
    if isinstance(correct, str) or not isinstance(correct, Collection) or any(c not in CORRECTIONS for c in correct):
        raise ValueError(f"`correct` must be a collection of {', '.join(CORRECTIONS)}, got {correct!r}.")
    return rev.law


@dataclass
class _Setup:
    """What both integrations share."""

    rev: ReverseSDE
    law: SDE
    probes: Probes
    num_probes: int
    exact: bool
    doubling: bool
    correct: tuple[str, ...]
    prior: Callable[[Tensor], Tensor] | None
    sigma_data: float
    chunk: int
    tf32: bool

    def rounding(self, x: Tensor) -> float:
        """What the arithmetic leaves uncertain, in nats: rounding in the network, and of the state beside its noise."""
        knot = self.law.knot(self.law.t_min)
        network = ROUNDING * _roundoff(self.rev, x, self.tf32)
        return math.sqrt(x[0].numel()) * (network + torch.finfo(x.dtype).eps * math.exp(float(knot.half_log_snr)))

    @property
    def splits(self) -> tuple[int, ...]:
        """Of the estimates at a knot: the pilot, and those after it."""
        if self.exact:
            return ()
        pilot = min(self.num_probes, PILOT)
        return (pilot, self.num_probes - pilot) if self.num_probes > pilot else (pilot,)

    def group(self, draw: Draw, *key: Any) -> Sequence[Tensor]:
        """The vectors of one estimate."""
        return self.probes.group(draw.normal(*key))

    def log_prior(self, latent: Tensor) -> Tensor:
        if self.prior is None:
            return self.law.prior_logp(latent.double()).double()
        found = self.prior(latent.double())
        if not isinstance(found, Tensor) or found.shape != latent.shape[:1]:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"`prior` must return log densities, a tensor of shape ({len(latent)},), got {got}.")
        return found.double()

    @property
    def what(self) -> str:
        """What log p is the logarithm of."""
        return density(self.law.t_min, "truncation" in self.correct, "prior" in self.correct or self.prior is not None)

    def products(self, shape: Sequence[int], estimates: int) -> int:
        """Vector-Jacobian products of one evaluation with so many estimates."""
        return math.prod(shape) if self.exact else estimates * self.probes.size(shape)

    def terms(self, first: Prediction, last: Prediction) -> tuple[Term, Term]:
        """Truncation and prior mismatch, up to the traces at both ends."""
        return truncation(first), mismatch(self.rev, last, self.law.prior_std, self.prior is not None)

    def remainder(self, first: Prediction, last: Prediction, draw: Draw) -> tuple[Tensor, int, int]:
        """A bound on what the corrections leave, (B,), and the network calls and products that it took."""
        x, calls, products = first.x.detach(), 0, 0
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        with torch.no_grad():
            if "truncation" in self.correct:
                group = None if self.exact else [self.group(draw, "remainder")]
                total = total + truncation_remainder(self.rev, self.law, first, group, self.chunk)
                calls, products = calls + 3, products + 3 * self.products(x.shape[1:], 1)
            if "prior" in self.correct and self.prior is None and float(last.knot.alpha) > 0.0:
                vectors = _isotropic(x, draw)
                total = total + mismatch_remainder(self.rev, last, self.law.prior_std, vectors)
                calls, products = calls + 3, products + 2 * len(vectors)
        return total, calls, products


def _isotropic(x: Tensor, draw: Draw) -> list[Tensor]:
    """Vectors with E[v v^T] = I: all units times sqrt(D) in few dimensions, a few of signs in many."""
    d = x[0].numel()
    if d > EXACT_UP_TO:
        return [torch.where(draw.normal("remainder", "prior", k) >= 0, 1.0, -1.0).to(x) for k in range(ISOTROPIC)]
    units = math.sqrt(d) * torch.eye(d, dtype=x.dtype, device=x.device)
    return [unit.reshape(x.shape[1:]).expand_as(x) for unit in units]


ISOTROPIC = 4
"""Sign vectors for the size of the prior's second-order terms in many dimensions, where each tells its norm well."""


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _roundoff(rev: ReverseSDE, x: Tensor, tf32: bool) -> float:
    """Unit roundoff of the coarsest arithmetic in use: of the state, the score model, autocast, or TF32."""
    dtypes = [x.dtype]
    owner = getattr(rev.network, "__self__", None)
    if isinstance(getattr(owner, "dtype", None), torch.dtype):
        dtypes.append(owner.dtype)  # type: ignore[union-attr]
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    unit = max(torch.finfo(dtype).eps for dtype in dtypes) / 2
    if kind == "cuda" and torch.float32 in dtypes and tf32:
        unit = max(unit, 2.0**-11)
    return unit


def _settled(d: int) -> float:
    """`SETTLED` in nats."""
    return SETTLED * d * math.log(2.0)


ROUNDING = 16.0
"""Error of log p by rounding inside a network, in units of roundoff * sqrt(D): 5 to 17 were measured in bfloat16."""


@contextlib.contextmanager
def _memory(x: Tensor) -> Iterator[None]:
    """A device that is too small says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        raise MemoryError(
            f"The likelihood of {len(x)} samples of shape {tuple(x.shape[1:])} does not fit into the memory of "
            f"{x.device}. Score fewer samples at a time, lower `batch_rows` or `chunk`, or use fewer probes. ({error})"
        ) from error


# --- fixed steps -----------------------------------------------------------------------------------------------------


def _fixed(
    setup: _Setup,
    x: Tensor,
    steps: int,
    draw: Draw,
    solver: Solver | str | None,
    grid: Grid | str | None,
    joint: bool | None,
    batch_rows: int,
    differentiable: bool,
    check: bool,
    keep: bool,
) -> Likelihood:
    solver = as_solver(solver or Multistep(4, 5, prediction="flow", starter="ramp")).on(setup.law)
    if solver.stochastic or solver.adaptive:
        raise ValueError(f"The trajectory needs a deterministic solver with fixed steps, got {solver}.")
    grid = Blended(mix=0.15, sigma_data=setup.sigma_data) if grid is None else grid
    calls_at_knots = solver.nfe_per_step - solver.shares_calls == 1
    if joint and not calls_at_knots:
        raise ValueError(f"{type(solver).__name__} calls the network between the knots too: use joint=False.")
    tracer = Tracer(
        setup.rev, solver, setup.sigma_data, calls_at_knots if joint is None else joint, setup.chunk, batch_rows,
        differentiable, probes=setup.probes, splits=setup.splits,
    )  # fmt: skip
    knots = ascending_knots(setup.law, grid, steps)
    kept = None if setup.exact or not setup.doubling else setup.group(draw, "kept")

    def groups(k: int) -> Groups:
        if setup.exact:
            return None
        fresh = [setup.group(draw, "probe", k, j) for j in range(setup.num_probes)]
        return fresh if kept is None else [*fresh, kept]

    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        nodes = tracer.follow(x, knots, groups)
        log_prior = setup.log_prior(nodes.latent)
        terms = setup.terms(*nodes.ends)
    remainder, calls, products = setup.remainder(*nodes.ends, draw)
    nfe = (nodes.calls + int(terms[1].slope != 0.0) + calls) * setup.rev.nfe_per_call
    vjps = len(nodes.knots) * setup.products(x.shape[1:], setup.num_probes + (kept is not None)) + products
    changes: list[Tensor] = []
    kept_log_prob: Tensor | None = None
    if setup.doubling:
        coarse = replace(tracer, differentiable=False, coarse=True, splits=())
        only: Groups = None if kept is None else [kept]

        def total(n: Nodes) -> Tensor:
            return setup.log_prior(n.latent).detach() + n.integral([t.values[:, -1].detach() for t in n.traces])

        with torch.no_grad():
            results = [total(nodes)]
            kept_log_prob = results[0] if kept is not None else None
            for stride in (2, 4):
                level = coarse.follow(x.detach(), knots[::stride], lambda k: only)
                nfe += level.calls * setup.rev.nfe_per_call
                vjps += len(level.knots) * setup.products(x.shape[1:], 1)
                results.append(total(level))
            changes = [results[0] - results[1], results[1] - results[2]]
    sums = _Sums(setup, draw, nodes, log_prior, terms, remainder, changes, kept_log_prob, nfe, vjps, check)
    result = sums.likelihood()
    if keep and check and not differentiable:
        result._path = sums
    return result


@dataclass
class _Sums:
    """What a fixed-step result is put together from: trace estimates per knot, and all that stands beside them.

    The first `PILOT` estimates are pooled for themselves: they decide how many a target takes, and once they have, they
    are no part of the result any more (`settled`).
    """

    setup: _Setup
    draw: Draw
    nodes: Nodes
    log_prior: Tensor
    terms: tuple[Term, Term]
    remainder: Tensor
    changes: Sequence[Tensor]
    kept: Tensor | None
    nfe: Any
    vjps: Any
    check: bool
    settled: bool = False
    pilot: Pool = field(init=False)
    rest: Pool = field(init=False)

    def __post_init__(self) -> None:
        traces, splits = self.nodes.traces, self.setup.splits
        self.pilot = Pool.of(traces, 0, splits[0], 0) if splits else Pool.exact(traces)
        self.rest = Pool.of(traces, splits[0], sum(splits), 1) if len(splits) > 1 else Pool.empty(traces)

    def copy(self) -> _Sums:
        """Its own sums, the same trajectory."""
        b = len(self.log_prior)
        new = replace(self)
        new.pilot, new.rest = self.pilot.copy(), self.rest.copy()
        new.nfe, new.vjps = (torch.as_tensor(v).expand(b).clone() for v in (self.nfe, self.vjps))
        return new

    @property
    def pool(self) -> Pool:
        """What the result rests on."""
        if self.setup.exact:
            return self.pilot
        if self.settled:
            return self.rest
        none = isinstance(self.rest.count, float) and self.rest.count == 0.0
        return self.pilot if none else self.pilot.joined(self.rest)

    def _weights(self) -> list[float]:
        """Of the traces in log_prob, corrections included."""
        weights = list(self.nodes.raw)
        for name, place, term in zip(CORRECTIONS, (0, -1), self.terms, strict=True):
            if name in self.setup.correct:
                weights[place] += term.slope
        return weights

    def likelihood(self) -> Likelihood:
        """The result."""
        setup, d, pool = self.setup, self.nodes.latent[0].numel(), self.pool
        values = [term.at(pool.means[place]) for term, place in zip(self.terms, (0, -1), strict=True)]
        log_prob = self.log_prior + self.nodes.integral(pool.means)
        for name, value in zip(CORRECTIONS, values, strict=True):
            if name in setup.correct:
                log_prob = log_prob + value
        noise, dof = pool.variance(self._weights())
        b = len(log_prob)
        precision = torch.full_like(noise, setup.rounding(self.nodes.states[0]))
        change = torch.full_like(noise, math.nan)
        if self.changes:
            last, before = (c.abs() for c in self.changes)
            # of a method of order five the second halving leaves 1/32: a change that is small by chance is no bar
            change = torch.maximum(last, before / 32.0)
        status, message = torch.zeros(b, dtype=torch.int64, device=log_prob.device), ""
        status = torch.where(3.0 * change > _settled(d) + precision, int(Status.NOT_CONVERGED), status)
        finite = torch.isfinite(log_prob.detach())
        log_prob = torch.where(finite, log_prob, math.nan)
        status = torch.where(finite, status, int(Status.NON_FINITE))
        nfe, vjps = (torch.as_tensor(v).expand(b) for v in (self.nfe, self.vjps))
        terms = [value.detach() for value in values]
        result = [log_prob, noise.sqrt(), dof, change, *terms, self.remainder, precision, self.log_prior.detach()]
        if self.check:
            result = [log_prob if v is log_prob and v.requires_grad else v.cpu() for v in result]
            status = status.cpu()
            message = _failure(status, self.nodes)
        if not bool(torch.as_tensor(pool.count >= 2).all()):
            message = sentences(message, unknown_noise(False, 1, 2))
        log_prob, trace_se, dof, change, truncated, mismatched, remainder, precision, log_prior = result
        return Likelihood(
            log_prob=log_prob,
            trace_se=trace_se,
            trace_dof=dof,
            discretization=change,
            truncation=truncated,
            prior_mismatch=mismatched,
            remainder=remainder,
            precision=precision,
            log_prior=log_prior,
            latent=self.nodes.latent,
            nfe=nfe.clone(),
            vjps=vjps.clone(),
            status=status,
            corrected=setup.correct,
            kept_log_prob=self.kept.cpu() if self.kept is not None and self.check else self.kept,
            message=message,
            what=setup.what,
        )

    # --- more probes ---
    def reach(self, target: float) -> None:
        r"""As many probes as a standard error of `target` takes, by the pilot, which is then left out.

        With the variance V of one estimate by the pilot, of nu degrees of freedom, :math:`n = V / \mathrm{target}^2
        \cdot \nu / (\nu - 2)`: the second factor is the mean of the true variance over V, so that the mean square
        error, over what the pilot may say, is that of the target. Given the pilot, n is a number like any other and the
        n new estimates know nothing of it: their mean is unbiased and their bar that of a sample of fixed size. A rule
        that stops on the estimates it reports is neither: those stop that happen to agree (Anscombe 1953; the two
        stages are Stein's, 1945, whose pooled mean is unbiased for normal estimates only).
        """
        check_positive("target_se", target)
        if self.setup.exact:
            return
        shape = self.nodes.latent.shape[1:]
        most = math.prod(shape) // self.setup.probes.size(shape)  # estimates that cost as much as the exact trace
        self._grow(self.pilot, torch.full_like(self.pilot.count, float(PILOT)))
        noise, dof = (v.cpu() for v in self.pilot.variance(self._weights()))
        wanted = noise * self.pilot.count / target**2 / (1.0 - 2.0 / dof)
        wanted = torch.nan_to_num(wanted, nan=0.0).clamp(min=float(FEWEST)).ceil()  # nan: failed, or exact already
        # few different numbers, so that many samples share a call: 4, 6, 8, 12, 16, 24, 32 …
        octave = 2.0 ** wanted.log2().floor()
        rounded = torch.where(wanted > 1.5 * octave, 2.0 * octave, torch.where(wanted > octave, 1.5 * octave, octave))
        self.settled = True
        self._grow(self.rest, torch.where(wanted >= most, math.inf, rounded))

    def add(self, more: int) -> None:
        """So many more estimates per knot for every sample."""
        self._grow(self.rest, self.rest.count + more)

    def _grow(self, pool: Pool, wanted: Tensor) -> None:
        """So many estimates per knot of every sample in a pool; inf for the exact trace."""
        exact = torch.isinf(self.pilot.count) | torch.isinf(self.rest.count)
        if bool((short := torch.isinf(wanted) & ~exact).any()):
            self._measure(pool, short, math.inf, 0)
        wanted = torch.where(exact | torch.isinf(wanted), 0.0, wanted)
        while bool((short := pool.count < wanted).any()):
            drawn = (self.pilot.count + self.rest.count)[short]
            rows = short & (self.pilot.count + self.rest.count == drawn.min())
            # those that need the fewest go as far as they must, the others with them
            n = min(float((wanted - pool.count)[rows].min()), float(TOGETHER))
            self._measure(pool, rows, n, int(drawn.min()))

    def _measure(self, pool: Pool, which: Tensor, n: float, start: int) -> None:
        """n estimates per knot for some samples, the first of them the start-th that is drawn there."""
        nodes, setup, exact = self.nodes, self.setup, math.isinf(n)
        rows = which.nonzero().flatten()
        at = rows.to(nodes.latent.device)
        rev, traces = setup.rev.select(at), []
        for k, (knot, state) in enumerate(zip(nodes.knots, nodes.states, strict=True)):
            groups: Groups = None
            if not exact:
                groups = [[v[at] for v in setup.group(self.draw, "probe", k, start + j)] for j in range(int(n))]
            with torch.no_grad():
                splits = () if exact else (int(n),)
                _, found = measure(rev, knot, state[at], groups, setup.chunk, False, setup.probes, splits)
            traces.append(found)
        pool.put(rows, Pool.exact(traces) if exact else Pool.of(traces, 0, int(n), 0))
        self.nfe[rows] += len(nodes.knots) * setup.rev.nfe_per_call
        size = setup.probes.size(nodes.latent.shape[1:])
        self.vjps[rows] += len(nodes.knots) * int(nodes.latent[0].numel() if exact else n * size)


def _failure(status: Tensor, nodes: Nodes) -> str:
    """What went wrong and where, for the first sample that failed, or else for the first that did not settle."""
    failed = ((status != Status.OK) & (status != Status.NOT_CONVERGED)).nonzero().flatten().tolist()
    found = failed or (status == Status.NOT_CONVERGED).nonzero().flatten().tolist()
    if not found:
        return ""
    row, code = found[0], Status(int(status[found[0]]))
    where = ""
    if code == Status.NON_FINITE:
        bad = [k for k, s, t in zip(nodes.knots, nodes.states, nodes.traces, strict=True)
               if not bool(torch.isfinite(s[row]).all() & torch.isfinite(t.values[row]).all())]  # fmt: skip
        where = f" at t = {float(bad[0].t):.6g}" if bad else ""
    count = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"sample {row}{count}{' failed' if failed else ''}{where} ({code.name}): {code.sentence}"


# --- adaptive --------------------------------------------------------------------------------------------------------


@dataclass
class _LikelihoodField:
    """d(y, log det, shares of the elements in it)/du in a coordinate, from one network call; probes are kept."""

    rev: ReverseSDE
    coordinate: Coordinate
    groups: Groups
    chunk: int
    probes: Probes

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

        output, traces = value_and_traces(raw, x, self.groups, self.chunk, law=self.probes)
        a, b = weights
        slope = rescale(x, a) + rescale(output, b)
        # the part of the slope that is linear in x has an exact trace: only the network's is estimated
        d = y[0].numel()
        found = slope, _column(scale) * (d * _column(a) + _column(b) * traces.values)
        return found if traces.shares is None else (*found, rescale(traces.shares, _column(scale * b)[..., None]))

    def select(self, rows: Tensor) -> _LikelihoodField:
        groups = None if self.groups is None else [[v[rows] for v in group] for group in self.groups]
        return replace(self, rev=self.rev.select(rows), groups=groups)


@dataclass
class _Solved:
    """Adaptive integrations of some samples.

    Attributes:
        leaves: the latents, log p by each probe up to what is added at the ends, (B, K), and the shares, if any.
        status: `Status`; this and the following are (B,), on the CPU.
        reached: the place that was reached.
        calls: network calls.
    """

    leaves: list[Tensor]
    status: Tensor
    reached: Tensor
    calls: Tensor

    def log_prob(self, rows: Tensor) -> Tensor:
        """The mean over the probes for some samples, on the CPU."""
        return self.leaves[1].mean(1).cpu()[rows]

    def put(self, rows: Tensor, new: _Solved, which: Tensor) -> None:
        """Results of a further run of `rows`, as far as `which` says."""
        self.calls[rows] += new.calls
        at, rows = which.nonzero().flatten(), rows[which]
        for leaf, value in zip(self.leaves, new.leaves, strict=True):
            leaf[rows.to(leaf.device)] = value[at.to(leaf.device)]
        self.status[rows], self.reached[rows] = new.status[at], new.reached[at]


@dataclass
class _Path:
    """The integration of (y, log det), and of the probes' shares if these are wanted, from t_min to t_max."""

    setup: _Setup
    coordinate: Coordinate
    x: Tensor
    groups: Groups
    shared: bool
    max_steps: int

    def run(self, tol: float, rows: Tensor) -> _Solved:
        """Some samples with a tolerance per step, in nats."""
        setup, law, at = self.setup, self.setup.law, rows.to(self.x.device)
        start, stop = law.knot(law.t_min), law.knot(law.t_max)
        ode = _LikelihoodField(setup.rev, self.coordinate, self.groups, setup.chunk, setup.probes).select(at)
        k = 1 if self.groups is None else len(self.groups)
        y = rescale(self.x[at], 1.0 / float(self.coordinate.scale(start)))
        state = max(tol / 100.0, 4.0 * torch.finfo(y.dtype).eps)
        leaves: Leaves = (y, torch.zeros(len(y), k, dtype=torch.float64, device=y.device))
        rtol: tuple[float, ...] = (state, 1e-15)
        atol: tuple[float, ...] = (state, tol)
        if self.shared:  # the shares follow the steps of the others
            shares = torch.zeros(len(y), k, y[0].numel(), dtype=y.dtype, device=y.device)
            leaves, rtol, atol = (*leaves, shares), (*rtol, 0.0), (*atol, math.inf)
        places = float(self.coordinate.of(start)), float(self.coordinate.of(stop))
        result = integrate(ode, *places, leaves, TABLEAUX["dormand_prince"], rtol, atol, self.max_steps)
        latent = rescale(result.leaves[0], float(self.coordinate.scale(stop)))
        totals = setup.log_prior(latent)[:, None] + result.leaves[1]
        return _Solved([latent, totals, *result.leaves[2:]], result.status, result.reached, result.calls)

    def settle(self, tol: float) -> tuple[_Solved, Tensor]:
        """All samples to an estimated error of `tol`, and by how much log p changed with the last run, (B,)."""
        rows = torch.arange(len(self.x))
        solved, change = self.run(tol, rows), torch.full((len(rows),), math.nan, dtype=torch.float64)
        if not self.setup.doubling:
            return solved, change
        limit, rows = max(LEFT * tol, 3.0 * self.setup.rounding(self.x)), rows[solved.status == Status.OK]
        for k in range(1, ROUNDS + 1):
            if not len(rows):
                break
            finer = self.run(tol / FINER**k, rows)
            by = (finer.log_prob(torch.arange(len(rows))) - solved.log_prob(rows)).abs()
            good = finer.status == Status.OK
            # one that gives up after there was a change to report leaves what is known
            solved.put(rows, finer, good if k > 1 else torch.ones_like(good))
            change[rows[good]] = by[good]
            rows = rows[good & (by > limit)]
        solved.status[change > limit] = int(Status.NOT_CONVERGED)
        return solved, change

    def message(self, solved: _Solved) -> str:
        """What went wrong, for the first sample that stopped on its way, or else for the first that did not settle."""
        open_ = solved.status == Status.NOT_CONVERGED
        stopped = torch.where(open_, int(Status.OK), solved.status)
        found = failure(stopped, solved.reached, self.coordinate, self.setup.law)
        if found or not bool(open_.any()):
            return found
        return f"sample {int(open_.nonzero()[0])} ({Status.NOT_CONVERGED.name}): {Status.NOT_CONVERGED.sentence}"


def _adaptive(setup: _Setup, x: Tensor, tol: float, draw: Draw, max_steps: int) -> Likelihood:
    law, d, coordinate = setup.law, x[0].numel(), Angle(setup.sigma_data)
    groups: Groups = None
    if not setup.exact:
        groups = [setup.group(draw, "probe", k) for k in range(setup.num_probes)]
    k = 1 if groups is None else len(groups)
    start, stop = law.knot(law.t_min), law.knot(law.t_max)
    with torch.no_grad():
        first, trace_0 = evaluate(setup.rev, start, x, groups, setup.chunk, law=setup.probes)
        path = _Path(setup, coordinate, x, groups, trace_0.shares is not None, max_steps)
        solved, change = path.settle(tol)
        latent, totals, *rest = solved.leaves
        last, trace_1 = evaluate(setup.rev, stop, latent, groups, setup.chunk, law=setup.probes)
        terms = setup.terms(first, last)
        remainder, more, products = setup.remainder(first, last, draw)
    scales = d * math.log(float(coordinate.scale(stop)) / float(coordinate.scale(start)))
    totals, shares, ends = totals + scales, rest[0] if rest else None, []
    for name, term, trace in zip(CORRECTIONS, terms, (trace_0, trace_1), strict=True):
        ends.append(term.constant[:, None] + term.slope * trace.values)
        if name in setup.correct:
            totals = totals + ends[-1]
            shares = None if shares is None or trace.shares is None else shares + term.slope * trace.shares
    known = (solved.status == Status.OK) | (solved.status == Status.NOT_CONVERGED)
    log_prob = torch.where(known, totals.mean(1).cpu(), math.nan)
    if groups is None:
        trace_se, dof = torch.zeros_like(log_prob), torch.full_like(log_prob, math.inf)
    else:
        trace_se, dof = (v.cpu() for v in _kept_noise(Traces(totals, trace_0.signs, shares)))
    silent = unknown_noise(True, k, KEPT) if groups is not None and k < KEPT else ""
    extra = int(terms[1].slope != 0.0)  # the call at 0, without products
    calls = solved.calls + 2 + extra
    return Likelihood(
        log_prob=log_prob,
        trace_se=trace_se,
        trace_dof=dof,
        discretization=change,
        truncation=ends[0].mean(1).cpu(),
        prior_mismatch=ends[1].mean(1).cpu(),
        remainder=remainder.cpu(),
        precision=torch.full_like(log_prob, setup.rounding(x)),
        log_prior=setup.log_prior(latent).cpu(),
        latent=latent,
        nfe=(calls + more) * setup.rev.nfe_per_call,
        vjps=(calls - extra) * setup.products(x.shape[1:], k) + products,
        status=solved.status,
        corrected=setup.correct,
        message=sentences(path.message(solved), silent),
        what=setup.what,
    )


def _kept_noise(traces: Traces) -> tuple[Tensor, Tensor]:
    """Standard error of the mean over kept probes, and its degrees of freedom, (B,); nan for fewer than `KEPT`."""
    k = traces.values.shape[1]
    if k < KEPT:
        return torch.full_like(traces.values[:, 0], math.nan), torch.zeros_like(traces.values[:, 0])
    found = traces.squares(0, k)
    return (variance(found) / (k * (k - 1.0))).sqrt(), found[:, 2]


def _column(value: Any) -> Any:
    """A coefficient of shape (n, 1, …) as a float64 column (n, 1)."""
    return value.reshape(-1, 1) if isinstance(value, Tensor) else value
