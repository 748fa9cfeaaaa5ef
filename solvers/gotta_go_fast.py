"""Gotta Go Fast: the reverse SDE with per-sample steps, on one Brownian path whatever is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sde_lib import Knot, ReverseSDE
from sde_lib import _math as m
from sde_lib._checks import check_positive
from solvers.adaptive import Adaptive, Integrated, Known, Rows, Trial, choose, drive, error_norm, places, row_knot
from solvers.coordinates import Coordinate, Time
from solvers.noise import Draw, _PathDraw
from solvers.runge_kutta import Leaves, rescale

_TIME = Time()


class Increments(Protocol):
    """Unit increments of one Brownian path per row, over steps that may be refused."""

    def aim(self, u: Tensor, s: Tensor) -> Tensor:
        """Where a step from u to s may end."""
        ...

    def over(self, u: Tensor, s: Tensor) -> Tensor:
        """The increment from u to s, in units of its standard deviation."""
        ...

    def settle(self, accept: Tensor) -> None:
        """These rows have taken the step."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        ...


class Remembered:
    r"""Increments drawn when first asked for and remembered when their step is refused.

    A refused increment z over [u, c] stays what it is. A shorter step to s, a share q of the way, is its Brownian
    bridge: with one fresh z',

    .. math:: z_{u,s} = \sqrt{q}\\, z + \sqrt{1 - q}\\, z', \\qquad z_{s,c} = \sqrt{1 - q}\\, z - \sqrt{q}\\, z',

    a rotation, so that both are standard normal and independent; the second waits on a stack for the steps that come to
    it (rejection sampling with memory: Rackauckas & Nie 2017, doi:10.3934/dcdsb.2017133, section 3). Deviation: a step
    never spans two remembered increments, and divides the one before it into equal parts, so that nothing is known
    about the path inside of a step but its increment. Every part is at most half of what it divides, which bounds the
    depth of the stack.

    Args:
        draw: noise of the whole batch; the k-th try of every row takes its k-th draw.
        x: the state.
    """

    def __init__(self, draw: Draw, x: Tensor) -> None:
        self.draw, self.tries = draw, 0
        self.index = torch.arange(len(x), device=x.device)
        self.level = torch.zeros_like(self.index)
        self.ends = torch.zeros(len(x), 0, dtype=torch.float64, device=x.device)
        self.z = x.new_empty(0, *x.shape)

    def _top(self, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, the topmost level of each, and where the increment there ends (s where none is remembered)."""
        rows, top = torch.arange(len(u), device=u.device), (self.level - 1).clamp(min=0)
        return rows, top, torch.where(self.level > 0, self.ends[rows, top], s) if self.ends.shape[1] else s

    def aim(self, u: Tensor, s: Tensor) -> Tensor:
        _, _, end = self._top(u, s)
        parts = torch.ceil((end - u) / (s - u) * (1.0 - 1e-9))
        return torch.where(parts > 1.0, u + (end - u) / parts, end)

    def over(self, u: Tensor, s: Tensor) -> Tensor:
        rows, top, end = self._top(u, s)
        fresh = self.draw.normal("increment", self.tries)[self.index]
        self.tries += 1
        push = (self.level == 0) | (s != end)
        if len(self.z) == int((self.level + push).amax()) - 1:
            self.ends = torch.cat([self.ends, u.new_zeros(len(u), 1)], 1)
            self.z = torch.cat([self.z, fresh[None]])
        share = ((s - u) / (end - u)).reshape(-1, *[1] * (fresh.ndim - 1))
        near, far = share.sqrt().to(fresh.dtype), (1.0 - share).sqrt().to(fresh.dtype)
        known = torch.where((self.level > 0).reshape(share.shape), self.z[top, rows], fresh)
        z = torch.where(share < 1.0, near * known + far * fresh, known)
        self.z[top, rows] = far * known - near * fresh  # overwritten by the next line where nothing is left
        self.level = self.level + push
        self.z[self.level - 1, rows], self.ends[rows, self.level - 1] = z, s
        return z

    def settle(self, accept: Tensor) -> None:
        self.level = self.level - accept.long()

    def keep(self, rows: Tensor) -> None:
        self.index, self.level = self.index[rows], self.level[rows]
        self.ends, self.z = self.ends[rows], self.z[:, rows]


class Shared:
    """Increments of a `BrownianPath`, which answers for any two times.

    Args:
        draw: the path.
        x: the state.
        rev: the reverse SDE, whose law turns times into knots.
    """

    def __init__(self, draw: Draw, x: Tensor, rev: ReverseSDE) -> None:
        self.draw, self.law, self.ndim = draw, rev.law, x.ndim
        self.index = torch.arange(len(x), device=x.device)
        self.ends = torch.empty(2, len(x), dtype=torch.float64, device=x.device)

    def aim(self, u: Tensor, s: Tensor) -> Tensor:
        return s

    def over(self, u: Tensor, s: Tensor) -> Tensor:
        self.ends[:, self.index] = torch.stack([u, s])  # rows that have left ask for their last step again
        t, end = (row_knot(self.law, _TIME, v, self.ndim) for v in self.ends)
        return self.draw(t, end)[self.index]

    def settle(self, accept: Tensor) -> None:
        pass

    def keep(self, rows: Tensor) -> None:
        self.index = self.index[rows]


class HeunRows(Rows):
    """Pairs of Euler-Maruyama and stochastic Heun steps of the reverse SDE in time.

    Args:
        rev: the reverse SDE.
        x: the state.
        increments: the noise.
        stops: times that a step must not pass, the last one the end.
        rtol: relative tolerance.
        atol: absolute tolerance.
        exponent: k, where the error of a step goes like h^k.
    """

    def __init__(
        self,
        rev: ReverseSDE,
        x: Tensor,
        increments: Increments,
        stops: Sequence[float],
        rtol: float,
        atol: float,
        exponent: float,
    ) -> None:
        self.rev, self.increments, self.rtol, self.atol, self.exponent = rev, increments, rtol, atol, exponent
        self.stops = torch.tensor(stops, dtype=torch.float64, device=x.device)
        self.first, self.previous, self.euler = Known(), x, x

    def start(self, u: Tensor, span: float, leaves: Leaves) -> tuple[Tensor, Tensor | int]:
        return torch.full_like(u, 0.01 * abs(span)), 0

    def aim(self, u: Tensor, s: Tensor) -> Tensor:
        stop = torch.where(self.stops < u[:, None], self.stops, -torch.inf).amax(1)
        return self.increments.aim(u, torch.maximum(s, stop))

    def _drift(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor | int]:
        def drift(rows: Tensor | None) -> Leaves:
            rev, u_r, x_r = (self.rev, u, x) if rows is None else (self.rev.select(rows), u[rows], x[rows])
            return (rev(x_r, row_knot(rev.law, _TIME, u_r, x.ndim)).drift,)

        (known,), calls = self.first.at(len(u), drift)
        return known, calls

    def attempt(self, u: Tensor, s: Tensor, leaves: Leaves) -> Trial:
        x = leaves[0]
        drift, calls = self._drift(u, x)
        z = self.increments.over(u, s)
        t, end = (row_knot(self.rev.law, _TIME, v, x.ndim) for v in (u, s))
        h = t.t - end.t

        def step(drift: Tensor, knot: Knot) -> Tensor:
            return x + rescale(drift, -h) + rescale(z, m.sqrt(h * knot.g2))

        self.euler = step(drift, t)
        other = step(self.rev(self.euler, end).drift, end)
        error = error_norm(0.5 * (other - self.euler), self.previous, self.euler, self.rtol, self.atol, larger=True)
        new = 0.5 * (self.euler + other)
        return Trial((new,), error, calls + 1, lambda rows, at: (new[rows],))  # reports are stops

    def settle(self, accept: Tensor) -> None:
        (self.previous,) = choose(accept, (self.euler,), (self.previous,))
        self.first.move(accept)
        self.increments.settle(accept)

    def keep(self, rows: Tensor) -> None:
        self.rev, self.previous, self.euler = self.rev.select(rows), self.previous[rows], self.euler[rows]
        self.first.keep(rows)
        self.increments.keep(rows)


@dataclass(frozen=True)
class GottaGoFast(Adaptive):
    r"""The reverse SDE with per-sample steps (Jolicoeur-Martineau et al. 2021, arXiv:2105.14080, Algorithm 1).

    A step from t to s = t - h is tried by Euler-Maruyama and by stochastic Heun, on the same noise z,

    .. math:: x' = x - h f(x, t) + g_t \sqrt{h} z, \quad \tilde x = x - h f(x', s) + g_s \sqrt{h} z, \quad
              x'' = \tfrac12 (x' + \tilde x),

    with f the drift of the reverse SDE. The error is the root mean square of :math:`\tfrac12(\tilde x - x')` over
    max(atol, rtol max(abs x', abs x'_-)), x'_- that of the accepted step before; x'' is taken. Two calls per accepted
    step, one per refused one.

    Deviation: a refused step keeps its noise, and shorter ones are bridged from it (`Remembered`), so that every sample
    follows one Brownian path. The published code draws anew, which favours noise that is easily accepted: on Gaussian
    data on the line the variance is off by half whatever the tolerance. With ``rng=BrownianPath(...)`` the path is that
    one, shared with every other solver that is given it.

    The knots of a grid are hit exactly, whether or not a trajectory is kept.

    Args:
        rtol: relative tolerance; the paper takes 0.01 to 0.05 for images.
        atol: absolute tolerance; 0.0078 in the paper, one of 256 levels on [-1, 1].
        exponent: r: a step's length goes with error^-r. The error of a short step goes like h^(3/2), hence 2/3; 0.9
            in the paper, which refuses more steps.
        max_steps: steps tried before a sample gives up.
    """

    order: ClassVar[int] = 2
    enters: ClassVar[bool] = True
    rtol: float = 0.02
    atol: float = 0.0078
    exponent: float = 2 / 3
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        self._check_control(self.rtol, self.atol, self.max_steps)
        check_positive("exponent", self.exponent)

    @property
    def stochastic(self) -> bool:
        return True

    def _along(self) -> Coordinate:
        return _TIME

    def _absolute(self) -> float:
        return self.atol

    def _enter(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, draw: Draw) -> Tensor:
        return rev(x, t).mix(s.alpha, 0.0) + s.sigma * draw(t, s)  # x_s knows nothing of noise that hides all data

    def _walk(
        self, rev: ReverseSDE, x: Tensor, knots: Sequence[Knot], draw: Draw, reports: Sequence[Knot]
    ) -> Integrated:
        increments = Shared(draw, x, rev) if isinstance(draw, _PathDraw) else Remembered(draw, x)
        times = places(_TIME, knots)
        rows = HeunRows(rev, x, increments, times[1:], self.rtol, self.atol, 1.0 / self.exponent)
        return drive(rows, times[0], times[-1], (x,), self.max_steps, 0.0, places(_TIME, reports), growth=1.5)
