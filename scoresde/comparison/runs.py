"""One run of one solver at one budget: what it costs and how accurate it is."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.comparison.bench import Bench, digest, grid_key
from scoresde.comparison.judges import Judges
from scoresde.comparison.references import References, distances
from scoresde.comparison.specs import Budget, Entry
from scoresde.comparison.stored_references import Reference
from scoresde.comparison.timing import Stopwatch, median_seconds, plain_draw_seconds, synchronize
from scoresde.storage.files import one_line
from scoresde.storage.processes import Shares, first_tells, from_all, process, together
from solvers import Solution, Solver
from solvers.grids import GridLike
from solvers.words import describe_grid

KEPT_IMAGES, KEPT_POINTS = 16, 4000
"""Samples of the first repetition that are kept for the sheet."""


class _Share(NamedTuple):
    """A process's share of a run: its solutions batch by batch, and figures of it."""

    found: list[Solution]
    figures: dict[str, Any]


class _Run(NamedTuple):
    """A finished run: its cost, the states (n, *D), the times of its first batch, how many samples failed and what was
    said, and how much noise it drew outside the path."""

    cost: dict[str, Any]
    x: Tensor
    times: list[float]
    failed: int
    message: str
    off_path: int


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
            **bench.under,
            **self.references.settings(),
            **self.judges.settings(),
        }

    def environment(self) -> dict[str, Any]:
        """What times depend on."""
        device = self.bench.device
        world = process()[1]
        return {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
            **({"processes": world} if world > 1 else {}),
        }

    def probe(self) -> dict[str, tuple[list[float], float]]:
        """Figures of the problem and of every metric, with the relative tolerance to which they are reproducible.

        Of a metric: how far the prior's draws are, which tells one feature extractor, or `decode`, from another. Also
        where it is found that a metric cannot be measured at all (too few samples …).
        """
        bench = self.bench
        loose = {torch.float64: 1e-8, torch.float32: 1e-4}.get(bench.dtype, 1e-2)
        found = {"network": (bench.probe(), loose)}
        figures = first_tells(lambda: self.judges.figures(bench.decode(bench.starts(0)).cpu()))
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
            run = self._run(entry, budget, repetition)
            figures |= run.cost
            if run.failed:
                reason = f"{run.failed} of {self.bench.n} samples: {one_line(run.message)}"
                return figures | {"status": "failed", "reason": reason}, None
            figures |= {"status": "ok", "reason": ""}
            figures |= self._path(run, entry, budget, repetition, most)
            judged, kept = first_tells(lambda: self._judged(run.x, repetition))
            return figures | judged, kept
        except (ValueError, TypeError, ImportError) as error:
            return figures | {"status": "skipped", "reason": one_line(error)}, None
        except Exception as error:  # a solver's defect costs its row, not the other solvers' hours
            return figures | {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}, None

    def _run(self, entry: Entry, budget: Budget, repetition: int) -> _Run:
        """The run of all processes: each times its share of the samples, and the slowest one's times count."""
        shares = self.bench.shares(budget.solver.batch_coupled)
        share = together(lambda: self._timed(entry, budget, repetition, shares))
        every = from_all(share.figures)
        first = every[0]  # has the first batch
        slowest = max(every, key=lambda figures: figures["seconds"])
        nfe = shares.all([solution.nfe for solution in share.found])
        times = ("seconds", "network_seconds", "overhead_seconds", "noise_seconds")
        cost = {
            "nfe": float(nfe.double().mean()),
            "nfe_max": int(nfe.max()),
            "steps": len(first["times"]) - 1 - int(first["times"][-1] == 0.0),
            "t_start": first["times"][0],
            **{name: slowest[name] for name in times},
        }
        failed = sum(figures["failed"] for figures in every)
        message = next((figures["message"] for figures in every if figures["failed"]), "")
        x = shares.all([solution.x for solution in share.found]).to(self.bench.device)
        return _Run(cost, x, first["times"], failed, message, sum(figures["off_path"] for figures in every))

    def _timed(self, entry: Entry, budget: Budget, repetition: int, shares: Shares) -> _Share:
        """This process's share of a run."""
        bench, solver, grid = self.bench, budget.solver, self.bench.grid_of(entry)
        bench.check_start(solver, grid)
        options = self._options(budget, grid, repetition)
        self._warm_up(entry, budget, repetition, options)
        network, noise = Stopwatch(bench.device), Stopwatch(bench.device)
        found, draws, off_path = [], 0, 0
        starts = bench.starts(repetition)
        synchronize(bench.device)
        began = time.perf_counter()
        for rows in shares.mine:
            solution, watched = bench.solve(solver, repetition, rows, grid, (network, noise), **options)
            assert watched is not None
            found.append(solution)
            draws, off_path = draws + watched.draws, off_path + watched.off_path
        synchronize(bench.device)
        wall = time.perf_counter() - began
        if self._draw_seconds is None:
            self._draw_seconds = plain_draw_seconds(starts[: len(shares.batches[0])])
        seconds = wall - noise.seconds + draws * self._draw_seconds
        in_network = network.seconds
        if found and seconds < self.min_run_time and all(solution.ok for solution in found):
            share = in_network / seconds
            again = partial(self._again, solver, repetition, grid, options, shares)
            seconds = median_seconds(again, self.min_run_time)
            in_network = share * seconds
        figures = {
            "seconds": seconds,
            "network_seconds": in_network,
            "overhead_seconds": seconds - in_network,
            "noise_seconds": noise.seconds,
            "times": found[0].times.tolist() if found else [],
            "failed": sum(int((solution.status != 0).sum()) for solution in found),
            "message": next((solution.message for solution in found if not solution.ok), ""),
            "off_path": off_path,
        }
        return _Share(found, figures)

    def _again(
        self, solver: Solver, repetition: int, grid: GridLike, options: dict[str, Any], shares: Shares
    ) -> None:
        """The share without watches, on ordinary noise."""
        for rows in shares.mine:
            self.bench.solve(solver, repetition, rows, grid, plain_noise=True, **options)

    def _warm_up(self, entry: Entry, budget: Budget, repetition: int, options: dict[str, Any]) -> None:
        """The same run of one sample, once: imports and tables of coefficients are no part of the figures."""
        grid = self.bench.grid_of(entry)
        key = f"{budget.solver!r} {grid_key(grid)} {budget.name}"
        if key not in self._warm:
            self._warm.add(key)
            self.bench.solve(budget.solver, repetition, range(1), grid, **options)

    def _path(self, run: _Run, entry: Entry, budget: Budget, repetition: int, most: int) -> dict[str, Any]:
        """Distances to the reference."""
        reference = Reference(None, None, "none (it draws noise that the common path does not determine)")
        if not (budget.solver.stochastic and run.off_path):
            reference = self.references.of(entry, budget, repetition, most, run.times)
        figures = {"reference": reference.name, "reference_error": reference.error}
        if reference.x is None:
            return figures
        gaps = distances(run.x, reference.x)
        return figures | {"path_rms": float(gaps.square().mean().sqrt()), "path_median": float(gaps.median())}

    def _judged(self, x: Tensor, repetition: int) -> tuple[dict[str, float | None], Tensor | None]:
        """Distances to other samples, and what is shown of these."""
        decoded = self.bench.decode(x).cpu()
        return self.judges.figures(decoded), _kept(decoded) if repetition == 0 else None

    def _options(self, budget: Budget, grid: GridLike, repetition: int) -> dict[str, Any]:
        """The arguments of `solve` for the budget."""
        if budget.nfe is None:
            return {}
        calls = budget.nfe
        if not budget.solver.adaptive:
            return {"nfe": calls}
        # a library counts its own calls: ask it what one and two steps of one sample cost
        runs = [self.bench.solve(budget.solver, repetition, range(1), grid, steps=k)[0] for k in (1, 2)]
        first, second = (int(run.nfe[0]) for run in runs)
        if calls < first:
            raise ValueError(f"{type(budget.solver).__name__} needs at least {first} network calls, got nfe={calls}")
        return {"steps": 1 + (calls - first) // max(1, second - first)}


def _kept(decoded: Tensor) -> Tensor | None:
    if decoded.ndim == 4 and decoded.shape[1] in (1, 3):
        return decoded[:KEPT_IMAGES].clone()
    return decoded[:KEPT_POINTS].clone() if tuple(decoded.shape[1:]) == (2,) else None
