"""Tableaux against second statements of them, and the interpolants between the ends of a step."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import observed_order
from torch import Tensor

from solvers import TABLEAUX, Ralston, Tsitouras
from solvers.runge_kutta import interpolate, rk_step

EMBEDDED = [k for k, v in TABLEAUX.items() if v.error is not None]
PLACES = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)


def weights_at(name: str, theta: Tensor) -> Tensor:
    """b_i(theta), (n, s), read off the code: the interpolant of y = 0 with unit slopes, one per stage."""
    tableau = TABLEAUX[name]
    n, s = len(theta), tableau.stages
    stages = [(torch.eye(s, dtype=torch.float64)[i].expand(n, s),) for i in range(s)]
    old = (torch.zeros(n, s, dtype=torch.float64),)
    new = (torch.tensor(tableau.b, dtype=torch.float64).expand(n, s),)
    return interpolate(tableau, theta, torch.ones(n, dtype=torch.float64), old, new, stages)[0]


def elementary(name: str) -> dict[int, list[tuple[Tensor, int]]]:
    """Butcher's order conditions b . v = 1 / gamma, as (v, gamma) by order, up to order 5."""
    tableau = TABLEAUX[name]
    s = tableau.stages
    a = torch.zeros(s, s, dtype=torch.float64)
    for i, row in enumerate(tableau.a, 1):
        a[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    c = torch.tensor(tableau.c, dtype=torch.float64)
    ac, ac2, aac = a @ c, a @ c**2, a @ (a @ c)
    return {
        1: [(torch.ones_like(c), 1)],
        2: [(c, 2)],
        3: [(c**2, 3), (ac, 6)],
        4: [(c**3, 4), (c * ac, 8), (ac2, 12), (aac, 24)],
        5: [
            (c**4, 5),
            (c**2 * ac, 10),
            (ac**2, 20),
            (c * ac2, 15),
            (a @ c**3, 20),
            (c * aac, 30),
            (a @ (c * ac), 40),
            (a @ ac2, 60),
            (a @ aac, 120),
        ],
    }


@pytest.mark.parametrize("name", EMBEDDED)
def test_order_conditions_of_the_interpolant(name):
    """b(theta) . v = theta^p / gamma for every tree up to the declared order, at every theta; and not beyond."""
    order, weights, conditions = TABLEAUX[name].dense_order, weights_at(name, PLACES), elementary(name)
    for p in range(1, order + 1):
        for v, gamma in conditions[p]:
            # coefficients of size ten and more cancel: a few hundred roundings
            torch.testing.assert_close(weights @ v, PLACES**p / gamma, rtol=0, atol=1e-13)
    missed = [float((weights @ v - PLACES ** (order + 1) / g)[1:-1].abs().max()) for v, g in conditions[order + 1]]
    assert max(missed) > 1e-4


@pytest.mark.parametrize("name", [k for k in EMBEDDED if TABLEAUX[k].fsal])
def test_interpolants_join_smoothly(name):
    """Values and slopes at both ends are those of the step: continuous and once differentiable from step to step."""
    s, eps = TABLEAUX[name].stages, 1e-6
    near = torch.tensor([0.0, eps, 1.0 - eps, 1.0], dtype=torch.float64)
    at = weights_at(name, near)
    torch.testing.assert_close(at[0], torch.zeros(s, dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(at[3], torch.tensor(TABLEAUX[name].b, dtype=torch.float64), rtol=0, atol=1e-15)
    ends = torch.eye(s, dtype=torch.float64)
    # one-sided differences: eps times second derivatives of up to 200
    torch.testing.assert_close((at[1] - at[0]) / eps, ends[0], rtol=0, atol=3e-4)
    torch.testing.assert_close((at[3] - at[2]) / eps, ends[-1], rtol=0, atol=3e-4)


@pytest.mark.parametrize(("name", "theirs"), [("bogacki_shampine", "RK23"), ("dormand_prince", "RK45")])
def test_coefficients_are_scipys(name, theirs):
    """Stages, weights, embedded error and interpolant of SciPy's classes, which state them in another form."""
    import scipy.integrate

    cls, tableau = getattr(scipy.integrate, theirs), TABLEAUX[name]
    s = tableau.stages - 1  # SciPy leaves the stage at the new point to the driver
    for i, row in enumerate(tableau.a[: s - 1], 1):
        assert list(row) == pytest.approx(cls.A[i, :i].tolist(), rel=1e-15)
    assert list(tableau.b[:s]) == pytest.approx(cls.B.tolist(), rel=1e-15)
    assert list(tableau.c[:s]) == pytest.approx(cls.C.tolist(), rel=1e-15)
    sign = math.copysign(1.0, cls.E[0] * tableau.error[0])
    assert list(tableau.error) == pytest.approx((sign * cls.E).tolist(), rel=1e-12, abs=1e-17)
    powers = PLACES[:, None] ** torch.arange(1, cls.P.shape[1] + 1)
    torch.testing.assert_close(weights_at(name, PLACES), powers @ torch.from_numpy(cls.P).T, rtol=0, atol=2e-14)


def test_tsitouras_interpolant_is_the_published_one():
    """Tsitouras 2011 states b_i(theta) as products of their roots."""
    x = PLACES
    published = torch.stack(
        [
            -1.0530884977290216 * x * (x - 1.3299890189751412) * (x**2 - 1.4364028541716351 * x + 0.7139816917074209),
            0.1017 * x**2 * (x**2 - 2.1966568338249754 * x + 1.2949852507374631),
            2.490627285651252793 * x**2 * (x**2 - 2.38535645472061657 * x + 1.57803468208092486),
            -16.54810288924490272 * (x - 1.21712927295533244) * (x - 0.61620406037800089) * x**2,
            47.37952196281928122 * (x - 1.203071208372362603) * (x - 0.658047292653547382) * x**2,
            -34.87065786149660974 * (x - 1.2) * (x - 2 / 3) * x**2,
            2.5 * (x - 1) * (x - 0.6) * x**2,
        ],
        1,
    )
    torch.testing.assert_close(weights_at("tsitouras", x), published, rtol=0, atol=2e-14)
    assert Tsitouras().nfe(3) == 19  # first same as last


def test_ralston_meets_the_third_order_quadrature_condition():
    """Of the methods with two stages b . c^2 = 1/3 holds for Ralston's alone: what is left of the local error is
    f' f' f / 6, which none of them can touch."""
    tableau = TABLEAUX["ralston"]
    assert sum(b * c * c for b, c in zip(tableau.b, tableau.c, strict=True)) == pytest.approx(1 / 3, rel=1e-15)
    for name in ("heun", "midpoint"):
        other = TABLEAUX[name]
        assert abs(sum(b * c * c for b, c in zip(other.b, other.c, strict=True)) - 1 / 3) > 0.05
    assert Ralston().order == 2 and Ralston().nfe(5) == 10


@pytest.mark.parametrize("name", EMBEDDED)
def test_observed_order_inside_and_at_the_end_of_a_step(name):
    """One step of y' = y cos u + y^2 sin(u)^2 / 3 from nine states at u = 0.3, against 256 steps of RK4.

    The local error, the largest of the nine, falls like h^(dense_order + 1) inside and h^(order + 1) at the end.
    """
    tableau, rk4 = TABLEAUX[name], TABLEAUX["rk4"]
    places = torch.tensor([0.25, 0.4, 0.7, 1.0], dtype=torch.float64)
    start = torch.linspace(0.2, 1.8, 9, dtype=torch.float64)
    theta, old = places.repeat_interleave(9), (start.repeat(4),)

    def slopes(u: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (y,) = leaves
        return (y * u.cos() + y * y * u.sin() ** 2 / 3,)

    def exact(h: Tensor, n: int = 256) -> Tensor:
        u, leaves = torch.full_like(h, 0.3), old
        for _ in range(n):
            leaves = rk_step(rk4, slopes, [u + c * h / n for c in rk4.c], h / n, leaves).leaves
            u = u + h / n
        return leaves[0]

    errors = []
    for h in (0.1, 0.05, 0.025) if tableau.order < 5 else (0.4, 0.2, 0.1):
        step = torch.full_like(theta, h)
        new, _, stages = rk_step(tableau, slopes, [0.3 + c * step for c in tableau.c], step, old)
        got = interpolate(tableau, theta, step, old, new, stages)[0]
        errors.append((got - exact(theta * step)).abs().reshape(4, 9).amax(1).tolist())
    for j, wanted in enumerate([tableau.dense_order + 1] * 3 + [tableau.order + 1]):
        assert observed_order(errors[0][j], errors[2][j], 4.0) > wanted - 0.25, (name, j, [e[j] for e in errors])
