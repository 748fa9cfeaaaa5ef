"""The one Runge-Kutta kernel, its tableaux, and the fixed-step solvers made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from sde_lib import Knot, Law, Prediction, ReverseSDE, lookup
from sde_lib._math import Real
from sde_lib.prediction import weighted_sum
from solvers.coordinates import COORDINATES, Coordinate
from solvers.noise import Draw
from solvers.solver import Past, Solver, Step, made_ahead


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method as data.

    Attributes:
        a: stage weights, one row per stage after the first.
        b: weights of the step.
        c: stage nodes in [0, 1]; the first is 0.
        order: order of the step.
        error: b minus the embedded method's weights, or None.
        dense: weights of the quartic part of the interpolant (see `interpolate`), or None for a cubic one.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    error: tuple[float, ...] | None = None
    dense: tuple[float, ...] | None = None

    @property
    def stages(self) -> int:
        """Evaluations per step."""
        return len(self.b)

    @property
    def fsal(self) -> bool:
        """First same as last: the last stage is the next step's first."""
        return bool(self.a) and self.c[-1] == 1.0 and (*self.a[-1], 0.0) == self.b

    @property
    def dense_order(self) -> int:
        """Order of the interpolant: its values between the ends of a step are off by h^(dense_order + 1)."""
        return 2 if not self.fsal else 3 if self.dense is None else 4


