"""One vocabulary: coordinates, exponential forms and quantities are three views of the same few formulas."""

from __future__ import annotations

import pytest
import torch
from oracles import SDE_NAMES, make_sde
from torch import Tensor

from sde_lib import Knot
from solvers import COORDINATES, Angle, Coordinate, Time
from solvers.exponential import PREDICTIONS, VARIABLES, End, Form, form_of

ALL = {**{name: cls() for name, cls in COORDINATES.items()}, "angle/0.5": Angle(0.5)}
FORMS = {**{name: form_of(name, 1.0) for name in PREDICTIONS}, "v/0.5": form_of("v", 0.5)}
LAMBDAS = torch.linspace(-4.0, 4.0, 9, dtype=torch.float64)


def knots_of(sde: str, coordinate: Coordinate) -> tuple[Tensor, Knot]:
    """Times (rows that can be differentiated by) and their knots, where every coordinate is finite."""
    law = make_sde(sde)
    high = law.drift_t_max
    t = torch.linspace(law.t_min + 0.05 * (high - law.t_min), 0.95 * high, 7, dtype=torch.float64).requires_grad_()
    return t, law.knot(t)


def rate(value: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), by, retain_graph=True)[0]


@pytest.mark.parametrize("sde", [name for name in SDE_NAMES if name != "tabulated"])
@pytest.mark.parametrize("name", ALL)
def test_slope_is_the_derivative_of_the_scaled_state(name, sde):
    """y = (alpha / scale) x_0 + (sigma / scale) eps for any x_0 and eps, so that dy/du has two weights."""
    coordinate = ALL[name]
    t, knot = knots_of(sde, coordinate)
    u, scale = coordinate.of(knot), coordinate.scale(knot)
    du = rate(torch.as_tensor(u), t)
    for part, weight in zip((knot.alpha, knot.sigma), coordinate.slope(knot), strict=True):
        y = torch.as_tensor(part / scale)
        found = rate(y, t) / du if y.requires_grad else torch.zeros_like(t)
        expected = torch.as_tensor(weight, dtype=torch.float64).detach().expand_as(t)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_coordinates_invert(name):
    coordinate, law = ALL[name], make_sde("vp")
    knot = law.knot_at(LAMBDAS)
    back = coordinate.knot(law, coordinate.of(knot))
    torch.testing.assert_close(back.half_log_snr, LAMBDAS, rtol=0.0, atol=1e-11)  # digits lost at lambda = +-4: e^4
    one = law.knot_at(1.5)
    assert coordinate.knot(law, float(coordinate.of(one))).t == pytest.approx(one.t, rel=1e-12)
    if not isinstance(coordinate, Time):
        torch.testing.assert_close(coordinate.half_log_snr(coordinate.u(LAMBDAS)), LAMBDAS, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_without_noise_is_its_coordinate(name):
    """k = scale_s du/dlambda, its integral scale_s (u_s - u_t), and A = scale_s / scale_t: x = scale y, dy/du = q."""
    form: Form = FORMS[name]
    law, along = make_sde("vp"), form.coordinate
    t, s = law.knot_at(-0.7), law.knot_at(0.9)
    end = End(s.alpha, s.sigma, s.half_log_snr)
    lam = LAMBDAS.clone().requires_grad_()
    scale = float(along.scale(s))
    torch.testing.assert_close(form.kernel(lam, end, 0.0).detach(), scale * rate(torch.as_tensor(along.u(lam)), lam))
    step = scale * (float(along.of(s)) - float(along.of(t)))
    assert form.total(t.half_log_snr, end, 0.0) == pytest.approx(step, rel=1e-13)
    assert form.carry(t, s, 0.0) == pytest.approx(scale / float(along.scale(t)), rel=1e-15)


def test_variables_are_coordinates_by_name():
    assert all(type(VARIABLES[name]) is COORDINATES[name] for name in VARIABLES)
    for name, variable in VARIABLES.items():  # what `usable` relies on: u is infinite at alpha = 0, or needs no drift
        assert (abs(float(variable.u(-float("inf")))) < float("inf")) != variable.needs_drift, name
