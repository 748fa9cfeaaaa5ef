"""What runs are measured against: where the same start, and for stochastic solvers the same noise, should have led."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.comparison.bench import Bench, grid_key
from scoresde.comparison.specs import Budget, Entry
from scoresde.comparison.store import finite
from scoresde.comparison.stored_references import Reference, ReferenceStore
from scoresde.storage.files import one_line
from scoresde.storage.processes import first_tells, process, together
from sde_lib import Knot
from solvers import AdaptiveRungeKutta, Grid, Solution, Solver
from solvers.grids import GridLike
from solvers.words import describe

Flow = Callable[[Tensor, Knot, Knot], Tensor]

_CHECKED = 16  # samples on which the reference itself is checked


class References:
    """The references of a comparison, each made once per repetition.

    Args:
        bench: the problem.
        path_error: whether there are any.
        flow: exact probability-flow map (x, from knot, to knot) -> x.
        tolerance: of the adaptive ODE reference.
        refine: steps of a stochastic reference per step of the largest budget; 0: none.
        strong: solver of every stochastic reference, instead of each solver itself.
        progress: a bar for each reference that is solved; None: on a terminal.
    """

    def __init__(
        self,
        bench: Bench,
        path_error: bool,
        flow: Flow | None,
        tolerance: float | None,
        refine: int,
        strong: Solver | None,
        progress: bool | None = False,
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
        self._made: dict[str, Reference] = {}
        self._disable = process()[0] > 0 or (None if progress is None else not progress)
        self.store: ReferenceStore | None = None

    def settings(self) -> dict[str, Any]:
        """How references are made, for JSON."""
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
        """What the run is measured against, in words."""
        solver, law = budget.solver, self.bench.law
        if not self.path_error:
            return "none"
        if not law.has_time:
            return f"solver's own run over all {law.n} levels"
        if not solver.stochastic:
            return "given flow" if self.flow is not None else f"adaptive ODE, rtol {self.tolerance:g}"
        if not self.refine:
            return "none"
        if solver.adaptive or not isinstance(self.bench.grid_of(entry), str | Grid):
            return "none (adaptive steps and given times cannot be refined)"
        who = "solver's own run" if self.strong is None else f"run by {describe(self.strong)}"
        return f"{who} of {self.refine * most} steps on the same path"

    def of(self, entry: Entry, budget: Budget, repetition: int, most: int, times: Sequence[float]) -> Reference:
        """The reference of a finished run that went over `times`. If it cannot be made, the run lacks its distance and
        nothing else."""
        name = self.name(entry, budget, most)
        if name.startswith("none"):
            return Reference(None, None, name)
        if repetition != self._repetition:  # what belongs to the last repetition is done with
            self._made.clear()
            self._repetition = repetition
        key, make = self._plan(name, entry, budget, repetition, most, times)
        if key not in self._made:
            self._made[key] = self._kept(f"{key} | repetition {repetition}", name, make)
        return self._made[key]

    def _kept(self, key: str, name: str, make: Callable[[], Reference]) -> Reference:
        """The stored reference, or a new one, which is stored unless it is by a given flow: two flows look alike."""
        store, starts = self.store if self.flow is None else None, self.bench.starts(self._repetition)
        found = first_tells(lambda: None if store is None else store.find(key, starts.cpu()))
        if found is not None and found.x is not None:
            return found._replace(x=found.x.to(starts.device))
        try:
            made = make()
        except Exception as error:
            return _failed(name, error)
        first_tells(lambda: None if store is None else store.keep(key, made))
        return made

    def _plan(
        self, name: str, entry: Entry, budget: Budget, repetition: int, most: int, times: Sequence[float]
    ) -> tuple[str, Callable[[], Reference]]:
        """What the reference depends on, and how it is made."""
        bench, grid = self.bench, self.bench.grid_of(entry)
        if not bench.law.has_time:
            make = partial(self._walked, name, entry.solver, repetition, bench.law, None)
            return f"{name} | {entry.solver!r}", make
        if not budget.solver.stochastic:
            first, last = times[0], times[-2] if bench.end == "denoise" else times[-1]
            make = partial(self._flowed if self.flow is not None else self._integrated, name, repetition, first, last)
            return f"{name} | {first!r} to {last!r}", make
        solver = self.strong or entry.solver
        make = partial(self._walked, name, solver, repetition, grid, self.refine * most)
        return f"{name} | {solver!r} | {grid_key(grid)}", make

    def _integrated(self, name: str, repetition: int, first: float, last: float) -> Reference:
        """The probability-flow ODE by the adaptive solver."""
        bench = self.bench
        tight = AdaptiveRungeKutta(rtol=self.tolerance, atol=self.tolerance)
        loose = AdaptiveRungeKutta(rtol=10 * self.tolerance, atol=10 * self.tolerance)
        ends = bench.law.knot(first), bench.law.knot(last)

        def reached(rows: range, part: str) -> Tensor:
            with self._bar(f"{name}{part}", 100, "%") as bar:
                along = _along(bar, *ends)
                return _states(bench.solve(tight, repetition, rows, [first, last], progress=along)[0])

        x = self._divided(tight.batch_coupled, reached)
        rougher = self._of_few(lambda few: bench.solve(loose, repetition, few, [first, last])[0])
        return Reference(x, _error(x, rougher), name)

    def _flowed(self, name: str, repetition: int, first: float, last: float) -> Reference:
        """The given flow, then the posterior mean if runs end in it."""
        assert self.flow is not None
        flow, bench = self.flow, self.bench
        here, there = bench.law.knot(first), bench.law.knot(last)

        def reached(rows: range, part: str) -> Tensor:
            x = bench.starts(repetition)[rows.start : rows.stop]
            state = flow(x, here, there)
            if not isinstance(state, Tensor) or state.shape != x.shape:
                got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
                raise ValueError(f"`flow` must return a tensor of shape {tuple(x.shape)}, got {got}.")
            if bench.end == "denoise":
                with torch.no_grad():
                    state = bench.select(rows)(state, there).data
            return state

        return Reference(self._divided(False, reached), None, name)

    def _walked(self, name: str, solver: Solver, repetition: int, grid: GridLike, steps: int | None) -> Reference:
        """A run on the same noise, finer."""
        bench = self.bench

        def reached(rows: range, part: str) -> Tensor:
            with self._bar(f"{name}{part}", None, "call") as bar:
                count = partial(_count_call, bar)
                return _states(bench.solve(solver, repetition, rows, grid, progress=count, steps=steps)[0])

        x = self._divided(solver.batch_coupled, reached)
        if steps is None:
            return Reference(x, None, name)
        rougher = self._of_few(lambda few: bench.solve(solver, repetition, few, grid, steps=steps // 2)[0])
        return Reference(x, _error(x, rougher), name)

    def _divided(self, coupled: bool, reached: Callable[[range, str], Tensor]) -> Tensor:
        """The states of all samples, (n, *D), of which every process makes its share, batch by batch."""
        shares = self.bench.shares(coupled)
        count = len(shares.mine)
        made = together(lambda: [reached(rows, _part(i, count)) for i, rows in enumerate(shares.mine)])
        return shares.all(made).to(self.bench.device)

    def _of_few(self, run: Callable[[range], Solution]) -> Tensor:
        """The states of the first few samples, from the first process."""
        few = range(min(_CHECKED, self.bench.n))
        return first_tells(lambda: run(few).x.cpu()).to(self.bench.device)

    @contextmanager
    def _bar(self, name: str, total: int | None, unit: str) -> Iterator[tqdm]:
        """A bar below that of the runs, gone when the reference is solved."""
        with tqdm(
            total=total, desc=f"reference: {name}", unit=unit, disable=self._disable, file=sys.stderr, leave=False
        ) as bar:
            yield bar


def _part(i: int, count: int) -> str:
    return f" (batch {i + 1} of {count})" if count > 1 else ""


def _along(bar: tqdm, start: Knot, end: Knot) -> Callable[[Knot], None] | None:
    """Moves a bar of 100 to the share of the angle atan(sigma / alpha) that samples have behind them, on average."""
    if bar.disable:
        return None
    first, last = (math.atan2(float(k.sigma), float(k.alpha)) for k in (start, end))
    looked = 0.0

    def told(knot: Knot) -> None:
        nonlocal looked
        if time.perf_counter() - looked < 0.2:  # a look waits for the device
            return
        looked = time.perf_counter()
        sigma, alpha = (torch.as_tensor(v, dtype=torch.float64) for v in (knot.sigma, knot.alpha))
        share = (float(torch.atan2(sigma, alpha).mean()) - first) / (last - first)
        bar.update(max(0.0, round(100.0 * share) - bar.n))

    return told


def _count_call(bar: tqdm, knot: Knot) -> None:
    bar.update()


def _states(solution: Solution) -> Tensor:
    """Where a run led, if it did."""
    if not solution.ok:
        raise ArithmeticError(solution.message)
    return solution.x


def _error(x: Tensor, rougher: Tensor) -> float | None:
    """Root mean square distance from a rougher run on a few samples."""
    return finite(float(distances(rougher, x[: len(rougher)]).square().mean().sqrt()))


def _failed(name: str, error: BaseException) -> Reference:
    return Reference(None, None, f"none (the {name} failed: {one_line(error)})")


def distances(x: Tensor, reference: Tensor) -> Tensor:
    """Root mean square difference per sample, (B,) float64."""
    return (x.double() - reference.double()).reshape(len(x), -1).square().mean(1).sqrt().cpu()
