"""The coefficient engine against closed-form integrals in 50 digits.

A weight is int k(lambda) l_j(xi(lambda)) d lambda: in mpmath, by exact antiderivatives where the kernel is an
exponential and the polynomial is in lambda, by tanh-sinh quadrature elsewhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from oracles import EPS, make_sde

from sde_lib import Knot, Prediction, VPrediction
from solvers.exponential import PREDICTIONS, VARIABLES, Data, Flow, Form, Interpolation, Noise, V

DIGITS = 50
FORMS: dict[str, tuple[Form, tuple[float, ...]]] = {
    "data": (Data(), (0.0, 0.25, 1.0)),
    "noise": (Noise(), (0.0, 0.25, 1.0)),
    "v": (V(), (0.0,)),
    "v/0.5": (V(0.5), (0.0,)),
    "flow": (Flow(), (0.0,)),
}
CASES = [(name, tau2) for name, (_, taus) in FORMS.items() for tau2 in taus]
KERNELS = {name: CASES for name in VARIABLES}


def test_every_form_and_variable_is_here():
    """A new form or variable enrols itself, or this fails."""
    assert {n.partition("/")[0] for n in FORMS} == set(PREDICTIONS)
    assert {"half_log_snr", "noise_ratio", "angle", "noise_share"} == set(VARIABLES)


# --- the laws, in arbitrary precision -------------------------------------------------------------------------------


def vp_knot(lam: float) -> Knot:
    """A variance-preserving knot at lambda; the engine needs nothing else of a law."""
    return Knot(0.0, 1.0 / math.sqrt(1.0 + math.exp(-2 * lam)), 1.0 / math.sqrt(1.0 + math.exp(2 * lam)), lam, 0.0)


def mp_alpha_sigma(knot: Knot) -> tuple[Any, Any]:
    """The doubles that the engine is given, exactly."""
    return mp.mpf(knot.alpha), mp.mpf(knot.sigma)


def mp_variable(name: str) -> Callable[[Any], Any]:
    return {
        "half_log_snr": lambda u: u,
        "noise_ratio": lambda u: mp.exp(-u),
        "angle": lambda u: mp.atan(mp.exp(-u)),
        "noise_share": lambda u: 1 / (1 + mp.exp(u)),
    }[name]


def mp_kernel(form: str, s: Knot, tau2: float) -> Callable[[Any], Any]:
    """k(lambda), from the differential equation of x in each form: dx = (A'/A) x + k q."""
    alpha, sigma = mp_alpha_sigma(s)
    end, p = mp.mpf(s.half_log_snr), 1 + mp.mpf(tau2)
    if form == "data":
        return lambda u: alpha * p * mp.exp(-p * (end - u))
    if form == "noise":
        return lambda u: -p * alpha * mp.exp(-u)
    if form.startswith("v"):
        d = mp.mpf("0.5") if form == "v/0.5" else mp.mpf(1)
        r = mp.sqrt(sigma**2 + (alpha * d) ** 2)
        # d theta / d lambda, theta = atan(e^-lambda / d)
        return lambda u: -r * mp.exp(-u) / d / (1 + (mp.exp(-u) / d) ** 2)
    # d w / d lambda, w = 1 / (1 + e^lambda)
    return lambda u: -(alpha + sigma) * mp.exp(u) / (1 + mp.exp(u)) ** 2


def lagrange(nodes: list[Any], j: int) -> Callable[[Any], Any]:
    def basis(u: Any) -> Any:
        out = mp.mpf(1)
        for k, other in enumerate(nodes):
            if k != j:
                out *= (u - other) / (nodes[j] - other)
        return out

    return basis


def mp_weights(form: str, variable: str, t: Knot, s: Knot, knots: list[Knot], tau2: float) -> list[Any]:
    """int k l_j, by Gauss-Legendre in 50 digits on pieces of one unit of lambda."""
    with mp.workdps(DIGITS):
        to, kernel = mp_variable(variable), mp_kernel(form, s, tau2)
        at = [to(mp.mpf(k.half_log_snr)) for k in knots]
        a, b = mp.mpf(t.half_log_snr), mp.mpf(s.half_log_snr)
        count = math.ceil(float(b - a))
        pieces = [a + (b - a) * i / count for i in range(count + 1)]
        bases = [lagrange(at, j) for j in range(len(knots))]
        return [
            mp.quad(lambda u, f=f: kernel(u) * f(to(u)), pieces, method="gauss-legendre", maxdegree=5) for f in bases
        ]


def mp_exact(form: str, t: Knot, s: Knot, knots: list[Knot], tau2: float) -> list[Any]:
    """The same for an exponential kernel e^(c lambda) and polynomials in lambda, by repeated integration by parts."""
    with mp.workdps(DIGITS + 40):
        p = 1 + mp.mpf(tau2)
        alpha, _ = mp_alpha_sigma(s)
        c = p if form == "data" else mp.mpf(-1)
        a, b = mp.mpf(t.half_log_snr), mp.mpf(s.half_log_snr)
        front = alpha * p * mp.exp(-p * b) if form == "data" else -p * alpha
        at = [mp.mpf(k.half_log_snr) for k in knots]
        out = []
        for j in range(len(knots)):
            coefficients = [mp.mpf(1)]  # of l_j, lowest power first
            for k, other in enumerate(at):
                if k == j:
                    continue
                scale = at[j] - other
                shifted = [mp.mpf(0), *coefficients]
                coefficients = [
                    (shifted[i] - (other * coefficients[i] if i < len(coefficients) else 0)) / scale
                    for i in range(len(shifted))
                ]
            total, sign, power = mp.mpf(0), mp.mpf(1), c
            while coefficients:
                value = [mp.polyval(coefficients[::-1], u) * mp.exp(c * u) for u in (a, b)]
                total += sign * (value[1] - value[0]) / power
                coefficients = [i * v for i, v in enumerate(coefficients)][1:]
                sign, power = -sign, power * c
            out.append(front * total)
        return out


def nodes_of(order: int, lam: float, h: float, corrector: bool) -> tuple[Knot, Knot, list[Knot], int]:
    """Uneven knots of a step: `order` of them up to t, the last one s itself with a corrector."""
    t, s = vp_knot(lam), vp_knot(lam + h)
    gaps = (1.0, 0.83, 1.21, 0.9, 1.1)
    behind = [vp_knot(lam - h * sum(gaps[:i])) for i in range(order - (2 if corrector else 1), 0, -1)]
    knots = [*behind, t, *([s] if corrector else [])]
    return t, s, knots, len(knots) - (2 if corrector else 1)


STEPS = (1e-6, 1e-4, 1e-2, 0.3, 1.0, 3.0, 10.0)
LAM = -1.0


def condition(form: str, variable: str, t: Knot, s: Knot, knots: list[Knot]) -> float:
    """How far a rounding of a knot's variable is magnified: |u| / |u - u'| over neighbours, per factor of l_j."""
    with mp.workdps(DIGITS):
        u = [mp_variable(variable)(mp.mpf(k.half_log_snr)) for k in knots]
        u += [mp_variable(variable)(mp.mpf(s.half_log_snr))]
        gaps = [float(max(abs(a), abs(b)) / abs(a - b)) for a, b in itertools.combinations(u, 2) if a != b]
    return 1.0 + sum(sorted(gaps)[-(len(knots)) :])


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "tau2"), [c for c in CASES if c[0] in ("data", "noise")])
def test_quadrature_reference_is_exact(form, tau2):
    """The two references agree where both exist: the closed form checks the quadrature that covers the rest."""
    for h, order in ((1e-2, 3), (1.0, 6), (10.0, 4)):
        t, s, knots, _ = nodes_of(order, LAM, h, False)
        for one, two in zip(
            mp_exact(form, t, s, knots, tau2), mp_weights(form, "half_log_snr", t, s, knots, tau2), strict=True
        ):
            assert abs(one - two) < mp.mpf(10) ** -30 * abs(one)


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("form", ["data", "noise"])
def test_weights_in_lambda(form, h):
    """Lagrange-exponential integrals, orders 1 to 6, predictor and corrector, tau^2 = 0, 1/4, 1, to 1e-12 of the
    largest weight (each weight by itself where steps are short)."""
    worst = 0.0
    for tau2, order, corrector in itertools.product((0.0, 0.25, 1.0), range(1, 7), (False, True)):
        if corrector and order < 2:
            continue
        t, s, knots, base = nodes_of(order, LAM, h, corrector)
        got = Interpolation(FORMS[form][0]).weights(t, s, knots, base, tau2)
        want = mp_exact(form, t, s, knots, tau2)
        scale = max(abs(w) for w in want)
        # a difference of two lambdas keeps |lambda| / h of its digits; each l_j is a ratio of up to five of them
        slack = 1e-12 if h >= 1e-2 else 20 * EPS * 6 * abs(LAM) / h
        for g, w in zip(got, want, strict=True):
            gap = float(abs(mp.mpf(g) - w) / scale)
            worst = max(worst, gap)
            assert gap <= slack, (tau2, order, corrector, g, float(w))
    assert worst > 0.0


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(("form", "tau2"), CASES)
def test_weights_in_every_variable(form, tau2, variable):
    """Every form in every variable: steps 1e-4 to 3, two to four knots, predictor and corrector."""
    for h, order, corrector in itertools.product((1e-4, 1e-2, 1.0, 3.0), (2, 4), (False, True)):
        t, s, knots, base = nodes_of(order, LAM, h, corrector)
        got = Interpolation(FORMS[form][0], variable).weights(t, s, knots, base, tau2)
        want = mp_weights(form, variable, t, s, knots, tau2)
        scale = max(abs(w) for w in want)
        # digits lost to differences of the variable, ten operations each, and never better than 1e-13
        slack = 10 * EPS * condition(form, variable, t, s, knots) + 1e-13
        for g, w in zip(got, want, strict=True):
            assert float(abs(mp.mpf(g) - w) / scale) <= slack, (h, order, corrector, g, float(w))


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(("form", "tau2"), CASES)
def test_weights_of_long_steps(form, tau2, variable):
    """Steps of 5, 7 and 10 units of lambda: exponentials stay exact to 1e-12, the rest to what 24 points can do.

    The v kernel, the angle and the share are rational in e^lambda or arctangents of it: poles at +-i pi / 2 or +-i pi.
    24-point Gauss-Legendre on a step h converges like rho^-48, rho + 1 / rho = 2 sqrt(1 + (pi / h)^2): 4e-13, 9e-10 and
    4e-7, times a constant of the method.
    """
    entire = form in ("data", "noise") and variable in ("half_log_snr", "noise_ratio")
    for h in (5.0, 7.0, 10.0):
        t, s, knots, base = nodes_of(2, -h / 2, h, False)
        got = Interpolation(FORMS[form][0], variable).weights(t, s, knots, base, tau2)
        want = mp_weights(form, variable, t, s, knots, tau2)
        scale = max(abs(w) for w in want)
        rho = math.pi / h + math.hypot(1.0, math.pi / h)
        slack = 1e-12 + (0.0 if entire else 100.0 * rho**-48) + 10 * EPS * condition(form, variable, t, s, knots)
        for g, w in zip(got, want, strict=True):
            assert float(abs(mp.mpf(g) - w) / scale) <= slack, (h, g, float(w))


