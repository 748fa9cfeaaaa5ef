"""Per-sample adaptive integration: every row has its own time, its own step and its own error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sde_lib import Knot, Law, ReverseSDE, lookup
from sde_lib._checks import check_positive
from solvers.coordinates import Coordinate
from solvers.noise import Draw
from solvers.runge_kutta import TABLEAUX, Leaves, Tableau, as_coordinate, rescale, rk_step
from solvers.solver import Hooks, Outcome, Solver, Status


class Field(Protocol):
    """An ODE on rows."""

    def slopes(self, u: Tensor, leaves: Leaves) -> Leaves:
        """d leaves / du at u, shape (n,)."""
        ...

    def select(self, rows: Tensor) -> Field:
        """The field of some of the rows."""
        ...


@dataclass
class Integrated:
    """Result of `integrate`: leaves at the end; per row (all on the CPU) status, calls, accepted and rejected steps
    and the place that was reached."""

    leaves: Leaves
    status: Tensor
    calls: Tensor
    accepted: Tensor
    rejected: Tensor
    reached: Tensor


def failure(result: Integrated, coordinate: Coordinate, law: Law) -> str:
    """What went wrong and where, for the first row that failed; empty if none did."""
    failed = (result.status != Status.OK).nonzero().flatten().tolist()
    if not failed:
        return ""
    row = failed[0]
    place, code = coordinate.knot(law, float(result.reached[row])).t, Status(int(result.status[row]))
    return f"sample {row} stopped at t = {place:.6g} ({code.name}): {code.sentence}"


def error_norm(error: Tensor, old: Tensor, new: Tensor, rtol: float, atol: float) -> Tensor:
    """Root mean square over a row's own elements of error / (atol + rtol max(|old|, |new|)), (n,)."""
    scaled = error / (atol + rtol * torch.maximum(old.abs(), new.abs()))
    return scaled.reshape(len(scaled), -1).square().mean(1).sqrt().double()


def integrate(
    rows: Field,
    u_0: float,
    u_1: float,
    leaves: Leaves,
    tableau: Tableau,
    rtol: Sequence[float],
    atol: Sequence[float],
    max_steps: int,
) -> Integrated:
    """Integrate a tuple of tensors from u_0 to u_1, row by row, with an embedded Runge-Kutta method.

    A row's step is accepted when the largest of its leaves' error norms is at most one. Steps end exactly at u_1 and
    never pass it; finished rows leave the batch. One host synchronisation per step.

    Args:
        rows: the ODE.
        u_0: start.
        u_1: end, on either side.
        leaves: tensors with the batch as first dimension.
        tableau: a method with an embedded error.
        rtol: relative tolerance per leaf.
        atol: absolute tolerance per leaf.
        max_steps: steps tried before a row gives up.
    """
    batch, device = leaves[0].shape[0], leaves[0].device
    span = u_1 - u_0
    power = -1.0 / tableau.order
    out = tuple(torch.empty_like(leaf) for leaf in leaves)
    status = torch.zeros(batch, dtype=torch.int64, device=device)
    calls, accepted, rejected = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(3))
    reached = torch.full((batch,), u_0, dtype=torch.float64, device=device)
    index = torch.arange(batch, device=device)
    u = torch.full((batch,), u_0, dtype=torch.float64, device=device)
    first = rows.slopes(u, leaves)
    calls += 1
    # first step (Hairer, Norsett & Wanner, II.4): one percent of the state's own time scale
    zero = torch.zeros_like(leaves[0])
    size = error_norm(leaves[0], leaves[0], leaves[0], rtol[0], atol[0])
    speed = error_norm(first[0], leaves[0], zero, rtol[0], atol[0])
    guess = 0.01 * size.clamp(min=1e-3) / speed.clamp(min=1e-12)
    guess = torch.nan_to_num(guess, nan=1e-6).clamp(max=abs(span))
    h = guess if span > 0 else -guess
    smallest = 1e-12 * abs(span)
    retried = torch.zeros(batch, dtype=torch.bool, device=device)
    calls_per_try = tableau.stages - 1
    for tried in range(max_steps + 1):
        left = u_1 - u
        last = h.abs() * 1.0001 >= left.abs()
        h = torch.where(last, left, h)
        nodes = [u + c * h if c < 1.0 else torch.where(last, u_1, u + h) for c in tableau.c]
        new, errors, tail = rk_step(tableau, rows.slopes, nodes, h, leaves, first)
        norms = [
            error_norm(e, old, y, r, a) for e, old, y, r, a in zip(errors or (), leaves, new, rtol, atol, strict=True)
        ]
        error = torch.stack(norms).amax(0)
        finite = torch.isfinite(error)
        accept = finite & (error <= 1.0)
        calls[index] += calls_per_try
        accepted[index] += accept
        rejected[index] += ~accept
        u = torch.where(accept, nodes[-1] if tableau.c[-1] == 1.0 else torch.where(last, u_1, u + h), u)
        leaves = _where(accept, new, leaves)
        if not tableau.fsal:
            tail = rows.slopes(u, leaves)
            calls[index] += 1
        first = _where(accept, tail, first)
        factor = torch.where(finite, 0.9 * error.clamp(min=1e-10) ** power, 0.1).clamp(0.1, 5.0)
        # the step right after a rejection does not grow: what was just refused is not asked for again
        h = h * torch.where(accept, torch.where(retried, factor.clamp(max=1.0), factor), factor.clamp(max=0.9))
        retried = ~accept
        finished = accept & last
        too_small = ~finished & (h.abs() < smallest)
        code = torch.where(too_small, torch.where(finite, int(Status.STEP_TOO_SMALL), int(Status.NON_FINITE)), 0)
        if tried == max_steps:
            code = torch.where(finished | too_small, code, int(Status.MAX_STEPS))
        done = finished | (code != 0)
        if bool(done.any()):
            gone = index[done]
            for target, leaf in zip(out, leaves, strict=True):
                target[gone] = leaf[done]
            status[gone], reached[gone] = code[done], u[done]
            keep = (~done).nonzero().flatten()
            if len(keep) == 0:
                break
            index, u, h, retried = index[keep], u[keep], h[keep], retried[keep]
            leaves, first = tuple(leaf[keep] for leaf in leaves), tuple(k[keep] for k in first)
            rows = rows.select(keep)
    return Integrated(out, status.cpu(), calls.cpu(), accepted.cpu(), rejected.cpu(), reached.cpu())


