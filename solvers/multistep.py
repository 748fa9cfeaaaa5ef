"""Exponential multistep solvers: one call per step, earlier predictions give the order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sde_lib import Knot, Law, Prediction, ReverseSDE, lookup
from sde_lib._checks import check_nonnegative
from sde_lib._math import Real
from solvers.exponential import VARIABLES, Interpolation, form_of
from solvers.noise import Draw
from solvers.solver import Past, Solver, Step, made_ahead, without_ahead

STARTERS = ("graded", "ramp")


@dataclass(frozen=True)
class Multistep(Solver):
    r"""The multistep method through the last `predictor` predictions, with an optional corrector.

    The predictor replaces the data (noise, v …) prediction by the polynomial through its values at the last knots and
    integrates the rest exactly (`solvers.exponential`). The corrector then calls the network at the new knot, includes
    that value in the polynomial, steps again from t with the same noise, and hands the call on: the next step starts
    with it (predict, evaluate, correct). A run therefore makes one call per step, and one more at its end with a
    corrector, which ``end="denoise"`` uses.

    With tau = 0 the order is `predictor`, or with a corrector the smaller of `corrector` and `predictor` + 1. With
    noise it is weak order 2 at most: a polynomial through a rough path carries no more.

    To reach order q a start needs steps of local error q. The default starter inserts q - 2 (with a corrector q - 3)
    short steps of growing order and length into the first interval, each of which costs a call; "ramp" takes the grid's
    own steps with orders 1, 2, …, as all published codes do, and caps the order at 2 (3 with a corrector). From the
    prior, where the prediction hardly changes, this costs little accuracy at small budgets. On a chain, which has no
    times between its levels, the starter is the ramp.

    Args:
        predictor: number of knots of the predictor, >= 1.
        corrector: number of knots of the corrector, the new one included; 0 for none. `predictor` + 1 raises the order
            by one; more gains nothing.
        prediction: what is interpolated: "data", "noise", "v" or "flow".
        variable: in which variable: a name in `VARIABLES`.
        tau: noise, 0 (probability-flow ODE) … 1 (reverse SDE) and above; the drift is changed to keep the law.
        tau_min: lowest sigma / alpha with noise.
        tau_max: highest sigma / alpha with noise.
        starter: "graded" or "ramp"; with noise or `lower_final`, which have order 2 anyway, the ramp.
        lower_final: lower the order towards the end, 3, 2, 1, as published codes do below 15 steps: more robust where
            the prediction varies fast near the data, and the order is lost.
        midpoint: see `Interpolation`.
        half_d2: see `Interpolation`.
        sigma_data: standard deviation of the data, used by "v" only.
    """

    predictor: int = 3
    corrector: int = 0
    prediction: str = "data"
    variable: str = "half_log_snr"
    tau: float = 0.0
    tau_min: float = 0.0
    tau_max: float = math.inf
    starter: str = "graded"
    lower_final: bool = False
    midpoint: bool = False
    half_d2: bool = False
    sigma_data: float = 1.0
    _rule: Interpolation = field(init=False, repr=False, compare=False)
    _remaining: dict[float, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("predictor", 1), ("corrector", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 8:
                raise ValueError(f"`{name}` must be an int in {least} … 8, got {value!r}.")
        if self.corrector == 1:
            raise ValueError("`corrector` counts the new knot and t: at least 2, or 0 for none.")
        form = form_of(self.prediction, self.sigma_data)
        lookup(VARIABLES, self.variable, "variable")
        if self.starter not in STARTERS:
            raise ValueError(f'`starter` must be "graded" or "ramp", got {self.starter!r}.')
        check_nonnegative("tau", self.tau)
        if not 0 <= self.tau_min <= self.tau_max:
            raise ValueError(f"Need 0 <= `tau_min` <= `tau_max`, got {self.tau_min} and {self.tau_max}.")
        if self.tau > 0 and not form.noisy:
            raise ValueError(f'tau > 0 needs prediction="data" or "noise", got {self.prediction!r}.')
        if self.half_d2 and self.variable != "half_log_snr":
            raise ValueError('`half_d2` reproduces a published formula in lambda: it needs variable="half_log_snr".')
        object.__setattr__(self, "_rule", Interpolation(form, self.variable, self.midpoint, self.half_d2))

    # --- what it declares -------------------------------------------------------------------------------------------

    @property
    def _full_order(self) -> int:
        """Order of a step in the middle of a run."""
        order = min(self.corrector, self.predictor + 1) if self.corrector else self.predictor
        if self.half_d2 and max(self.predictor, self.corrector) == 3:
            order = min(order, 2)
        return order

    @property
    def order(self) -> int:  # type: ignore[override]
        order = self._full_order
        if self.starter == "ramp" or self.lower_final:
            order = min(order, 3 if self.corrector else 2)
        return min(order, 2) if self.tau > 0 else order

    @property
    def stochastic(self) -> bool:
        return self.tau > 0

    @property
    def needs_drift(self) -> bool:  # type: ignore[override]
        """Short first steps and a corrector's polynomial need a finite lambda to start from."""
        return self._rule.form.needs_drift or self._short_steps > 0 or self.corrector > 0

    @property
    def shares_calls(self) -> bool:  # type: ignore[override]
        return self.corrector > 0

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return 2 if self.corrector else 1

    @property
    def nfe_to_start(self) -> int:  # type: ignore[override]
        return self._short_steps

    @property
    def _short_steps(self) -> int:
        if self.starter == "ramp" or self.tau > 0 or self.lower_final:
            return 0
        return max(0, self._full_order - (3 if self.corrector else 2))

    def on(self, law: Law) -> Solver:
        """On a chain, with the ramp."""
        return replace(self, starter="ramp") if not law.has_time and self._short_steps else self

    def bind(self, knots: Sequence[Knot]) -> Solver:
        """Notes how many steps are left at each knot, if the last ones are lowered."""
        if not self.lower_final:
            return self
        bound = replace(self)
        n = len(knots) - 1
        object.__setattr__(bound, "_remaining", {float(k.half_log_snr): n - i for i, k in enumerate(knots)})
        return bound

    # --- steps ------------------------------------------------------------------------------------------------------

    def step(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, past: Past, draw: Draw) -> Step:
        """One step, or the start: several short ones."""
        prediction = made_ahead(past, t) or rev(x, t)
        nodes: Past = (*without_ahead(past, t), (t, prediction))
        if len(nodes) == 1 and self._short_steps and not _from_no_signal(t):
            here = t
            for there in self._start(rev.law, t, s):
                x, nodes = self._advance(rev, x, here, there, nodes, draw)
                here = there
                if not self.corrector:
                    nodes = (*nodes, (here, rev(x, here)))
            x, nodes = self._advance(rev, x, here, s, nodes, draw)
        else:
            x, nodes = self._advance(rev, x, t, s, nodes, draw)
        return Step(x, prediction, nodes)

    def _advance(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, nodes: Past, draw: Draw) -> tuple[Tensor, Past]:
        """From t, the last of `nodes`, to s; with the nodes that the next step may read."""
        cap = self._remaining.get(float(t.half_log_snr), 8) if self._remaining and not t.per_sample else 8
        tau2 = self._tau2(t)
        noise = None
        if self.tau > 0:
            noise = self._rule.noise(t, s, tau2, draw(t, s))
        used = self._rule.usable(nodes[-min(self.predictor, cap) :])
        x_s = self._rule.advance(x, t, s, used, -1, tau2, noise)
        if not self.corrector:
            return x_s, nodes[1 - self.predictor :] if self.predictor > 1 else ()
        ahead: tuple[Knot, Prediction] = (s, rev(x_s, s))
        if not _from_no_signal(t):
            used = self._rule.usable(nodes[1 - min(self.corrector, cap + 1) :])
            x_s = self._rule.advance(x, t, s, (*used, ahead), -2, tau2, noise)
        keep = max(self.predictor, self.corrector - 1) - 1
        return x_s, (*(nodes[-keep:] if keep else ()), ahead)

    def _tau2(self, t: Knot) -> Real:
        tau2 = float(self.tau) ** 2
        if tau2 == 0.0 or (self.tau_min == 0.0 and self.tau_max == math.inf):
            return tau2
        low, high = (-math.log(u) if u > 0 else math.inf for u in (self.tau_max, self.tau_min))
        lam = t.half_log_snr
        if isinstance(lam, Tensor):
            return torch.where((low <= lam) & (lam <= high), tau2, 0.0)
        return tau2 if low <= lam <= high else 0.0

    def _start(self, law: Law, t: Knot, s: Knot) -> list[Knot]:
        r"""Knots of the short first steps.

        Step k has order k (k + 1 with a corrector) and local error :math:`O(\ell_k^{k+1})` (:math:`O(\ell_k^{k+2})`);
        the polynomials of later steps, of length h, divide it by the distances between the short steps. With
        :math:`\ell_k = O(h^{b_k})` every contribution to the state is :math:`O(h^q)` if :math:`b_k \ge q / (k + 1)` and
        :math:`b_k \ge 1 + \sum_{i > k} b_i` (with a corrector :math:`b_k \ge q / (k + 2)` and
        :math:`2 b_k \ge 2 + \sum_{i>k} b_i`). From order 5 without a corrector the first of them is so short that
        rounding shows: about 1e-8 in float64.
        """
        m, q = self._short_steps, self._full_order
        b: list[float] = []
        for k in range(m, 0, -1):
            above = sum(b)
            b.insert(0, max(q / (k + 2), 1.0 + above / 2) if self.corrector else max(q / (k + 1), 1.0 + above))
        lam, h = t.half_log_snr, s.half_log_snr - t.half_log_snr
        small = abs(h) if isinstance(h, Tensor) else abs(float(h))
        small = small.clamp(max=1.0) if isinstance(small, Tensor) else min(small, 1.0)
        return [law.knot_at(lam + h * 0.5 ** (m - k) * small ** (b[k] - 1.0)) for k in range(m)]


