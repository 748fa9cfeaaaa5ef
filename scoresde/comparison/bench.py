"""One problem on the bench: what every run shares, what runs are measured against, and how they are measured."""

from __future__ import annotations

import hashlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.comparison.specs import Budget, Entry, describe, describe_grid, walks_the_grid
from scoresde.comparison.store import finite
from scoresde.comparison.timing import Stopwatch, Timed, WatchedDraw, plain_draw_seconds, synchronize
from scoresde.metrics import METRICS, Features, frechet_distance
from scoresde.score_model import DataSpec, ScoreModel
from sde_lib import Chain, Knot, ReverseSDE, lookup
from solvers import AdaptiveRungeKutta, BrownianPath, Grid, Noise, PerSample, Solution, Solver, make_knots, solve
from solvers.grids import ENDS, GridLike

Metric = Callable[[Tensor, Tensor], float]
Flow = Callable[[Tensor, Knot, Knot], Tensor]

KEPT_IMAGES, KEPT_POINTS = 16, 4000
"""Samples of the first repetition that are kept for the sheet."""

_CHECKED = 16  # samples on which the reference itself is checked


class _Reference(NamedTuple):
    """What a run is measured against: its state, an estimate of its own error, and its name."""

    x: Tensor | None
    error: float | None
    name: str