@pytest.mark.parametrize(("form", "tau2"), CASES)
def test_constant_predictions_are_exact(form, tau2):
    """Weights add up to the kernel's integral: constant data are reproduced whatever the knots, tiny steps included.

    A x_t + total q is the exact solution for constant q, against 50 digits from the two knots' own doubles.
    """
    # angle and share saturate below lambda = -36: the last knots of long steps stay above
    for h, orders, lam in ((1e-6, (1, 3, 6), LAM), (1e-3, (1, 3, 6), LAM), (0.5, (1, 3, 6), LAM), (10.0, (1, 3), -4.0)):
        for order, variable in itertools.product(orders, VARIABLES):
            t, s, knots, base = nodes_of(order, lam, h, False)
            got = Interpolation(FORMS[form][0], variable).weights(t, s, knots, base, tau2)
            with mp.workdps(DIGITS):
                a, b, p = mp.mpf(t.half_log_snr), mp.mpf(s.half_log_snr), 1 + mp.mpf(tau2)
                alpha, sigma = mp_alpha_sigma(s)
                if form == "data":
                    want = -alpha * mp.expm1(-p * (b - a))
                elif form == "noise":
                    want = -p * sigma * mp.expm1(b - a)
                elif form == "flow":
                    want = (alpha + sigma) * (1 / (1 + mp.exp(b)) - 1 / (1 + mp.exp(a)))
                else:
                    d = mp.mpf("0.5") if form == "v/0.5" else mp.mpf(1)
                    r = mp.sqrt(sigma**2 + (alpha * d) ** 2)
                    want = r * (mp.atan(mp.exp(-b) / d) - mp.atan(mp.exp(-a) / d))
                # the doubles lambda, alpha and sigma of a knot agree to rounding only: |lambda| EPS over h of h
                slack = 16 * EPS + 4 * EPS * (1.0 + abs(lam + h)) / h if form in ("v", "v/0.5", "flow") else 16 * EPS
                assert float(abs(mp.fsum(map(mp.mpf, got)) / want - 1)) <= slack + len(got) * EPS * float(
                    sum(abs(mp.mpf(g)) for g in got) / abs(want)
                )


