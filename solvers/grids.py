"""Where a solver stops on its way: grids of knots, in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from torch import Tensor

from sde_lib import DATA, SDE, Chain, Knot, Law, Table, lookup
from sde_lib._checks import check_positive
from solvers.coordinates import Angle, Coordinate, HalfLogSNR, Time


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
        return [start, *self._inner(law, start, end, steps), end]

    def _inner(self, law: SDE, start: float, end: float, steps: int) -> list[float]:
        """The steps - 1 times between the ends."""
        a, b = self._forward(law, start), self._forward(law, end)
        return [self._inverse(law, a + (b - a) * i / steps) for i in range(1, steps)]

    def _start(self, law: SDE, needs_drift: bool) -> float:
        return law.drift_t_max if needs_drift else law.t_max

    def _along(self) -> Coordinate:
        """The coordinate whose u the grid spaces equally, unless it says how to compute another quantity."""
        raise NotImplementedError

    def _forward(self, law: SDE, t: float) -> float:
        """The quantity that the grid spaces equally."""
        return float(self._along().of(law.knot(t)))

    def _inverse(self, law: SDE, u: float) -> float:
        return float(self._along().knot(law, u).t)


@dataclass(frozen=True)
class UniformTime(Grid):
    """Equal steps in t (Song et al. 2021)."""

    def _along(self) -> Coordinate:
        return Time()


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

    def _along(self) -> Coordinate:
        return HalfLogSNR()


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

    def _along(self) -> Coordinate:
        return Angle(self.sigma_data)


@dataclass(frozen=True)
class Blended(Grid):
    r"""Equal steps in a mixture of lambda and the angle, each scaled to the range of the run.

    :math:`w = (1 - m)\, \frac{\lambda - \lambda_0}{\lambda_1 - \lambda_0}
    + m\, \frac{\theta - \theta_0}{\theta_1 - \theta_0}` with :math:`\theta = \arctan(\sigma / \alpha\sigma_d)`. Equal
    steps in lambda resolve the noise levels where fine structure forms, equal steps in the angle those where most of
    the variance turns from noise into data. `recommend` uses it.

    Where the run starts at alpha = 0, :math:`\lambda = -\infty` (the flow SDE's t = 1), lambda is replaced by
    :math:`\log(c + e^\lambda)`, c the ratio alpha / sigma at the law's `drift_t_max`: all steps shrink with their
    number.

    Args:
        t_start: see `Grid`.
        t_end: see `Grid`.
        mix: m in [0, 1]: 0 is `UniformHalfLogSNR`, 1 `UniformAngle`.
        sigma_data: standard deviation of the data; 0.7 was best on data between 0.5 and 1.
    """

    mix: float = 0.5
    sigma_data: float = 0.7

    def __post_init__(self) -> None:
        check_positive("sigma_data", self.sigma_data)
        if not 0 <= self.mix <= 1:
            raise ValueError(f"`mix` must lie in [0, 1], got {self.mix}.")

    def _inner(self, law: SDE, start: float, end: float, steps: int) -> list[float]:
        noisy, clean = sorted((law.half_log_snr(start), law.half_log_snr(end)))
        times = [law.time_at(lam) for lam in self._levels(law, noisy, clean, steps)]
        return times if law.half_log_snr(start) < law.half_log_snr(end) else times[::-1]

    def _levels(self, law: SDE, noisy: float, clean: float, steps: int) -> list[float]:
        """Inner values of lambda, ascending."""
        shift = math.log(self.sigma_data)
        floor = math.exp(law.half_log_snr(law.drift_t_max)) if noisy == -math.inf else 0.0

        def turned(lam: float) -> float:
            """theta_noisy - theta as one arctangent of a quotient: no difference of nearly equal angles."""
            b = math.exp(-lam - shift)
            if noisy == -math.inf:
                return math.atan2(1.0, b)
            a = math.exp(-noisy - shift)
            return math.atan2(a - b, 1.0 + a * b)

        def lifted(lam: float) -> float:
            return math.log(floor + math.exp(lam)) if floor else lam

        def lowered(level: float) -> float:
            return math.log(floor) + math.log(math.expm1(level - math.log(floor))) if floor else level

        first, last = math.log(floor) if floor else noisy, lifted(clean)
        of_lambda, of_angle = (1.0 - self.mix) / (last - first), self.mix / turned(clean)
        found = []
        low = first
        for i in range(1, steps):
            w, high = i / steps, last
            for _ in range(200):  # bisection, to the last bit
                level = 0.5 * (low + high)
                if level in (low, high):
                    break
                below = of_lambda * (level - first) + of_angle * turned(lowered(level)) < w
                low, high = (level, high) if below else (low, level)
            found.append(lowered(low))
        return found


@dataclass(frozen=True)
class Polyexponential(Grid):
    r"""Equal steps in :math:`(\lambda_{max} - \lambda)^{1/\rho}`: for rho > 1 they crowd at low noise.

    k-diffusion's "polyexponential" spacing of log sigma; rho = 1 is `UniformHalfLogSNR`. Starts where lambda is finite.

    Args:
        t_start: see `Grid`.
        t_end: see `Grid`.
        rho: > 0.
    """

    rho: float = 1.5

    def __post_init__(self) -> None:
        check_positive("rho", self.rho)

    def _start(self, law: SDE, needs_drift: bool) -> float:
        return law.drift_t_max

    def _inner(self, law: SDE, start: float, end: float, steps: int) -> list[float]:
        first, last = (law.half_log_snr(t) for t in (start, end))
        clean = max(first, last)
        fractions = [i / steps for i in range(1, steps)]
        if last < first:  # upward: the same times
            fractions = [1.0 - u for u in fractions]
        return [law.time_at(clean - (1.0 - u) ** self.rho * abs(last - first)) for u in fractions]


@dataclass(frozen=True)
class Cosine(Grid):
    r"""Equal steps in the time of the cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17), on any SDE.

    There :math:`\bar\alpha(\tau) = \cos^2(\tfrac\pi2 \tfrac{\tau + s}{1 + s}) / \cos^2(\tfrac\pi2 \tfrac{s}{1 + s})`;
    a level of the law lies at the tau with :math:`\bar\alpha = \alpha^2 / (\alpha^2 + \sigma^2)`. Nearly equal steps in
    the angle; finite at both ends of every law.

    Args:
        t_start: see `Grid`.
        t_end: see `Grid`.
        offset: s, > 0; 0.008 in the paper.
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        check_positive("offset", self.offset)

    @property
    def _first(self) -> float:
        return 0.5 * math.pi * self.offset / (1.0 + self.offset)

    def _forward(self, law: SDE, t: float) -> float:
        # cos a = c cos b by sines: arccos near 1 would lose half the digits
        alpha, sigma, b = law.alpha(t), law.sigma(t), self._first
        r = math.hypot(alpha, sigma)
        cosine, sine = alpha / r, sigma / r
        return math.atan2(math.hypot(sine, cosine * math.sin(b)), cosine * math.cos(b)) - b

    def _inverse(self, law: SDE, u: float) -> float:
        # sin^2 of the law's angle: 1 - (cos(u + b) / cos b)^2 = sin(u) sin(u + 2 b) / cos^2 b
        b = self._first
        sine = math.sqrt(math.sin(u) * math.sin(u + 2.0 * b)) / math.cos(b)
        return law.time_at(math.log(math.cos(u + b) / math.cos(b) / sine))


