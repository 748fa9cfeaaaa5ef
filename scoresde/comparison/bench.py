"""The problem of a comparison, and what all its runs share: starts, noise, batches."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.comparison.specs import Entry
from scoresde.comparison.timing import Followed, Stopwatch, Timed, WatchedDraw
from scoresde.data.conditions import mapped
from scoresde.data.spec import DataSpec
from scoresde.guidance import ClassifierFreeGuidance
from scoresde.models.score_model import ScoreModel
from scoresde.storage.processes import Shares
from sde_lib import Chain, Knot, ReverseSDE
from solvers import (
    BrownianPath,
    Grid,
    Noise,
    PerSample,
    Recommended,
    Solution,
    Solver,
    as_draw,
    make_knots,
    solve,
)
from solvers.grids import ENDS, GridLike, default_grid


class Bench:
    """The problem and what all runs share.

    Args:
        problem: `ScoreModel` or `ReverseSDE`.
        shape: of one sample; a score model and given starts know their own.
        n: samples per repetition.
        seed: of starts and noise.
        grid: for solvers without one of their own; `Blended` steps, or the levels of a chain, if None.
        end: "denoise" or "stop".
        start: states to start from, instead of prior draws.
        decode: model units to data units; a score model knows its own.
        batch_size: samples per run of a solver.
        dtype: of the states.
        device: of the states; a score model's own by default.
        paths: whether the noise is one Brownian path per sample, shared between grids, or one stream per sample.
        condition: conditions by name, n rows each.
        guidance: scale of classifier-free guidance; 1: none.
    """

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
        paths: bool,
        condition: Mapping[str, Any] | None,
        guidance: float,
    ) -> None:
        spec: DataSpec | None = None
        state: tuple[int, ...] | None = None
        if isinstance(problem, ScoreModel):
            spec, self.rev = problem.data_spec, problem.reverse()
            decode = problem.decode if decode is None and spec is not None else decode
            state = problem.state_shape if spec is not None else None
            device = problem.device if device is None else device
        elif isinstance(problem, ReverseSDE):
            self.rev = problem
        else:
            raise TypeError(
                "`problem` must be a ScoreModel or a ReverseSDE (sde.reverse(score=fn), mixture.reverse(sde)), "
                f"got {type(problem).__name__}."
            )
        if end not in ENDS:
            raise ValueError(f'`end` must be "stop" or "denoise", got {end!r}.')
        if not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be floating point, got {dtype}.")
        self.law: Any = self.rev.law
        self.device, self.dtype = torch.device("cpu" if device is None else device), dtype
        (self.n,) = integers("n", [n if start is None else len(start)])
        self.seed, self.end, self.paths = int(seed), end, paths
        self.start = None if start is None else start.to(self.device, dtype)
        self.rev, self.under = self._under(condition, guidance, spec)
        self.shape = self._shape(shape, state)
        self.grid: GridLike = default_grid(self.law) if grid is None else grid
        self.batch_size = self.n if batch_size is None else integers("batch_size", [batch_size])[0]
        self.decode = decode or (lambda x: x)
        self.range: tuple[float, float] | None = None
        if spec is not None:
            self.range = spec.range if spec.levels is None else (0.0, spec.levels - 1.0)
        self._drawn: tuple[int, Tensor] | None = None
        self.data_shape = tuple(self.decode(self.starts(0)[:1]).shape[1:])

    def _under(
        self, condition: Mapping[str, Any] | None, guidance: float, spec: DataSpec | None
    ) -> tuple[ReverseSDE, dict[str, Any]]:
        """The problem under conditions and guidance, and what tells these from others, for JSON."""
        rev = self.rev
        if condition is not None and not isinstance(condition, Mapping):
            raise TypeError(f"`condition` must be a mapping of names, got {type(condition).__name__}.")
        if condition:
            if spec is not None and spec.conditions:
                spec.check_condition(condition, self.n)
            rev = rev.given(**mapped(self._rows, condition))
        if guidance != 1.0:
            rev = ClassifierFreeGuidance(rev, guidance)
        return rev, {"condition": mapped(digest, dict(condition or {})), "guidance": float(guidance)}

    def _rows(self, value: Tensor) -> Tensor:
        if value.ndim and len(value) != self.n:
            raise ValueError(f"`condition` needs a row for each of the {self.n} samples, got {len(value)}.")
        return value.to(self.device)

    def _shape(self, shape: Sequence[int] | None, state: tuple[int, ...] | None) -> tuple[int, ...]:
        if self.start is not None:
            found = tuple(self.start.shape[1:])
            if shape is not None and tuple(shape) != found:
                raise ValueError(f"`shape` {tuple(shape)} and the samples of `start` {found} disagree.")
            return found
        if shape is None:
            if state is None:
                raise ValueError("`shape`, of one sample, is needed for a ReverseSDE: it does not know it.")
            shape = state
        return tuple(int(k) for k in shape)

    # --- what everybody starts from -------------------------------------------------------------------------------
    def shares(self, coupled: bool) -> Shares:
        """The rows in batches, divided over the processes; if rows of a batch are coupled, the batches are as given."""
        return Shares(self.n, self.batch_size, coupled)

    def seeds(self, repetition: int) -> list[int]:
        """One per sample: consecutive numbers, the first of which is a hash of the seed and the repetition."""
        word = f"compare {self.seed} {repetition}".encode()
        base = int.from_bytes(hashlib.blake2b(word, digest_size=7).digest(), "little")
        return [base + i for i in range(self.n)]

    def starts(self, repetition: int) -> Tensor:
        """States at the first time, (n, *D)."""
        if self.start is not None:
            return self.start
        if self._drawn is None or self._drawn[0] != repetition:
            like = torch.empty((self.n, *self.shape), dtype=self.dtype, device=self.device)
            draw = PerSample(self.seeds(repetition)).bind(like)
            self._drawn = repetition, self.law.prior(draw, like)
        return self._drawn[1]

    def noise(self, repetition: int, rows: range) -> Noise:
        """The noise of some samples."""
        seeds = self.seeds(repetition)[rows.start : rows.stop]
        return BrownianPath(seeds) if self.paths else PerSample(seeds)

    def select(self, rows: range) -> ReverseSDE:
        """The reverse SDE of some samples."""
        if rows == range(self.n):
            return self.rev
        return self.rev.select(torch.arange(rows.start, rows.stop, device=self.device))

    def grid_of(self, entry: Entry) -> GridLike:
        """The entry's own grid, or the comparison's; that of `Recommended` is part of the recommendation."""
        if entry.grid is None and isinstance(entry.solver, Recommended):
            return default_grid(self.law)
        return self.grid if entry.grid is None else entry.grid

    def check_start(self, solver: Solver, grid: GridLike) -> None:
        """Refuse a grid that does not start at t_max, where the prior's draws belong, unless there are given starts."""
        if self.start is not None or not self.law.has_time:
            return
        steps = 1 if isinstance(grid, str | Grid) else None
        first = float(make_knots(self.law, grid, steps, needs_drift=solver.needs_drift)[0].t)
        if first < self.law.drift_t_max * (1 - 1e-6):
            raise ValueError(
                f"runs start from the prior, at t = {self.law.t_max}, but this grid starts at t = {first}; "
                "give `start`, states at that time"
            )

    # --- runs -----------------------------------------------------------------------------------------------------
    def solve(
        self,
        solver: Solver,
        repetition: int,
        rows: range,
        grid: GridLike,
        watches: tuple[Stopwatch, Stopwatch] | None = None,
        plain_noise: bool = False,
        progress: Callable[[Knot], None] | None = None,
        **budget: Any,
    ) -> tuple[Solution, WatchedDraw | None]:
        """One run on some of the samples.

        Args:
            solver: the solver.
            repetition: whose start and noise.
            rows: of the samples.
            grid: the grid.
            watches: of the network and of the noise, if these are timed.
            plain_noise: one `torch.randn` per draw, for timing, instead of the repetition's noise.
            progress: called with the knot of every network call.
            **budget: steps or nfe.
        """
        x = self.starts(repetition)[rows.start : rows.stop]
        rev = self.select(rows)
        draw = as_draw(0, x) if plain_noise else self.noise(repetition, rows).bind(x)
        if progress is not None:
            rev = Followed(rev, progress)
        watched = None
        if watches is not None:
            rev, watched = Timed(rev, watches[0]), WatchedDraw(draw, watches[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a failure becomes a row
            solution = solve(rev, x, solver, grid=grid, end=self.end, rng=watched or draw, **budget)
        return solution, watched

    def probe(self) -> list[float]:
        """Some outputs of the network, for the prior's draws at the middle of time: they tell one problem from another.

        It is also the first call of a whole batch, before any run is timed: memory and threads are allocated here.

        Raises:
            ValueError: if it is not finite.
        """
        middle = 0.5 * (self.law.t_min + self.law.t_max) if self.law.has_time else self.law.n // 2
        rows = range(min(self.batch_size, self.n))
        with torch.no_grad():
            raw = self.select(rows)(self.starts(0)[: len(rows)], self.law.knot(middle)).raw.double()
        if not bool(torch.isfinite(raw).all()):
            raise ValueError(f"The network's answer at the prior's draws and t = {middle:g} is not finite.")
        return [*raw.flatten()[:8].tolist(), float(raw.square().mean().sqrt())]


def integers(name: str, values: Any) -> list[int]:
    """The distinct values in their order, after a check that they are ints >= 1."""
    if isinstance(values, int):
        values = [values]
    found = list(dict.fromkeys(values))
    if not found or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in found):
        raise ValueError(f"`{name}` must be int(s) >= 1, got {values if len(found) != 1 else found[0]!r}.")
    return found


def grid_key(grid: GridLike) -> str:
    """Text that is the same for equal grids only."""
    if grid is None or isinstance(grid, str | Grid):
        return repr(grid)
    if isinstance(grid, Chain):
        return f"{grid!r} {digest(grid.half_log_snr)}"
    times = [float(k.t) if isinstance(k, Knot) else float(k) for k in grid]
    return f"{len(times)} times {digest(torch.tensor(times, dtype=torch.float64))}"


def digest(x: Tensor) -> str:
    """A tensor's shape and the beginning of a hash of its values."""
    array = x.detach().cpu().double().contiguous().numpy()
    return f"{tuple(x.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
