r"""The base class of the forward SDEs.

Every law here is a linear diffusion :math:`dx = f(t)\,x\,dt + g(t)\,dw` with the kernel
:math:`x_t \mid x_0 \sim N(\alpha_t x_0, \sigma_t^2 I)`. A subclass states log alpha and log sigma, and f and g^2,
each in closed form; the tests hold the two statements against each other through

.. math:: (\log\alpha)' = f, \qquad g^2 = (\sigma^2)' - 2 f \sigma^2 = -2 \sigma^2 \lambda'.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sde_lib import _math as m
from sde_lib import knot as knots
from sde_lib._checks import as_number, check_count
from sde_lib._math import Real
from sde_lib.chain import MOST_LEVELS, Chain
from sde_lib.knot import Kernel, Knot, Law, Posterior
from sde_lib.reverse import ReverseSDE, reverse_from_function


class SDE(Law, ABC):
    """A forward SDE with a Gaussian kernel, defined on [t_min, t_max]. It is the continuous law only: no step count.

    Methods take a time as a Python float or as a tensor of any shape. They compute in float64 and return floats for
    floats and the dtype that came in for tensors.

    Attributes:
        t_min: smallest time at which a model of this law is defined (score networks are not trained below).
        t_max: largest time, where the prior stands.
    """

    t_min: float
    t_max: float

    # --- what a subclass states; t is a float or a float64 tensor -------------------------------------------------
    @abstractmethod
    def _log_alpha(self, t: Real) -> Real: ...

    @abstractmethod
    def _log_sigma(self, t: Real) -> Real: ...

    @abstractmethod
    def _f(self, t: Real) -> Real: ...

    @abstractmethod
    def _g2(self, t: Real) -> Real: ...

    @abstractmethod
    def _time_at(self, half_log_snr: Real) -> Real: ...

    def _rates(self, t: Real) -> tuple[Real, Real]:
        f = self._f(t)
        alpha, sigma = m.exp(self._log_alpha(t)), m.exp(self._log_sigma(t))
        return f * alpha, f * sigma + self._g2(t) / (2.0 * sigma)

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std^2 I) that stands for p at t_max."""
        return 1.0

    # --- the law ------------------------------------------------------------------------------------------------
    def log_alpha(self, t: Any) -> Any:
        """log of the signal scale."""
        return _evaluate(self._log_alpha, t)

    def log_sigma(self, t: Any) -> Any:
        """log of the noise scale."""
        return _evaluate(self._log_sigma, t)

    def alpha(self, t: Any) -> Any:
        """Signal scale alpha_t."""
        return _evaluate(lambda u: m.exp(self._log_alpha(u)), t)

    def sigma(self, t: Any) -> Any:
        """Noise scale sigma_t (a standard deviation)."""
        return _evaluate(lambda u: m.exp(self._log_sigma(u)), t)

    def half_log_snr(self, t: Any) -> Any:
        """lambda = log(alpha / sigma), strictly decreasing in t."""
        return _evaluate(lambda u: self._log_alpha(u) - self._log_sigma(u), t)

    def time_at(self, half_log_snr: Any) -> Any:
        """The time with the given lambda: exact inverse of `half_log_snr`."""
        return _evaluate(self._time_at, half_log_snr)

    def f(self, t: Any) -> Any:
        """Drift coefficient f(t), in 1/time."""
        return _evaluate(self._f, t)

    def g2(self, t: Any) -> Any:
        """Squared diffusion coefficient g(t)^2, in x^2/time."""
        return _evaluate(self._g2, t)

    def rates(self, t: Any) -> tuple[Any, Any]:
        """(d alpha/dt, d sigma/dt); finite where f and g are not (flow at t = 1)."""
        if isinstance(t, Tensor):
            alpha_rate, sigma_rate = (torch.as_tensor(r) for r in self._rates(t.double()))
            dtype = t.dtype if t.is_floating_point() else torch.get_default_dtype()
            return alpha_rate.to(dtype), sigma_rate.to(dtype)
        return self._rates(float(t))

    def drift(self, x: Tensor, t: Any) -> Tensor:
        """f(t) x for x of shape (B, *D) and t of shape () or (B,)."""
        return _expand(self.f(t), x) * x

    def diffusion(self, t: Any) -> Any:
        """g(t)."""
        return _evaluate(lambda u: m.sqrt(self._g2(u)), t)

    def marginal_prob(self, x_0: Tensor, t: Any) -> tuple[Tensor, Any]:
        """Mean alpha_t x_0, shape (B, *D), and standard deviation sigma_t, shape of t, of x_t given x_0."""
        return _expand(self.alpha(t), x_0) * x_0, self.sigma(t)

    def perturb(self, x_0: Tensor, t: Any, noise: Tensor | None = None) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise; standard normal noise is drawn if none is given."""
        noise = torch.randn_like(x_0) if noise is None else noise
        return _expand(self.alpha(t), x_0) * x_0 + _expand(self.sigma(t), x_0) * noise

    def prior_sampling(self, shape: tuple[int, ...], generator: torch.Generator | None = None, **like: Any) -> Tensor:
        """A draw of shape (B, *D) from the prior; `like` may give dtype and device."""
        return self.prior_std * torch.randn(shape, generator=generator, **like)

    def prior_logp(self, z: Tensor) -> Tensor:
        """log density in nats of the prior at z, shape (B, *D) -> (B,)."""
        d = z[0].numel()
        square = z.flatten(1).square().sum(1) if z.ndim > 1 else z.square()
        return -0.5 * square / self.prior_std**2 - d * (math.log(self.prior_std) + 0.5 * math.log(2 * math.pi))

    def transition(self, s: Any, t: Any) -> Kernel:
        """Forward kernel x_t | x_s ~ N(scale x_s, std^2 I) for s <= t."""
        return knots.transition(self.knot(s), self.knot(t))

    def posterior(self, s: Any, t: Any) -> Posterior:
        """x_s | x_t, x_0 for s <= t: coefficients of x_t and x_0, and the standard deviation."""
        return knots.posterior(self.knot(s), self.knot(t))

    # --- knots, chains, the reverse -------------------------------------------------------------------------------
    def knot(self, t: Any, ndim: int = 1) -> Knot:
        """The knot at time t: floats for a float or a 0-d tensor, (B, 1, …) tensors for t of shape (B,).

        Args:
            t: time.
            ndim: number of dimensions of the state that the knot's tensors will multiply.
        """
        if isinstance(t, Tensor):
            if t.ndim == 0:
                t = float(t)
            else:
                if t.numel() != t.shape[0]:
                    raise ValueError(f"`t` must have shape () or (B,), got {tuple(t.shape)}.")
                t = t.double().reshape(-1, *[1] * (ndim - 1))
        else:
            t = as_number("t", t)
        log_alpha, log_sigma = self._log_alpha(t), self._log_sigma(t)
        return Knot(t, m.exp(log_alpha), m.exp(log_sigma), log_alpha - log_sigma, t, self)

    def knot_at(self, half_log_snr: Real) -> Knot:
        """The knot with the given lambda (a float, or a tensor already shaped to multiply the state).

        Its time is clamped to [t_min, t_max], so that rounding never leaves the domain of the model.
        """
        # beyond +-300 e^lambda leaves float64, and every law's domain has long ended
        if isinstance(half_log_snr, Tensor):
            rows = torch.as_tensor(self._time_at(half_log_snr.clamp(-300.0, 300.0)))
            return self.knot(rows.clamp(self.t_min, self.t_max), ndim=rows.ndim)
        t = float(self._time_at(min(max(half_log_snr, -300.0), 300.0)))
        return self.knot(min(max(t, self.t_min), self.t_max))

    def discretize(self, n: int) -> Chain:
        """The exact marginals at t_i = t_min + (t_max - t_min) i / (n - 1), as a chain of n steps."""
        check_count("n", n, 2, MOST_LEVELS)
        times = _linspace(self.t_min, self.t_max, n)
        at = [self.knot(t) for t in times]
        lams, alphas, sigmas = zip(*((k.half_log_snr, k.alpha, k.sigma) for k in at), strict=True)
        return Chain(times, lams, alphas, sigmas, self.prior_std, self)

    def reverse(self, **prediction: Any) -> ReverseSDE:
        """The reverse of this SDE under a score model given as a function.

        Args:
            **prediction: exactly one of ``score=``, ``noise=``, ``data=``, ``v=``, ``flow=``, ``edm=`` (with
                ``sigma_data=``): a function of (x, t, **condition), x of shape (B, *D), t of shape (B,), that
                returns a tensor like x. Two more options: ``condition={…}``, arguments of every call, batch first
                (more of them later by ``.given(…)``); ``noise_level=``, what the function gets in the place of t: a
                name in `NOISE_LEVELS` or a function of the knot, such as ``lambda knot: -knot.half_log_snr``.

        Raises:
            TypeError, ValueError: for no or several functions, unknown options, an index level (an SDE has no indices).
        """
        return reverse_from_function(self, prediction)


def _evaluate(fn: Callable[[Any], Any], t: Any) -> Any:
    """fn in float64; the result in the form of t."""
    if isinstance(t, Tensor):
        dtype = t.dtype if t.is_floating_point() else torch.get_default_dtype()
        return fn(t.double()).to(dtype)
    return float(fn(as_number("t", t)))


def _expand(c: Any, x: Tensor) -> Any:
    """A coefficient of shape () or (B,) shaped to multiply x of shape (B, *D), in the dtype of x."""
    if not isinstance(c, Tensor) or c.ndim == 0:
        return c
    if c.shape != x.shape[:1]:
        raise ValueError(
            f"`t` must have shape () or (B,) with B = {x.shape[0]} to match x {tuple(x.shape)}, got {tuple(c.shape)}."
        )
    return c.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _linspace(start: float, end: float, n: int) -> list[float]:
    if n < 2:
        raise ValueError(f"A chain needs n >= 2 steps, got {n}.")
    return [start + (end - start) * i / (n - 1) for i in range(n)]
