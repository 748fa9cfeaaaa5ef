"""Which solver and grid to take for a budget of network calls, by measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sde_lib import Knot, Law
from solvers.grids import Blended, Grid
from solvers.multistep import Multistep, SASolver
from solvers.solver import Solver
from solvers.words import describe


class Recommendation(NamedTuple):
    """A solver and a grid for a budget: ``sample(rev, shape, r.solver, nfe=r.nfe, grid=r.grid)``.

    Attributes:
        nfe: the budget asked for.
        solver: the solver.
        grid: the grid.
        measured_at: the nearest budget that was measured.
        exact: at that budget the error on closed-form scores: per-sample root mean square distance to the solution, in
            units of the data, median over samples, geometric mean over 13 problems. For stochastic solvers the sliced
            2-Wasserstein distance to the law over 6 problems, with 60000 samples, whose floor is 0.015.
        learned: the same on six trained networks (None: not measured).
    """

    nfe: int
    solver: Solver
    grid: Grid
    measured_at: int
    exact: float
    learned: float | None

    def __repr__(self) -> str:
        learned = "not measured" if self.learned is None else f"{self.learned:.2g}"
        what = "distance to the law" if self.solver.stochastic else "error"
        return (
            f"for {self.nfe} network calls: {describe(self.solver)} on {describe(self.grid)}\n"
            f"  {what} at {self.measured_at} calls, in units of the data: {self.exact:.2g} on exact scores, {learned} "
            "on trained networks"
        )


class _Row(NamedTuple):
    least: int  # smallest budget
    predictor: int
    corrector: int


_ORDERS = (_Row(1, 2, 0), _Row(7, 2, 3), _Row(13, 3, 4), _Row(24, 4, 5), _Row(45, 5, 6), _Row(75, 6, 7))

# benchmarks/recommend.py prints these
_MEASURED: dict[int, tuple[float, float]] = {
    3: (0.12, 0.19),
    5: (0.039, 0.039),
    8: (0.013, 0.013),
    12: (0.0029, 0.0037),
    16: (0.001, 0.0011),
    20: (0.00033, 0.00049),
    30: (4.5e-05, 0.00013),
    45: (4.8e-06, 3.8e-05),
    60: (9.7e-07, 2.3e-05),
    90: (4.7e-08, 1.5e-05),
    120: (9.3e-09, 1.2e-05),
}
_MEASURED_STOCHASTIC: dict[int, float] = {10: 0.056, 15: 0.027, 20: 0.017, 30: 0.016, 50: 0.016}


def recommend(nfe: int, stochastic: bool = False) -> Recommendation:
    r"""The best measured solver and grid for a budget of network calls per sample.

    Deterministic: the predictor-corrector multistep method that interpolates the flow prediction eps - x_0 in lambda,
    with an order that grows with the budget, started by the ramp, on `Blended` steps. Stochastic: SA-Solver with noise
    1, three knots for predictor and corrector, along sigma / alpha.

    How it was found: a search (``benchmarks/recommend.py``) over what is interpolated, in which variable, the orders,
    starters and grids, on 13 closed-form problems (VP, sub-VP, VE, EDM, cosine and flow SDEs; mixtures in 2 to 64
    dimensions, spirals, thin manifolds) and on six small trained networks, half the weight each; 2/3 of the score is
    the median and 1/3 the root mean square error. Exact scores alone would favour higher orders and fewer steps near
    the data: they are smoother in time than a network is. With strong guidance lower orders and the data prediction
    (`DPMpp2M`) are the usual, more careful choice; it was not measured.

    On a chain take the solver alone: its levels are the grid.

    Args:
        nfe: network calls per sample, >= 1.
        stochastic: solve the reverse SDE instead of the probability-flow ODE; >= 2 calls.

    Raises:
        ValueError: for a budget that is not an int >= 1 (>= 2 with `stochastic`).
    """
    least = 2 if stochastic else 1
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < least:
        raise ValueError(f"`nfe`, the budget of network calls, must be an int >= {least}, got {nfe!r}.")
    if stochastic:
        at = _nearest(nfe, _MEASURED_STOCHASTIC)
        solver: Solver = SASolver(variable="noise_ratio")
        return Recommendation(nfe, solver, Blended(), at, _MEASURED_STOCHASTIC[at], None)
    row = next(r for r in reversed(_ORDERS) if nfe >= r.least)
    at = _nearest(nfe, _MEASURED)
    solver = Multistep(row.predictor, row.corrector, prediction="flow", starter="ramp")
    return Recommendation(nfe, solver, Blended(), at, *_MEASURED[at])


def _nearest(nfe: int, measured: dict[int, float] | dict[int, tuple[float, float]]) -> int:
    return min(measured, key=lambda n: abs(n - nfe))


@dataclass(frozen=True)
class Recommended(Solver):
    """`recommend` as a solver, for scripts that hold one object for all budgets: each run is the recommended method's.

    Goes with the `Blended` grid. The budget is that of the run: ``nfe=``, or the number of steps.

    Args:
        noise: solve the reverse SDE instead of the probability-flow ODE.
    """

    noise: bool = False
    needs_drift = True

    @property
    def order(self) -> int:  # type: ignore[override]
        """Grows with the budget, to 3 with the ramp as starter; weak order 2 with noise."""
        return 2

    @property
    def stochastic(self) -> bool:
        return self.noise

    def within(self, nfe: int, end: str = "stop") -> tuple[Solver, int]:
        """The recommended solver itself."""
        return recommend(nfe, self.noise).solver.within(nfe, end)

    def steps_for(self, nfe: int, end: str = "stop") -> int:
        return self.within(nfe, end)[1]

    def nfe(self, steps: int, end: str = "stop") -> int:
        return self._for(steps).nfe(steps, end)

    def on(self, law: Law) -> Solver:
        """On a chain too."""
        return self

    def bind(self, knots: Sequence[Knot]) -> Solver:
        """The solver for as many steps."""
        return self._for(max(1, sum(not k.is_data for k in knots) - 1)).bind(knots)  # 1: straight to the data

    def _for(self, steps: int) -> Solver:
        """The solver of the smallest budget that comes to as many steps."""
        for nfe in (steps, steps + 1):
            if nfe >= 1 + self.noise and self.within(nfe)[1] == steps:
                return recommend(nfe, self.noise).solver
        raise ValueError(f"`steps` must be >= 1, got {steps}.")
