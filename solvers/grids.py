"""Where a solver stops on its way: grids of knots, in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from torch import Tensor

from sde_lib import DATA, SDE, Chain, Knot, Law, lookup
from sde_lib._checks import check_positive


@dataclass(frozen=True)
class Grid:
    """A rule that places `steps` + 1 times from `t_start` to `t_end`, ends included.

    Args:
        t_start: first time; the law's t_max (or where its drift is finite, for solvers that use it) if None.
        t_end: last time; the law's t_min if None. t_end > t_start runs upward (inversion).
    """

    t_start: float | None = None
    t_end: float | None = None

    def times(self, law: SDE, steps: int, needs_drift: bool = False) -> list[float]:
        """The times, float64."""
        start = self._start(law, needs_drift) if self.t_start is None else float(self.t_start)
        end = law.t_min if self.t_end is None else float(self.t_end)
        if start == end:
            raise ValueError(f"The grid starts and ends at t = {start}; give different `t_start` and `t_end`.")
        a, b = self._forward(law, start), self._forward(law, end)
        inner = [self._inverse(law, a + (b - a) * i / steps) for i in range(1, steps)]
        return [start, *inner, end]

    def _start(self, law: SDE, needs_drift: bool) -> float:
        return law.drift_t_max if needs_drift else law.t_max

    def _forward(self, law: SDE, t: float) -> float:
        """The quantity that the grid spaces equally."""
        raise NotImplementedError

    def _inverse(self, law: SDE, u: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class UniformTime(Grid):
    """Equal steps in t (Song et al. 2021)."""

    def _forward(self, law: SDE, t: float) -> float:
        return t

    def _inverse(self, law: SDE, u: float) -> float:
        return u


@dataclass(frozen=True)
class Quadratic(Grid):
    """Equal steps in sqrt(t) (DDIM, Song et al. 2020, arXiv:2010.02502, appendix D.2)."""

    def _forward(self, law: SDE, t: float) -> float:
        return math.sqrt(t)

    def _inverse(self, law: SDE, u: float) -> float:
        return u * u


@dataclass(frozen=True)
class Geometric(Grid):
    """Equal steps in log t."""

    def _forward(self, law: SDE, t: float) -> float:
        return math.log(t)

    def _inverse(self, law: SDE, u: float) -> float:
        return math.exp(u)


@dataclass(frozen=True)
class UniformHalfLogSNR(Grid):
    """Equal steps in lambda = log(alpha / sigma) (DPM-Solver, Lu et al. 2022, arXiv:2206.00927, section 3.3).

    Starts where lambda is finite: at t = 0.999 on the flow SDE.
    """

    def _start(self, law: SDE, needs_drift: bool) -> float:
        return law.drift_t_max

    def _forward(self, law: SDE, t: float) -> float:
        return law.half_log_snr(t)

    def _inverse(self, law: SDE, u: float) -> float:
        return law.time_at(u)


@dataclass(frozen=True)
class Karras(Grid):
    """Equal steps in (sigma / alpha)^(1 / rho) (Karras et al. 2022, arXiv:2206.00364, eq. 5, for any SDE).

    Starts where sigma / alpha is finite: at t = 0.999 on the flow SDE.

    Args:
        t_start: see `Grid`.
        t_end: see `Grid`.
        rho: how strongly steps crowd at low noise; 7 in the paper.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        check_positive("rho", self.rho)

    def _start(self, law: SDE, needs_drift: bool) -> float:
        return law.drift_t_max

    def _forward(self, law: SDE, t: float) -> float:
        return math.exp(-law.half_log_snr(t) / self.rho)

    def _inverse(self, law: SDE, u: float) -> float:
        return law.time_at(-self.rho * math.log(u))


