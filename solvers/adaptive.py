"""Per-sample adaptive integration: every row has its own time, its own step and its own error.

One loop, `drive`, accepts and rejects steps, compacts the batch and ends exactly at the end. A `Rows` is what it
drives: a method that tries one step of every row. Here are the embedded Runge-Kutta methods, which the likelihood
shares through `integrate`, and the adaptive DPM-Solver; `gotta_go_fast` is the stochastic one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sde_lib import Knot, Law, Parameterization, Prediction, ReverseSDE, lookup
from sde_lib._checks import check_nonnegative, check_positive
from sde_lib._math import Real
from solvers.coordinates import Coordinate, HalfLogSNR
from solvers.exponential import _GAUSS, End, Interpolation, form_of
from solvers.noise import Draw
from solvers.runge_kutta import TABLEAUX, Leaves, Tableau, as_coordinate, interpolate, rescale, rk_step
from solvers.solver import Hooks, Outcome, Past, Solver, Status

BETA = 0.4
"""Weight of the error before the last in the size of the next step (see `drive`)."""
SAFETY = 0.7
"""The step control steers for an error of SAFETY^k in units of the tolerance (see `drive`)."""


class Field(Protocol):
    """An ODE on rows."""

    def slopes(self, u: Tensor, leaves: Leaves) -> Leaves:
        """d leaves / du at u, shape (n,)."""
        ...

    def select(self, rows: Tensor) -> Field:
        """The field of some of the rows."""
        ...


class Trial(NamedTuple):
    """One attempted step of all rows.

    Attributes:
        leaves: the state it leads to.
        error: its error in units of the tolerance, (n,) in float64: accepted up to one.
        calls: network calls per row, (n,) or one number.
        between: (rows, u) -> leaves of some of the rows at u inside their step, without further calls.
    """

    leaves: Leaves
    error: Tensor
    calls: Tensor | int
    between: Callable[[Tensor, Tensor], Leaves]


class Rows:
    """A method on rows: what `drive` drives. It holds whatever the method knows at the rows' present places.

    Attributes:
        exponent: k, where the error of a step goes like h^k.
    """

    exponent: float

    def start(self, u: Tensor, span: float, leaves: Leaves) -> tuple[Tensor, Tensor | int]:
        """Size of the first step, (n,) and positive, and the calls made to find it."""
        raise NotImplementedError

    def aim(self, u: Tensor, s: Tensor) -> Tensor:
        """Where the step from u to s shall end: s, or before it."""
        return s

    def attempt(self, u: Tensor, s: Tensor, leaves: Leaves) -> Trial:
        """Try a step from u to s, both (n,)."""
        raise NotImplementedError

    def settle(self, accept: Tensor) -> None:
        """Learn which rows take the step just tried."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        raise NotImplementedError


@dataclass
class Integrated:
    """Result of an adaptive integration.

    Attributes:
        leaves: at the end, or where a row gave up.
        status: `Status` per row. This and the following are (B,), on the CPU.
        calls: network calls per row.
        accepted: accepted steps per row.
        rejected: rejected steps per row.
        reached: the place that was reached, in float64.
        reports: leaves at the places asked for; NaN where a row did not get there.
    """

    leaves: Leaves
    status: Tensor
    calls: Tensor
    accepted: Tensor
    rejected: Tensor
    reached: Tensor
    reports: Sequence[Leaves] = ()


def failure(status: Tensor, reached: Tensor, coordinate: Coordinate, law: Law) -> str:
    """What went wrong and where, for the first row that failed; empty if none did. Arguments as in `Integrated`."""
    failed = (status != Status.OK).nonzero().flatten().tolist()
    if not failed:
        return ""
    row = failed[0]
    place, code = coordinate.knot(law, float(reached[row])).t, Status(int(status[row]))
    return f"sample {row} stopped at t = {place:.6g} ({code.name}): {code.sentence}"


