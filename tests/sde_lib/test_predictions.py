"""Every parameterization and every view of it, against rational arithmetic in 50 digits."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from oracles import EPS, SDE_NAMES, make_sde, times_of

from sde_lib import PARAMETERIZATIONS, Knot, Prediction

VIEWS = ("data", "noise", "score", "v", "flow", "velocity", "drift")
every_sde = pytest.mark.parametrize("name", SDE_NAMES)
every_kind = pytest.mark.parametrize("kind", PARAMETERIZATIONS)


def view_in_terms_of_pair(view: str, knot: Knot) -> tuple:
    """(a, b) with view = a x_0 + b eps, in mpmath, from the double values of the knot."""
    alpha, sigma = mp.mpf(knot.alpha), mp.mpf(knot.sigma)
    if view == "velocity":
        return tuple(map(mp.mpf, knot.rates))
    if view == "drift":
        f, g2 = mp.mpf(knot.f), mp.mpf(knot.g2)
        return f * alpha, f * sigma + g2 / sigma
    return {
        "data": (mp.mpf(1), mp.mpf(0)),
        "noise": (mp.mpf(0), mp.mpf(1)),
        "score": (mp.mpf(0), -1 / sigma),
        "v": (-sigma, alpha),
        "flow": (mp.mpf(-1), mp.mpf(1)),
    }[view]


def kind_in_terms_of_pair(kind: str, knot: Knot) -> tuple:
    """(p, q) with F = p x_0 + q eps, restated from the papers."""
    alpha, sigma, d = mp.mpf(knot.alpha), mp.mpf(knot.sigma), mp.mpf("0.5")
    if kind == "edm":
        # D = c_skip y + c_out F with y = x / alpha, s = sigma / alpha (Karras et al. 2022, table 1)
        if alpha == 0:
            return 1 / d, mp.mpf(0)
        s = sigma / alpha
        skip, out = d**2 / (s**2 + d**2), s * d / mp.sqrt(s**2 + d**2)
        # x_0 = skip (x_0 + s eps) + out F
        return (1 - skip) / out, -skip * s / out
    return view_in_terms_of_pair(kind, knot)


def test_every_kind_has_a_reference():
    """A new parameterization must state its meaning here too."""
    knot = make_sde("vp").knot(0.5)
    for kind in PARAMETERIZATIONS:
        kind_in_terms_of_pair(kind, knot)


@every_sde
@every_kind
def test_views_lose_no_digits(name, kind):
    """Each view is within a few ulp of |a x| + |b F|, at every time and at both ends.

    The exact weights of x and F are worked out in 50 digits from the knot's doubles; the double result may differ from
    the exact combination by the rounding of its own two terms, and of the weights where these are sums that do not
    cancel. Where the kind does not determine the view (noise or score at alpha = 0) the error must say so.
    """
    sde = make_sde(name)
    generator = torch.Generator().manual_seed(3)
    for t in times_of(sde, 9):
        knot = sde.knot(t)
        x = knot.alpha * 0.7 + torch.randn(5, generator=generator, dtype=torch.float64) * knot.sigma
        raw = torch.randn(5, generator=generator, dtype=torch.float64)
        prediction = Prediction(x, knot, raw, PARAMETERIZATIONS[kind]())
        for view in VIEWS:
            if view == "drift" and t > sde.drift_t_max:
                continue
            if knot.alpha == 0.0 and kind in ("noise", "score"):
                with pytest.raises(ValueError, match="alpha > 0"):
                    getattr(prediction, view)
                continue
            got = getattr(prediction, view)
            with mp.workdps(50):
                a, b = view_in_terms_of_pair(view, knot)
                p, q = kind_in_terms_of_pair(kind, knot)
                alpha, sigma = mp.mpf(knot.alpha), mp.mpf(knot.sigma)
                det = alpha * q - sigma * p
                weight_x, weight_raw = (a * q - b * p) / det, (alpha * b - sigma * a) / det
                for i in range(5):
                    terms = weight_x * mp.mpf(float(x[i])), weight_raw * mp.mpf(float(raw[i]))
                    # a weight is a difference of two products: its own rounding is relative to their sum
                    size_x = (abs(a * q) + abs(b * p)) / abs(det) * abs(mp.mpf(float(x[i])))
                    size_raw = (abs(alpha * b) + abs(sigma * a)) / abs(det) * abs(mp.mpf(float(raw[i])))
                    assert abs(float(mp.mpf(float(got[i])) - sum(terms))) <= 16 * EPS * float(size_x + size_raw)


@every_sde
@every_kind
def test_weights_of_the_named_views_do_not_cancel(name, kind):
    """The weights of data, noise, score, v and flow are within 16 ulp of |a| + |b|: no larger sum hides behind them."""
    sde = make_sde(name)
    for t in times_of(sde, 9):
        knot = sde.knot(t)
        if knot.alpha == 0.0 and kind in ("noise", "score"):
            continue
        for view in ("data", "noise", "score", "v", "flow"):
            prediction = Prediction(torch.ones(1, dtype=torch.float64), knot, torch.ones(1), PARAMETERIZATIONS[kind]())
            with mp.workdps(50):
                a, b = view_in_terms_of_pair(view, knot)
                p, q = kind_in_terms_of_pair(kind, knot)
                alpha, sigma = mp.mpf(knot.alpha), mp.mpf(knot.sigma)
                det = alpha * q - sigma * p
                exact = (a * q - b * p) / det, (alpha * b - sigma * a) / det
                got = prediction.weights(float(a), float(b))
                scale = abs(exact[0]) + abs(exact[1])
                for mine, theirs in zip(got, exact, strict=True):
                    assert abs(float(mp.mpf(mine) - theirs)) <= 16 * EPS * float(scale), (view, t)


@every_sde
@every_kind
def test_view_of_its_own_kind_is_the_raw_output(name, kind):
    """The identity costs no rounding: at both ends and between, a view of the network's own kind is F itself."""
    sde = make_sde(name)
    for t in times_of(sde, 7):
        knot = sde.knot(t)
        if knot.alpha == 0.0 and kind in ("noise", "score"):
            continue
        raw = torch.tensor([0.3, -1.7, 1e-8], dtype=torch.float64)
        prediction = Prediction(torch.full_like(raw, 2.3), knot, raw, PARAMETERIZATIONS[kind]())
        if kind == "edm":
            assert torch.equal(prediction.mix(*prediction.parameterization.coefficients(knot)), raw)
        else:
            assert torch.equal(getattr(prediction, kind), raw), t


