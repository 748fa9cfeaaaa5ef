r"""A solved trajectory and the integral of the divergence along it, on fixed grids.

The probability-flow ODE is run upward by a fixed-step solver, and the trace of its Jacobian is taken at the knots of
the grid. With :math:`y = x / r`, :math:`r^2 = \sigma^2 + \alpha^2\sigma_d^2` and
:math:`\theta = \arctan(\sigma / \alpha\sigma_d)` (`solvers.Angle`) state and slope are of order one and

.. math:: \log p_{t_{min}}(x) = \log \pi(x_T) + D \log\frac{r_T}{r_{t_{min}}}
          + \int \nabla\cdot\frac{dy}{d\theta}\, d\theta,

where the terms of thousands of nats stand outside of the integral. The integral is a weighted sum over the knots
(`quadrature`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.likelihood.divergence import Traces, value_and_traces
from scoresde.likelihood.probes import Probes
from scoresde.likelihood.quadrature import quadrature
from sde_lib import SDE, Knot, Prediction, ReverseSDE, Wrapper
from solvers import Angle, Grid, Solver, make_knots, solve
from solvers.runge_kutta import rescale

Groups = Sequence[Sequence[Tensor]] | None
"""Probe vectors of some estimates, or None for the exact trace."""


class Estimates(NamedTuple):
    """Trace estimates at a knot.

    Attributes:
        values: (B, K), or (B, 1) for the exact trace; float64.
        squares: of each split of the estimates their `scatter.squares`, (B, splits, 3).
    """

    values: Tensor
    squares: Tensor


@dataclass
class Nodes:
    """The knots of a trajectory, where the divergence is taken, from t_min to t_max.

    Attributes:
        knots: ascending in time.
        states: (B, *D) at the knots.
        ends: predictions at the first and the last knot.
        raw: weights of the trace of the raw output in that of the slope, times the quadrature's: host floats.
        constant: the part of the integral that is linear in the state, hence known.
        traces: of the raw output, per knot.
        latent: the state at t_max, (B, *D).
        calls: network calls.
    """

    knots: Sequence[Knot]
    states: list[Tensor]
    ends: tuple[Prediction, Prediction]
    raw: list[float]
    constant: float
    traces: list[Estimates]
    latent: Tensor
    calls: int

    def integral(self, traces: Sequence[Tensor]) -> Tensor:
        """The integral of the divergence for traces of the raw output per knot, (B, …) each."""
        total: Any = self.constant
        for weight, trace in zip(self.raw, traces, strict=True):
            total = total + weight * trace
        return total


def ascending_knots(law: SDE, grid: Grid | str, steps: int) -> tuple[Knot, ...]:
    """Knots of a grid from t_min up to where lambda is finite."""
    inner = make_knots(law, grid, steps, needs_drift=True)[-2:0:-1]
    return (law.knot(law.t_min), *inner, law.knot(law.drift_t_max))


def evaluate(
    rev: ReverseSDE,
    knot: Knot,
    x: Tensor,
    groups: Groups,
    chunk: int,
    differentiable: bool = False,
    law: Probes | None = None,
) -> tuple[Prediction, Traces]:
    """The prediction at x and traces of the raw output's Jacobian from one network call; see `value_and_traces`."""
    kinds: list[Any] = []

    def raw(state: Tensor) -> Tensor:
        prediction = rev(state, knot)
        kinds.append(prediction.parameterization)
        return prediction.raw

    value, traces = value_and_traces(raw, x, groups, chunk, differentiable, law)
    return Prediction(x, knot, value, kinds[0]), traces


def measure(
    rev: ReverseSDE,
    knot: Knot,
    x: Tensor,
    groups: Groups,
    chunk: int,
    differentiable: bool = False,
    law: Probes | None = None,
    splits: Sequence[int] = (),
) -> tuple[Prediction, Estimates]:
    """`evaluate`, with the scatter in place of the shares: of the first splits[0] estimates, the next splits[1] …"""
    prediction, traces = evaluate(rev, knot, x, groups, chunk, differentiable, law if splits else None)
    ends = [0, *itertools.accumulate(splits)]
    scatter = [traces.squares(low, high) for low, high in itertools.pairwise(ends)]
    squares = torch.stack(scatter, 1) if scatter else traces.values.new_zeros(len(x), 0, 3)
    return prediction, Estimates(traces.values, squares)


class _Visitor(Wrapper):
    """A reverse SDE that counts its calls and takes the traces in those made at given knots, the first time each."""

    def __init__(self, inner: ReverseSDE, knots: Sequence[Knot], visit: Callable[..., Any] | None) -> None:
        super().__init__(inner)
        self.calls = 0
        self.visit = visit
        self.places = {id(knot): k for k, knot in enumerate(knots)}
        self.states: list[Any] = [None] * len(knots)
        self.found: list[Any] = [None] * len(knots)

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        self.calls += 1
        k = self.places.get(id(t))
        if self.visit is None or k is None or self.found[k] is not None:
            return self.inner(x, t)
        self.states[k], self.found[k] = x, self.visit(k, t, x)
        return self.found[k][0]