@dataclass(frozen=True)
class UniformAngle(Grid):
    """Equal steps in theta = atan(sigma / (alpha sigma_data)), which is finite at both ends of every law.

    Args:
        t_start: see `Grid`.
        t_end: see `Grid`.
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_positive("sigma_data", self.sigma_data)

    def _forward(self, law: SDE, t: float) -> float:
        return math.atan2(law.sigma(t), law.alpha(t) * self.sigma_data)

    def _inverse(self, law: SDE, u: float) -> float:
        return law.time_at(-math.log(math.tan(u) * self.sigma_data))


GRIDS: Mapping[str, type[Grid]] = {
    "uniform_time": UniformTime,
    "quadratic": Quadratic,
    "geometric": Geometric,
    "uniform_half_log_snr": UniformHalfLogSNR,
    "karras": Karras,
    "uniform_angle": UniformAngle,
}
"""Name -> class. A new grid is one class and one line here."""

ENDS = ("stop", "denoise")
GridLike = Grid | Chain | str | Tensor | Sequence[Any] | None


def make_knots(
    law: Law, grid: GridLike, steps: int | None, end: str = "stop", needs_drift: bool = False
) -> tuple[Knot, ...]:
    """Knots of a run.

    Args:
        law: what the score model is defined on.
        grid: a `Grid` (or its name), a `Chain`, given times (1-D), given knots, or None: equal steps in time on an
            SDE, the chain itself on a chain.
        steps: number of intervals; needed for a `Grid`, optional for a chain (which it strides), and not accepted with
            given times or knots.
        end: "stop" at the last time, or "denoise" from there to the posterior mean (one more call). A chain always
            ends at the data.
        needs_drift: start where f and g are finite.

    Raises:
        ValueError: for a grid that is not strictly monotone or leaves [t_min, t_max], for steps that do not fit.
    """
    if end not in ENDS:
        raise ValueError(f'`end` must be "stop" or "denoise", got {end!r}.')
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"`steps` must be an int >= 1, got {steps!r}.")
    if isinstance(grid, str):
        grid = lookup(GRIDS, grid, "grid")()
    if grid is None:
        grid = law if isinstance(law, Chain) else UniformTime()
    if isinstance(grid, Chain):
        _same_chain(law, grid)
        knots = grid.descend(steps)
        _check_inside(law, [k.t for k in knots if not k.is_data])
        return knots
    if isinstance(law, Chain) and not _is_knots(grid):
        raise ValueError(
            "This score model is defined on the levels of a chain only: pass the chain as `grid` (with `steps` to "
            "stride it), or knots from chain.descend(…)."
        )
    if isinstance(grid, Grid):
        if steps is None:
            raise ValueError(f"`steps` (or `nfe`) is needed with the grid {grid}.")
        return _finish(law, grid.times(cast(SDE, law), steps, needs_drift), end)
    if steps is not None:
        raise ValueError("`steps` and `nfe` do not go with given times or knots: their number already says it.")
    if _is_knots(grid):
        knots = tuple(cast(Sequence[Knot], grid))
        _check_monotone([k.half_log_snr for k in knots], "half_log_snr")
        if knots[0].is_data:
            raise ValueError(
                "A run cannot start at the noise-free end (sigma = 0), where no model is defined: to invert along a "
                "chain, start at level 0, e.g. tuple(reversed(chain.descend()[:-1]))."
            )
        for k in knots:
            if isinstance(k.law, Chain):
                _same_chain(law, k.law)
            elif isinstance(k.law, SDE) and k.law != law:
                raise ValueError(f"The knots belong to {k.law}, the score model to {law}.")
        _check_inside(law, [k.t for k in knots if not k.is_data])
        return knots if end == "stop" or knots[-1] is DATA else (*knots, DATA)
    try:
        times = [float(t) for t in (grid.double().tolist() if isinstance(grid, Tensor) else grid)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"Given times must be a 1-D sequence of numbers, got {type(grid).__name__}.") from error
    return _finish(law, times, end)


def _finish(law: Any, times: list[float], end: str) -> tuple[Knot, ...]:
    _check_monotone(times, "t")
    _check_inside(law, times)
    low, high = law.t_min, law.t_max
    if end == "denoise" and times[-1] > times[0]:
        raise ValueError('An upward grid (inversion) ends in noise: use end="stop".')
    knots = tuple(law.knot(min(max(t, low), high)) for t in times)
    return knots if end == "stop" else (*knots, DATA)


def _check_inside(law: Law, times: Sequence[Any]) -> None:
    """Raise if a time lies outside the domain of a continuous model (up to what float32 makes of an end)."""
    if isinstance(law, Chain):
        return
    low, high, slack = law.t_min, law.t_max, 1e-6
    for t in times:
        if not low * (1 - slack) <= t <= high * (1 + slack):
            raise ValueError(
                f"Time {t} lies outside [t_min, t_max] = [{low}, {high}], where this model is defined; "
                "choose other times, or build the SDE with another t_min or t_max."
            )


def _check_monotone(values: Sequence[Any], name: str) -> None:
    if len(values) < 2:
        raise ValueError(f"A grid needs at least two entries, got {len(values)}.")
    steps = [b - a for a, b in pairwise(values)]
    if not (all(d > 0 for d in steps) or all(d < 0 for d in steps)):
        where = next(i for i, d in enumerate(steps) if not d * steps[0] > 0)
        raise ValueError(
            f"A grid must be strictly monotone in {name}; entries {where} and {where + 1} are "
            f"{values[where]} and {values[where + 1]}."
        )


def _is_knots(grid: Any) -> bool:
    return isinstance(grid, Sequence) and len(grid) > 0 and isinstance(grid[0], Knot)


def _same_chain(law: Law, chain: Chain) -> None:
    if isinstance(law, Chain) and law is not chain and law.n != chain.n:
        raise ValueError(f"The score model lives on a chain of {law.n} levels, the grid on one of {chain.n}.")