@every_sde
def test_views_are_consistent(name):
    """x = alpha data + sigma noise; score = -noise / sigma; v, flow and velocity from the pair."""
    sde = make_sde(name)
    x, raw = torch.linspace(-2, 2, 5, dtype=torch.float64), torch.linspace(1, -1, 5, dtype=torch.float64)
    for t in times_of(sde, 7):
        knot = sde.knot(t)
        p = Prediction(x, knot, raw, PARAMETERIZATIONS["v"]())
        d, e = p.data, p.noise
        scale = 1.0 + float(d.abs().max() + e.abs().max()) * (1.0 + knot.sigma)
        close = dict(rtol=1e-12, atol=1e-14 * scale)
        torch.testing.assert_close(knot.alpha * d + knot.sigma * e, x, **close)
        torch.testing.assert_close(p.score * knot.sigma, -e, **close)
        torch.testing.assert_close(p.v, knot.alpha * e - knot.sigma * d, **close)
        torch.testing.assert_close(p.flow, e - d, **close)
        da, ds = knot.rates
        torch.testing.assert_close(p.velocity, da * d + ds * e, rtol=1e-11, atol=1e-13 * scale * (abs(da) + abs(ds)))


@every_sde
@every_kind
def test_per_sample_knots_give_the_same_views(name, kind):
    """Row i under (B, 1, ...) knots is the view under the float knot of its time."""
    sde = make_sde(name)
    at = [t for t in times_of(sde, 5) if t <= sde.drift_t_max]
    generator = torch.Generator().manual_seed(4)
    x, raw = (torch.randn(len(at), 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    knot = sde.knot(torch.tensor(at, dtype=torch.float64), ndim=3)
    rows = Prediction(x, knot, raw, PARAMETERIZATIONS[kind]())
    for i, t in enumerate(at):
        one = Prediction(x[i : i + 1], sde.knot(t), raw[i : i + 1], PARAMETERIZATIONS[kind]())
        for view in VIEWS:
            got, want = getattr(rows, view)[i : i + 1], getattr(one, view)
            scale = float(sum(abs(w) for w in one.weights(1.0, 1.0))) + float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("kind", ["noise", "score"])
def test_rows_at_alpha_zero_do_not_pass_silently(kind):
    """A per-sample knot with one row at alpha = 0: an error or a non-finite row, never a plausible number."""
    sde = make_sde("flow")
    knot = sde.knot(torch.tensor([0.5, 1.0], dtype=torch.float64), ndim=2)
    x = torch.ones(2, 2, dtype=torch.float64)
    try:
        data = Prediction(x, knot, 0.5 * x, PARAMETERIZATIONS[kind]()).data
    except ValueError:
        return
    assert torch.isfinite(data[0]).all() and not torch.isfinite(data[1]).any()


@every_kind
def test_raw_takes_the_dtype_of_the_state(kind):
    """A float16 or float64 network output joins a float32 state in float32."""
    knot = make_sde("vp").knot(0.3)
    x = torch.ones(2, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        p = Prediction(x, knot, torch.ones(2, 3, dtype=dtype), PARAMETERIZATIONS[kind]())
        assert p.raw.dtype == torch.float32 and p.data.dtype == torch.float32 and p.velocity.dtype == torch.float32


@every_sde
@every_kind
def test_float32_views_near_the_data(name, kind):
    """A float32 state at t_min: within a few float32 ulp of |a x| + |b F| computed in float64."""
    sde = make_sde(name)
    knot = sde.knot(sde.t_min)
    x, raw = torch.tensor([0.71, -1.3]), torch.tensor([0.2, 0.9])
    single = Prediction(x, knot, raw, PARAMETERIZATIONS[kind]())
    double = Prediction(x.double(), knot, raw.double(), PARAMETERIZATIONS[kind]())
    for view, pair in (("data", (1.0, 0.0)), ("noise", (0.0, 1.0)), ("score", (0.0, -1.0 / knot.sigma))):
        a, b = single.weights(*pair)
        scale = abs(a) * x.double().abs() + abs(b) * raw.double().abs()
        error = (getattr(single, view).double() - getattr(double, view)).abs()
        assert bool((error <= 4 * torch.finfo(torch.float32).eps * scale).all())


def test_replace_keeps_the_point():
    """replace() changes the output (and its kind) at the same state and knot."""
    knot = make_sde("vp").knot(0.4)
    p = Prediction(torch.ones(2), knot, torch.zeros(2), PARAMETERIZATIONS["noise"]())
    q = p.replace(p.data.clamp(-1, 1), PARAMETERIZATIONS["data"]())
    assert q.x is p.x and q.knot is knot
    torch.testing.assert_close(q.data, p.data.clamp(-1, 1))
    torch.testing.assert_close(knot.alpha * q.data + knot.sigma * q.noise, p.x)
    assert p.replace(torch.ones(2)).parameterization is p.parameterization


def test_edm_prediction_has_unit_variance_target():
    """For data of standard deviation sigma_data the EDM target has variance one at every time of every SDE."""
    for name in SDE_NAMES:
        sde = make_sde(name)
        for t in times_of(sde, 5):
            p, q = PARAMETERIZATIONS["edm"](0.5).coefficients(sde.knot(t))
            assert math.hypot(p * 0.5, q) == pytest.approx(1.0, rel=1e-13)