def error_norm(error: Tensor, old: Tensor, new: Tensor, rtol: float, atol: float, larger: bool = False) -> Tensor:
    """Root mean square over a row's own elements of error / (atol + rtol max(|old|, |new|)), (n,) in float64.

    With `larger`, of error / max(atol, rtol max(|old|, |new|)).
    """
    relative = rtol * torch.maximum(old.abs(), new.abs())
    scaled = error / (relative.clamp(min=atol) if larger else relative + atol)
    return scaled.reshape(len(scaled), -1).square().mean(1).sqrt().double()


def drive(
    rows: Rows,
    u_0: float,
    u_1: float,
    leaves: Leaves,
    max_steps: int,
    beta: float = 0.0,
    reports: Sequence[float] = (),
    safety: float = SAFETY,
    growth: float = 5.0,
) -> Integrated:
    r"""Carry a tuple of tensors from u_0 to u_1, row by row, in steps as long as their errors allow.

    A step is accepted when its error is at most one. The next is
    :math:`(e / e^*)^{-(1 - 0.75\beta)/k} (e_- / e^*)^{\beta/k}` times as long, with its error e, that of the accepted
    step before, e_-, and the goal :math:`e^* = \mathtt{safety}^k`: a PI controller (Gustafsson 1991; Hairer & Wanner,
    IV.2, whose beta is ours over k). After a rejection it is :math:`(e / e^*)^{-1/k}` times as long. Steps end exactly
    at u_1 and never pass it; finished rows leave the batch. The host waits for the device once per step.

    Args:
        rows: the method.
        u_0: start.
        u_1: end, on either side.
        leaves: tensors with the batch as first dimension.
        max_steps: steps tried before a row gives up.
        beta: 0 looks at the last error alone.
        reports: places strictly between u_0 and u_1, in order, at which the leaves are wanted too. They are
            interpolated: asking for them changes neither the steps nor the calls.
        safety: below 1: shorter steps, fewer of them refused.
        growth: largest factor from one step to the next.
    """
    batch, device = leaves[0].shape[0], leaves[0].device
    span, power = u_1 - u_0, 1.0 / rows.exponent
    sign = 1.0 if span > 0 else -1.0
    out = tuple(torch.empty_like(leaf) for leaf in leaves)
    reported = [tuple(torch.full_like(leaf, torch.nan) for leaf in leaves) for _ in reports]
    places = torch.tensor(reports, dtype=torch.float64, device=device)
    status, calls, accepted, rejected = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(4))
    reached = torch.full((batch,), u_0, dtype=torch.float64, device=device)
    index = torch.arange(batch, device=device)
    u = reached.clone()
    h, made = rows.start(u, span, leaves)
    h = torch.nan_to_num(h, nan=1e-6 * abs(span)).clamp(max=abs(span))
    calls += made
    before = torch.ones_like(u)
    retried = torch.zeros(batch, dtype=torch.bool, device=device)
    smallest = 1e-12 * abs(span)
    for tried in range(max_steps + 1):
        s = rows.aim(u, torch.where(h * 1.0001 >= (u_1 - u).abs(), u_1, u + sign * h))
        trial = rows.attempt(u, s, leaves)
        finite = torch.isfinite(trial.error)
        accept = finite & (trial.error <= 1.0)
        calls[index] += trial.calls
        accepted[index] += accept
        rejected[index] += ~accept
        if reports:
            passed = accept[:, None] & ((s[:, None] - places) * sign >= 0) & ((places - u[:, None]) * sign > 0)
            row, place = passed.nonzero(as_tuple=True)
            if len(row):
                values = trial.between(row, places[place])
                for k in set(place.tolist()):
                    for target, value in zip(reported[k], values, strict=True):
                        target[index[row[place == k]]] = value[place == k]
        rows.settle(accept)
        error = trial.error.clamp(min=1e-10) / safety**rows.exponent
        refused = error**-power
        factor = error ** (-power * (1.0 - 0.75 * beta)) * before ** (power * beta)
        # the step right after a rejection does not grow: what was just refused is not asked for again
        factor = torch.where(accept, torch.where(retried, factor.clamp(max=1.0), factor), refused.clamp(max=0.9))
        factor = torch.where(finite, factor.clamp(0.1, growth), 0.1)
        step = (s - u).abs()
        # a step cut short by something else than its error says little about the next
        h = torch.where(accept & (factor >= 1.0), torch.maximum(h, step * factor), step * factor)
        before = torch.where(accept, error.clamp(min=1e-4), before)
        retried = ~accept
        finished = accept & (s == u_1)
        u = torch.where(accept, s, u)
        leaves = choose(accept, trial.leaves, leaves)
        too_small = ~finished & (h < smallest)
        code = torch.where(too_small, torch.where(finite, int(Status.STEP_TOO_SMALL), int(Status.NON_FINITE)), 0)
        if tried == max_steps:
            code = torch.where(finished | too_small, code, int(Status.MAX_STEPS))
        done = finished | (code != 0)
        if bool(done.any()):
            gone = index[done]
            for target, leaf in zip(out, leaves, strict=True):
                target[gone] = leaf[done]
            status[gone], reached[gone] = code[done], u[done]
            kept = (~done).nonzero().flatten()
            if len(kept) == 0:
                break
            index, u, h, before, retried = index[kept], u[kept], h[kept], before[kept], retried[kept]
            leaves = tuple(leaf[kept] for leaf in leaves)
            rows.keep(kept)
    return Integrated(out, status.cpu(), calls.cpu(), accepted.cpu(), rejected.cpu(), reached.cpu(), reported)