@pytest.mark.parametrize(("form", "tau2"), CASES)
def test_tiny_steps_do_not_cancel(form, tau2):
    """h = 1e-6 … 1e-9: the first-order weight is h k to its own O(h), with no digit of h lost beyond lambda's."""
    for h in (1e-6, 1e-7, 1e-9):
        t, s = vp_knot(LAM), vp_knot(LAM + h)
        step = s.half_log_snr - t.half_log_snr  # the h that the doubles have
        (w,) = Interpolation(FORMS[form][0]).weights(t, s, [t], 0, tau2)
        with mp.workdps(DIGITS):
            kernel = mp_kernel(form, s, tau2)
            middle = (mp.mpf(t.half_log_snr) + mp.mpf(s.half_log_snr)) / 2
            # midpoint rule: error h^2 / 24 k'' / k, below 1e-13
            want = kernel(middle) * mp.mpf(step)
            # with sigma_data, lambda + log sigma_data is rounded once more
            shifted = 2 * EPS * (1 + abs(LAM)) / h if form == "v/0.5" else 0.0
            assert float(abs(mp.mpf(w) / want - 1)) <= 16 * EPS + step * step + shifted


@pytest.mark.parametrize("degree", range(4))
@pytest.mark.parametrize("variable", VARIABLES)
def test_polynomials_are_integrated_exactly(variable, degree):
    """k knots reproduce the integral of the kernel times every polynomial of degree < k in the variable."""
    for (form, tau2), h in itertools.product(CASES, (0.05, 2.0)):
        t, s, knots, base = nodes_of(degree + 1, LAM, h, False)
        weights = Interpolation(FORMS[form][0], variable).weights(t, s, knots, base, tau2)
        with mp.workdps(DIGITS):
            to, kernel = mp_variable(variable), mp_kernel(form, s, tau2)
            values = [to(mp.mpf(k.half_log_snr)) ** degree for k in knots]
            a, b = mp.mpf(t.half_log_snr), mp.mpf(s.half_log_snr)
            want = mp.quad(lambda u, f=to, k=kernel: k(u) * f(u) ** degree, [a, b], method="gauss-legendre")
            got = mp.fsum(mp.mpf(w) * v for w, v in zip(weights, values, strict=True))
            size = sum(abs(mp.mpf(w) * v) for w, v in zip(weights, values, strict=True))
            slack = 10 * EPS * condition(form, variable, t, s, knots) + 1e-13
            assert abs(got - want) <= slack * size


