"""One run of one solver at one budget: what it costs and how accurate it is."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresde.comparison.bench import Bench, digest, grid_key
from scoresde.comparison.judges import Judges
from scoresde.comparison.references import References, distances
from scoresde.comparison.specs import Budget, Entry
from scoresde.comparison.stored_references import Reference
from scoresde.comparison.timing import Stopwatch, median_seconds, plain_draw_seconds, synchronize
from scoresde.storage.files import one_line
from solvers import Solution, Solver
from solvers.grids import GridLike
from solvers.words import describe_grid

KEPT_IMAGES, KEPT_POINTS = 16, 4000
"""Samples of the first repetition that are kept for the sheet."""


class Runs:
    """Measures runs on a bench, against references, before judges; short ones are repeated for `min_run_time`."""

    def __init__(self, bench: Bench, references: References, judges: Judges, min_run_time: float) -> None:
        self.bench, self.references, self.judges, self.min_run_time = bench, references, judges, min_run_time
        self._warm: set[str] = set()
        self._draw_seconds: float | None = None

    def settings(self) -> dict[str, Any]:
        """What all runs of one file share, for JSON."""
        bench = self.bench
        return {
            "law": repr(bench.law),
            "shape": list(bench.shape),
            "n": bench.n,
            "seed": bench.seed,
            "end": bench.end,
            "start": "prior" if bench.start is None else digest(bench.start),
            "dtype": str(bench.dtype).removeprefix("torch."),
            "device": bench.device.type,
            "batch_size": bench.batch_size,
            "nfe_per_call": bench.rev.nfe_per_call,
            **self.references.settings(),
            **self.judges.settings(),
        }

    def environment(self) -> dict[str, Any]:
        """What times depend on."""
        device = self.bench.device
        return {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
        }

    def probe(self) -> dict[str, tuple[list[float], float]]:
        """Figures of the problem and of every metric, with the relative tolerance to which they are reproducible.

        Of a metric: how far the prior's draws are, which tells one feature extractor, or `decode`, from another. Also
        where it is found that a metric cannot be measured at all (too few samples …).
        """
        bench = self.bench
        loose = {torch.float64: 1e-8, torch.float32: 1e-4}.get(bench.dtype, 1e-2)
        found = {"network": (bench.probe(), loose)}
        figures = self.judges.figures(bench.decode(bench.starts(0)).cpu())
        # generous: a metric of the user's own may draw random directions
        return found | {name: ([value], 0.1) for name, value in figures.items() if value is not None}

    def execute(self, entry: Entry, budget: Budget, repetition: int, most: int) -> tuple[dict[str, Any], Tensor | None]:
        """A run's figures, and the samples to show of it."""
        solver = budget.solver
        figures: dict[str, Any] = {
            "solver": repr(solver),
            "grid": describe_grid(self.bench.grid_of(entry)),
            "kind": "stochastic" if solver.stochastic else "deterministic",
            "order": int(solver.order),
            "adaptive": not solver.needs_steps,
            "samples": self.bench.n,
            "machine": ", ".join(f"{key} {value}" for key, value in self.environment().items()),
        }
        try:
            cost, found, off_path = self._timed(entry, budget, repetition)
            figures |= cost
            if not all(solution.ok for solution in found):
                bad = sum(int((solution.status != 0).sum()) for solution in found)
                message = next(solution.message for solution in found if not solution.ok)
                reason = f"{bad} of {self.bench.n} samples: {one_line(message)}"
                return figures | {"status": "failed", "reason": reason}, None
            x = torch.cat([solution.x for solution in found])
            figures |= {"status": "ok", "reason": ""}
            figures |= self._path(x, entry, budget, repetition, most, found[0], off_path)
            decoded = self.bench.decode(x).cpu()
            return figures | self.judges.figures(decoded), _kept(decoded) if repetition == 0 else None
        except (ValueError, TypeError, ImportError) as error:
            return figures | {"status": "skipped", "reason": one_line(error)}, None
        except Exception as error:  # a solver's defect costs its row, not the other solvers' hours
            return figures | {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}, None

    def _timed(self, entry: Entry, budget: Budget, repetition: int) -> tuple[dict[str, Any], list[Solution], int]:
        """What the run cost, its solutions part by part, and how much noise it drew outside the path."""
        bench, solver, grid = self.bench, budget.solver, self.bench.grid_of(entry)
        bench.check_start(solver, grid)
        options = self._options(budget, grid, repetition)
        self._warm_up(entry, budget, repetition, options)
        network, noise = Stopwatch(bench.device), Stopwatch(bench.device)
        found, draws, off_path = [], 0, 0
        starts = bench.starts(repetition)
        synchronize(bench.device)
        began = time.perf_counter()
        for rows in bench.parts:
            solution, watched = bench.solve(solver, repetition, rows, grid, (network, noise), **options)
            assert watched is not None
            found.append(solution)
            draws, off_path = draws + watched.draws, off_path + watched.off_path
        synchronize(bench.device)
        wall = time.perf_counter() - began
        if self._draw_seconds is None:
            self._draw_seconds = plain_draw_seconds(starts[bench.parts[0]])
        seconds = wall - noise.seconds + draws * self._draw_seconds
        in_network = network.seconds
        if seconds < self.min_run_time and all(solution.ok for solution in found):
            share = in_network / seconds
            seconds = median_seconds(partial(self._again, solver, repetition, grid, options), self.min_run_time)
            in_network = share * seconds
        nfe, times = torch.cat([solution.nfe for solution in found]), found[0].times
        cost = {
            "nfe": float(nfe.double().mean()),
            "nfe_max": int(nfe.max()),
            "steps": len(times) - 1 - int(float(times[-1]) == 0.0),
            "t_start": float(times[0]),
            "seconds": seconds,
            "network_seconds": in_network,
            "overhead_seconds": seconds - in_network,
            "noise_seconds": noise.seconds,
        }
        return cost, found, off_path

    def _again(self, solver: Solver, repetition: int, grid: GridLike, options: dict[str, Any]) -> None:
        """The run without watches, on ordinary noise."""
        for rows in self.bench.parts:
            self.bench.solve(solver, repetition, rows, grid, plain_noise=True, **options)

    def _warm_up(self, entry: Entry, budget: Budget, repetition: int, options: dict[str, Any]) -> None:
        """The same run of one sample, once: imports and tables of coefficients are no part of the figures."""
        grid = self.bench.grid_of(entry)
        key = f"{budget.solver!r} {grid_key(grid)} {budget.name}"
        if key not in self._warm:
            self._warm.add(key)
            self.bench.solve(budget.solver, repetition, slice(0, 1), grid, **options)

    def _path(
        self, x: Tensor, entry: Entry, budget: Budget, repetition: int, most: int, solution: Solution, off_path: int
    ) -> dict[str, Any]:
        """Distances to the reference."""
        reference = Reference(None, None, "none (it draws noise that the common path does not determine)")
        if not (budget.solver.stochastic and off_path):
            reference = self.references.of(entry, budget, repetition, most, solution)
        figures = {"reference": reference.name, "reference_error": reference.error}
        if reference.x is None:
            return figures
        gaps = distances(x, reference.x)
        return figures | {"path_rms": float(gaps.square().mean().sqrt()), "path_median": float(gaps.median())}

    def _options(self, budget: Budget, grid: GridLike, repetition: int) -> dict[str, Any]:
        """The arguments of `solve` for the budget."""
        if budget.nfe is None:
            return {}
        calls = budget.nfe
        if not budget.solver.adaptive:
            return {"nfe": calls}
        # a library counts its own calls: ask it what one and two steps of one sample cost
        runs = [self.bench.solve(budget.solver, repetition, slice(0, 1), grid, steps=k)[0] for k in (1, 2)]
        first, second = (int(run.nfe[0]) for run in runs)
        if calls < first:
            raise ValueError(f"{type(budget.solver).__name__} needs at least {first} network calls, got nfe={calls}")
        return {"steps": 1 + (calls - first) // max(1, second - first)}


def _kept(decoded: Tensor) -> Tensor | None:
    if decoded.ndim == 4 and decoded.shape[1] in (1, 3):
        return decoded[:KEPT_IMAGES].clone()
    return decoded[:KEPT_POINTS].clone() if tuple(decoded.shape[1:]) == (2,) else None