def choose(accept: Tensor, new: Leaves, old: Leaves) -> Leaves:
    """Row by row, the new or the old."""
    return tuple(torch.where(accept.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(new, old, strict=True))


class Known:
    """What is known at the rows' own places, worked out anew only for the rows that have moved.

    Attributes:
        leaves: of all rows, once `at` was called.
    """

    def __init__(self) -> None:
        self.leaves: Leaves = ()
        self._moved: Tensor | None = None

    def at(self, rows: int, compute: Callable[[Tensor | None], Leaves]) -> tuple[Leaves, Tensor | int]:
        """The leaves and the calls they cost; `compute` works them out for some rows, or for all (None)."""
        if not self.leaves or self._moved is None:
            made: Tensor | int = 0 if self.leaves else 1
            self.leaves = self.leaves or compute(None)
            return self.leaves, made
        moved, self._moved = self._moved, None
        at = moved.nonzero().flatten()
        if len(at) == rows:
            self.leaves = compute(None)
        elif len(at):
            fresh = compute(at)
            self.leaves = tuple(leaf.index_copy(0, at, new) for leaf, new in zip(self.leaves, fresh, strict=True))
        return self.leaves, moved.long()

    def move(self, accept: Tensor) -> None:
        """These rows have taken a step."""
        self._moved = accept

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.leaves = tuple(leaf[rows] for leaf in self.leaves)
        self._moved = None if self._moved is None else self._moved[rows]


# --- Runge-Kutta ----------------------------------------------------------------------------------------------------


class RungeKuttaRows(Rows):
    """An embedded Runge-Kutta method on an ODE.

    Args:
        ode: the ODE.
        tableau: a method with an embedded error.
        rtol: relative tolerance per leaf.
        atol: absolute tolerance per leaf.
    """

    def __init__(self, ode: Field, tableau: Tableau, rtol: Sequence[float], atol: Sequence[float]) -> None:
        self.ode, self.tableau, self.rtol, self.atol = ode, tableau, rtol, atol
        self.exponent = tableau.order
        self.first = Known()
        self.last: Leaves = ()

    def start(self, u: Tensor, span: float, leaves: Leaves) -> tuple[Tensor, Tensor | int]:
        """The state's own time scale (Hairer, Norsett & Wanner, II.4) times (tolerance / size of the state)^(1 / k).

        By Taylor's formula that is where the error reaches the tolerance, up to a constant. Without a call. At most a
        tenth of the way: at the prior slopes may vanish, and say nothing about what comes. At least a millionth of it:
        a state that starts at 0 has no time scale.
        """
        first, calls = self._first(u, leaves)
        y, rtol, atol = leaves[0], self.rtol[0], self.atol[0]
        size = error_norm(y, y, y, rtol, atol).clamp(min=1e-3)
        speed = error_norm(first[0], y, y, rtol, atol).clamp(min=1e-12)
        guess = 0.6 * size.clamp(min=1.0) ** (-1.0 / self.exponent) * size / speed
        return guess.clamp(1e-6 * abs(span), 0.1 * abs(span)), calls

    def _first(self, u: Tensor, leaves: Leaves) -> tuple[Leaves, Tensor | int]:
        def slopes(rows: Tensor | None) -> Leaves:
            if rows is None:
                return self.ode.slopes(u, leaves)
            return self.ode.select(rows).slopes(u[rows], tuple(leaf[rows] for leaf in leaves))

        return self.first.at(len(u), slopes)

    def attempt(self, u: Tensor, s: Tensor, leaves: Leaves) -> Trial:
        first, calls = self._first(u, leaves)
        tableau, h = self.tableau, s - u
        nodes = [u + c * h if c < 1.0 else s for c in tableau.c]
        new, errors, stages = rk_step(tableau, self.ode.slopes, nodes, h, leaves, first)
        norms = [
            error_norm(e, old, y, r, a)
            for e, old, y, r, a in zip(errors or (), leaves, new, self.rtol, self.atol, strict=True)
        ]
        self.last = stages[-1]

        def between(rows: Tensor, at: Tensor) -> Leaves:
            def pick(values: Leaves) -> Leaves:
                return tuple(v[rows] for v in values)

            theta = (at - u[rows]) / h[rows]
            return interpolate(tableau, theta, h[rows], pick(leaves), pick(new), [pick(k) for k in stages])

        return Trial(new, torch.stack(norms).amax(0), calls + tableau.stages - 1, between)

    def settle(self, accept: Tensor) -> None:
        if self.tableau.fsal:
            self.first.leaves = choose(accept, self.last, self.first.leaves)
        else:
            self.first.move(accept)

    def keep(self, rows: Tensor) -> None:
        self.first.keep(rows)
        self.ode = self.ode.select(rows)


def integrate(
    ode: Field,
    u_0: float,
    u_1: float,
    leaves: Leaves,
    tableau: Tableau,
    rtol: Sequence[float],
    atol: Sequence[float],
    max_steps: int,
    beta: float = BETA,
    reports: Sequence[float] = (),
) -> Integrated:
    """Integrate a tuple of tensors from u_0 to u_1, row by row, with an embedded Runge-Kutta method.

    A row's error is the largest of its leaves' error norms. See `drive` for the rest.

    Args:
        ode: the ODE.
        u_0: start.
        u_1: end, on either side.
        leaves: tensors with the batch as first dimension.
        tableau: a method with an embedded error.
        rtol: relative tolerance per leaf.
        atol: absolute tolerance per leaf.
        max_steps: steps tried before a row gives up.
        beta: of the step control.
        reports: places in between where the leaves are wanted too.
    """
    return drive(RungeKuttaRows(ode, tableau, rtol, atol), u_0, u_1, leaves, max_steps, beta, reports)


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


# --- solvers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adaptive(Solver):
    """Base of the solvers with per-sample steps of their own.

    A sample's steps and result do not depend on its batch mates. The grid says where the solution is reported (its
    ends, without `steps`), and the solver chooses its steps in between; it never evaluates past the end.

    A subclass has `rtol`, `atol`, `max_steps` and `beta`, says in which coordinate the steps are taken, and makes the
    rows that `drive` drives.
    """

    adaptive: ClassVar[bool] = True
    needs_time: ClassVar[bool] = True
    enters: ClassVar[bool] = False
    """Whether alpha = 0, where lambda, f and g are infinite, takes a step of its own to where they are not."""

    def _check_control(self, rtol: float, atol: float, max_steps: int) -> None:
        check_positive("rtol", rtol)
        check_positive("atol", atol)
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"`max_steps` must be an int >= 1, got {max_steps!r}.")

    def nfe(self, steps: int, end: str = "stop") -> int:
        raise ValueError("An adaptive solver chooses its steps: read the calls it made from Solution.nfe.")

    def steps_for(self, nfe: int, end: str = "stop") -> int:
        raise ValueError("An adaptive solver chooses its steps: set rtol and atol instead of `nfe`.")

    def _along(self) -> Coordinate:
        """What the steps are measured in."""
        raise NotImplementedError

    def _walk(
        self, rev: ReverseSDE, x: Tensor, knots: Sequence[Knot], draw: Draw, reports: Sequence[Knot]
    ) -> Integrated:
        """From the state at the first knot to the last: states, not scaled ones, in the one leaf of the result."""
        raise NotImplementedError

    def _entry(self, law: Law) -> Knot:
        """Where to go from alpha = 0: `drift_t_max`, or nearer so that alpha^2 stays below a tenth of `atol`."""
        first = law.knot(law.drift_t_max)
        lam = 0.5 * math.log(0.1 * self._absolute())
        return first if first.half_log_snr < lam else law.knot_at(lam)

    def _absolute(self) -> float:
        """The absolute tolerance."""
        raise NotImplementedError

    def _enter(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, draw: Draw) -> Tensor:
        """From alpha = 0 to s: one call, and an error of the order of alpha_s^2."""
        return rev(x, t).mix(s.alpha, s.sigma)

    def run(self, rev: ReverseSDE, x: Tensor, knots: Sequence[Knot], draw: Draw, hooks: Hooks) -> Outcome:
        hooks.refuse(self)
        noisy = [k for k in knots if not k.is_data]
        states = [x]
        calls = torch.zeros(len(x), dtype=torch.int64)
        coordinate = self._along()
        if self.enters and len(noisy) > 1 and noisy[0].alpha == 0.0:
            first = self._entry(rev.law)
            inside = bool(first.half_log_snr < noisy[1].half_log_snr)
            first = first if inside else noisy[1]
            x = self._enter(rev, x, noisy[0], first, draw)
            calls += 1
            noisy = [first, *noisy[1:]] if inside else noisy[1:]
            states = states if inside else [*states, x]
        status, message, stats = torch.zeros_like(calls), "", {}
        if len(noisy) > 1:
            result = self._walk(rev, x, noisy, draw, noisy[1:-1] if hooks.trajectory else ())
            x = result.leaves[0]
            states += [leaf for (leaf,) in result.reports]
            states.append(x)
            calls += result.calls
            status, message = result.status, failure(result.status, result.reached, coordinate, rev.law)
            stats = {"accepted": result.accepted, "rejected": result.rejected}
        if knots[-1].is_data:
            x = rev(x, noisy[-1]).data
            calls += 1
            states.append(x)
        return Outcome(x, calls, states if hooks.trajectory else [], status, stats, message)