@dataclass(frozen=True)
class Beta(Grid):
    """Quantiles of a Beta(a, b) distribution over [t_min, t_max]: steps crowd at both ends for a, b < 1.

    Lee et al. 2024, "Beta Sampling is All You Need", arXiv:2407.12173. Loaded with SciPy.

    Args:
        t_start: see `Grid`.
        t_end: see `Grid`.
        a: > 0; 0.6 in the paper.
        b: > 0; 0.6 in the paper.
    """

    a: float = 0.6
    b: float = 0.6

    def __post_init__(self) -> None:
        check_positive("a", self.a)
        check_positive("b", self.b)

    def _forward(self, law: SDE, t: float) -> float:
        from scipy.special import betainc

        return float(betainc(self.a, self.b, (t - law.t_min) / (law.t_max - law.t_min)))

    def _inverse(self, law: SDE, u: float) -> float:
        from scipy.special import betaincinv

        return law.t_min + (law.t_max - law.t_min) * float(betaincinv(self.a, self.b, u))


@dataclass(frozen=True)
class Shifted(Grid):
    r"""Rectified flow's equal steps, shifted to higher noise: :math:`w = k u / (1 + (k - 1) u)`, on any SDE.

    w = sigma / (alpha + sigma) is the time of rectified flow and u is spaced equally (Esser et al. 2024,
    arXiv:2403.03206, eq. 23). The resolution-dependent shift exp(mu) of later models is ``Shifted(shift=exp(mu))``.
    Finite at both ends of every law.

    Args:
        t_start: see `Grid`.
        t_end: see `Grid`.
        shift: k, > 0; 1 is no shift, 3 the paper's value for large images.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        check_positive("shift", self.shift)

    def _forward(self, law: SDE, t: float) -> float:
        alpha, sigma = law.alpha(t), law.sigma(t)
        return sigma / (sigma + self.shift * alpha)

    def _inverse(self, law: SDE, u: float) -> float:
        return law.time_at(math.log((1.0 - u) / (self.shift * u)))


class _Table(Grid):
    """Base of grids that are a list of noise levels sigma / alpha, interpolated in its logarithm."""

    def _levels(self) -> Sequence[float]:
        """log(sigma / alpha), decreasing."""
        raise NotImplementedError

    def _start(self, law: SDE, needs_drift: bool) -> float:
        return law.drift_t_max

    def _inner(self, law: SDE, start: float, end: float, steps: int) -> list[float]:
        high, low = sorted((-law.half_log_snr(start), -law.half_log_snr(end)), reverse=True)
        levels = self._fitted(list(self._levels()), high, low)
        out = []
        for i in range(1, steps):
            place = (len(levels) - 1) * i / steps
            k = min(int(place), len(levels) - 2)
            out.append(law.time_at(-(levels[k] + (place - k) * (levels[k + 1] - levels[k]))))
        return out if law.half_log_snr(start) < law.half_log_snr(end) else out[::-1]

    def _fitted(self, levels: list[float], high: float, low: float) -> list[float]:
        """The levels over the range of the run."""
        raise NotImplementedError


@dataclass(frozen=True)
class IDDPM(_Table):
    r"""The noise levels of the iDDPM models as Karras et al. 2022 (arXiv:2206.00364, Table 1) write them.

    :math:`u_{j-1} = \sqrt{(u_j^2 + 1) / \max(\bar\alpha_{j-1} / \bar\alpha_j, C_1) - 1}`, :math:`u_M = 0`, with
    :math:`\bar\alpha_j = \sin^2(\tfrac\pi2 \tfrac{j}{M (1 + C_2)})`: equal steps in j over the levels within the run's
    range, whose ends are the run's own. Between levels log u is interpolated, where the paper rounds to the next one.

    Args:
        t_start: see `Grid`.
        t_end: see `Grid`.
        levels: M, 1000 in the paper.
        c_1: C_1, 0.001 in the paper: limits the largest step.
        c_2: C_2, 0.008 in the paper: the cosine schedule's offset.
    """

    levels: int = 1000
    c_1: float = 0.001
    c_2: float = 0.008

    def __post_init__(self) -> None:
        if not isinstance(self.levels, int) or self.levels < 2:
            raise ValueError(f"`levels` must be an int >= 2, got {self.levels!r}.")
        check_positive("c_1", self.c_1)
        check_positive("c_2", self.c_2)

    def _levels(self) -> Sequence[float]:
        def alpha_bar(j: int) -> float:
            return math.sin(0.5 * math.pi * j / (self.levels * (1.0 + self.c_2))) ** 2

        u, out = 0.0, []
        for j in range(self.levels, 0, -1):
            u = math.sqrt((u * u + 1.0) / max(alpha_bar(j - 1) / alpha_bar(j), self.c_1) - 1.0)
            out.append(math.log(u))
        return out[::-1]

    def _fitted(self, levels: list[float], high: float, low: float) -> list[float]:
        inside = [u for u in levels if low < u < high]
        return [high, *inside, low]


_SD = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
_SVD = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)
AYS_TABLES: Mapping[str, tuple[float, ...]] = {"sd": _SD, "sdxl": _SDXL, "svd": _SVD}
"""Noise levels sigma / alpha of 10 steps, optimized for Stable Diffusion 1.5, XL and Stable Video Diffusion."""


@dataclass(frozen=True)
class AlignYourSteps(_Table):
    """Published optimized noise levels (Sabour et al. 2024, arXiv:2404.14507, appendix), for ten steps.

    For other step counts log sigma is interpolated linearly in the step number, as the authors say. On a law with
    another range the table is stretched in lambda to the law's ends: an optimum of its own model only.

    Args:
        t_start: see `Grid`.
        t_end: see `Grid`.
        table: "sd", "sdxl" or "svd".
    """

    table: str = "sd"

    def __post_init__(self) -> None:
        lookup(AYS_TABLES, self.table, "table")

    def _levels(self) -> Sequence[float]:
        return [math.log(u) for u in AYS_TABLES[self.table]]

    def _fitted(self, levels: list[float], high: float, low: float) -> list[float]:
        scale = (high - low) / (levels[0] - levels[-1])
        return [high, *(low + (u - levels[-1]) * scale for u in levels[1:-1]), low]


GRIDS: Mapping[str, type[Grid]] = Table(Grid, {
    "uniform_time": UniformTime,
    "quadratic": Quadratic,
    "geometric": Geometric,
    "uniform_half_log_snr": UniformHalfLogSNR,
    "karras": Karras,
    "uniform_angle": UniformAngle,
    "blended": Blended,
    "polyexponential": Polyexponential,
    "cosine": Cosine,
    "iddpm": IDDPM,
    "beta": Beta,
    "shifted": Shifted,
    "align_your_steps": AlignYourSteps,
})
"""Name -> class. A new grid is one class and one line here. "module:Class" names one of your own."""

ENDS = ("stop", "denoise")
GridLike = Grid | Chain | str | Tensor | Sequence[Any] | None


def default_grid(law: Law) -> Grid | Chain:
    """The grid of a run that names none: `Blended` on every SDE, the chain itself on a chain.

    Equal steps in time, the customary default, cannot resolve the small noise levels of VE and EDM in any affordable
    number of steps, and are several times worse elsewhere; see ``benchmarks/README.md``.
    """
    return law if isinstance(law, Chain) else Blended()


def make_knots(
    law: Law, grid: GridLike, steps: int | None, end: str = "stop", needs_drift: bool = False
) -> tuple[Knot, ...]:
    """Knots of a run.

    Args:
        law: what the score model is defined on.
        grid: a `Grid` (or its name), a `Chain`, given times (1-D), given knots, or None for `default_grid`.
        steps: number of intervals; needed for a `Grid`, optional for a chain (which it strides), and not accepted with
            given times or knots.
        end: "stop" at the last time, or "denoise" from there to the posterior mean (one more call). A chain always
            ends at the data.
        needs_drift: start where f and g are finite.

    Raises:
        ValueError: for a grid that is not strictly monotone or leaves [t_min, t_max], for steps that do not fit, for
            given times that start at alpha = 0 with `needs_drift`.
    """
    if end not in ENDS:
        raise ValueError(f'`end` must be "stop" or "denoise", got {end!r}.')
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"`steps` must be an int >= 1, got {steps!r}.")
    if isinstance(grid, str):
        grid = lookup(GRIDS, grid, "grid")()
    if grid is None:
        grid = default_grid(law)
    if isinstance(grid, Chain):
        _same_chain(law, grid)
        knots = grid.descend(steps)
        _check_inside(law, [k.t for k in knots if not k.is_data])
        return knots
    if not law.has_time and not _is_knots(grid):
        raise ValueError(
            "This score model is defined on the levels of a chain only: pass the chain as `grid` (with `steps` to "
            "stride it), or knots from chain.descend(…)."
        )
    if isinstance(grid, Grid):
        if steps is None:
            raise ValueError(f"`steps` (or `nfe`) is needed with the grid {grid}.")
        return _check_ends(law, _finish(law, grid.times(cast(SDE, law), steps, needs_drift), end), needs_drift)
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
        _check_ends(law, knots, needs_drift)
        return knots if end == "stop" or knots[-1].is_data else (*knots, DATA)
    try:
        times = [float(t) for t in (grid.double().tolist() if isinstance(grid, Tensor) else grid)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"Given times must be a 1-D sequence of numbers, got {type(grid).__name__}.") from error
    return _check_ends(law, _finish(law, times, end), needs_drift)


def _check_ends(law: Law, knots: tuple[Knot, ...], needs_drift: bool) -> tuple[Knot, ...]:
    """Raise if times start, or upward end, where a solver that needs f, g or lambda cannot."""
    if not (needs_drift and law.has_time):
        return knots
    for end, other, knot in (
        ("start", 'DDIM, a multistep method in the data prediction with starter="ramp" and no corrector', knots[0]),
        ("end", "DDIM", knots[-1]),
    ):
        if not knot.per_sample and knot.alpha == 0.0:
            raise ValueError(
                f"This solver cannot {end} at t = {knot.t}, where alpha = 0 and half_log_snr is infinite: {end} at "
                f"t = {law.drift_t_max}, or use one that can ({other})."
            )
    return knots


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
    if not law.has_time:
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
