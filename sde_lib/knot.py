r"""A `Knot`: everything a solver needs to know about one time, in float64.

Notation (all packages): time runs from t = 0 (data) to t = T (prior), a step goes from `t` to `s`, and

.. math:: p(x_t \mid x_0) = N(\alpha_t x_0,\ \sigma_t^2 I), \qquad \lambda_t = \log(\alpha_t / \sigma_t).

`alpha` and `sigma` are scales (not variances); `half_log_snr` is :math:`\lambda`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sde_lib import _math as m
from sde_lib._checks import check_state
from sde_lib._math import Real

if TYPE_CHECKING:
    from sde_lib.reverse import ReverseSDE


class NormalDraw(Protocol):
    """The part of a run's noise that a law draws its prior from: `solvers.Draw` is one."""

    def normal(self, *key: Any) -> Tensor: ...


class Law:
    """What knots come from: a continuous `SDE`, or a `Chain` that discretizes one."""

    t_min: float
    t_max: float
    has_time: ClassVar[bool] = True
    """Whether there is anything between its levels: drift, velocity, times. A chain has levels only."""

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior that stands for the law at its noisy end."""
        raise NotImplementedError

    @property
    def drift_t_max(self) -> float:
        """Largest time at which f, g and lambda are finite: where solvers that use them start. t_max for most laws."""
        return self.t_max

    @property
    def index_levels(self) -> int:
        """Number of levels that an index counts; 0 on a continuous law."""
        return 0

    def prior(self, draw: NormalDraw, like: Tensor) -> Tensor:
        """A state (B, *D) like `like`, drawn from the prior N(0, prior_std^2 I)."""
        return self.prior_std * draw.normal("prior").to(like)

    def check_state(self, x: Any, name: str = "x_T") -> None:
        """Raise TypeError or ValueError unless x is a state of this law: floating point, (B, *D)."""
        check_state(name, x)

    def f(self, t: Any) -> Any:
        raise NotImplementedError

    def g2(self, t: Any) -> Any:
        raise NotImplementedError

    def rates(self, t: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def knot(self, t: Any, ndim: int = 1) -> Knot:
        raise NotImplementedError

    def knot_at(self, half_log_snr: Any) -> Knot:
        raise NotImplementedError

    def reverse(self, **prediction: Any) -> ReverseSDE:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Knot:
    """One time and its coefficients.

    On a fixed grid every field is a Python float: coefficients are computed on the host in float64 and reach the
    device as scalar arguments. Where each sample has its own time the fields are float64 tensors of shape
    (B, 1, …, 1), ready to multiply a (B, *D) state. Step formulas use `sde_lib._math` and serve both.

    Attributes:
        t: time.
        alpha: signal scale.
        sigma: noise scale (standard deviation); 0 at the data end.
        half_log_snr: log(alpha / sigma); +inf where sigma = 0, -inf where alpha = 0.
        index: level on a chain, an integer; on an SDE the time.
        law: the SDE or chain that the knot belongs to.
    """

    t: Real
    alpha: Real
    sigma: Real
    half_log_snr: Real
    index: Any
    law: Law | None = None

    @property
    def per_sample(self) -> bool:
        """Whether every sample has its own time."""
        return isinstance(self.t, Tensor)

    @property
    def is_data(self) -> bool:
        """Whether this is the noise-free end (alpha = 1, sigma = 0), where no network is ever evaluated."""
        return not isinstance(self.sigma, Tensor) and self.sigma == 0.0

    @property
    def has_time(self) -> bool:
        """Whether this is a time of a continuous law, not a level of a chain."""
        return self.law is not None and self.law.has_time

    @property
    def f(self) -> Real:
        """Drift coefficient of dx = f x dt + g dw. Raises ValueError on a chain, which has none."""
        return self._law().f(self.t)

    @property
    def g2(self) -> Real:
        """Squared diffusion coefficient g^2. Raises ValueError on a chain, which has none."""
        return self._law().g2(self.t)

    @property
    def rates(self) -> tuple[Real, Real]:
        """(d alpha / dt, d sigma / dt). Raises ValueError on a chain, which has none."""
        return self._law().rates(self.t)

    def _law(self) -> Law:
        if self.law is None:
            raise ValueError("The data end (sigma = 0) has no drift or diffusion: nothing is evaluated there.")
        return self.law

    def spread(self, value: Real | int, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`value` (of this knot) as a (B,) tensor on the device of `x`: what networks are called with."""
        if dtype is None and x.dtype not in _WIDE:
            dtype = torch.float32
        if isinstance(value, Tensor):
            one = value.ndim == 0 or not self.per_sample  # a function of a knot of floats, or a constant
            value = value.reshape(-1).to(x.device, dtype or x.dtype)
            return value.expand(len(x)) if one else value
        return x.new_full((len(x),), value) if dtype is None else x.new_full((len(x),), value, dtype=dtype)

    def select(self, rows: Tensor) -> Knot:
        """The knot of the given rows (an index or mask over samples)."""
        if not self.per_sample:
            return self

        def pick(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) else value

        return Knot(
            pick(self.t), pick(self.alpha), pick(self.sigma), pick(self.half_log_snr), pick(self.index), self.law
        )