# --- the published shortcuts ----------------------------------------------------------------------------------------


def test_shortcuts():
    """`midpoint`: half the kernel's mass times the step; `half_d2`: the second divided difference halved."""
    t, s, knots, base = nodes_of(2, LAM, 0.4, False)
    got = Interpolation(Data(), midpoint=True).weights(t, s, knots, base)
    total = -s.alpha * math.expm1(-0.4)
    r = (t.half_log_snr - knots[0].half_log_snr) / (s.half_log_snr - t.half_log_snr)
    assert got == pytest.approx([-0.5 * total / r, total * (1 + 0.5 / r)], rel=1e-14)
    t, s, knots, base = nodes_of(3, LAM, 0.4, False)
    full = Interpolation(Data()).weights(t, s, knots, base)
    half = Interpolation(Data(), half_d2=True).weights(t, s, knots, base)
    h = 0.4
    r0, r1 = (b.half_log_snr - a.half_log_snr for a, b in ((knots[1], knots[2]), (knots[0], knots[1])))
    phi3 = (math.expm1(-h) / h + 1.0) / h - 0.5
    second = -s.alpha * phi3 * h * h / (r0 + r1)  # of D2 = ((q0 - q1) / r0 - (q1 - q2) / r1) / (r0 + r1), once
    want = [second / r1, -second / r0 - second / r1, second / r0]
    assert [a - b for a, b in zip(full, half, strict=True)] == pytest.approx(want, rel=1e-9)