@dataclass(frozen=True)
class AdaptiveRungeKutta(Adaptive):
    """The probability-flow ODE by an embedded Runge-Kutta method with per-sample step control.

    A sample's steps and result do not depend on its batch mates. The grid says where the solution is reported (its
    ends, without `steps`), which is interpolated and changes neither the steps nor the calls; the solver never
    evaluates past the end. Tolerances are for the state in the coordinate, which has unit scale.

    Args:
        tableau: a name in `TABLEAUX` with an embedded error.
        rtol: relative tolerance.
        atol: absolute tolerance; 1e-5 each is the setting of Song et al. 2021.
        coordinate: "angle" is smooth from the data to the prior of every law.
        max_steps: steps tried before a sample gives up.
        beta: step control: 0 looks at the last error only, above 0 at the one before too (see `drive`).
    """

    tableau: str = "dormand_prince"
    rtol: float = 1e-5
    atol: float = 1e-5
    coordinate: Coordinate | str = "angle"
    max_steps: int = 10_000
    beta: float = BETA
    _tableau: Tableau = field(init=False, repr=False, compare=False)
    _coordinate: Coordinate = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_control(self.rtol, self.atol, self.max_steps)
        check_nonnegative("beta", self.beta)
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

    def _along(self) -> Coordinate:
        return self._coordinate

    def _absolute(self) -> float:
        return self.atol

    def _walk(
        self, rev: ReverseSDE, x: Tensor, knots: Sequence[Knot], draw: Draw, reports: Sequence[Knot]
    ) -> Integrated:
        coordinate, t, s = self._coordinate, knots[0], knots[-1]
        y = rescale(x, 1.0 / coordinate.scale(t))
        rows = RungeKuttaRows(FlowField(rev, coordinate), self._tableau, (self.rtol,), (self.atol,))
        u, end = places(coordinate, (t, s))
        result = drive(rows, u, end, (y,), self.max_steps, self.beta, places(coordinate, reports))
        leaves = [*result.reports, result.leaves]
        *inner, last = [(rescale(y, coordinate.scale(k)),) for (y,), k in zip(leaves, (*reports, s), strict=True)]
        return replace(result, leaves=last, reports=inner)


