"""Exponential one-step solvers: stages between the two knots, no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from sde_lib import Knot, ReverseSDE
from sde_lib._checks import check_nonnegative
from solvers.exponential import Interpolation, form_of, rescaled
from solvers.noise import Draw
from solvers.solver import Past, Solver, Step, made_ahead


@dataclass(frozen=True)
class SingleStep(Solver):
    r"""The exponential Runge-Kutta method with stages at :math:`\lambda_t + r_i h`.

    Each stage extrapolates the prediction from the knots before it; the step interpolates it through t and the last
    stage, or through all. One stage: order 2. Two: order 3 if the last one is at 2/3, where the first stage's
    own error has no weight.

    With tau > 0 (one stage) the noise of the step is composed of that up to the stage and the rest, so that both belong
    to one path: weak order 2. Independent noise for stage and step, as in some codes, is of order 1.

    Args:
        stages: positions r_i in (0, 1), increasing: one or two.
        prediction: what is interpolated: "data", "noise", "v" or "flow".
        tau: noise, 0 (probability-flow ODE) … 1 (reverse SDE) and above.
        midpoint: see `Interpolation`.
        all_stages: the last polynomial runs through all knots, DPM-Solver-3's "taylor" variant.
        fast: with two stages and a budget ``nfe=``, the published plan of orders 3, …, 3, and 2, 1 at the end, which
            uses the budget up (Lu et al. 2022, arXiv:2206.00927, section 3.4); the last steps lower the order.
        sigma_data: standard deviation of the data, used by "v" only.
    """

    stages: tuple[float, ...] = (0.5,)
    prediction: str = "noise"
    tau: float = 0.0
    midpoint: bool = False
    all_stages: bool = False
    fast: bool = False
    sigma_data: float = 1.0
    needs_drift = True  # stages between lambda = -inf and a number have no place
    needs_time = True  # stages between the knots
    _rule: Interpolation = field(init=False, repr=False, compare=False)
    _plan: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())
    _calls: dict[float, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        stages = tuple(self.stages) if isinstance(self.stages, list | tuple) else None
        if (
            stages is None
            or len(stages) not in (1, 2)
            or not all(0 < r < 1 for r in stages)
            or len(set(stages)) < len(stages)
        ):
            raise ValueError(f"`stages` must be one or two different positions in (0, 1), got {self.stages!r}.")
        object.__setattr__(self, "stages", stages)
        form = form_of(self.prediction, self.sigma_data)
        check_nonnegative("tau", self.tau)
        if self.tau > 0 and (len(stages) > 1 or not form.noisy):
            raise ValueError('tau > 0 goes with one stage and prediction="data" or "noise".')
        if self.fast and len(stages) < 2:
            raise ValueError("The fast plan mixes orders 3, 2 and 1: it needs two stages.")
        object.__setattr__(self, "_rule", Interpolation(form, midpoint=self.midpoint))

    @property
    def order(self) -> int:  # type: ignore[override]
        third = len(self.stages) == 2 and abs(self.stages[1] - 2 / 3) < 1e-12
        return 3 if third and (self.all_stages or not self.midpoint) else 2

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return len(self.stages) + 1

    @property
    def stochastic(self) -> bool:
        return self.tau > 0

    def nfe(self, steps: int, end: str = "stop") -> int:
        if steps == len(self._plan):
            return sum(self._plan) + (end == "denoise")
        return super().nfe(steps, end)

    def within(self, nfe: int, end: str = "stop") -> tuple[Solver, int]:
        """With `fast`, as many steps of three calls as fit, and shorter ones for the rest."""
        calls = nfe - (end == "denoise")
        if not self.fast or calls < 1:
            return super().within(nfe, end)
        blocks = calls // 3 + 1
        tail = {0: (2, 1), 1: (1,), 2: (2,)}[calls % 3]
        planned = replace(self)
        object.__setattr__(planned, "_plan", (3,) * (blocks - len(tail)) + tail)
        return planned, blocks

    def bind(self, knots: Sequence[Knot]) -> Solver:
        """Notes the planned calls of each step."""
        if not self._plan:
            return self
        bound = replace(self)
        calls = {float(k.half_log_snr): n for k, n in zip(knots, self._plan, strict=False)}
        object.__setattr__(bound, "_calls", calls)
        return bound

    def step(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, past: Past, draw: Draw) -> Step:
        """Stages, then the step."""
        rule, tau2 = self._rule, float(self.tau) ** 2
        prediction = made_ahead(past, t) or rev(x, t)
        stages = self.stages
        if self._calls:
            calls = self._calls[float(t.half_log_snr)]
            stages = {1: (), 2: (0.5,), 3: self.stages}[calls]
        nodes: Past = ((t, prediction),)
        noise = None
        for r in stages:
            middle = rev.law.knot_at(t.half_log_snr + r * (s.half_log_snr - t.half_log_snr))
            if tau2:
                noise = rule.noise(t, middle, tau2, draw(t, middle))
            x_r = rule.advance(x, t, middle, nodes, 0, tau2, noise)
            nodes = (*nodes, (middle, rev(x_r, middle)))
        if noise is not None:
            carried = rescaled(noise, rule.form.carry(middle, s, tau2))
            noise = carried.add_(rule.noise(middle, s, tau2, draw(middle, s)))
        used = nodes if self.all_stages or len(nodes) < 3 else (nodes[0], nodes[-1])
        return Step(rule.advance(x, t, s, used, 0, tau2, noise), prediction)


@dataclass(frozen=True)
class DPMSolver2(SingleStep):
    """DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927, Algorithm 1): the noise prediction, one stage, order 2."""

    midpoint: bool = True


@dataclass(frozen=True)
class DPMSolver3(SingleStep):
    """DPM-Solver-3 (Lu et al. 2022, arXiv:2206.00927, Algorithm 2): the noise prediction, two stages, order 3."""

    stages: tuple[float, ...] = (1 / 3, 2 / 3)


@dataclass(frozen=True)
class DPMpp2S(SingleStep):
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, Algorithm 1): the data prediction, one stage, order 2."""

    prediction: str = "data"
    midpoint: bool = True


@dataclass(frozen=True)
class DPMpp3S(SingleStep):
    """DPM-Solver++(3S): the data prediction, two stages, order 3."""

    stages: tuple[float, ...] = (1 / 3, 2 / 3)
    prediction: str = "data"


@dataclass(frozen=True)
class DPMppSDE(SingleStep):
    """DPM-Solver++(2S) on the reverse SDE ("DPM++ SDE" in k-diffusion), noise of stage and step from one path."""

    prediction: str = "data"
    midpoint: bool = True
    tau: float = 1.0


@dataclass(frozen=True)
class SEEDS2(SingleStep):
    """SEEDS-2 (Gonzalez et al. 2023, arXiv:2305.14267) in data prediction: exact weights; weak order 2."""

    prediction: str = "data"
    tau: float = 1.0
