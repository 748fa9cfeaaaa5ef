"""Laws that every SDE of the table obeys: two statements of one process, kernels, inverses, precision, shapes."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from oracles import EPS, MP_LAWS, SDE_NAMES, extended_times, make_sde, mp_law, relative, times_of
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from sde_lib import DATA, SDE, SDES, ReverseSDE

every_sde = pytest.mark.parametrize("name", SDE_NAMES)


def rate_of(fn, t: float) -> float:
    """d fn / dt by forward-mode differentiation, exact to rounding."""
    at = torch.tensor(t, dtype=torch.float64)
    return float(torch.func.jvp(fn, (at,), (torch.ones_like(at),))[1])


def open_times(sde: SDE) -> list[float]:
    """Times where f and g are finite, the table's knots (where lambda' is one-sided) left out."""
    return [t for t in extended_times(sde) if t <= sde.drift_t_max]


# --- two statements of one process ----------------------------------------------------------------------------------


@every_sde
def test_drift_is_the_rate_of_log_alpha(name):
    """f = (log alpha)'. Forward mode is exact, so a few roundings of |f| and of what f is made of remain."""
    sde = make_sde(name)
    for t in open_times(sde):
        want = rate_of(sde.log_alpha, t)
        # lambda' enters a tabulated f through a cubic on an interval of 1/N: the condition number of u is N t
        assert sde.f(t) == pytest.approx(want, rel=1e-11, abs=1e-14)


@every_sde
def test_diffusion_is_what_the_variance_needs(name):
    """g^2 = (sigma^2)' - 2 f sigma^2, relative to the larger of the two terms on the right."""
    sde = make_sde(name)
    for t in open_times(sde):
        variance_rate = 2.0 * sde.sigma(t) ** 2 * rate_of(sde.log_sigma, t)
        drift_part = 2.0 * sde.f(t) * sde.sigma(t) ** 2
        scale = abs(variance_rate) + abs(drift_part)
        assert sde.g2(t) == pytest.approx(variance_rate - drift_part, rel=1e-11, abs=1e-11 * scale)
        assert sde.g2(t) >= 0.0
        assert sde.diffusion(t) == pytest.approx(math.sqrt(sde.g2(t)), rel=4 * EPS)


@every_sde
def test_diffusion_is_the_rate_of_lambda(name):
    """g^2 = -2 sigma^2 lambda'."""
    sde = make_sde(name)
    for t in open_times(sde):
        want = -2.0 * sde.sigma(t) ** 2 * rate_of(sde.half_log_snr, t)
        assert sde.g2(t) == pytest.approx(want, rel=1e-10)


@every_sde
def test_rates_are_the_derivatives_of_the_kernel(name):
    """(alpha', sigma'), where f and g are singular too: the flow SDE at t = 1."""
    sde = make_sde(name)
    for t in extended_times(sde):
        alpha_rate, sigma_rate = sde.rates(t)
        if sde.alpha(t) > 0.0:
            assert alpha_rate == pytest.approx(rate_of(sde.alpha, t), rel=1e-11, abs=1e-14)
        assert sigma_rate == pytest.approx(rate_of(sde.sigma, t), rel=1e-10)
        assert math.isfinite(alpha_rate) and math.isfinite(sigma_rate)


@every_sde
def test_prior_is_the_law_of_the_noise_at_t_max(name):
    """What the data leave behind at t_max: sigma(t_max) = prior_std up to the signal that is still there."""
    sde = make_sde(name)
    alpha, sigma = sde.alpha(sde.t_max), sde.sigma(sde.t_max)
    left = 1.001 * alpha**2 if alpha < 1.0 else 4 * EPS
    assert abs(sigma / sde.prior_std - 1.0) <= left


# --- kernels --------------------------------------------------------------------------------------------------------


def triples(sde: SDE) -> list[tuple[float, float, float]]:
    at = times_of(sde, 7)
    return [(s, u, t) for i, s in enumerate(at) for j, u in enumerate(at[i + 1 :], i + 1) for t in at[j + 1 :]]