def places(coordinate: Coordinate, knots: Sequence[Knot]) -> list[float]:
    """u at knots of floats."""
    return [float(coordinate.of(k)) for k in knots]


# --- DPM-Solver -----------------------------------------------------------------------------------------------------


class RowsInterpolation(Interpolation):
    """`Interpolation` in lambda through one or two knots whose every row has its own time: quadrature in one pass."""

    def weights(self, t: Knot, s: Knot, knots: Sequence[Knot], base: int, tau2: Real = 0.0) -> Sequence[Real]:
        if len(knots) == 1 or self.midpoint:
            return super().weights(t, s, knots, base, tau2)
        (lam_t, alpha, sigma, lam_s), other = _columns(t, s), torch.as_tensor(knots[1].half_log_snr)
        points, shares = torch.tensor(_GAUSS, dtype=torch.float64, device=lam_t.device).unbind(1)
        h = lam_s - lam_t
        mass = self.form.kernel(lam_t + h * points, End(alpha, sigma, lam_s), tau2) * (h * h * points * shares)
        moment = torch.as_tensor(mass).sum(-1) / (other - lam_t[..., 0])
        return [self.form.total(lam_t[..., 0], End(s.alpha, s.sigma, s.half_log_snr), tau2) - moment, moment]


def _columns(t: Knot, s: Knot) -> tuple[Tensor, ...]:
    """lambda_t, alpha_s, sigma_s and lambda_s of rows, with a last dimension for the points of a quadrature."""
    return tuple(torch.as_tensor(v)[..., None] for v in (t.half_log_snr, s.alpha, s.sigma, s.half_log_snr))