def _where(accept: Tensor, new: Leaves, old: Leaves) -> Leaves:
    return tuple(torch.where(accept.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(new, old, strict=True))


@dataclass
class FlowField:
    """The probability-flow ODE of a reverse SDE in a coordinate, on rows."""

    rev: ReverseSDE
    coordinate: Coordinate

    def slopes(self, u: Tensor, leaves: Leaves) -> Leaves:
        y = leaves[0]
        knot = row_knot(self.rev.law, self.coordinate, u, y.ndim)
        prediction = self.rev(rescale(y, self.coordinate.scale(knot)), knot)
        return (prediction.mix(*self.coordinate.slope(knot)),)

    def select(self, rows: Tensor) -> FlowField:
        return FlowField(self.rev.select(rows), self.coordinate)


def row_knot(law: Law, coordinate: Coordinate, u: Tensor, ndim: int) -> Knot:
    """The knot of rows at u, shape (n,)."""
    return coordinate.knot(law, u.reshape(-1, *[1] * (ndim - 1)))


@dataclass(frozen=True)
class AdaptiveRungeKutta(Solver):
    """The probability-flow ODE by an embedded Runge-Kutta method with per-sample step control.

    A sample's steps and result do not depend on its batch mates. The grid says where the solution is reported (its
    ends, without `steps`); the solver chooses its steps in between and never evaluates past the end. Tolerances are
    for the state in the coordinate, which has unit scale.

    Args:
        tableau: a name in `TABLEAUX` with an embedded error.
        rtol: relative tolerance.
        atol: absolute tolerance; 1e-5 each is the setting of Song et al. 2021.
        coordinate: "angle" is smooth from the data to the prior of every law.
        max_steps: steps tried per interval before a sample gives up.
    """

    tableau: str = "dormand_prince"
    rtol: float = 1e-5
    atol: float = 1e-5
    coordinate: Coordinate | str = "angle"
    max_steps: int = 10_000
    adaptive: ClassVar[bool] = True
    _tableau: Tableau = field(init=False, repr=False, compare=False)
    _coordinate: Coordinate = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol)
        check_positive("atol", self.atol)
        if not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(f"`max_steps` must be an int >= 1, got {self.max_steps!r}.")
        tableau = lookup(TABLEAUX, self.tableau, "tableau")
        if tableau.error is None:
            embedded = ", ".join(k for k, v in TABLEAUX.items() if v.error is not None)
            raise ValueError(f"Adaptive steps need an embedded error; {self.tableau!r} has none, {embedded} do.")
        object.__setattr__(self, "_tableau", tableau)
        object.__setattr__(self, "_coordinate", as_coordinate(self.coordinate))

    @property
    def order(self) -> int:  # type: ignore[override]
        return self._tableau.order

    @property
    def needs_drift(self) -> bool:  # type: ignore[override]
        return self._coordinate.needs_drift

    def nfe(self, steps: int, end: str = "stop") -> int:
        raise ValueError("An adaptive solver chooses its steps: read the calls it made from Solution.nfe.")

    def steps_for(self, nfe: int, end: str = "stop") -> int:
        raise ValueError("An adaptive solver chooses its steps: set rtol and atol instead of `nfe`.")

    def run(self, rev: ReverseSDE, x: Tensor, knots: Sequence[Knot], draw: Draw, hooks: Hooks) -> Outcome:
        hooks.refuse(self)
        trajectory = [x] if hooks.trajectory else []
        calls = torch.zeros(len(x), dtype=torch.int64)
        accepted, rejected, status = calls.clone(), calls.clone(), calls.clone()
        message = ""
        for t, s in itertools.pairwise(knots):
            if s.is_data:
                x = rev(x, t).data
                calls += 1
            else:
                x, result = self._interval(rev, x, t, s)
                calls += result.calls
                accepted += result.accepted
                rejected += result.rejected
                message = message or failure(result, self._coordinate, rev.law)
                status = torch.where(status == 0, result.status, status)
            if hooks.trajectory:
                trajectory.append(x)
        stats: dict[str, Any] = {"accepted": accepted, "rejected": rejected}
        return Outcome(x, calls, trajectory, status, stats, message)

    def _interval(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot) -> tuple[Tensor, Integrated]:
        u_t, u_s = float(self._coordinate.of(t)), float(self._coordinate.of(s))
        y = rescale(x, 1.0 / self._coordinate.scale(t))
        result = integrate(
            FlowField(rev, self._coordinate), u_t, u_s, (y,), self._tableau, (self.rtol,), (self.atol,), self.max_steps
        )
        return rescale(result.leaves[0], self._coordinate.scale(s)), result