@every_sde
def test_kernels_compose(name):
    """p(u | s) then p(t | u) is p(t | s): scales multiply, variances add (Chapman-Kolmogorov)."""
    sde = make_sde(name)
    for s, u, t in triples(sde):
        first, second, whole = sde.transition(s, u), sde.transition(u, t), sde.transition(s, t)
        assert first.scale * second.scale == pytest.approx(whole.scale, rel=1e-13, abs=1e-300)
        variance = (second.scale * first.std) ** 2 + second.std**2
        # lambda carries |lambda| EPS of absolute error, a variance -expm1(2 dlambda) divides it by dlambda
        slack = 1e-14 / min(1.0, *(sde.half_log_snr(a) - sde.half_log_snr(b) for a, b in ((s, u), (u, t))))
        assert variance == pytest.approx(whole.std**2, rel=slack)


@every_sde
def test_marginals_compose_with_kernels(name):
    """p(s | 0) then p(t | s) is p(t | 0)."""
    sde = make_sde(name)
    at = times_of(sde, 9)
    for i, s in enumerate(at):
        for t in at[i + 1 :]:
            kernel = sde.transition(s, t)
            assert kernel.scale * sde.alpha(s) == pytest.approx(sde.alpha(t), rel=1e-13, abs=1e-300)
            variance = (kernel.scale * sde.sigma(s)) ** 2 + kernel.std**2
            assert variance == pytest.approx(sde.sigma(t) ** 2, rel=1e-13)


@pytest.mark.parametrize("name", MP_LAWS)
def test_short_kernels_lose_no_digits(name):
    """Var(x_t | x_s) = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2, which cancels, against 60 digits."""
    sde = make_sde(name)
    for s in times_of(sde, 7):
        t = s * (1.0 + 1e-7)
        if t > sde.drift_t_max:
            continue
        with mp.workdps(60):
            (a, b), (c, d) = mp_law(name, s), mp_law(name, t)
            want = mp.sqrt(d * d - (c / a * b) ** 2)
            dlam = float(mp.log(a / b) - mp.log(c / d))
        lam = abs(sde.half_log_snr(s))
        # std ~ sqrt(2 dlambda): half the relative error of dlambda, which is a few EPS (1 + |lambda|) / dlambda
        assert relative(sde.transition(s, t).std, want) < 4 * EPS * (1.0 + lam) / dlam


@every_sde
def test_posterior_is_bayes(name):
    """x_s | x_t, x_0 by conditioning the joint Gaussian of (x_s, x_t) given x_0."""
    sde = make_sde(name)
    at = times_of(sde, 9)
    for i, s in enumerate(at):
        for t in at[i + 1 :]:
            kernel, got = sde.transition(s, t), sde.posterior(s, t)
            alpha_s, sigma_s = sde.alpha(s), sde.sigma(s)
            covariance, variance = kernel.scale * sigma_s**2, (kernel.scale * sigma_s) ** 2 + kernel.std**2
            gain = covariance / variance
            assert got.x_t == pytest.approx(gain, rel=1e-12, abs=1e-300)
            # alpha_s (1 - gain scale), written without the difference
            assert got.x_0 == pytest.approx(alpha_s * kernel.std**2 / variance, rel=1e-12)
            assert got.std == pytest.approx(sigma_s * kernel.std / math.sqrt(variance), rel=1e-12)


@every_sde
def test_posterior_at_the_data_end(name):
    """At sigma_s = 0 the posterior is x_0 itself: coefficients (0, 1), no spread."""
    from sde_lib import posterior, transition

    sde = make_sde(name)
    for t in times_of(sde, 5):
        knot = sde.knot(t)
        assert posterior(DATA, knot) == (0.0, 1.0, 0.0)
        assert transition(DATA, knot) == (knot.alpha, knot.sigma)