@dataclass
class Tracer:
    """What is needed to follow trajectories and to take divergences on them.

    Args:
        rev: the reverse SDE of a continuous law, with its conditions.
        solver: a deterministic fixed-step solver.
        sigma_data: standard deviation of the data, for the coordinate.
        joint: take the divergence at a knot in the call that the solver makes there; else after the trajectory.
        chunk: vector-Jacobian products of the exact trace taken together.
        batch_rows: rows per network call where knots are evaluated together.
        differentiable: record graphs.
        coarse: a first-order last step to alpha = 0 in place of one of second order. The steps before are made longer
            by leaving out knots, and this one, which has none to leave out, would not change with them.
        probes: law of the probes.
        splits: of the estimates at a knot, see `measure`.
    """

    rev: ReverseSDE
    solver: Solver
    sigma_data: float
    joint: bool
    chunk: int
    batch_rows: int
    differentiable: bool = False
    coarse: bool = False
    probes: Probes | None = None
    splits: Sequence[int] = ()
    law: SDE = field(init=False)

    def __post_init__(self) -> None:
        assert isinstance(self.rev.law, SDE)
        self.law = self.rev.law

    def follow(self, x: Tensor, knots: Sequence[Knot], groups: Callable[[int], Groups]) -> Nodes:
        """Run upward from x along `knots`, with traces by the probes `groups(k)` at knot k."""

        def visit(k: int, knot: Knot, state: Tensor) -> tuple[Prediction, Estimates]:
            return self._measure(self.rev, knot, state, groups(k))

        visitor = _Visitor(self.rev, knots, visit if self.joint else None)
        options = {"grid": knots, "differentiable": self.differentiable, "check": False}
        solution = solve(visitor, x, self.solver, trajectory=not self.joint, **options)  # type: ignore[arg-type]
        states, found, latent = visitor.states, visitor.found, solution.x
        if solution.trajectory is not None:
            states = list(solution.trajectory.unbind(0))
        elif states[-1] is None:
            states[-1] = latent
        knots = list(knots)
        if float(self.law.drift_t_max) < float(self.law.t_max):
            if found[-1] is None:
                found[-1] = visit(len(knots) - 1, knots[-1], states[-1])
                visitor.calls += 1
            end = self.law.knot(self.law.t_max)
            states.append(self._leave(latent, knots[-1], found[-1][0]))
            found.append(visit(len(knots), end, states[-1]))
            visitor.calls += 1
            latent = states[-1] if self.coarse else self._leave(latent, knots[-1], found[-2][0], found[-1][0])
            knots.append(end)
        left = [k for k, known in enumerate(found) if known is None]
        for k, known in zip(left, self.revisit(left, knots, states, groups), strict=True):
            found[k] = known
        return self._nodes(knots, states, found, latent, visitor.calls + len(left))

    def _measure(self, rev: ReverseSDE, knot: Knot, x: Tensor, groups: Groups) -> tuple[Prediction, Estimates]:
        return measure(rev, knot, x, groups, self.chunk, self.differentiable, self.probes, self.splits)

    def _leave(self, x: Tensor, knot: Knot, prediction: Prediction, there: Prediction | None = None) -> Tensor:
        """From the last finite lambda to alpha = 0, one step along the angle, of length alpha / sigma: by the slope
        here (Euler), or by the mean with that of a prediction there (Heun)."""
        angle, end = Angle(self.sigma_data), self.law.knot(self.law.t_max)
        step = float(angle.of(end)) - float(angle.of(knot))
        slope = prediction.mix(*angle.slope(knot))
        if there is not None:
            slope = 0.5 * (slope + there.mix(*angle.slope(end)))
        return rescale(rescale(x, 1.0 / float(angle.scale(knot))) + step * slope, float(angle.scale(end)))

    def revisit(
        self, which: Sequence[int], knots: Sequence[Knot], states: Sequence[Tensor], groups: Callable[[int], Groups]
    ) -> list[tuple[Prediction, Estimates]]:
        """Predictions and traces at stored states: all independent, so several knots share a network call."""
        if not which:
            return []
        b = len(states[which[0]])
        together = max(1, self.batch_rows // b)
        out = []
        for low in range(0, len(which), together):
            part = which[low : low + together]
            if len(part) == 1:
                k = part[0]
                out.append(self._measure(self.rev, knots[k], states[k], groups(k)))
                continue
            x = torch.cat([states[k] for k in part])
            times = torch.cat([torch.full((b,), float(knots[k].t), dtype=torch.float64, device=x.device) for k in part])
            rows = torch.arange(b, device=x.device).repeat(len(part))
            rev, knot = self.rev.select(rows), self.law.knot(times, x.ndim)
            vectors = _side_by_side([groups(k) for k in part])
            prediction, traces = self._measure(rev, knot, x, vectors)
            values, squares = (v.split(b) for v in traces)
            for k, raw, v, s in zip(part, prediction.raw.split(b), values, squares, strict=True):
                out.append((Prediction(states[k], knots[k], raw, prediction.parameterization), Estimates(v, s)))
        return out

    def _nodes(
        self,
        knots: Sequence[Knot],
        states: list[Tensor],
        found: Sequence[tuple[Prediction, Estimates]],
        latent: Tensor,
        calls: int,
    ) -> Nodes:
        angle, d = Angle(self.sigma_data), states[0][0].numel()
        raw, constant = [], d * math.log(float(angle.scale(knots[-1])) / float(angle.scale(knots[0])))
        weights = quadrature(knots, self.sigma_data, self.coarse)
        for knot, weight, (prediction, _) in zip(knots, weights, found, strict=True):
            a, b = (float(c) for c in prediction.weights(*angle.slope(knot)))
            scale = weight * float(angle.scale(knot))
            raw.append(scale * b)
            constant += scale * a * d
        return Nodes(knots, states, (found[0][0], found[-1][0]), raw, constant, [t for _, t in found], latent, calls)


def _side_by_side(groups: Sequence[Groups]) -> Groups:
    """The probes of several knots as those of one batch."""
    if groups[0] is None:
        return None
    estimates = zip(*(g for g in groups if g is not None), strict=True)
    return [[torch.cat(vectors) for vectors in zip(*estimate, strict=True)] for estimate in estimates]
