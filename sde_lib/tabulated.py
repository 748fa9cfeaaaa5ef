"""A variance-preserving SDE through a table of DDPM alphas."""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sde_lib import _math as m
from sde_lib._checks import as_float64
from sde_lib._constants import Constants
from sde_lib._math import Real
from sde_lib.sde import SDE


@dataclass(frozen=True, eq=False)
class TabulatedSDE(SDE):
    r"""The VP SDE whose :math:`\alpha^2` passes through `alphas_cumprod` at t_i = (i + 1) / N.

    lambda is interpolated between the table's entries by a monotone cubic (PCHIP; Fritsch & Carlson 1980), so every
    solver runs on a model that was trained on a discrete table. Defined on [1 / N, 1].

    Args:
        alphas_cumprod: strictly decreasing values in (0, 1), at least two: DDPM's cumulative products.

    Raises:
        ValueError: if the table is too short, not strictly decreasing, or leaves (0, 1).
    """

    alphas_cumprod: Sequence[float] | Tensor
    _times: list[float] = field(init=False, repr=False)
    _lams: list[float] = field(init=False, repr=False)
    _slopes: list[float] = field(init=False, repr=False)
    _constants: Constants = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table = as_float64("alphas_cumprod", self.alphas_cumprod).flatten().tolist()
        if len(table) < 2 or any(not b < a for a, b in itertools.pairwise(table)):
            raise ValueError("`alphas_cumprod` must hold at least two strictly decreasing values.")
        if not (0.0 < table[-1] and table[0] < 1.0):
            raise ValueError(f"`alphas_cumprod` must lie inside (0, 1), got {table[0]} … {table[-1]}.")
        n = len(table)
        lams = [0.5 * (math.log(a) - math.log1p(-a)) for a in table]
        object.__setattr__(self, "_times", [(i + 1) / n for i in range(n)])
        object.__setattr__(self, "_lams", lams)
        object.__setattr__(self, "_slopes", _pchip_slopes(lams, 1.0 / n))
        object.__setattr__(self, "_constants", Constants(self._times, self._lams, self._slopes))

    def __repr__(self) -> str:
        return f"TabulatedSDE(n={len(self._times)}, half_log_snr={self._lams[0]:.3g}…{self._lams[-1]:.3g})"

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self._times[0]

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return self._times[-1]

    def _piece(self, t: Real) -> tuple[Real, Real, Real, Real, Real]:
        """Position u in [0, 1] within the interval of t, and the interval's end values and slopes (times h)."""
        n, h = len(self._times), 1.0 / len(self._times)
        if isinstance(t, Tensor):
            times, lams, slopes = (v.to(t.dtype) for v in self._constants.on(t.device))
            i = (torch.searchsorted(times, t.detach().contiguous(), right=True) - 1).clamp(0, n - 2)
            return (t - times[i]) / h, lams[i], lams[i + 1], slopes[i] * h, slopes[i + 1] * h
        j = min(max(bisect.bisect_right(self._times, t) - 1, 0), n - 2)
        u = (t - self._times[j]) / h
        return u, self._lams[j], self._lams[j + 1], self._slopes[j] * h, self._slopes[j + 1] * h

    def _lam(self, t: Real) -> Real:
        u, y0, y1, d0, d1 = self._piece(t)
        return _hermite(u, y0, y1, d0, d1)

    def _lam_rate(self, t: Real) -> Real:
        u, y0, y1, d0, d1 = self._piece(t)
        rate = 6.0 * u * (1.0 - u) * (y1 - y0) + (1.0 - u) * (1.0 - 3.0 * u) * d0 + u * (3.0 * u - 2.0) * d1
        return rate * len(self._times)

    def _log_alpha(self, t: Real) -> Real:
        return -0.5 * m.softplus(-2.0 * self._lam(t))

    def _log_sigma(self, t: Real) -> Real:
        return -0.5 * m.softplus(2.0 * self._lam(t))

    def _f(self, t: Real) -> Real:
        return m.sigmoid(-2.0 * self._lam(t)) * self._lam_rate(t)

    def _g2(self, t: Real) -> Real:
        return -2.0 * self._f(t)

    def _time_at(self, half_log_snr: Real) -> Real:
        """Bisection inside the interval: the cubic is monotone, 60 halvings reach the last bit."""
        n, h = len(self._times), 1.0 / len(self._times)
        if isinstance(half_log_snr, Tensor):
            times, lams, slopes = self._constants.on(half_log_snr.device)
            i = (torch.searchsorted(-lams, -half_log_snr.contiguous(), right=True) - 1).clamp(0, n - 2)
            piece = lams[i], lams[i + 1], slopes[i] * h, slopes[i + 1] * h
            low, high = torch.zeros_like(half_log_snr), torch.ones_like(half_log_snr)
            for _ in range(60):
                mid = 0.5 * (low + high)
                above = _hermite(mid, *piece) > half_log_snr  # lambda falls with time: the root lies further on
                low, high = torch.where(above, mid, low), torch.where(above, high, mid)
            return times[i] + 0.5 * (low + high) * h
        j = min(max(bisect.bisect_right([-v for v in self._lams], -half_log_snr) - 1, 0), n - 2)
        ends = self._lams[j], self._lams[j + 1], self._slopes[j] * h, self._slopes[j + 1] * h
        lo, hi = 0.0, 1.0
        for _ in range(60):
            middle = 0.5 * (lo + hi)
            if _hermite(middle, *ends) > half_log_snr:
                lo = middle
            else:
                hi = middle
        return self._times[j] + 0.5 * (lo + hi) * h


def _hermite(u: Real, y0: Real, y1: Real, d0: Real, d1: Real) -> Real:
    """Cubic Hermite polynomial on [0, 1] as the chord plus a bump: exact at both ends."""
    secant = y1 - y0
    return y0 + u * secant + u * (1.0 - u) * ((1.0 - u) * (d0 - secant) - u * (d1 - secant))


def _pchip_slopes(y: list[float], h: float) -> list[float]:
    """Fritsch-Carlson slopes on an equispaced table: harmonic means inside, limited parabolas at the ends."""
    secants = [(b - a) / h for a, b in itertools.pairwise(y)]
    if len(secants) == 1:
        return [secants[0], secants[0]]
    inner = [2.0 * a * b / (a + b) for a, b in itertools.pairwise(secants)]
    return [_end_slope(secants[0], secants[1]), *inner, _end_slope(secants[-1], secants[-2])]


def _end_slope(first: float, second: float) -> float:
    slope = 0.5 * (3.0 * first - second)
    if slope * first <= 0.0:
        return 0.5 * first  # keeps lambda strictly monotone, where PCHIP would go flat
    return slope