def _from_no_signal(t: Knot) -> bool:
    """Whether alpha = 0 at t: a step from there is infinitely long in lambda, and of first order."""
    return not isinstance(t.half_log_snr, Tensor) and t.half_log_snr == -math.inf


@dataclass(frozen=True)
class DPMpp2M(Multistep):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2): the data prediction through two knots.

    With the exact weights of the line through both (k-diffusion and diffusers weight the difference quotient by the
    midpoint rule: ``midpoint=True``).
    """

    predictor: int = 2


@dataclass(frozen=True)
class DPMpp3M(Multistep):
    """DPM-Solver++(3M): the data prediction through three knots, order 3.

    As published in code (dpm-solver, diffusers, k-diffusion) the second divided difference lacks a factor two and the
    method is of second order; ``half_d2=True, starter="ramp"`` reproduces those numbers.
    """

    predictor: int = 3


@dataclass(frozen=True)
class DEIS(Multistep):
    """DEIS in log rho (Zhang & Chen 2022, arXiv:2204.13902): the noise prediction through three knots in lambda."""

    predictor: int = 3
    prediction: str = "noise"


@dataclass(frozen=True)
class LinearMultistep(Multistep):
    """Adams-Bashforth along sigma / alpha ("LMS" in k-diffusion): the noise prediction through four knots.

    Of order 4, which shows late: with steps of h in lambda the knots lie a factor e^h apart in sigma / alpha, and on
    mixtures the error is near C h^4 (1 - 3 h), so that halving a step of 0.25 divides it by 2^3.5, one of 0.03 by
    2^3.9. Interpolated in lambda (``variable="half_log_snr"``) the error was 7 to 20 times smaller.
    """

    predictor: int = 4
    prediction: str = "noise"
    variable: str = "noise_ratio"


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC (Zhao et al. 2023, arXiv:2302.04867) with exact weights: `predictor` = 3 is UniPC-3, of order 4.

    The published code's shortcut where two knots are used (rho = 1/2 with B_2(h)) is ``midpoint=True``.
    """

    predictor: int = 3
    corrector: int = 4


@dataclass(frozen=True)
class SDEDPMpp2M(Multistep):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095): DPM-Solver++(2M) on the reverse SDE; weak order 2."""

    predictor: int = 2
    tau: float = 1.0


@dataclass(frozen=True)
class SDEDPMpp3M(Multistep):
    """The three-knot version of SDE-DPM-Solver++; weak order 2, with a smaller constant."""

    predictor: int = 3
    tau: float = 1.0


@dataclass(frozen=True)
class SASolver(Multistep):
    """SA-Solver (Xue et al. 2023, arXiv:2309.05019): stochastic Adams predictor and corrector with noise tau.

    The corrector re-uses the predictor's noise. `predictor` and `corrector` are its orders, `tau_min` and `tau_max`
    the range of sigma / alpha where noise is added.
    """

    predictor: int = 3
    corrector: int = 3
    tau: float = 1.0