class ExponentialRows(Rows):
    """Embedded exponential steps along -lambda: orders 1(2) and 2(3) of `singlestep`, by the same rule.

    Args:
        rev: the reverse SDE.
        rule: how predictions become a step.
        order: of the step, 2 or 3.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """

    def __init__(self, rev: ReverseSDE, rule: RowsInterpolation, order: int, rtol: float, atol: float) -> None:
        self.rev, self.order, self.rtol, self.atol = rev, order, rtol, atol
        self.exact, self.midpoint = rule, replace(rule, midpoint=True)
        self.exponent = order
        self.first = Known()
        self.parameterization: Parameterization | None = None

    def start(self, u: Tensor, span: float, leaves: Leaves) -> tuple[Tensor, Tensor | int]:
        """Where the error reaches the tolerance, by its order, if predictions change like lambda."""
        return torch.full_like(u, 1.5 * max(self.rtol, self.atol) ** (1.0 / self.order)), 0

    def _knot(self, u: Tensor, x: Tensor) -> Knot:
        return row_knot(self.rev.law, _LAMBDA, u, x.ndim)

    def _first(self, u: Tensor, x: Tensor) -> tuple[Prediction, Tensor | int]:
        def raw(rows: Tensor | None) -> Leaves:
            rev, u_r, x_r = (self.rev, u, x) if rows is None else (self.rev.select(rows), u[rows], x[rows])
            prediction = rev(x_r, self._knot(u_r, x_r))
            self.parameterization = prediction.parameterization
            return (prediction.raw,)

        (known,), calls = self.first.at(len(u), raw)
        assert self.parameterization is not None
        return Prediction(x, self._knot(u, x), known, self.parameterization), calls

    def attempt(self, u: Tensor, s: Tensor, leaves: Leaves) -> Trial:
        x, rev = leaves[0], self.rev
        prediction, calls = self._first(u, x)
        t, end = prediction.knot, self._knot(s, x)
        nodes: Past = ((t, prediction),)
        if self.order == 2:
            low = self.exact.advance(x, t, end, nodes, 0)
            stages: tuple[float, ...] = (0.5,)
            rule = self.midpoint
        else:
            stages, rule = (1 / 3, 2 / 3), self.exact
        for r in stages:
            middle = self._knot(u + r * (s - u), x)
            nodes = (*nodes, (middle, rev(self.exact.advance(x, t, middle, nodes, 0), middle)))
        if self.order == 3:
            low = self.midpoint.advance(x, t, end, nodes[:2], 0)
        used = (nodes[0], nodes[-1])
        new = rule.advance(x, t, end, used, 0)
        error = error_norm(new - low, x, low, self.rtol, self.atol, larger=True)

        def between(rows: Tensor, at: Tensor) -> Leaves:
            x_r = x[rows]
            picked = [
                (
                    k.select(rows),
                    Prediction(x_r if p.x is x else p.x[rows], k.select(rows), p.raw[rows], p.parameterization),
                )
                for k, p in used
            ]
            return (rule.advance(x_r, t.select(rows), self._knot(at, x_r), picked, 0),)

        return Trial((new,), error, calls + len(stages), between)

    def settle(self, accept: Tensor) -> None:
        self.first.move(accept)

    def keep(self, rows: Tensor) -> None:
        self.first.keep(rows)
        self.rev = self.rev.select(rows)


