"""What runs are measured against: the path that the same start, or the same start and noise, should have led along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.comparison.bench import Bench, grid_key
from scoresde.comparison.specs import Budget, Entry, describe
from scoresde.comparison.store import finite
from scoresde.storage.files import one_line
from sde_lib import Chain, Knot
from solvers import AdaptiveRungeKutta, Grid, Solution, Solver
from solvers.grids import GridLike

Flow = Callable[[Tensor, Knot, Knot], Tensor]

_CHECKED = 16  # samples on which the reference itself is checked


class Reference(NamedTuple):
    """States to be reached, (n, *D), an estimate of their own error, and what they are; without states: why."""

    x: Tensor | None
    error: float | None
    name: str


class References:
    """The references of a comparison, each made once per repetition.

    Args:
        bench: the problem.
        path_error: whether there are any.
        flow: exact probability-flow map (x, from knot, to knot) -> x.
        tolerance: of the adaptive ODE reference.
        refine: steps of a stochastic reference per step of the largest budget; 0: none.
        strong: solver of every stochastic reference, instead of each solver itself.
    """

    def __init__(
        self,
        bench: Bench,
        path_error: bool,
        flow: Flow | None,
        tolerance: float | None,
        refine: int,
        strong: Solver | None,
    ) -> None:
        if not isinstance(refine, int) or isinstance(refine, bool) or refine < 0 or refine == 1:
            raise ValueError(f"`refine` must be an int >= 2, or 0 for no stochastic references, got {refine!r}.")
        if strong is not None and not (isinstance(strong, Solver) and strong.stochastic and not strong.adaptive):
            raise ValueError(f"`strong` must be a stochastic fixed-step solver, got {strong!r}.")
        if tolerance is not None and not 0 < tolerance < 1:
            raise ValueError(f"`tolerance` must be in (0, 1), got {tolerance!r}.")
        if flow is not None and not callable(flow):
            raise TypeError(f"`flow` must be a function (x, from knot, to knot) -> x, got {type(flow).__name__}.")
        self.bench, self.path_error, self.flow, self.refine, self.strong = bench, path_error, flow, refine, strong
        self.tolerance = tolerance or (1e-10 if bench.dtype == torch.float64 else 1e-6)
        self._repetition = -1
        self._made: dict[Any, Reference] = {}

    def settings(self) -> dict[str, Any]:
        """What says how references are made, JSON-able."""
        return {
            "path_error": self.path_error,
            "flow": self.flow is not None,
            "tolerance": self.tolerance,
            "refine": self.refine,
            "strong": None if self.strong is None else describe(self.strong),
        }

    def most_steps(self, entry: Entry, nfe: Sequence[int]) -> int:
        """Steps of the entry's largest feasible budget."""
        bench, most = self.bench, 0
        for calls in nfe:
            try:
                most = max(most, entry.solver.on(bench.law).within(calls // bench.rev.nfe_per_call, bench.end)[1])
            except Exception:  # whatever it is, the run itself will say so in its row
                continue
        return most

    def name(self, entry: Entry, budget: Budget, most: int) -> str:
        """Which reference the run is to be measured against."""
        solver, law = budget.solver, self.bench.law
        if not self.path_error:
            return "none"
        if isinstance(law, Chain):
            return f"own run over all {law.n} levels"
        if not solver.stochastic:
            return "given flow" if self.flow is not None else f"adaptive ODE, rtol {self.tolerance:g}"
        if not self.refine:
            return "none"
        if solver.adaptive or not isinstance(self.bench.grid_of(entry), str | Grid):
            return "none (no grid to refine)"
        who = "own run" if self.strong is None else f"run by {describe(self.strong)}"
        return f"{who} of {self.refine * most} steps, same path"

    def of(self, entry: Entry, budget: Budget, repetition: int, most: int, solution: Solution) -> Reference:
        """The reference of a finished run; one that cannot be made costs the run its distance only."""
        name = self.name(entry, budget, most)
        if name.startswith("none"):
            return Reference(None, None, name)
        if repetition != self._repetition:  # what belongs to the last repetition is done with
            self._made.clear()
            self._repetition = repetition
        key, make = self._plan(name, entry, budget, repetition, most, solution)
        if key not in self._made:
            try:
                self._made[key] = make()
            except Exception as error:
                self._made[key] = _failed(name, error)
        return self._made[key]

    def _plan(
        self, name: str, entry: Entry, budget: Budget, repetition: int, most: int, solution: Solution
    ) -> tuple[Any, Callable[[], Reference]]:
        """What the reference depends on, and how it is made."""
        bench, grid = self.bench, self.bench.grid_of(entry)
        if isinstance(bench.law, Chain):
            return (name, entry.label), partial(self._walked, name, entry.solver, repetition, bench.law, None)
        if not budget.solver.stochastic:
            times = solution.times.tolist()
            first, last = times[0], times[-2] if bench.end == "denoise" else times[-1]
            make = self._flowed if self.flow is not None else self._integrated
            return (name, first, last), partial(make, name, repetition, first, last)
        who = None if self.strong else entry.label
        solver = self.strong or entry.solver
        return (name, who, grid_key(grid)), partial(self._walked, name, solver, repetition, grid, self.refine * most)

    def _integrated(self, name: str, repetition: int, first: float, last: float) -> Reference:
        """The probability-flow ODE by the adaptive solver."""
        bench, few = self.bench, slice(0, min(_CHECKED, self.bench.n))
        tight = AdaptiveRungeKutta(rtol=self.tolerance, atol=self.tolerance)
        loose = AdaptiveRungeKutta(rtol=10 * self.tolerance, atol=10 * self.tolerance)
        found = [bench.solve(tight, repetition, rows, [first, last])[0] for rows in bench.parts]
        return _judged(name, found, bench.solve(loose, repetition, few, [first, last])[0])

    def _flowed(self, name: str, repetition: int, first: float, last: float) -> Reference:
        """The given flow, then the posterior mean if runs end in it."""
        assert self.flow is not None
        bench, states = self.bench, []
        here, there = bench.law.knot(first), bench.law.knot(last)
        for rows in bench.parts:
            x = bench.starts(repetition)[rows]
            state = self.flow(x, here, there)
            if not isinstance(state, Tensor) or state.shape != x.shape:
                got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
                raise ValueError(f"`flow` must return a tensor of shape {tuple(x.shape)}, got {got}.")
            if bench.end == "denoise":
                with torch.no_grad():
                    state = bench.select(rows)(state, there).data
            states.append(state)
        return Reference(torch.cat(states), None, name)

    def _walked(self, name: str, solver: Solver, repetition: int, grid: GridLike, steps: int | None) -> Reference:
        """A run on the same noise, finer."""
        bench = self.bench
        found = [bench.solve(solver, repetition, rows, grid, steps=steps)[0] for rows in bench.parts]
        if steps is None:
            return _judged(name, found, None)
        few = slice(0, min(_CHECKED, bench.n))
        return _judged(name, found, bench.solve(solver, repetition, few, grid, steps=steps // 2)[0])


def _judged(name: str, found: list[Solution], rougher: Solution | None) -> Reference:
    """The states, and their distance from a rougher run on a few samples."""
    failed = next((solution.message for solution in found if not solution.ok), None)
    if failed is not None:
        return _failed(name, failed)
    x = torch.cat([solution.x for solution in found])
    if rougher is None:
        return Reference(x, None, name)
    gaps = distances(rougher.x, x[: len(rougher.x)])
    return Reference(x, finite(float(gaps.square().mean().sqrt())), name)


def _failed(name: str, error: BaseException | str) -> Reference:
    return Reference(None, None, f"none (the {name} failed: {one_line(error)})")


def distances(x: Tensor, reference: Tensor) -> Tensor:
    """Root mean square difference per sample, (B,) float64."""
    return (x.double() - reference.double()).reshape(len(x), -1).square().mean(1).sqrt().cpu()