@every_sde
def test_kernels_take_one_time_per_sample(name):
    """(B,) times give the (B,) kernel of each."""
    sde = make_sde(name)
    at = [t for t in times_of(sde, 6) if t <= sde.drift_t_max]
    s, t = torch.tensor(at[:-1], dtype=torch.float64), torch.tensor(at[1:], dtype=torch.float64)
    kernel, post = sde.transition(s, t), sde.posterior(s, t)
    for i in range(len(s)):
        torch.testing.assert_close(kernel.scale[i].item(), sde.transition(at[i], at[i + 1]).scale, rtol=1e-13, atol=0)
        torch.testing.assert_close(kernel.std[i].item(), sde.transition(at[i], at[i + 1]).std, rtol=1e-10, atol=0)
        torch.testing.assert_close(post.std[i].item(), sde.posterior(at[i], at[i + 1]).std, rtol=1e-10, atol=0)


@every_sde
def test_a_kernel_runs_forward_only(name):
    """s > t is refused in words, not by the square root."""
    sde = make_sde(name)
    low, high = sde.t_min, 0.5 * (sde.t_min + sde.t_max)
    for call in (sde.transition, sde.posterior):
        with pytest.raises(ValueError, match=r"`s`.*`t`"):
            call(high, low)


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MP_LAWS)
def test_float64_is_accurate_at_both_ends(name):
    """alpha and sigma against 60 digits: within a few EPS times the condition of the exponential."""
    sde = make_sde(name)
    for t in extended_times(sde):
        alpha, sigma = mp_law(name, t)
        if alpha == 0:
            assert sde.alpha(t) == 0.0 and sde.sigma(t) == 1.0
            continue
        # exp(y) turns an absolute error |y| EPS of its argument into a relative one, and y may be a sum of terms as
        # large as it gets anywhere (VE: log sigma_min + t log ratio); log_alpha of the cosine schedule is itself log1p
        # of a difference that reaches 1 - alpha: one more factor 1 / alpha
        largest = abs(sde.log_sigma(sde.t_min)) + abs(sde.log_sigma(sde.t_max)) + abs(sde.log_sigma(t))
        condition = 4.0 + 4.0 * (abs(sde.log_alpha(t)) + largest) + (2.0 / float(alpha) if alpha < 1 else 0)
        assert relative(sde.alpha(t), alpha) < EPS * condition
        assert relative(sde.sigma(t), sigma) < EPS * condition
        with mp.workdps(60):
            lam = mp.log(alpha / sigma)
            assert abs(float(lam - sde.half_log_snr(t))) < EPS * condition * (1.0 + abs(float(lam)))


@every_sde
def test_float32_times_lose_nothing_near_the_data(name):
    """alpha and sigma of a float32 time within 1e-6 relative of float64 at the same time, from t = 1e-6 up.

    Only the rounding of the result to float32 (6e-8) remains. score_sde_pytorch computes 1 - exp(.) in float32 and is
    off by 9e-2 at 1e-6 and 1e-4 at 1e-3.
    """
    sde = make_sde(name)
    for t in extended_times(sde):
        t32 = torch.tensor(t, dtype=torch.float32)
        same = float(t32)
        if same < sde.t_min and name == "tabulated":
            continue
        for fn in (sde.alpha, sde.sigma):
            got, want = fn(t32), fn(min(same, sde.t_max))
            assert got.dtype == torch.float32
            assert float(got) == pytest.approx(want, rel=1e-6, abs=1e-30), (fn, t)