class Bench:
    """The problem, with everything that all runs share."""

    def __init__(
        self,
        problem: Any,
        shape: Sequence[int] | None,
        n: int,
        seed: int,
        grid: GridLike,
        end: str,
        start: Tensor | None,
        decode: Callable[[Tensor], Tensor] | None,
        batch_size: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        spec: DataSpec | None = None
        if isinstance(problem, ScoreModel):
            spec = problem.data_spec
            self.rev = problem.reverse()
            device = problem.device if device is None else device
        elif isinstance(problem, ReverseSDE):
            self.rev = problem
        else:
            raise TypeError(
                "`problem` must be a ScoreModel or a ReverseSDE (sde.reverse(score=fn), mixture.reverse(sde)), "
                f"got {type(problem).__name__}."
            )
        self.law: Any = self.rev.law
        (self.n,) = integers("n", [n if start is None else len(start)])
        self.seed, self.end = int(seed), end
        if end not in ENDS:
            raise ValueError(f'`end` must be "stop" or "denoise", got {end!r}.')
        if shape is None and start is None and spec is None:
            raise ValueError("`shape`, of one sample, is needed for a ReverseSDE: it does not know it.")
        given = start.shape[1:] if start is not None else shape if shape is not None else spec.shape  # type: ignore[union-attr]
        self.shape = tuple(int(k) for k in given)
        if shape is not None and tuple(shape) != self.shape:
            raise ValueError(f"`shape` {tuple(shape)} and the samples of `start` {self.shape} disagree.")
        self.device, self.dtype = torch.device("cpu" if device is None else device), dtype
        if not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be floating point, got {dtype}.")
        self.start = None if start is None else start.to(self.device, dtype)
        self.grid: GridLike = ("karras" if not isinstance(self.law, Chain) else self.law) if grid is None else grid
        self.batch_size = self.n if batch_size is None else integers("batch_size", [batch_size])[0]
        self.decode = decode or (spec.decode if spec is not None else lambda x: x)
        self.range: tuple[float, float] | None = None
        if spec is not None:
            low, high = spec.shift - 2.0 * spec.scale, spec.shift + 2.0 * spec.scale
            self.range = (low, high) if spec.levels is None else (0.0, spec.levels - 1.0)
        self._cache: dict[Any, Any] = {}
        self._repetition = -1
        self._draw_seconds: float | None = None
        middle = self.law.n // 2 if isinstance(self.law, Chain) else 0.5 * (self.law.t_min + self.law.t_max)
        rows = self.parts[0]
        # one call before any clock runs (allocations, thread pools), whose answer also tells this problem from others
        with torch.no_grad():
            raw = self.select(rows)(self.starts(0)[rows], self.law.knot(middle)).raw.double()
        figures = [*raw.flatten()[:8].tolist(), float(raw.square().mean().sqrt())]
        if not all(finite(v) is not None for v in figures):
            raise ValueError(f"The network's answer at the prior's draws and t = {middle:g} is not finite.")
        self.probe = figures
        self.data_shape = tuple(self.decode(self.starts(0)[:1]).shape[1:])

    # --- what everybody starts from -------------------------------------------------------------------------------
    @property
    def parts(self) -> list[slice]:
        """Rows of each batch."""
        return [slice(i, min(i + self.batch_size, self.n)) for i in range(0, self.n, self.batch_size)]

    def seeds(self, repetition: int) -> list[int]:
        """One per sample: neighbouring numbers, from a place that the seed and the repetition decide."""
        word = f"compare {self.seed} {repetition}".encode()
        base = int.from_bytes(hashlib.blake2b(word, digest_size=7).digest(), "little")
        return [base + i for i in range(self.n)]

    def starts(self, repetition: int) -> Tensor:
        """States at the first time, (n, *D)."""
        if repetition != self._repetition:  # what belongs to the last repetition is done with
            self._cache.clear()
            self._repetition = repetition
        if self.start is not None:
            return self.start
        if "start" not in self._cache:
            like = torch.empty((self.n, *self.shape), dtype=self.dtype, device=self.device)
            self._cache["start"] = self.law.prior_std * PerSample(self.seeds(repetition)).bind(like).normal("prior")
        return self._cache["start"]

    def noise(self, repetition: int, rows: slice) -> Noise:
        """The noise of some samples: one path each, or streams where nothing is measured along paths."""
        seeds = self.seeds(repetition)[rows]
        return BrownianPath(seeds) if self.path_error and self.refine else PerSample(seeds)

    def select(self, rows: slice) -> ReverseSDE:
        """The reverse SDE of some samples."""
        if rows == slice(0, self.n):
            return self.rev
        return self.rev.select(torch.arange(rows.start, rows.stop, device=self.device))

    def grid_of(self, entry: Entry) -> GridLike:
        """The entry's own grid, or the comparison's."""
        return self.grid if entry.grid is None else entry.grid

    # --- references -----------------------------------------------------------------------------------------------
    def references(
        self, path_error: bool, flow: Flow | None, tolerance: float | None, refine: int, strong: Solver | None
    ) -> None:
        """Take the arguments that say what runs are measured against."""
        if not isinstance(refine, int) or isinstance(refine, bool) or refine < 0 or refine == 1:
            raise ValueError(f"`refine` must be an int >= 2, or 0 for no stochastic references, got {refine!r}.")
        if strong is not None and not (isinstance(strong, Solver) and strong.stochastic and not strong.adaptive):
            raise ValueError(f"`strong` must be a stochastic fixed-step solver, got {strong!r}.")
        if tolerance is not None and not 0 < tolerance < 1:
            raise ValueError(f"`tolerance` must be in (0, 1), got {tolerance!r}.")
        if flow is not None and not callable(flow):
            raise TypeError(f"`flow` must be a function (x, from knot, to knot) -> x, got {type(flow).__name__}.")
        self.path_error, self.flow, self.refine, self.strong = path_error, flow, refine, strong
        self.tolerance = tolerance or (1e-10 if self.dtype == torch.float64 else 1e-6)

    def most_steps(self, entry: Entry, nfe: Sequence[int]) -> int:
        """Steps of the entry's largest feasible budget."""
        most = 0
        for calls in nfe:
            try:
                most = max(most, entry.solver.on(self.law).within(calls // self.rev.nfe_per_call, self.end)[1])
            except Exception:  # whatever it is, the run itself will say so in its row
                continue
        return most

    def reference_name(self, entry: Entry, budget: Budget, most: int) -> str:
        """Which reference the run is to be measured against."""
        solver = budget.solver
        if not self.path_error:
            return "none"
        if isinstance(self.law, Chain):
            return f"own run over all {self.law.n} levels"
        if not solver.stochastic:
            return "given flow" if self.flow is not None else f"adaptive ODE, rtol {self.tolerance:g}"
        if not self.refine:
            return "none"
        if solver.adaptive or not isinstance(self.grid_of(entry), str | Grid):
            return "none (no grid to refine)"
        who = "own run" if self.strong is None else f"run by {describe(self.strong)}"
        return f"{who} of {self.refine * most} steps, same path"

    def reference(self, entry: Entry, budget: Budget, repetition: int, most: int, solution: Solution) -> _Reference:
        """The reference of a finished run."""
        name = self.reference_name(entry, budget, most)
        if name.startswith("none"):
            return _Reference(None, None, name)
        if isinstance(self.law, Chain):
            key: Any = (name, entry.label)
            make: Callable[[], _Reference] = partial(self._walked, name, entry.solver, repetition, self.law, None)
        elif not budget.solver.stochastic:
            times = solution.times.tolist()
            first, last = times[0], times[-2] if self.end == "denoise" else times[-1]
            key = (name, first, last)
            make = partial(self._flowed, name, repetition, first, last)
        else:
            solver = self.strong or entry.solver
            key = (name, None if self.strong else entry.label, grid_key(self.grid_of(entry)))
            make = partial(self._walked, name, solver, repetition, self.grid_of(entry), self.refine * most)
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _flowed(self, name: str, repetition: int, first: float, last: float) -> _Reference:
        """The probability-flow ODE from `first` to `last`, then the posterior mean if runs end in it."""
        if self.flow is None:
            tight = AdaptiveRungeKutta(rtol=self.tolerance, atol=self.tolerance)
            loose = AdaptiveRungeKutta(rtol=10 * self.tolerance, atol=10 * self.tolerance)
            few = slice(0, min(_CHECKED, self.n))
            found = [self.solve(tight, repetition, rows, [first, last])[0] for rows in self.parts]
            return self._judged(name, found, self.solve(loose, repetition, few, [first, last])[0])
        here, there = self.law.knot(first), self.law.knot(last)
        states = []
        for rows in self.parts:
            x = self.starts(repetition)[rows]
            state = self.flow(x, here, there)
            if not isinstance(state, Tensor) or state.shape != x.shape:
                got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
                raise ValueError(f"`flow` must return a tensor of shape {tuple(x.shape)}, got {got}.")
            if self.end == "denoise":
                with torch.no_grad():
                    state = self.select(rows)(state, there).data
            states.append(state)
        return _Reference(torch.cat(states), None, name)

    def _walked(self, name: str, solver: Solver, repetition: int, grid: GridLike, steps: int | None) -> _Reference:
        """A run on the same noise, finer."""
        found = [self.solve(solver, repetition, rows, grid, steps=steps)[0] for rows in self.parts]
        if steps is None:
            return self._judged(name, found, None)
        few = slice(0, min(_CHECKED, self.n))
        return self._judged(name, found, self.solve(solver, repetition, few, grid, steps=steps // 2)[0])

    def _judged(self, name: str, found: list[Solution], rougher: Solution | None) -> _Reference:
        """The states, and their distance from a rougher run on a few samples."""
        failed = next((solution.message for solution in found if not solution.ok), None)
        if failed is not None:
            return _Reference(None, None, f"none (the {name} failed: {failed})")
        x = torch.cat([solution.x for solution in found])
        gap = (
            None
            if rougher is None
            else finite(float(_distances(rougher.x, x[: len(rougher.x)]).square().mean().sqrt()))
        )
        return _Reference(x, gap, name)

    # --- two-sample distances -------------------------------------------------------------------------------------
    def judges(
        self,
        samples: Tensor | Callable[[int, int], Tensor] | None,
        floor: Tensor | None,
        metrics: Sequence[str] | Mapping[str, Metric] | None,
        features: Features | None,
        repetitions: int,
    ) -> None:
        """Take the arguments that say how samples are judged, and measure the noise floors."""
        self.metrics = _metrics(metrics, features)
        self.features = features
        self.floors: dict[str, dict[str, float | None]] = {}
        self.targets: Tensor | None = None
        if samples is None:
            if metrics or features is not None:
                raise ValueError("`metrics` and `features` judge samples against reference samples: give `samples`.")
            self.metrics = {}
            return
        draw = samples if callable(samples) else None
        target = draw(self.n, 0) if draw is not None else samples
        for name, value in (("samples", target), ("floor", floor)):
            if value is not None and not (isinstance(value, Tensor) and tuple(value.shape[1:]) == self.data_shape):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"`{name}` must have shape (M, {', '.join(map(str, self.data_shape))}), got {got}.")
        assert isinstance(target, Tensor)
        self.targets = target
        if not self.metrics:
            return
        cycled = target[torch.arange(self.n) % len(target)]
        for metric in self.metrics.values():  # what cannot be measured (too few samples …) is said now
            metric(cycled, target)
        values: dict[str, list[float]] = {name: [] for name in self.metrics}
        for k in range(max(3, repetitions)):
            one, other = self._halves(draw, target, floor, k)
            for name, metric in self.metrics.items():
                try:
                    values[name].append(metric(one, other))
                except ValueError:  # halves may be too small where the whole is not
                    continue
        for name, found in values.items():
            if found:
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                self.floors[name] = {"mean": finite(statistics.fmean(found)), "std": finite(spread)}

    def _halves(
        self, draw: Callable[[int, int], Tensor] | None, target: Tensor, floor: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor]:
        """Two independent samples of the reference law."""
        if draw is not None:
            return draw(self.n, 1 + k), target
        generator = torch.Generator().manual_seed(k)
        if floor is not None:
            return floor[torch.randperm(len(floor), generator=generator)[: self.n]], target
        order = torch.randperm(len(target), generator=generator)
        size = min(self.n, len(target) // 2)
        return target[order[:size]], target[order[size:]]

    # --- runs -----------------------------------------------------------------------------------------------------
    def solve(
        self,
        solver: Solver,
        repetition: int,
        rows: slice,
        grid: GridLike,
        watches: tuple[Stopwatch, Stopwatch] | None = None,
        **budget: Any,
    ) -> tuple[Solution, WatchedDraw | None]:
        """One run on some of the samples."""
        x = self.starts(repetition)[rows]
        rev, draw = self.select(rows), self.noise(repetition, rows).bind(x)
        watched = None
        if watches is not None:
            rev, watched = Timed(rev, watches[0]), WatchedDraw(draw, watches[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a failure becomes a row
            solution = solve(rev, x, solver, grid=grid, end=self.end, rng=watched or draw, **budget)
        return solution, watched

    def execute(self, entry: Entry, budget: Budget, repetition: int, most: int) -> tuple[dict[str, Any], Tensor | None]:
        """A run's figures, and the samples to show of it."""
        solver, grid = budget.solver, self.grid_of(entry)
        figures: dict[str, Any] = {
            "solver": repr(solver),
            "grid": describe_grid(grid),
            "kind": "stochastic" if solver.stochastic else "deterministic",
            "order": int(solver.order),
            "adaptive": bool(solver.adaptive and not walks_the_grid(solver)),
            "samples": self.n,
        }
        try:
            figures |= self._measured(entry, budget, repetition, most)
        except (ValueError, TypeError, ImportError) as error:
            return figures | {"status": "skipped", "reason": _one_line(error)}, None
        except Exception as error:  # a solver's defect costs its row, not the other solvers' hours
            return figures | {"status": "failed", "reason": f"{type(error).__name__}: {_one_line(error)}"}, None
        return figures, figures.pop("kept", None)

    def _measured(self, entry: Entry, budget: Budget, repetition: int, most: int) -> dict[str, Any]:
        solver, grid = budget.solver, self.grid_of(entry)
        self._check_start(solver, grid)
        options = self._options(budget, grid, repetition)
        network, noise = Stopwatch(self.device), Stopwatch(self.device)
        found, draws, off_path = [], 0, 0
        starts = self.starts(repetition)
        synchronize(self.device)
        began = time.perf_counter()
        for rows in self.parts:
            solution, watched = self.solve(solver, repetition, rows, grid, (network, noise), **options)
            assert watched is not None
            found.append(solution)
            draws, off_path = draws + watched.draws, off_path + watched.off_path
        synchronize(self.device)
        wall = time.perf_counter() - began
        if self._draw_seconds is None:
            self._draw_seconds = plain_draw_seconds(starts[self.parts[0]])
        seconds = wall - noise.seconds + draws * self._draw_seconds
        nfe = torch.cat([solution.nfe for solution in found])
        times = found[0].times
        figures: dict[str, Any] = {
            "nfe": float(nfe.double().mean()),
            "nfe_max": int(nfe.max()),
            "steps": len(times) - 1 - int(float(times[-1]) == 0.0),
            "t_start": float(times[0]),
            "seconds": seconds,
            "network_seconds": network.seconds,
            "overhead_seconds": seconds - network.seconds,
            "noise_seconds": noise.seconds,
        }
        bad = sum(int((solution.status != 0).sum()) for solution in found)
        if bad:
            message = next(solution.message for solution in found if not solution.ok)
            return figures | {"status": "failed", "reason": f"{bad} of {self.n} samples: {_one_line(message)}"}
        x = torch.cat([solution.x for solution in found])
        figures |= {"status": "ok", "reason": ""}
        reference = _Reference(None, None, "none (noise outside the path)")
        if not (solver.stochastic and off_path):
            reference = self.reference(entry, budget, repetition, most, found[0])
        figures |= {"reference": reference.name, "reference_error": reference.error}
        if reference.x is not None:
            gaps = _distances(x, reference.x)
            figures |= {"path_rms": float(gaps.square().mean().sqrt()), "path_median": float(gaps.median())}
        decoded = self.decode(x).cpu()
        for name, metric in self.metrics.items():
            assert self.targets is not None
            figures[name] = finite(metric(decoded, self.targets))
        if repetition == 0:
            figures["kept"] = _kept(decoded)
        return figures

    def _check_start(self, solver: Solver, grid: GridLike) -> None:
        """Prior draws stand for p at t_max only."""
        if self.start is not None or isinstance(self.law, Chain):
            return
        first = make_knots(self.law, grid, 1 if isinstance(grid, str | Grid) else None, needs_drift=solver.needs_drift)[
            0
        ]
        if float(first.t) < self.law.drift_t_max * (1 - 1e-6):
            raise ValueError(
                f"runs start from the prior, at t = {self.law.t_max}, but this grid starts at t = {float(first.t)}; "
                "give `start`, states at that time"
            )

    def _options(self, budget: Budget, grid: GridLike, repetition: int) -> dict[str, Any]:
        """The budget in the words of `solve`."""
        if budget.nfe is None:
            return {}
        per_call = self.rev.nfe_per_call
        calls = budget.nfe // per_call
        if calls < 1:
            raise ValueError(f"one call costs {per_call} network evaluations here, got nfe={budget.nfe}")
        if not walks_the_grid(budget.solver):
            return {"nfe": calls}
        # a library counts its own calls: ask it what one and two steps of one sample cost
        one = slice(0, 1)
        costs = [int(self.solve(budget.solver, repetition, one, grid, steps=k)[0].nfe[0]) // per_call for k in (1, 2)]
        if calls < costs[0]:
            raise ValueError(f"{type(budget.solver).__name__} needs at least {costs[0]} network calls, got nfe={calls}")
        return {"steps": 1 + (calls - costs[0]) // max(1, costs[1] - costs[0])}

    # --- what it is -----------------------------------------------------------------------------------------------
    def settings(self) -> dict[str, Any]:
        """What all runs of one file share, JSON-able."""
        targets = None if self.targets is None else _digest(self.targets)
        return {
            "law": repr(self.law),
            "shape": list(self.shape),
            "n": self.n,
            "seed": self.seed,
            "end": self.end,
            "start": "prior" if self.start is None else _digest(self.start),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "batch_size": self.batch_size,
            "nfe_per_call": self.rev.nfe_per_call,
            "path_error": self.path_error,
            "flow": self.flow is not None,
            "tolerance": self.tolerance,
            "refine": self.refine,
            "strong": None if self.strong is None else describe(self.strong),
            "samples": targets,
            "metrics": list(self.metrics),
            "features": self.features if isinstance(self.features, str | None) else _name_of(self.features),
        }

    def environment(self) -> dict[str, Any]:
        """What times depend on."""
        cuda = self.device.type == "cuda"
        return {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if cuda else str(self.device),
            "threads": torch.get_num_threads(),
        }


def integers(name: str, values: Any) -> list[int]:
    """The values without repetitions, in order; every one an int >= 1."""
    if isinstance(values, int):
        values = [values]
    found = list(dict.fromkeys(values))
    if not found or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in found):
        raise ValueError(f"`{name}` must be int(s) >= 1, got {values if len(found) != 1 else found[0]!r}.")
    return found


def _metrics(metrics: Sequence[str] | Mapping[str, Metric] | None, features: Features | None) -> dict[str, Metric]:
    if metrics is None:
        metrics = [m for m in METRICS if m != "frechet_distance" or features is not None]
    if isinstance(metrics, str):
        metrics = [metrics]
    if not isinstance(metrics, Mapping):
        metrics = {name: lookup(METRICS, name, "metric") for name in metrics}
    on_features = partial(frechet_distance, features="identity" if features is None else features)
    return {name: on_features if metric is frechet_distance else metric for name, metric in metrics.items()}


def _distances(x: Tensor, reference: Tensor) -> Tensor:
    """Root mean square difference per sample, (B,) float64."""
    return (x.double() - reference.double()).reshape(len(x), -1).square().mean(1).sqrt().cpu()


def _kept(decoded: Tensor) -> Tensor | None:
    if decoded.ndim == 4 and decoded.shape[1] in (1, 3):
        return decoded[:KEPT_IMAGES].clone()
    return decoded[:KEPT_POINTS].clone() if tuple(decoded.shape[1:]) == (2,) else None


def grid_key(grid: GridLike) -> str:
    """A grid, exactly."""
    if grid is None or isinstance(grid, str | Grid):
        return repr(grid)
    if isinstance(grid, Chain):
        return f"{grid!r} {_digest(grid.half_log_snr)}"
    times = [float(k.t) if isinstance(k, Knot) else float(k) for k in grid]
    return f"{len(times)} times {_digest(torch.tensor(times, dtype=torch.float64))}"


def _digest(x: Tensor) -> str:
    array = x.detach().cpu().double().contiguous().numpy()
    return f"{tuple(x.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def _name_of(thing: Any) -> str:
    return getattr(thing, "__qualname__", type(thing).__qualname__)


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())[:400]