# --- advance and noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "tau2"), CASES)
def test_advance_is_the_written_sum(form, tau2):
    """A x + sum w_j q_j + n with A, w in 50 digits, from v predictions at knots of every law: 1e-13."""
    interpolation = Interpolation(FORMS[form][0])
    generator = torch.Generator().manual_seed(0)
    for name in ("vp", "ve", "flow"):
        sde = make_sde(name)
        knots = [sde.knot_at(u) for u in (-1.0, -0.62, -0.3)]
        t, s = knots[-1], sde.knot_at(0.1)
        x = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in knots]
        raw = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in knots]
        z = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        nodes = [(k, Prediction(a, k, f, VPrediction())) for k, a, f in zip(knots, x, raw, strict=True)]
        got = interpolation.advance(x[-1], t, s, nodes, -1, tau2, interpolation.noise(t, s, tau2, z))
        with mp.workdps(DIGITS):
            h, p = mp.mpf(s.half_log_snr) - mp.mpf(t.half_log_snr), mp.mpf(tau2)
            (a_t, s_t), (a_s, s_s) = mp_alpha_sigma(t), mp_alpha_sigma(s)
            d = mp.mpf("0.5") if form == "v/0.5" else mp.mpf(1)
            if form == "data":
                carry, std = s_s / s_t * mp.exp(-p * h), s_s * mp.sqrt(-mp.expm1(-2 * p * h))
            elif form == "noise":
                carry, std = a_s / a_t, s_s * mp.sqrt(p * mp.expm1(2 * h))
            elif form == "flow":
                carry, std = (a_s + s_s) / (a_t + s_t), mp.mpf(0)
            else:
                carry, std = mp.sqrt((s_s**2 + (a_s * d) ** 2) / (s_t**2 + (a_t * d) ** 2)), mp.mpf(0)
            weights = mp_weights(form, "half_log_snr", t, s, knots, tau2)
            want = float(carry) * x[-1] + float(std) * z
            for k, w, (_, prediction) in zip(knots, weights, nodes, strict=True):
                q = {"data": prediction.data, "noise": prediction.noise, "flow": prediction.flow}.get(form)
                if q is None:
                    r = math.sqrt(k.sigma**2 + (k.alpha * float(d)) ** 2)
                    q = (k.alpha * float(d) * prediction.noise - k.sigma * prediction.data / float(d)) / r
                want = want + float(w) * q
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["data", "noise"])
def test_noise_adds_up(form):
    """Noise over two intervals is the noise over both: N(t, s)^2 = A(m, s)^2 N(t, m)^2 + N(m, s)^2 for the data form.

    In the noise form the linear part carries alpha_s / alpha_m, and the drift that tau adds is in the prediction.
    """
    f = FORMS[form][0]
    for tau2, h in itertools.product((0.25, 1.0), (1e-6, 1e-2, 1.0, 8.0)):
        t, mid, s = vp_knot(LAM), vp_knot(LAM + 0.3 * h), vp_knot(LAM + h)
        whole = f.std(t, s, tau2) ** 2
        parts = (f.carry(mid, s, tau2) * f.std(t, mid, tau2)) ** 2 + f.std(mid, s, tau2) ** 2
        # lambda of a knot is a double: h keeps |lambda| / h of its digits
        assert parts == pytest.approx(whole, rel=32 * EPS * (1.0 + abs(LAM + h) / h) + 16 * EPS)
    assert f.std(vp_knot(0.0), vp_knot(1.0), 0.0) == 0.0