@pytest.mark.parametrize("name", [n for n in SDE_NAMES if n != "tabulated"])
def test_float32_at_one_millionth(name):
    """The stated requirement, literally: t = 1e-6 in float32 within 1e-6 of float64."""
    sde = make_sde(name)
    t = torch.full((3,), 1e-6, dtype=torch.float32)
    torch.testing.assert_close(sde.alpha(t).double(), sde.alpha(t.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(sde.sigma(t).double(), sde.sigma(t.double()), rtol=1e-6, atol=0)


@every_sde
@pytest.mark.parametrize("method", ["alpha", "sigma", "half_log_snr", "f", "g2", "diffusion", "log_alpha", "log_sigma"])
def test_floats_and_tensors_agree(name, method):
    """The Python-float path and the tensor path are the same numbers up to their libraries' last bits."""
    sde = make_sde(name)
    at = open_times(sde) if method in ("f", "g2", "diffusion") else extended_times(sde)
    tensor = getattr(sde, method)(torch.tensor(at, dtype=torch.float64))
    floats = torch.tensor([getattr(sde, method)(t) for t in at], dtype=torch.float64)
    torch.testing.assert_close(tensor, floats, rtol=1e-12, atol=1e-15)


@every_sde
def test_results_take_the_form_of_the_time(name):
    """Floats give floats, tensors give their own dtype and shape, integers the default dtype."""
    sde = make_sde(name)
    t = 0.5 * (sde.t_min + sde.drift_t_max)
    assert isinstance(sde.alpha(t), float) and isinstance(sde.f(t), float) and isinstance(sde.rates(t)[0], float)
    for dtype in (torch.float32, torch.float64, torch.float16):
        for shape in ((), (3,), (2, 3)):
            at = torch.full(shape, t, dtype=dtype)
            for value in (sde.alpha(at), sde.sigma(at), sde.g2(at), *sde.rates(at), sde.half_log_snr(at)):
                assert value.dtype == dtype and value.shape == shape
    assert sde.alpha(torch.tensor(0 if sde.t_max <= 1 else 1)).dtype == torch.get_default_dtype()


# --- inverse and monotone -------------------------------------------------------------------------------------------


@every_sde
def test_time_at_inverts_lambda(name):
    """time_at(lambda(t)) = t. lambda carries EPS (1 + |lambda|), which its slope turns into time."""
    sde = make_sde(name)
    for t in extended_times(sde):
        lam = sde.half_log_snr(t)
        if not math.isfinite(lam):
            continue
        slope = -rate_of(sde.half_log_snr, t)
        # the table solves its cubic by bisection in u: the last bit of u is EPS / N of time
        slack = 16 * EPS * ((1.0 + abs(lam)) / slope + t)
        assert abs(sde.time_at(lam) - t) <= slack, t
        as_tensor = float(sde.time_at(torch.tensor(lam, dtype=torch.float64)))
        assert abs(as_tensor - t) <= slack, t


@every_sde
def test_lambda_inverts_time_at(name):
    """lambda(time_at(lam)) = lam across the whole range, batches included."""
    sde = make_sde(name)
    low = max(sde.half_log_snr(sde.t_max), -12.0)
    lam = torch.linspace(low, sde.half_log_snr(sde.t_min), 41, dtype=torch.float64)
    t = sde.time_at(lam)
    slope = torch.tensor([-rate_of(sde.half_log_snr, float(u)) for u in t], dtype=torch.float64)
    error = (sde.half_log_snr(t) - lam).abs()
    # t near T is known to EPS: lambda there to EPS |lambda'|
    assert bool((error <= 16 * EPS * (1.0 + lam.abs() + slope * t)).all()), error.max()


@every_sde
def test_monotone(name):
    """lambda falls strictly, alpha never rises, sigma rises."""
    sde = make_sde(name)
    at = torch.tensor(sorted({*extended_times(sde), *times_of(sde, 400)}), dtype=torch.float64)
    assert bool((sde.half_log_snr(at).diff() < 0).all())
    assert bool((sde.alpha(at).diff() <= 0).all())
    assert bool((sde.sigma(at).diff() >= 0).all())


@every_sde
def test_knots_carry_the_law(name):
    """A knot's fields are the SDE's at its time; knot_at finds it again and never leaves [t_min, t_max]."""
    sde = make_sde(name)
    for t in times_of(sde, 7):
        knot = sde.knot(t)
        assert (knot.t, knot.alpha, knot.sigma, knot.half_log_snr) == (
            t, sde.alpha(t), sde.sigma(t), sde.half_log_snr(t)
        )  # fmt: skip
        assert knot.law is sde and not knot.per_sample and not knot.is_data
        if math.isfinite(knot.half_log_snr):
            assert sde.knot_at(knot.half_log_snr).t == pytest.approx(t, rel=1e-9)
    assert sde.knot_at(1e3).t == sde.t_min
    assert sde.knot_at(-1e3).t == sde.t_max
    rows = sde.knot_at(torch.tensor([[1e3], [-1e3]], dtype=torch.float64))
    assert rows.t.flatten().tolist() == [sde.t_min, sde.t_max] and rows.t.shape == (2, 1)


@every_sde
def test_per_sample_knots_are_the_float_knots(name):
    """Row i of a (B, 1, ...) knot is the knot of time i, ready to multiply a state of any shape."""
    sde = make_sde(name)
    at = times_of(sde, 5)
    knot = sde.knot(torch.tensor(at, dtype=torch.float64), ndim=4)
    assert knot.per_sample and knot.sigma.shape == (len(at), 1, 1, 1)
    for i, t in enumerate(at):
        one = sde.knot(t)
        for field in ("t", "alpha", "sigma", "half_log_snr"):
            assert float(getattr(knot, field)[i]) == pytest.approx(getattr(one, field), rel=1e-13, abs=1e-14)
        rows = knot.select(torch.tensor([i]))
        assert float(rows.t) == t and rows.t.shape == (1, 1, 1, 1)
    x = torch.zeros(len(at), 2, dtype=torch.float32)
    assert knot.spread(knot.t, x).shape == (len(at),) and knot.spread(knot.t, x).dtype == torch.float32


def test_flow_reaches_the_prior_exactly():
    """alpha(1) = 0, sigma(1) = 1, rates (-1, 1); f and g refuse, drift_t_max lies inside."""
    sde = make_sde("flow")
    knot = sde.knot(1.0)
    assert (knot.alpha, knot.sigma, knot.half_log_snr) == (0.0, 1.0, -math.inf)
    assert knot.rates == (-1.0, 1.0)
    for bad in (sde.f, sde.g2, sde.diffusion):
        with pytest.raises(ValueError, match="drift_t_max"):
            bad(1.0)
    assert math.isfinite(sde.g2(sde.drift_t_max))
    rows = sde.knot(torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert rows.alpha.tolist() == [0.0, 0.5] and rows.half_log_snr[0] == -math.inf


# --- states of any shape --------------------------------------------------------------------------------------------

SHAPES = [(), (3,), (2, 4, 4)]


@every_sde
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_marginals_take_any_shape(name, shape, dtype):
    """perturb, marginal_prob and drift on (B,), (B, D), (B, C, H, W), with one time or one per sample."""
    sde = make_sde(name)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(4, *shape, generator=generator, dtype=dtype) for _ in range(2))
    times = torch.linspace(sde.t_min, sde.drift_t_max, 6, dtype=torch.float64)[1:5]
    for t in (float(times[1]), times[1].to(dtype), times.to(dtype)):
        mean, std = sde.marginal_prob(x_0, t)
        x_t, drift = sde.perturb(x_0, t, noise), sde.drift(x_0, t)
        assert mean.shape == x_t.shape == drift.shape == x_0.shape
        assert mean.dtype == x_t.dtype == drift.dtype == dtype
        for i in range(4):
            ti = float(t[i]) if isinstance(t, Tensor) and t.ndim else float(t)
            tolerance = dict(rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
            torch.testing.assert_close(mean[i], sde.alpha(ti) * x_0[i], **tolerance)
            torch.testing.assert_close(drift[i], sde.f(ti) * x_0[i], **tolerance)
            scale = sde.alpha(ti) * x_0[i].abs() + sde.sigma(ti) * noise[i].abs()
            error = (x_t[i] - (sde.alpha(ti) * x_0[i] + sde.sigma(ti) * noise[i])).abs()
            assert bool((error <= 4 * torch.finfo(dtype).eps * scale).all())
            std_i = float(std[i]) if isinstance(std, Tensor) and std.ndim else float(std)
            assert std_i == pytest.approx(sde.sigma(ti), rel=4 * torch.finfo(dtype).eps)


@every_sde
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prior_density(name, shape):
    """prior_logp is the log density of N(0, prior_std^2 I)."""
    sde = make_sde(name)
    z = sde.prior_sampling((5, *shape), torch.Generator().manual_seed(1), dtype=torch.float64)
    want = Normal(0.0, torch.tensor(sde.prior_std, dtype=torch.float64)).log_prob(z).reshape(5, -1).sum(1)
    torch.testing.assert_close(sde.prior_logp(z), want, rtol=1e-12, atol=1e-12)


@every_sde
def test_prior_sampling_has_the_prior_moments(name):
    """Mean and variance of 200 000 draws, each within 5 standard errors of the prior's."""
    sde, n = make_sde(name), 200_000
    z = sde.prior_sampling((n, 1), torch.Generator().manual_seed(2)).double() / sde.prior_std
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / n)
    again = sde.prior_sampling((n, 1), torch.Generator().manual_seed(2)).double() / sde.prior_std
    assert torch.equal(z, again)


@every_sde
def test_wrong_shape_of_t(name):
    """A (B, 1) or (B + 1,) time is refused with both shapes named."""
    sde = make_sde(name)
    x = torch.zeros(4, 3)
    for t in (torch.full((5,), sde.t_min), torch.full((4, 1), sde.t_min), torch.full((3,), sde.t_min)):
        for call in (sde.perturb, sde.marginal_prob):
            with pytest.raises(ValueError, match=r"shape \(\) or \(B,\)"):
                call(x, t)
        with pytest.raises(ValueError, match=r"shape \(\) or \(B,\)"):
            sde.drift(x, t)


# --- the reverse SDE from a function --------------------------------------------------------------------------------


@every_sde
def test_reverse_from_a_function(name):
    """score=fn gets x and t of shape (B,); drift is f x - g^2 score, velocity f x - g^2/2 score."""
    sde = make_sde(name)
    seen = []

    def score(x, t):
        seen.append(t)
        return -x.sin()

    x = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(3, 2)
    t = 0.5 * (sde.t_min + sde.drift_t_max)
    prediction = sde.reverse(score=score)(x, t)
    assert isinstance(sde.reverse(score=score), ReverseSDE)
    assert seen[0].shape == (3,) and seen[0].dtype == x.dtype and float(seen[0][0]) == t
    f, g2 = sde.f(t), sde.g2(t)
    scale = float((abs(f) + g2 + 1.0) * 4)
    torch.testing.assert_close(prediction.drift, f * x + g2 * x.sin(), rtol=1e-12, atol=1e-14 * scale)
    torch.testing.assert_close(prediction.velocity, f * x + 0.5 * g2 * x.sin(), rtol=1e-12, atol=1e-14 * scale)


# --- Gaussian identity: posterior mean of data ----------------------------------------------------------------------


@every_sde
def test_conditioning_three_times_at_once(name):
    """The joint law of (x_s, x_u, x_t) built from kernels is a Markov chain's."""
    sde = make_sde(name)
    s, u, t = (sde.t_min + w * (sde.drift_t_max - sde.t_min) for w in (0.1, 0.4, 0.8))
    first, second = sde.transition(s, u), sde.transition(u, t)
    v = sde.sigma(s) ** 2
    cov = torch.tensor(
        [
            [v, first.scale * v, first.scale * second.scale * v],
            [0, sde.sigma(u) ** 2, second.scale * sde.sigma(u) ** 2],
            [0, 0, sde.sigma(t) ** 2],
        ],
        dtype=torch.float64,
    )
    cov = cov + cov.triu(1).T
    precision = torch.linalg.inv(cov)
    # Markov: x_s and x_t are independent given x_u, a zero of the precision matrix
    assert abs(float(precision[0, 2])) < 1e-9 * float(precision.diagonal().min() * precision.diagonal().max()) ** 0.5
    MultivariateNormal(torch.zeros(3, dtype=torch.float64), cov)  # positive definite


# --- unusual parameters ---------------------------------------------------------------------------------------------

UNUSUAL = {
    "vp, constant beta": lambda: SDES["vp"](1.0, 1.0, t_max=3.0),
    "vp, extreme": lambda: SDES["vp"](1e-4, 60.0, t_min=1e-9),
    "sub_vp, constant beta": lambda: SDES["sub_vp"](5.0, 5.0, t_min=1e-8),
    "ve, wide": lambda: SDES["ve"](1e-4, 1e4, t_min=1e-8),
    "ve, narrow": lambda: SDES["ve"](0.5, 0.6),
    "cosine, tiny s": lambda: SDES["cosine"](1e-5, t_min=1e-7, t_max=0.9999),
    "cosine, large s": lambda: SDES["cosine"](0.5, t_max=0.5),
    "edm, wide": lambda: SDES["edm"](1e-7, 1e5),
    "flow, inside": lambda: SDES["flow"](1e-8, 0.9),
    "tabulated, two": lambda: SDES["tabulated"]([0.9, 0.1]),
    "tabulated, uneven": lambda: SDES["tabulated"]([1 - 1e-10, 0.999, 0.9989, 0.5, 0.4999, 1e-8]),
    "tabulated, tensor": lambda: SDES["tabulated"](torch.linspace(0.99, 0.01, 50)),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_laws_hold_for_unusual_parameters(case):
    """Derivatives, inverse, monotonicity and composition far from the defaults."""
    sde = UNUSUAL[case]()
    at = times_of(sde, 15)
    lam = torch.tensor([sde.half_log_snr(t) for t in at], dtype=torch.float64)
    assert bool((lam.diff() < 0).all()) and torch.isfinite(lam).all()
    for t in at:
        slope = -rate_of(sde.half_log_snr, t)
        assert sde.f(t) == pytest.approx(rate_of(sde.log_alpha, t), rel=1e-10, abs=1e-13)
        assert sde.g2(t) == pytest.approx(2.0 * sde.sigma(t) ** 2 * slope, rel=1e-9)
        largest = 1.0 + float(lam.abs().max())
        assert abs(sde.time_at(sde.half_log_snr(t)) - t) <= 32 * EPS * (largest / slope + t)
    for s, u, t in triples(sde):
        first, second, whole = sde.transition(s, u), sde.transition(u, t), sde.transition(s, t)
        gap = min(1.0, *(sde.half_log_snr(a) - sde.half_log_snr(b) for a, b in ((s, u), (u, t))))
        variance = (second.scale * first.std) ** 2 + second.std**2
        assert variance == pytest.approx(whole.std**2, rel=2e-14 * float(1 + lam.abs().max()) / gap)


@every_sde
def test_laws_can_be_copied_and_pickled(name):
    """Laws, knots and chains travel to worker processes; what comes back is the same law."""
    import copy
    import pickle

    sde = make_sde(name)
    t = 0.5 * (sde.t_min + sde.drift_t_max)
    for clone in (copy.deepcopy(sde), pickle.loads(pickle.dumps(sde))):
        assert clone.half_log_snr(t) == sde.half_log_snr(t) and repr(clone) == repr(sde)
    chain = pickle.loads(pickle.dumps(sde.discretize(30)))
    assert chain.levels[3].alpha == sde.discretize(30).levels[3].alpha and chain.descend(4)[-1].is_data
    assert len(repr(sde)) < 400  # a table of a thousand numbers is summarized


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("vp", {"beta_min": 0.0}, "beta_min"),
        ("vp", {"beta_min": -1.0}, "beta_min"),
        ("vp", {"beta_max": 0.05}, "beta_max"),
        ("vp", {"beta_max": math.nan}, "beta_max"),
        ("vp", {"beta_max": math.inf}, "beta_max"),
        ("vp", {"beta_min": "0.1"}, "beta_min"),
        ("vp", {"t_min": 0.0}, "t_min"),
        ("vp", {"t_min": 2.0}, "t_min"),
        ("sub_vp", {"beta_max": 0.0}, "beta_max"),
        ("ve", {"sigma_min": 0.0}, "sigma_min"),
        ("ve", {"sigma_min": 60.0}, "sigma_min"),
        ("ve", {"t_max": -1.0}, "t_max"),
        ("cosine", {"s": 0.0}, "s"),
        ("cosine", {"t_max": 1.0}, "t_max"),
        ("cosine", {"t_min": 0.9999}, "t_min"),
        ("edm", {"t_min": 0.0}, "t_min"),
        ("edm", {"t_min": 90.0}, "t_min"),
        ("flow", {"t_max": 1.5}, "t_max"),
        ("flow", {"t_min": math.nan}, "t_min"),
        ("tabulated", {"alphas_cumprod": [0.9]}, "alphas_cumprod"),
        ("tabulated", {"alphas_cumprod": [0.9, 0.9]}, "alphas_cumprod"),
        ("tabulated", {"alphas_cumprod": [0.5, 0.9]}, "alphas_cumprod"),
        ("tabulated", {"alphas_cumprod": [1.0, 0.5]}, "alphas_cumprod"),
        ("tabulated", {"alphas_cumprod": [0.5, 0.0]}, "alphas_cumprod"),
        ("tabulated", {"alphas_cumprod": [0.9, math.nan]}, "alphas_cumprod"),
        ("tabulated", {"alphas_cumprod": [0.9, math.nan, 0.5]}, "alphas_cumprod"),
    ],
)
def test_bad_options(name, options, says):
    """Each is refused at construction, by the name of the option and with what came in."""
    with pytest.raises(ValueError, match=says):
        SDES[name](**options)


def test_unknown_names_and_options():
    """Unknown entries list the known ones and suggest the nearest; so do misspelt options."""
    from sde_lib import build, lookup

    with pytest.raises(ValueError, match="sub_vp") as error:
        lookup(SDES, "subvp", "sde")
    assert "Did you mean" in str(error.value) and all(known in str(error.value) for known in SDES)
    with pytest.raises(ValueError, match=r"beta_maxx.*Did you mean 'beta_max'"):
        build(SDES, {"name": "vp", "vp": {"beta_maxx": 1.0}}, "sde")
    assert build(SDES, {"name": "vp", "vp": {"beta_max": 5.0}, "ve": {"nonsense": 1}}, "sde").beta_max == 5.0
    assert build(SDES, {"name": "vp", "vp": {"beta_max": 5.0}}, "sde", beta_max=7.0).beta_max == 7.0


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ValueError, "exactly one"),
        ({"score": abs, "noise": abs}, ValueError, "exactly one"),
        ({"scores": abs}, ValueError, "score"),
        ({"score": 3}, TypeError, "function"),
        ({"score": abs, "sigma_data": 0.5}, TypeError, "sigma_data"),
        ({"edm": abs, "sigma_dat": 0.5}, TypeError, "sigma_dat"),
        ({"edm": abs, "sigma_data": 0.0}, ValueError, "sigma_data"),
    ],
)
def test_bad_reverse(options, error, says):
    """reverse() takes one function by the name of its parameterization."""
    with pytest.raises(error, match=says):
        make_sde("vp").reverse(**options)
    with pytest.raises(error, match=says):
        make_sde("vp").discretize(30).reverse(**options)
