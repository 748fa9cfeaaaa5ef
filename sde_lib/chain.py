"""Discretized laws: DDPM and SMLD as tables of knots."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sde_lib import _math as m
from sde_lib._checks import as_number
from sde_lib._constants import Constants
from sde_lib.knot import DATA, Knot, Law, posterior, transition
from sde_lib.reverse import ReverseSDE, reverse_from_function

if TYPE_CHECKING:
    from sde_lib.sde import SDE

SPACINGS = ("trailing", "leading", "linspace")


class Chain(Law):
    r"""A discrete forward process x_0 -> x_1 -> … of n noise levels, index 0 the cleanest.

    ``VPSDE().discretize(1000)`` is DDPM (Ho et al. 2020), ``VESDE().discretize(n)`` is SMLD/NCSN (Song & Ermon
    2019). A chain is accepted wherever a grid is; its end is the data (alpha = 1, sigma = 0). Score functions of a
    chain are called with the index, an int64 tensor of shape (B,).

    Tables are float64 tensors of shape (n,) on the CPU, indexed by the level:
        `alpha`, `sigma`, `half_log_snr`; `betas`, the variance of x_i given x_{i-1} (x_{-1} is the data) and
        `forward_scale`, the mean's factor; `posterior_std`, `posterior_x_t`, `posterior_x_0` of x_{i-1} given
        x_i and x_0.

    Args:
        times: nominal time of each level, ascending (what a continuous-time network is called with).
        half_log_snr: lambda of each level, strictly descending.
        alpha: signal scales.
        sigma: noise scales.
        prior_std: standard deviation of the prior at the last level.
        sde: an SDE that passes through the levels, for `continuous`.
    """

    has_time: ClassVar[bool] = False

    def __init__(
        self,
        times: Sequence[float],
        half_log_snr: Sequence[Any],
        alpha: Sequence[Any],
        sigma: Sequence[Any],
        prior_std: float,
        sde: SDE | None = None,
    ) -> None:
        if len(times) < 1 or any(not b < a for a, b in itertools.pairwise(half_log_snr)):
            raise ValueError("A chain needs at least one level and a strictly descending half_log_snr.")
        self._prior_std, self._sde = prior_std, sde
        self.levels = tuple(
            Knot(float(t), float(a), float(s), float(lam), i, self)
            for i, (t, a, s, lam) in enumerate(zip(times, alpha, sigma, half_log_snr, strict=True))
        )
        self.t_min, self.t_max = float(times[0]), float(times[-1])
        self._times = [k.t for k in self.levels]
        self.times = _table(self._times)
        self.alpha = _table(k.alpha for k in self.levels)
        self.sigma = _table(k.sigma for k in self.levels)
        self.half_log_snr = _table(k.half_log_snr for k in self.levels)
        self._constants = Constants(self.times, self.alpha, self.sigma, self.half_log_snr)
        before = (DATA, *self.levels[:-1])
        kernels = [transition(s, t) for s, t in zip(before, self.levels, strict=True)]
        self.forward_scale = _table(k.scale for k in kernels)
        self.betas = _table(k.std for k in kernels).square()
        posteriors = [posterior(s, t) for s, t in zip(before, self.levels, strict=True)]
        self.posterior_std = _table(p.std for p in posteriors)
        self.posterior_x_t = _table(p.x_t for p in posteriors)
        self.posterior_x_0 = _table(p.x_0 for p in posteriors)

    @property
    def n(self) -> int:
        """Number of levels, and of steps from the last one to the data."""
        return len(self.levels)

    @property
    def prior_std(self) -> float:
        return self._prior_std

    @property
    def index_levels(self) -> int:
        return self.n

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2: DDPM's cumulative product of 1 - beta."""
        return self.alpha.square()

    @property
    def kl_weights(self) -> Tensor:
        r"""Weight of :math:`\|\hat\epsilon - \epsilon\|^2` in the chain's bound, (n,); inf at level 0 (a decoder term).

        KL between the posterior and the model's step of the same variance,
        :math:`\tfrac12 (e^{2(\lambda_{i-1} - \lambda_i)} - 1)` (Ho et al. 2020, eq. 12, for any chain).
        """
        before = (DATA, *self.levels[:-1])
        return _table(
            0.5 * m.expm1(2.0 * (s.half_log_snr - t.half_log_snr)) if s is not DATA else math.inf
            for s, t in zip(before, self.levels, strict=True)
        )

    def knot(self, index: Any, ndim: int = 1) -> Knot:
        """The knot of a level: floats for an int, (B, 1, …) tensors for an int64 tensor of shape (B,).

        Raises:
            TypeError: for a time (a float): a chain has indices only.
        """
        if isinstance(index, Tensor) and index.ndim:
            if index.is_floating_point():
                raise TypeError("A chain is indexed by level (int64 tensor), got floating-point times.")
            looked = index.device.type == "cpu" and not torch.compiler.is_compiling()
            if looked and not (0 <= int(index.min()) and int(index.max()) < self.n):
                raise ValueError(f"Levels must be in 0..{self.n - 1}, got {int(index.min())} to {int(index.max())}.")
            shape = (-1, *[1] * (ndim - 1))
            t, alpha, sigma, lam = (table[index].reshape(shape) for table in self._constants.on(index.device))
            return Knot(t, alpha, sigma, lam, index.reshape(shape), self)
        if isinstance(index, float) or (isinstance(index, Tensor) and index.is_floating_point()):
            raise TypeError(f"A chain is indexed by level 0..{self.n - 1}, got the time {float(index)}.")
        i = int(as_number("level", index))
        if not 0 <= i < self.n:
            raise ValueError(f"Level must be in 0..{self.n - 1}, got {i}.")
        return self.levels[i]

    def knot_at(self, half_log_snr: Any) -> Knot:
        raise ValueError(NO_TIME)

    def f(self, t: Any) -> Any:
        raise ValueError(NO_TIME)

    def g2(self, t: Any) -> Any:
        raise ValueError(NO_TIME)

    def rates(self, t: Any) -> tuple[Any, Any]:
        raise ValueError(NO_TIME)

    def descend(self, steps: int | None = None, spacing: str = "trailing") -> tuple[Knot, ...]:
        """Knots from the noisiest level down to the data: all n levels, or `steps` of them.

        Args:
            steps: number of intervals, 1 … n; every level if None.
            spacing: how levels are picked: "trailing" (always starts at the last level; Lin et al. 2023,
                arXiv:2305.08891), "leading" (DDPM and DDIM code: i n // steps) or "linspace" (both end levels).
        """
        n = self.n
        steps = n if steps is None else steps
        if not isinstance(steps, int) or not 1 <= steps <= n:
            raise ValueError(f"A chain of {n} levels can be walked in 1 to {n} steps, got steps={steps!r}.")
        if spacing == "trailing":
            picked = [round(n - i * n / steps) - 1 for i in range(steps)]
        elif spacing == "leading":
            picked = [i * (n // steps) for i in reversed(range(steps))]
        elif spacing == "linspace":
            picked = [round(i * (n - 1) / (steps - 1)) for i in reversed(range(steps))] if steps > 1 else [n - 1]
        else:
            raise ValueError(f"`spacing` must be one of {', '.join(SPACINGS)}, got {spacing!r}.")
        return (*(self.levels[i] for i in picked), DATA)

    def perturb(self, x_0: Tensor, index: Any, noise: Tensor | None = None) -> Tensor:
        """x_i = alpha_i x_0 + sigma_i noise for levels of shape () or (B,)."""
        noise = torch.randn_like(x_0) if noise is None else noise
        k = self.knot(index, ndim=x_0.ndim)
        if k.per_sample:
            return k.alpha.to(x_0.dtype) * x_0 + k.sigma.to(x_0.dtype) * noise  # type: ignore[union-attr]
        return k.alpha * x_0 + k.sigma * noise

    def reverse(self, **prediction: Any) -> ReverseSDE:
        """The reverse of the chain under a score model: as `SDE.reverse`, but the function gets (x, index), int64."""
        return reverse_from_function(self, prediction)

    def continuous(self) -> SDE:
        """The SDE that passes through the levels, for likelihoods and adaptive solvers.

        The SDE itself where the levels are exact marginals of one (``sde.discretize(n)``, VE's among them); for DDPM's
        chain, whose betas are no marginals of the linear schedule, the VP SDE through `alphas_cumprod`
        (`TabulatedSDE`). A network of indices is called with `index_at` there:

            chain.continuous().reverse(noise=network, noise_level=chain.index_at)

        Raises:
            ValueError: for a chain that was made without one.
        """
        if self._sde is None:
            raise ValueError(
                "This chain does not know an SDE through its levels: make it by sde.discretize(n), or hand one over as "
                "Chain(…, sde=TabulatedSDE(alphas_cumprod))."
            )
        return self._sde

    def index_at(self, knot: Knot) -> Any:
        """The index of a knot of the `continuous` law, a real number: linear in time between the levels."""
        t = knot.t
        if not isinstance(t, Tensor):
            i = min(max(bisect.bisect_right(self._times, t) - 1, 0), self.n - 2)
            return i + (t - self._times[i]) / (self._times[i + 1] - self._times[i])
        times = self.times.to(t.device)
        at = (torch.searchsorted(times, t.contiguous(), right=True) - 1).clamp(0, self.n - 2)
        return at + (t - times[at]) / (times[at + 1] - times[at])

    def __repr__(self) -> str:
        return f"Chain(n={self.n}, half_log_snr={self.levels[0].half_log_snr:.3g}…{self.levels[-1].half_log_snr:.3g})"


MOST_LEVELS = 100_000
"""Of a chain: a hundred times those of any published model. Tabulating more would take minutes."""

NO_TIME = (
    "A chain has no continuous time: no drift, no velocity, no times between its levels. Use a solver that steps "
    "between knots (DDIM, Ancestral, ReverseDiffusion, Heun in the noise-ratio coordinate), or go on between the "
    "levels with chain.continuous()."
)


def _table(values: Any) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64, device="cpu")