def state_std(at: Any, sigma_data: float) -> Real:
    """Standard deviation of the state at a knot (or what else has `alpha` and `sigma`) for data of deviation
    `sigma_data`: sqrt(sigma^2 + alpha^2 sigma_data^2)."""
    signal = at.alpha * sigma_data
    return m.sqrt(at.sigma * at.sigma + signal * signal)


def compilable(t: Any, x: Tensor) -> Any:
    """A time, as a (B,) tensor if it is a number and the call is being compiled.

    Coefficients of a number come from `math`, which knows no symbols: every time would be a graph of its own, or a
    failed guard.
    """
    if isinstance(t, float) and torch.compiler.is_compiling():
        return x.new_full(x.shape[:1], t, dtype=torch.float64)
    return t


_WIDE = (torch.float32, torch.float64)

DATA = Knot(t=0.0, alpha=1.0, sigma=0.0, half_log_snr=math.inf, index=-1)
"""The noise-free end: alpha = 1, sigma = 0."""


class Kernel(NamedTuple):
    """x_t | x_s ~ N(scale x_s, std^2 I)."""

    scale: Real
    std: Real


class Posterior(NamedTuple):
    """x_s | x_t, x_0 ~ N(x_t x_t + x_0 x_0, std^2 I): the coefficients of x_t and x_0, and the standard deviation."""

    x_t: Real
    x_0: Real
    std: Real


def noise_fraction(s: Knot, t: Knot) -> Real:
    r"""Share of the noise variance at `t` that was added after `s` (the cleaner one).

    .. math:: 1 - e^{2(\lambda_t - \lambda_s)} = \mathrm{Var}(x_t \mid x_s) / \sigma_t^2 \in [0, 1]

    Through expm1, never as a difference of variances.

    Raises:
        ValueError: if `s` is the noisier of the two (checked for knots of floats).
    """
    if isinstance(t.half_log_snr, float) and isinstance(s.half_log_snr, float) and t.half_log_snr > s.half_log_snr:
        raise ValueError(f"`s` must be cleaner than `t`, got s = {s.t} and t = {t.t}: kernels run forward only.")
    lam_t, lam_s = t.half_log_snr, s.half_log_snr
    if isinstance(lam_t, Tensor) or isinstance(lam_s, Tensor):
        same = torch.as_tensor(lam_t == lam_s)
        return -m.expm1(2.0 * torch.where(same, 0.0, lam_t - lam_s))
    return 0.0 if lam_t == lam_s else -m.expm1(2.0 * (lam_t - lam_s))  # inf - inf where alpha = 0 at both


def _kept(s: Knot, t: Knot) -> Real:
    """alpha_t / alpha_s; 1 between equal scales, alpha = 0 at both included."""
    if isinstance(t.alpha, Tensor) or isinstance(s.alpha, Tensor):
        return torch.where(torch.as_tensor(t.alpha == s.alpha), 1.0, t.alpha / s.alpha)
    return 1.0 if t.alpha == s.alpha else t.alpha / s.alpha


def transition(s: Knot, t: Knot) -> Kernel:
    """Forward kernel from `s` to the noisier `t`."""
    return Kernel(_kept(s, t), t.sigma * m.sqrt(noise_fraction(s, t)))


def posterior(s: Knot, t: Knot) -> Posterior:
    """Law of x_s given x_t and x_0, by Bayes (Ho et al. 2020, arXiv:2006.11239, eqs. 6-7, for any linear SDE)."""
    new = noise_fraction(s, t)
    ratio = s.sigma / t.sigma
    return Posterior(_kept(s, t) * ratio * ratio, s.alpha * new, s.sigma * m.sqrt(new))