TABLEAUX: Mapping[str, Tableau] = {
    "euler": Tableau((), (1.0,), (0.0,), 1),
    "heun": Tableau(((1.0,),), (0.5, 0.5), (0.0, 1.0), 2, (-0.5, 0.5)),
    "midpoint": Tableau(((0.5,),), (0.0, 1.0), (0.0, 0.5), 2, (-1.0, 1.0)),
    # Ralston 1962: of the two-stage methods, the one with the least bound of the local error
    "ralston": Tableau(((2 / 3,),), (1 / 4, 3 / 4), (0.0, 2 / 3), 2, (-3 / 4, 3 / 4)),
    "rk4": Tableau(((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0), 4),
    # Bogacki & Shampine 1989, order 3(2)
    "bogacki_shampine": Tableau(
        ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        (2 / 9, 1 / 3, 4 / 9, 0.0),
        (0.0, 1 / 2, 3 / 4, 1.0),
        3,
        (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    ),
    # Dormand & Prince 1980, order 5(4); interpolant of order 4: Shampine 1986, as in Hairer, Norsett & Wanner, II.6
    "dormand_prince": Tableau(
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        5,
        (
            35 / 384 - 5179 / 57600,
            0.0,
            500 / 1113 - 7571 / 16695,
            125 / 192 - 393 / 640,
            -2187 / 6784 + 92097 / 339200,
            11 / 84 - 187 / 2100,
            -1 / 40,
        ),
        (
            -12715105075 / 11282082432,
            0.0,
            87487479700 / 32700410799,
            -10690763975 / 1880347072,
            701980252875 / 199316789632,
            -1453857185 / 822651844,
            69997945 / 29380423,
        ),
    ),
    # Tsitouras 2011, doi:10.1016/j.camwa.2011.06.002, order 5(4) with an interpolant of order 4: Table 1
    "tsitouras": Tableau(
        (
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            (
                0.09646076681806523,
                0.01,
                0.4798896504144996,
                1.379008574103742,
                -3.290069515436081,
                2.324710524099774,
            ),
        ),
        (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0),
        (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
        5,
        (
            -0.00178001105222577714,
            -0.0008164344596567469,
            0.007880878010261995,
            -0.1447110071732629,
            0.5823571654525552,
            -0.45808210592918697,
            1 / 66,
        ),
        (
            -1.0530884977290216,
            0.1017,
            2.490627285651252793,
            -16.54810288924490272,
            47.37952196281928122,
            -34.87065786149660974,
            2.5,
        ),
    ),
}
"""Name -> tableau."""

Leaves = tuple[Tensor, ...]


class RKStep(NamedTuple):
    """New leaves, the embedded error of each (None without an embedded method), and the slopes of every stage."""

    leaves: Leaves
    errors: Leaves | None
    stages: Sequence[Leaves]


def rk_step(
    tableau: Tableau,
    slopes: Callable[[Any, Leaves], Leaves],
    nodes: Sequence[Any],
    h: Real,
    leaves: Leaves,
    first: Leaves | None = None,
) -> RKStep:
    """One step of a tuple of tensors.

    Args:
        tableau: the method.
        slopes: (node, leaves) -> d leaves / du.
        nodes: one handle per stage, passed through to `slopes`.
        h: signed step in u: a float, or a (B,) tensor.
        leaves: tensors with the batch as first dimension.
        first: slopes at the first node, if already known.
    """
    ks = [slopes(nodes[0], leaves) if first is None else first]
    new = leaves
    for row, node in zip(tableau.a, nodes[1:], strict=True):
        new = _advance(leaves, h, row, ks)
        ks.append(slopes(node, new))
    if not tableau.fsal:
        new = _advance(leaves, h, tableau.b, ks)
    errors = None if tableau.error is None else _advance(None, h, tableau.error, ks)
    return RKStep(new, errors, ks)


def interpolate(
    tableau: Tableau, theta: Tensor, h: Tensor, old: Leaves, new: Leaves, stages: Sequence[Leaves]
) -> Leaves:
    r"""The state inside a step, at u + theta h, from what the step has worked out: no further evaluation.

    First same as last: the cubic through both states and slopes, plus
    :math:`\theta^2 (1 - \theta)^2 h \sum_i d_i k_i`, which is every quartic that is once continuously
    differentiable from step to step; `Tableau.dense` holds d. Otherwise the parabola through both states and the first
    slope.

    Args:
        tableau: the method.
        theta: place within the step, (n,), in [0, 1].
        h: signed step, (n,).
        old: leaves at the start of the step.
        new: leaves at its end.
        stages: slopes of the stages.
    """
    out = []
    for j, (y_0, y_1) in enumerate(zip(old, new, strict=True)):

        def on(value: Tensor, like: Tensor = y_0) -> Tensor:
            return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))

        first, rise = stages[0][j], y_1 - y_0
        if not tableau.fsal:
            out.append(y_0 + on(theta * (1.0 - theta) * h) * first + on(theta * theta) * rise)
            continue
        both = theta * (1.0 - theta)
        y = y_0 + on(theta + both * (2.0 * theta - 1.0)) * rise
        y = y + on(both * (1.0 - theta) * h) * first - on(both * theta * h) * stages[-1][j]
        if tableau.dense is not None:
            (quartic,) = _advance(None, both * both * h, tableau.dense, [(k[j],) for k in stages])
            y = y + quartic
        out.append(y)
    return tuple(out)


def _advance(leaves: Leaves | None, h: Real, weights: Sequence[float], ks: Sequence[Leaves]) -> Leaves:
    """leaves + h sum_i w_i k_i, leaf by leaf (without the first term if None)."""
    out = []
    for j in range(len(ks[0])):
        terms = [(w, k[j]) for w, k in zip(weights, ks, strict=True) if w != 0.0]
        if isinstance(h, Tensor):
            total = terms[0][1] * terms[0][0]
            for w, k in terms[1:]:
                total = total.add_(k, alpha=w)
            total = total * h.to(total.dtype).reshape(-1, *[1] * (total.ndim - 1))
            out.append(total if leaves is None else leaves[j] + total)
            continue
        w, k = terms[0]
        acc = k * (h * w) if leaves is None else weighted_sum(leaves[j], 1.0, k, h * w)
        for w, k in terms[1:]:
            acc = acc.add_(k, alpha=h * w)
        out.append(acc)
    return tuple(out)


def as_coordinate(coordinate: Coordinate | str) -> Coordinate:
    """A coordinate, or the one of that name with its defaults."""
    return lookup(COORDINATES, coordinate, "coordinate")() if isinstance(coordinate, str) else coordinate


@dataclass(frozen=True)
class RungeKutta(Solver):
    """A fixed-step explicit Runge-Kutta method on the probability-flow ODE.

    Args:
        tableau: a name in `TABLEAUX`.
        coordinate: where the ODE is integrated: a name in `COORDINATES`, or a `Coordinate`.
    """

    tableau: str = "heun"
    coordinate: Coordinate | str = "noise_ratio"
    _tableau: Tableau = field(init=False, repr=False, compare=False)
    _coordinate: Coordinate = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tableau", lookup(TABLEAUX, self.tableau, "tableau"))
        object.__setattr__(self, "_coordinate", as_coordinate(self.coordinate))

    @property
    def order(self) -> int:  # type: ignore[override]
        return self._tableau.order

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return self._tableau.stages

    @property
    def needs_drift(self) -> bool:  # type: ignore[override]
        return self._coordinate.needs_drift

    @property
    def needs_time(self) -> bool:  # type: ignore[override]
        """Stages between the knots, or a slope in time."""
        return self._coordinate.needs_time or any(c not in (0.0, 1.0) for c in self._tableau.c)

    @property
    def shares_calls(self) -> bool:  # type: ignore[override]
        """First same as last."""
        return self._tableau.fsal

    def step(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, past: Past, draw: Draw) -> Step:
        """One step; stages between the knots need a law with continuous time."""
        return ode_step(self._tableau, self._coordinate, rev, x, t, s, made_ahead(past, t))


def ode_step(
    tableau: Tableau, coordinate: Coordinate, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, known: Prediction | None
) -> Step:
    """A Runge-Kutta step of the probability-flow ODE from t to s; `known` is a prediction already made at (x, t)."""
    u, u_s = coordinate.of(t), coordinate.of(s)
    h = u_s - u
    nodes = [t if c == 0.0 else s if c == 1.0 else coordinate.knot(rev.law, u + c * h) for c in tableau.c]
    predictions: list[Prediction] = []

    def slopes(node: Knot, leaves: Leaves) -> Leaves:
        prediction = rev(rescale(leaves[0], coordinate.scale(node)), node)
        predictions.append(prediction)
        return (prediction.mix(*coordinate.slope(node)),)

    first = None
    if known is not None:
        predictions.append(known)
        first = (known.mix(*coordinate.slope(t)),)
    y = rescale(x, 1.0 / coordinate.scale(t))
    leaves = rk_step(tableau, slopes, nodes, h, (y,), first).leaves
    if tableau.fsal:
        ahead = predictions[-1]
        return Step(ahead.x, predictions[0], ((s, ahead),))
    return Step(rescale(leaves[0], coordinate.scale(s)), predictions[0])


def rescale(x: Tensor, c: Real) -> Tensor:
    """c x in the dtype of x."""
    if isinstance(c, Tensor):
        return x * c.to(x.dtype)
    return x if c == 1.0 else x * c


@dataclass(frozen=True)
class Heun(RungeKutta):
    r"""Heun's method with the stochastic churn of Karras et al. 2022, arXiv:2206.00364, Algorithms 1 and 2.

    Two calls per step, (weak) order 2. With `s_churn` > 0 the noise level is first raised from u = sigma / alpha to
    (1 + gamma) u by fresh noise, gamma = min(s_churn / N, sqrt(2) - 1) where s_min <= u <= s_max, and the network is
    called after the noise is added. Deviation: the raised level is capped at the law's t_max, outside of which no
    model is defined.

    Args:
        tableau: "heun"; any tableau will do.
        coordinate: "noise_ratio", as in the paper.
        s_churn: total amount of churn over the N steps; 0 is deterministic.
        s_min: lowest u with churn.
        s_max: highest u with churn.
        s_noise: factor on the standard deviation of the fresh noise.
    """

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    _steps: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.s_churn < math.inf:
            raise ValueError(f"`s_churn` must be a finite number >= 0, got {self.s_churn!r}.")
        if not 0 <= self.s_noise < math.inf:
            raise ValueError(f"`s_noise` must be a finite number >= 0, got {self.s_noise!r}.")
        if not 0 <= self.s_min <= self.s_max:
            raise ValueError(f"Need 0 <= `s_min` <= `s_max`, got {self.s_min} and {self.s_max}.")

    @property
    def order(self) -> int:  # type: ignore[override]
        """Fresh noise is exact in law, so churn keeps the order in the weak sense, unless `s_noise` inflates it."""
        return self._tableau.order if self.s_churn == 0 or self.s_noise == 1.0 else 0

    @property
    def stochastic(self) -> bool:
        return self.s_churn > 0

    def on(self, law: Law) -> Solver:
        """Churn needs continuous time."""
        if self.s_churn > 0 and not law.has_time:
            raise ValueError("Churn raises the noise level between knots, which a chain does not have; use s_churn=0.")
        return super().on(law)

    def bind(self, knots: Sequence[Knot]) -> Solver:
        """Fixes N, the number of steps."""
        if self.s_churn == 0:
            return self
        bound = replace(self)
        object.__setattr__(bound, "_steps", len(knots) - 1)
        return bound

    def _churned(self, law: Law, x: Tensor, t: Knot, draw: Draw) -> tuple[Tensor, Knot]:
        if t.per_sample:
            raise ValueError("Churn takes one time for the whole batch; per-sample knots need s_churn=0.")
        u = math.exp(-t.half_log_snr)
        gamma = min(self.s_churn / self._steps, math.sqrt(2.0) - 1.0) if self.s_min <= u <= self.s_max else 0.0
        raised = min((1.0 + gamma) * u, math.exp(-law.knot(law.t_max).half_log_snr))
        if raised <= u:
            return x, t
        hat = law.knot_at(-math.log(raised))
        std = hat.alpha * self.s_noise * math.sqrt(raised * raised - u * u)
        return weighted_sum(x, hat.alpha / t.alpha, draw.normal("churn", t.half_log_snr), std), hat

    def step(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, past: Past, draw: Draw) -> Step:
        """Churn, then Heun."""
        if self.s_churn == 0:
            return super().step(rev, x, t, s, past, draw)
        x, hat = self._churned(rev.law, x, t, draw)
        return ode_step(self._tableau, self._coordinate, rev, x, hat, s, None)

    def finish(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, past: Past, draw: Draw) -> Step:
        """The last step churns too, then takes the posterior mean."""
        if self.s_churn == 0:
            return super().finish(rev, x, t, s, past, draw)
        x, hat = self._churned(rev.law, x, t, draw)
        prediction = rev(x, hat)
        return Step(prediction.data, prediction)


@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """The explicit midpoint method: two calls per step, order 2 (DPM-Solver-2's idea in another coordinate)."""

    tableau: str = "midpoint"


@dataclass(frozen=True)
class Ralston(RungeKutta):
    """Ralston's method: two calls per step, order 2, the smallest bound of the local error of its kind."""

    tableau: str = "ralston"


@dataclass(frozen=True)
class RK4(RungeKutta):
    """The classical method of order 4: four calls per step."""

    tableau: str = "rk4"


@dataclass(frozen=True)
class BogackiShampine(RungeKutta):
    """Bogacki-Shampine 3(2) at fixed steps: three calls per step (first same as last)."""

    tableau: str = "bogacki_shampine"


@dataclass(frozen=True)
class DormandPrince(RungeKutta):
    """Dormand-Prince 5(4) at fixed steps: six calls per step (first same as last)."""

    tableau: str = "dormand_prince"
    coordinate: Coordinate | str = "angle"


@dataclass(frozen=True)
class Tsitouras(RungeKutta):
    """Tsitouras 5(4) at fixed steps: six calls per step (first same as last)."""

    tableau: str = "tsitouras"
    coordinate: Coordinate | str = "angle"
