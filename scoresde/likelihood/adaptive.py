"""log p with steps of each sample's own: (state, log det) are integrated together, the probes kept along the path."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoresde.likelihood.divergence import Traces, value_and_traces
from scoresde.likelihood.ends import remainder, terms
from scoresde.likelihood.path import Groups, evaluate
from scoresde.likelihood.precision import rounding
from scoresde.likelihood.probes import Probes
from scoresde.likelihood.result import Likelihood
from scoresde.likelihood.scatter import variance
from scoresde.likelihood.settings import CORRECTIONS, KEPT, Adaptive, Settings
from scoresde.likelihood.words import sentences, unknown_noise
from sde_lib import ReverseSDE
from solvers import TABLEAUX, Angle, Coordinate, Status
from solvers.adaptive import failure, integrate, row_knot
from solvers.noise import Draw
from solvers.runge_kutta import Leaves, rescale

FINER = 32.0
"""Between two adaptive runs: twice the steps of a method of order five."""
LEFT = 4.0
"""The change between two adaptive runs in units of what is left. On smooth scores it is 20 and more; on random networks
that are rough in time errors fell 5 to 30 times with a tolerance 32 times smaller."""
ROUNDS = 3
"""Adaptive runs after the first, at most: with the last, steps are eight times as many."""


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

    rev: ReverseSDE
    settings: Settings
    way: Adaptive
    coordinate: Coordinate
    x: Tensor
    groups: Groups
    shared: bool

    def run(self, tol: float, rows: Tensor) -> _Solved:
        """Some samples with a tolerance per step, in nats."""
        settings, law, at = self.settings, self.settings.law, rows.to(self.x.device)
        start, stop = law.knot(law.t_min), law.knot(law.t_max)
        whole = _LikelihoodField(self.rev, self.coordinate, self.groups, settings.chunk, settings.probes)
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
        field, tableau = whole.select(at), TABLEAUX["dormand_prince"]
        result = integrate(field, *places, leaves, tableau, rtol, atol, self.way.max_steps)
        latent = rescale(result.leaves[0], float(self.coordinate.scale(stop)))
        totals = settings.log_prior(latent)[:, None] + result.leaves[1]
        return _Solved([latent, totals, *result.leaves[2:]], result.status, result.reached, result.calls)

    def settle(self) -> tuple[_Solved, Tensor]:
        """All samples to an estimated error of the tolerance, and by how much log p changed with the last run, (B,)."""
        tol, rows = self.way.tol, torch.arange(len(self.x))
        solved, change = self.run(tol, rows), torch.full((len(rows),), math.nan, dtype=torch.float64)
        if not self.settings.doubling:
            return solved, change
        precision = rounding(self.rev, self.settings.law, self.x, self.settings.tf32)
        limit, rows = max(LEFT * tol, 3.0 * precision), rows[solved.status == Status.OK]
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
        found = failure(stopped, solved.reached, self.coordinate, self.settings.law)
        if found or not bool(open_.any()):
            return found
        return f"sample {int(open_.nonzero()[0])} ({Status.NOT_CONVERGED.name}): {Status.NOT_CONVERGED.sentence}"


def adaptively(rev: ReverseSDE, x: Tensor, settings: Settings, way: Adaptive, draw: Draw) -> Likelihood:
    """The likelihood of x, (B, *D), with steps of each sample's own."""
    law, d, coordinate = settings.law, x[0].numel(), Angle(settings.sigma_data)
    groups: Groups = None
    if not settings.exact:
        groups = [settings.group(draw, "probe", k) for k in range(settings.num_probes)]
    k = 1 if groups is None else len(groups)
    start, stop = law.knot(law.t_min), law.knot(law.t_max)
    with torch.no_grad():
        first, trace_0 = evaluate(rev, start, x, groups, settings.chunk, law=settings.probes)
        path = _Path(rev, settings, way, coordinate, x, groups, trace_0.shares is not None)
        solved, change = path.settle()
        latent, totals, *rest = solved.leaves
        last, trace_1 = evaluate(rev, stop, latent, groups, settings.chunk, law=settings.probes)
        found = terms(rev, settings, first, last)
        left, more, products = remainder(rev, settings, first, last, draw)
    scales = d * math.log(float(coordinate.scale(stop)) / float(coordinate.scale(start)))
    totals, shares, ends = totals + scales, rest[0] if rest else None, []
    for name, term, trace in zip(CORRECTIONS, found, (trace_0, trace_1), strict=True):
        ends.append(term.constant[:, None] + term.slope * trace.values)
        if name in settings.correct:
            totals = totals + ends[-1]
            shares = None if shares is None or trace.shares is None else shares + term.slope * trace.shares
    known = (solved.status == Status.OK) | (solved.status == Status.NOT_CONVERGED)
    log_prob = torch.where(known, totals.mean(1).cpu(), math.nan)
    if groups is None:
        trace_se, dof = torch.zeros_like(log_prob), torch.full_like(log_prob, math.inf)
    else:
        trace_se, dof = (v.cpu() for v in _kept_noise(Traces(totals, trace_0.signs, shares)))
    silent = unknown_noise(True, k, KEPT) if groups is not None and k < KEPT else ""
    extra = int(found[1].slope != 0.0)  # the call at 0, without products
    calls = solved.calls + 2 + extra
    return Likelihood(
        log_prob=log_prob,
        trace_se=trace_se,
        trace_dof=dof,
        discretization=change,
        truncation=ends[0].mean(1).cpu(),
        prior_mismatch=ends[1].mean(1).cpu(),
        remainder=left.cpu(),
        precision=torch.full_like(log_prob, rounding(rev, law, x, settings.tf32)),
        log_prior=settings.log_prior(latent).cpu(),
        latent=latent,
        nfe=(calls + more) * rev.nfe_per_call,
        vjps=(calls - extra) * settings.products(x.shape[1:], k) + products,
        status=solved.status,
        corrected=settings.correct,
        message=sentences(path.message(solved), silent),
        what=settings.what,
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