_LAMBDA = HalfLogSNR()


@dataclass(frozen=True)
class AdaptiveDPMSolver(Adaptive):
    """DPM-Solver-12 and DPM-Solver-23: exponential steps of the probability-flow ODE with per-sample step control.

    Order 2 compares DPM-Solver-2 with DPM-Solver-1, order 3 DPM-Solver-3 with DPM-Solver-2 (its stage at 1/3), on the
    calls of the higher one (Lu et al. 2022, arXiv:2206.00927, Appendix C). The higher one is taken, as published.
    The error is measured in the state, against max(atol, rtol max(abs x, abs x_low)). Deviations: every sample has its
    own steps, where the published code takes the largest error of the batch; a rejected step costs one call less, for
    the prediction at its start is kept; the first step is 1.5 tol^(1 / order) in lambda instead of 0.05; PI control.

    Where the grid has knots of its own, the solution is reported there by the same exponential formula over the part of
    a step, which changes neither the steps nor the calls.

    Args:
        order: 3 (DPM-Solver-23) or 2 (DPM-Solver-12).
        prediction: what is interpolated: "noise" as published, "data" (DPM-Solver++), "v" or "flow".
        rtol: relative tolerance; 0.05 in the paper.
        atol: absolute tolerance; 0.0078 in the paper, one of 256 levels on [-1, 1].
        max_steps: steps tried before a sample gives up.
        beta: step control: 0 looks at the last error only, as in the paper; above 0 fewer steps are refused.
        sigma_data: standard deviation of the data, used by "v" only.
    """

    order: int = 3  # type: ignore[misc]
    prediction: str = "noise"
    rtol: float = 0.05
    atol: float = 0.0078
    max_steps: int = 10_000
    beta: float = BETA
    sigma_data: float = 1.0
    enters: ClassVar[bool] = True
    _rule: RowsInterpolation = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.order not in (2, 3):
            raise ValueError(f"`order` must be 2 (DPM-Solver-12) or 3 (DPM-Solver-23), got {self.order!r}.")
        self._check_control(self.rtol, self.atol, self.max_steps)
        check_nonnegative("beta", self.beta)
        object.__setattr__(self, "_rule", RowsInterpolation(form_of(self.prediction, self.sigma_data)))

    def _along(self) -> Coordinate:
        return _LAMBDA

    def _absolute(self) -> float:
        return self.atol

    def _walk(
        self, rev: ReverseSDE, x: Tensor, knots: Sequence[Knot], draw: Draw, reports: Sequence[Knot]
    ) -> Integrated:
        rows = ExponentialRows(rev, self._rule, self.order, self.rtol, self.atol)
        u, end = places(_LAMBDA, (knots[0], knots[-1]))
        return drive(rows, u, end, (x,), self.max_steps, self.beta, places(_LAMBDA, reports))