def test_long_steps_stay_finite():
    """Steps of 10 and 40 units of lambda, at both ends: finite, with the total of the closed form."""
    for form, tau2 in CASES:
        for lam, h in ((-12.0, 10.0), (-20.0, 40.0), (5.0, 10.0)):
            t, s, knots, base = nodes_of(3, lam, h, False)
            weights = Interpolation(FORMS[form][0]).weights(t, s, knots, base, tau2)
            assert all(math.isfinite(w) for w in weights)


def test_per_sample_knots_have_the_same_weights():
    """(B, 1) float64 knots: row by row the weights of float knots."""
    sde = make_sde("vp")
    lams = torch.tensor([[-1.0, -0.6, -0.1, 0.4], [0.2, 0.5, 0.9, 1.0]], dtype=torch.float64)
    rows = [sde.knot_at(lams[:, i : i + 1]) for i in range(4)]
    for (form, tau2), variable in itertools.product(CASES, VARIABLES):
        rule = Interpolation(FORMS[form][0], variable)
        got = rule.weights(rows[2], rows[3], rows[:3], 2, tau2)
        for b in range(2):
            one = [sde.knot_at(float(u)) for u in lams[b]]
            want = rule.weights(one[2], one[3], one[:3], 2, tau2)
            assert [float(g[b]) for g in got] == pytest.approx(want, rel=1e-10, abs=1e-12)


def test_the_v_kernel_keeps_the_digits_of_short_steps():
    """A step of 1e-6 with sigma_data = 1/2: the weight of a constant to 1e-14, as a difference of two arctangents."""
    t, s = (
        Knot(0.0, 1 / math.sqrt(1 + math.exp(-2 * lam)), 1 / math.sqrt(1 + math.exp(2 * lam)), lam, 0)
        for lam in (-1.0, -1.0 + 1e-6)
    )
    (w,) = Interpolation(V(0.5)).weights(t, s, [t], 0)
    with mp.workdps(50):
        a, b, d = mp.mpf(t.half_log_snr), mp.mpf(s.half_log_snr), mp.mpf("0.5")
        r = mp.sqrt(mp.mpf(s.sigma) ** 2 + (mp.mpf(s.alpha) * d) ** 2)
        want = r * (mp.atan(mp.exp(-b) / d) - mp.atan(mp.exp(-a) / d))
        assert float(abs(mp.mpf(w) / want - 1)) < 1e-14
