"""log p against closed forms, and every error bar against the error it stands for."""

import math

import numpy as np
import pytest
import torch

from scoresde import SDES, VPSDE, ClassifierFreeGuidance, GaussianMixture, log_likelihood
from scoresde.likelihood.path import ascending_knots
from scoresde.likelihood.quadrature import quadrature
from sde_lib import EDMSDE, PARAMETERIZATIONS, VESDE, FlowSDE, Wrapper
from solvers import DDIM, RK4, Angle, Blended, EulerMaruyama, Heun, PerSample, Status


def sde_of(name):
    return SDES[name](VPSDE().discretize(1000).alphas_cumprod) if name == "tabulated" else SDES[name]()


def mixture(shape=(2, 2), seed=0):
    """Three correlated components of every spread, in any shape."""
    generator = torch.Generator().manual_seed(seed)
    d = math.prod(shape)
    a = torch.randn(d, d, generator=generator, dtype=torch.float64)
    cov = a @ a.T / (2 * d) + 0.02 * torch.eye(d)
    means = 0.5 * torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, covariances=torch.stack([cov, cov / 2, cov / 3]), weights=[0.5, 0.3, 0.2])


@pytest.mark.parametrize("name", sorted(SDES))
def test_log_likelihood_is_the_exact_log_density_at_t_min(name):
    """Exact trace and exact terminal density leave the discretisation only: tolerance 1e-8 gives 1e-6 nats."""
    sde, data = sde_of(name), mixture()
    x = data.sample(12, torch.Generator().manual_seed(1), torch.float64)
    result = log_likelihood(
        data.reverse(sde),
        x,
        tol=1e-6,
        prior=lambda z: data.log_prob(z, sde.knot(sde.t_max)),
    )
    exact = data.log_prob(x, sde.knot(sde.t_min))
    torch.testing.assert_close(result.log_prob, exact, rtol=0, atol=1e-6)
    assert result.ok and (result.trace_se == 0).all()


def test_the_standard_priors_mismatch_is_what_it_should_be():
    """With the default prior the difference from the exact density is log N(x_T; 0, I) - log p_T(x_T), no more."""
    sde, data = VPSDE(), mixture()
    x = data.sample(12, torch.Generator().manual_seed(1), torch.float64)
    standard = log_likelihood(data.reverse(sde), x, tol=1e-6)
    mismatch = sde.prior_logp(standard.latent) - data.log_prob(standard.latent, sde.knot(sde.t_max))
    exact = data.log_prob(x, sde.knot(sde.t_min))
    torch.testing.assert_close(standard.log_prob - mismatch, exact, rtol=0, atol=1e-6)
    assert 1e-5 < mismatch.abs().max() < 0.1  # there is one: alpha(T) = 6.6e-3


def test_a_sample_does_not_know_its_batch_mates():
    """Alone, among easy mates, or beside an outlier: the same log p to rounding (the mixture uses no matmul)."""
    data = GaussianMixture([[-1.0, 0.3], [1.0, -0.5]], std=[0.05, 0.4])
    rev = data.reverse(VPSDE())
    x = data.sample(6, torch.Generator().manual_seed(0), torch.float64)
    together = log_likelihood(rev, torch.cat([x, torch.full((1, 2), 40.0, dtype=torch.float64)]))
    for i in range(len(x)):
        alone = log_likelihood(rev, x[i : i + 1])
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[i], rtol=0, atol=1e-12)
        assert alone.nfe[0] == together.nfe[i]


@pytest.mark.parametrize("kind", sorted(PARAMETERIZATIONS))
def test_every_parameterization_gives_the_same_density(kind):
    """The linear part of the slope is taken in closed form, differently for each: the sum must not care."""
    sde, data = VPSDE(), mixture((3,))
    knot_rev = data.reverse(sde)

    def view(x, t):
        prediction = knot_rev(x, sde.knot(t, ndim=x.ndim))
        if kind != "edm":
            return getattr(prediction, kind)
        p, q = PARAMETERIZATIONS["edm"](0.7).coefficients(prediction.knot)
        return p * prediction.data + q * prediction.noise

    rev = sde.reverse(**{kind: view}, **({"sigma_data": 0.7} if kind == "edm" else {}))
    x = data.sample(5, torch.Generator().manual_seed(0), torch.float64)
    options = {"tol": 1e-7}
    torch.testing.assert_close(
        log_likelihood(rev, x, **options).log_prob, log_likelihood(knot_rev, x, **options).log_prob, rtol=0, atol=1e-7
    )


def test_float32_is_enough():
    """D = 16, float32 state and score: within 1e-3 nats of float64."""
    data = mixture((16,))
    rev = data.reverse(VPSDE())
    x = data.sample(8, torch.Generator().manual_seed(0), torch.float64)
    single, double = (log_likelihood(rev, v, divergence="exact").log_prob for v in (x.float(), x))
    torch.testing.assert_close(single, double, rtol=0, atol=1e-3)


def test_guidance_counts_twice_and_a_failing_sample_says_so():
    data = GaussianMixture([[0.0]], std=0.5)
    rev = data.reverse(VPSDE())
    guided = ClassifierFreeGuidance(rev, 1.0, null={})
    x = data.sample(3, torch.Generator().manual_seed(0), torch.float64)
    assert torch.equal(log_likelihood(guided, x).nfe, 2 * log_likelihood(rev, x).nfe)

    def broken(v, t):
        return torch.where((t[:, None] > 0.5) & (v > 0), math.nan, -v)

    result = log_likelihood(VPSDE().reverse(score=broken), torch.tensor([[0.5], [-0.5]], dtype=torch.float64))
    assert result.status.tolist() == [Status.NON_FINITE, Status.OK]
    assert math.isnan(result.log_prob[0]) and math.isfinite(result.log_prob[1])
    assert "sample 0" in result.message and "t = 0.5" in result.message


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_golden_gaussian(golden, name):
    """score_sde_pytorch's own problem: log p of the ODE with the standard prior is known in closed form.

    The published code is off by 5e-7 to 5e-6 of the bits/dim; ours agrees with the exact value to its tolerance.
    """
    z = np.load(golden / "likelihood_gauss.npz")
    mu, s, eps = z[f"gauss_{name}/params"]
    sde = {"vp": VPSDE, "subvp": SDES["sub_vp"], "ve": SDES["ve"]}[name](t_min=float(eps))
    x = torch.from_numpy(z[f"gauss_{name}/x"]).double()
    data = GaussianMixture(torch.full((1, *x.shape[1:]), float(mu), dtype=torch.float64), std=float(s))
    result = log_likelihood(data.reverse(sde), x, divergence="exact", tol=1e-5, doubling=False)
    exact = torch.from_numpy(z[f"gauss_{name}/logp_ode_exact"])
    torch.testing.assert_close(result.log_prob, exact, rtol=1e-6, atol=1e-4)



# --- fixed steps -----------------------------------------------------------------------------------------------------


class Logged(Wrapper):
    """Counts evaluations: rows times calls."""

    def __init__(self, inner, log):
        super().__init__(inner)
        self.log = log

    def __call__(self, x, t):
        self.log.append((len(x), *((t.t, t.t) if isinstance(t.t, float) else (float(t.t.min()), float(t.t.max())))))
        return self.inner(x, t)


def spectrum(d=48, low=1e-3, high=9.0, seed=0):
    """A Gaussian with eigenvalues over four decades in a random basis."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    cov = (q * torch.logspace(math.log10(low), math.log10(high), d, dtype=torch.float64)) @ q.T
    return GaussianMixture(torch.zeros(1, d), covariances=((cov + cov.T) / 2)[None])


LAWS = {"vp": VPSDE(), "sub_vp": SDES["sub_vp"](), "ve": VESDE(), "edm": EDMSDE(), "flow": FlowSDE()}


@pytest.mark.parametrize("name", LAWS)
def test_fixed_steps_converge_to_the_exact_density(name):
    """96 dimensions with eigenvalues from 1e-3 to 9, terminal density given, exact trace: from 16 to 96 steps the error
    falls at least 50 times, to below 1e-3 nats (1.5e-5 bits/dim)."""
    sde, data = LAWS[name], spectrum(96)
    x = data.sample(3, torch.Generator().manual_seed(1), torch.float64) * sde.alpha(sde.t_min)
    exact = data.log_prob(x, sde.knot(sde.t_min))
    options = {"divergence": "exact", "doubling": False, "chunk": 64}
    options["prior"] = lambda z: data.log_prob(z, sde.knot(sde.t_max))
    errors = []
    for steps in (16, 96):
        result = log_likelihood(data.reverse(sde), x, steps=steps, **options)
        errors.append(float((result.log_prob - exact).square().mean().sqrt()))
        assert int(result.nfe[0]) <= steps + 3 and result.ok
    assert errors[1] < errors[0] / 50 and errors[1] < 1e-3, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_adaptive_steps_reach_1e_6_nats_in_192_dimensions(name):
    """The same Gaussian, exact trace, terminal density given: log p at t_min to 1e-6 nats."""
    sde, data = LAWS[name], spectrum(192)
    x = data.sample(2, torch.Generator().manual_seed(1), torch.float64) * sde.alpha(sde.t_min)
    result = log_likelihood(
        data.reverse(sde),
        x,
        tol=1e-7,
        divergence="exact",
        doubling=False,
        chunk=64,
        prior=lambda z: data.log_prob(z, sde.knot(sde.t_max)),
    )
    torch.testing.assert_close(result.log_prob, data.log_prob(x, sde.knot(sde.t_min)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_quadrature_is_of_fourth_order(sigma_data):
    """On a function whose integral over the angle is known, with and without an end at alpha = 0."""
    for law in (VPSDE(), FlowSDE()):
        errors = []
        for steps in (20, 40, 80):
            knots = ascending_knots(law, Blended(mix=0.3), steps)
            if law.drift_t_max < law.t_max:
                knots = (*knots, law.knot(law.t_max))
            at = [float(Angle(sigma_data).of(k)) for k in knots]
            got = sum(w * math.sin(2 * u) for w, u in zip(quadrature(knots, sigma_data), at, strict=True))
            errors.append(abs(got - (math.cos(2 * at[0]) - math.cos(2 * at[-1])) / 2))
        assert errors[1] < errors[0] / 10 and errors[2] < max(errors[1] / 10, 1e-6), errors


def test_traces_are_taken_in_the_solvers_calls_and_never_outside():
    """33 calls for 32 steps, every knot once; t within [t_min, t_max]; coarser runs add 17 and 9; the prior one."""
    data = spectrum(20)
    x = data.sample(2, torch.Generator().manual_seed(1), torch.float64)
    for law, joint in ((VPSDE(), 33), (FlowSDE(), 34)):
        log = []
        rev = Logged(data.reverse(law), log)
        start = x * law.alpha(law.t_min)
        result = log_likelihood(rev, start, steps=32, num_probes=1, doubling=False, rng=0)
        assert len(log) == int(result.nfe[0]) == joint + (law.alpha(law.t_max) > 0)
        times = [t for row in log for t in row[1:]]
        assert min(times) == law.t_min and max(times) == law.t_max
        assert int(result.vjps[0]) == joint
        del log[:]
        result = log_likelihood(rev, start, steps=32, num_probes=3, rng=0)
        assert len(log) == int(result.nfe[0]) and int(result.vjps[0]) == 4 * joint + (joint - 16) + (joint - 24)


def test_trajectory_first_gives_the_same():
    """The divergence after the trajectory, knots in one batch or one by one: same states, same probes, same value."""
    data = spectrum(20)
    rev = data.reverse(VPSDE())
    x = data.sample(3, torch.Generator().manual_seed(1), torch.float64)
    options = {"steps": 16, "solver": DDIM(), "rng": [5, 6, 7]}
    want = log_likelihood(rev, x, **options)
    for rows in (1, 7, 1000):
        got = log_likelihood(rev, x, joint=False, batch_rows=rows, **options)
        torch.testing.assert_close(got.log_prob, want.log_prob, rtol=1e-10, atol=1e-8)
        torch.testing.assert_close(got.trace_se, want.trace_se)
    calls = []
    log_likelihood(Logged(rev, calls), x, joint=False, batch_rows=1000, doubling=False, **options)
    assert len(calls) == 16 + 1 + 1 and max(rows for rows, _, _ in calls) == 3 * 17


@pytest.mark.parametrize("solver", [DDIM(), Heun(), RK4("rk4", "angle")], ids=lambda s: type(s).__name__)
def test_any_deterministic_solver_follows_the_trajectory(solver):
    data = mixture((6,))
    sde = VPSDE()
    x = data.sample(4, torch.Generator().manual_seed(1), torch.float64)
    exact = data.log_prob(x, sde.knot(sde.t_min))
    prior = {"prior": lambda z: data.log_prob(z, sde.knot(sde.t_max))}
    errors = []
    for steps in (64, 256):
        got = log_likelihood(data.reverse(sde), x, steps=steps, solver=solver, divergence="exact", **prior)
        errors.append(float((got.log_prob - exact).abs().mean()))
    order = math.log(errors[0] / errors[1]) / math.log(4)
    assert order > 0.8 * min(solver.order, 3), (errors, order)


def test_a_sample_does_not_know_its_batch_mates_on_fixed_steps_either():
    """Alone, with others, and with a hard sample: the same to rounding, probes and error bars included."""
    data = GaussianMixture(torch.randn(4, 20, generator=torch.Generator().manual_seed(0)), std=0.3)
    rev = data.reverse(VPSDE())
    x = data.sample(5, torch.Generator().manual_seed(0), torch.float64)
    seeds = [11, 12, 13, 14, 15, 99]
    together = log_likelihood(rev, torch.cat([x, torch.full((1, 20), 30.0, dtype=torch.float64)]), steps=16, rng=seeds)
    more = together.refine(target_se=0.2)
    for i in range(5):
        alone = log_likelihood(rev, x[i : i + 1], steps=16, rng=[seeds[i]])
        for name in ("log_prob", "trace_se", "discretization", "truncation", "prior_mismatch"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[i], rtol=1e-9, atol=1e-9)
        alone = alone.refine(target_se=0.2)
        torch.testing.assert_close(alone.log_prob[0], more.log_prob[i], rtol=1e-9, atol=1e-9)
        assert alone.vjps[0] == more.vjps[i]


# --- the error bars --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"steps": 16}, {"tol": 1e-2, "doubling": False}], ids=["fixed", "adaptive"])
def test_hutchinson_is_unbiased_and_its_bar_covers(options):
    """200 seeds: the mean within 3 standard errors; the reported standard error within 20 % of the true spread, in the
    mean square; the 90 % bars cover 90 % within three binomial standard deviations."""
    data = spectrum(24)
    rev = data.reverse(VPSDE())
    x = data.sample(1, torch.Generator().manual_seed(3), torch.float64)
    exact = log_likelihood(rev, x, divergence="exact", **options).log_prob
    n = 200
    many = log_likelihood(
        rev, x.expand(n, -1), divergence="hutchinson", num_probes=6, rng=list(range(n)), **options
    )
    error = many.log_prob - exact
    assert abs(error.mean()) < 3 * error.std() / math.sqrt(n)
    assert abs(float(many.trace_se.square().mean().sqrt() / error.std()) - 1) < 0.2
    covered = (error.abs() < many.trace_bar(0.9)).double().mean()
    assert abs(covered - 0.9) < 3 * math.sqrt(0.09 / n), covered


def test_fresh_probes_leave_less_noise_than_kept_ones():
    """Same number of products: the variance of the sum over knots is a fraction of that of one probe for all."""
    data = spectrum(24)
    rev = data.reverse(VPSDE())
    x = data.sample(1, torch.Generator().manual_seed(3), torch.float64).expand(200, -1)
    options = {"divergence": "hutchinson", "num_probes": 1, "rng": list(range(200)), "doubling": False}
    fresh = log_likelihood(rev, x, steps=32, **options).log_prob
    kept = log_likelihood(rev, x, tol=1e-2, **options).log_prob
    assert fresh.var() < kept.var() / 3


@pytest.mark.parametrize("law", ["vp", "ve", "flow"])
def test_the_discretization_bar_covers(law):
    """Three times the reported change covers the error in at least 97 % of 300 samples (minus three binomial standard
    deviations), at several numbers of steps, some of them too few, whether they are flagged or not."""
    sde = LAWS[law]
    means = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    data = GaussianMixture(means, std=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    x = data.sample(300, torch.Generator().manual_seed(1), torch.float64) * sde.alpha(sde.t_min)
    exact = data.log_prob(x, sde.knot(sde.t_min))
    options = {"divergence": "exact", "prior": lambda z: data.log_prob(z, sde.knot(sde.t_max))}
    for steps in (8, 12, 16, 32, 64):
        result = log_likelihood(data.reverse(sde), x, steps=steps, **options)
        settled = result.status == Status.OK
        error = (result.log_prob - exact).abs()
        covered = (error <= 3 * result.discretization + 1e-9).double().mean()
        assert covered > 0.97 - 3 * math.sqrt(0.03 * 0.97 / 300), (steps, covered)
        if steps >= 32:  # and it is a bar, not a blanket: the size of the error of half the steps
            half = log_likelihood(data.reverse(sde), x, steps=steps // 2, doubling=False, **options)
            assert 0.5 < float(((half.log_prob - exact).abs() / result.discretization).median()) < 2.0
            assert settled.double().mean() > (0.9 if steps == 64 else 0.5)
    adaptive = log_likelihood(data.reverse(sde), x[:50], tol=1e-3, **options)
    assert ((adaptive.log_prob - exact[:50]).abs() <= 3 * adaptive.discretization + 1e-9).double().mean() > 0.9


def test_the_last_step_of_the_flow_is_in_the_bar():
    """From t = 0.999 to alpha = 0 no knot can be left out. Data 100 times as wide as `sigma_data`, whose score turns
    there: an Euler step is off by 4e-2 nats, and a bar from the knots before says 1e-5."""
    sde, data = FlowSDE(), GaussianMixture(torch.zeros(1, 8), std=100.0)
    x = data.sample(50, torch.Generator().manual_seed(0), torch.float64) * sde.alpha(sde.t_min)
    result = log_likelihood(data.reverse(sde), x, steps=128, divergence="exact")
    error = (result.log_prob - data.log_prob(x, sde.knot(sde.t_min))).abs()
    assert float(error.max()) < 1e-3 and bool((error < 3 * result.discretization).all())
    assert 1e-3 < float(result.discretization.max()) < 0.1


@pytest.mark.parametrize("law", ["vp", "ve", "flow"])
@pytest.mark.parametrize("options", [{"tol": 1e-5}, {"steps": 64, "divergence": "exact"}], ids=["adaptive", "fixed"])
def test_truncation_leads_to_the_density_of_the_data(law, options):
    """The first-order term: what is left after it falls with the square of the noise variance at t_min."""
    data = GaussianMixture(torch.randn(3, 4, generator=torch.Generator().manual_seed(4)), std=[0.3, 0.4, 0.5])
    raw, left = [], []
    # the first order is that of sigma^2, and of sigma on the flow, where 1 - alpha = sigma
    power = 1 if law == "flow" else 2
    for half_log_snr in (3.5, 4.5):
        base = LAWS[law]
        sde = type(base)(t_min=base.time_at(half_log_snr))
        x = data.sample(40, torch.Generator().manual_seed(1), torch.float64)
        given = {"prior": lambda z, s=sde: data.log_prob(z, s.knot(s.t_max)), **options}
        result = log_likelihood(data.reverse(sde), x, **given)
        fixed = log_likelihood(data.reverse(sde), x, correct=["truncation"], **given)
        torch.testing.assert_close(fixed.log_prob, result.log_prob + result.truncation)
        difference = data.log_prob(x) - data.log_prob(x, sde.knot(sde.t_min))
        solved = data.log_prob(x, sde.knot(sde.t_min)) + (fixed.log_prob - result.log_prob)
        raw.append(float(difference.square().mean().sqrt()))
        left.append(float((solved - data.log_prob(x)).square().mean().sqrt()))
        assert (difference.abs() <= 1.5 * result.truncation.abs() + 1e-4).double().mean() > 0.9
    assert raw[1] < 1.3 * raw[0] * math.exp(-power), raw
    assert left[1] < 1.3 * left[0] * math.exp(-2 * power) and left[0] < raw[0] / 3, left


@pytest.mark.parametrize("law", ["vp", "sub_vp", "ve", "edm"])
@pytest.mark.parametrize("options", [{"tol": 1e-4}, {"steps": 64, "divergence": "exact"}], ids=["adaptive", "fixed"])
def test_prior_mismatch_leads_to_the_exact_terminal_density(law, options):
    """Per sample, to a hundredth of itself, for data with a mean of their own."""
    sde, data = LAWS[law], mixture((3,))
    x = data.sample(20, torch.Generator().manual_seed(1), torch.float64)
    result = log_likelihood(data.reverse(sde), x, **options)
    want = data.log_prob(result.latent, sde.knot(sde.t_max)) - sde.prior_logp(result.latent)
    torch.testing.assert_close(result.prior_mismatch, want, rtol=0.02, atol=0.01 * float(want.abs().mean()))
    corrected = log_likelihood(data.reverse(sde), x, correct=["prior"], **options)
    torch.testing.assert_close(corrected.log_prob, result.log_prob + result.prior_mismatch)
    # the bound on what it leaves: not less than is left, and small beside the term itself (log p scatters by 1e-4)
    left = (want - result.prior_mismatch).abs()
    assert bool((left <= corrected.remainder + 1e-9).all()) and not result.remainder.any()
    assert float(corrected.remainder.mean()) < 0.05 * float(want.abs().mean())


CLUSTERS = GaussianMixture(
    torch.randn(6, 8, generator=torch.Generator().manual_seed(4)), std=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
)


@pytest.mark.parametrize("law", [VESDE(0.05, 5.0), VPSDE(beta_max=8.0, t_min=0.01)], ids=["ve", "vp"])
def test_the_bar_covers_what_corrections_leave(law):
    """Ends with a large mismatch and truncation (0.1 to 0.4 nats): the terms are biases, so the error is about their
    size, and a bar of their size covers half of the samples. Corrected, the bar covers the density at t_min, and the
    one at t = 0; uncorrected, it covers the ODE's own density."""
    x = CLUSTERS.sample(200, torch.Generator().manual_seed(0), torch.float64)
    rev, options = CLUSTERS.reverse(law), {"steps": 64, "divergence": "exact"}
    at_min, at_0 = CLUSTERS.log_prob(x, law.knot(law.t_min)), CLUSTERS.log_prob(x)
    raw = log_likelihood(rev, x, **options)
    ode = log_likelihood(rev, x, tol=1e-7, doubling=False).log_prob
    assert float(((raw.log_prob - ode).abs() <= raw.error()).double().mean()) >= 0.97
    torch.testing.assert_close(raw.bias, raw.truncation + raw.prior_mismatch)
    as_bars = (raw.log_prob - at_min).abs() <= raw.prior_mismatch.abs()
    assert 0.3 < float(as_bars.double().mean()) < 0.8
    assert not raw.remainder.any()
    for correct, truth in ((["prior"], at_min), (["prior", "truncation"], at_0)):
        result = log_likelihood(rev, x, correct=correct, **options)
        error, bar = (result.log_prob - truth).abs(), result.error()
        assert float((error <= bar).double().mean()) >= 0.95
        # and not by being long: about what it replaces, squared
        assert float(error.median()) < float(bar.median()) < 0.5 * float((raw.log_prob - truth).abs().median())
        one = "prior" not in correct or len(correct) == 1
        assert torch.equal(result.nfe - raw.nfe, torch.full_like(raw.nfe, 3 if one else 6))
        left = torch.zeros_like(raw.bias) if not one else raw.truncation
        torch.testing.assert_close(result.bias, left)


def test_one_bar_for_everything():
    data = mixture((6,))
    x = data.sample(40, torch.Generator().manual_seed(1), torch.float64)
    options = {"divergence": "hutchinson", "steps": 32, "num_probes": 4, "correct": ["truncation", "prior"]}
    result = log_likelihood(data.reverse(VESDE()), x, rng=0, **options)
    z = (result.log_prob - data.log_prob(x)).abs() / result.error(0.95)
    assert (z < 1).double().mean() > 0.9
    assert (result.trace_bar(0.99) > result.trace_bar(0.9)).all()
    with pytest.raises(ValueError, match="confidence"):
        result.trace_bar(95)


def test_corrections_take_one_seed_per_sample():
    """In more dimensions than have an exact trace, where what is left of the prior's term has probes of its own, too: a
    sample is the same alone and among others."""
    data = mixture((5, 5))
    x = data.sample(3, torch.Generator().manual_seed(1), torch.float64)
    options = {"steps": 8, "correct": ["prior", "truncation"]}
    together = log_likelihood(data.reverse(VPSDE()), x, rng=[4, 5, 6], **options)
    alone = log_likelihood(data.reverse(VPSDE()), x[1:2], rng=[5], **options)
    assert bool((together.remainder > 0).all())
    torch.testing.assert_close(alone.remainder, together.remainder[1:2])


def test_the_adaptive_tolerance_is_that_of_log_p():
    """A linear score that ripples in lambda, so that log p is an integral over lambda known to 1e-9: the errors of some
    hundred steps add up to 2 to 13 times the tolerance of one, while the result is within the one asked for."""
    sde = VPSDE(t_min=1e-4)

    def noise(x, t):
        knot = sde.knot(t, ndim=x.ndim)
        return knot.sigma * x * (1.0 + 0.5 * torch.sin(20.0 * knot.half_log_snr) ** 3)

    first, last = sde.knot(sde.t_min), sde.knot(sde.t_max)
    lam = torch.linspace(float(last.half_log_snr), float(first.half_log_snr), 200001, dtype=torch.float64)
    # y = x / alpha grows by dlog y = -sigma eps / x dlambda
    rate = torch.sigmoid(-2.0 * lam) * (1.0 + 0.5 * torch.sin(20.0 * lam) ** 3)
    growth = float(torch.trapezoid(rate, lam)) + math.log(float(last.alpha) / float(first.alpha))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = sde.prior_logp(x * math.exp(growth)) + 4 * growth
    for tol in (0.1, 0.01):
        result = log_likelihood(sde.reverse(noise=noise), x, tol=tol)
        per_step = log_likelihood(sde.reverse(noise=noise), x, tol=tol, doubling=False)
        error = (result.log_prob - exact).abs()
        assert result.ok and float(error.max()) < tol and bool((error < 3 * result.discretization).all())
        assert float((per_step.log_prob - exact).abs().max()) > 2 * tol
    # where a finer run gives up, what is known is given, and flagged
    short = log_likelihood(sde.reverse(noise=noise), x, tol=0.1, max_steps=100)
    flagged = short.status == Status.NOT_CONVERGED
    assert bool(flagged.any()) and bool((short.discretization[flagged] > 0.4).all())
    assert bool(short.log_prob[flagged].isfinite().all()) and short.message


@pytest.mark.parametrize("law", ["vp", "ve", "flow"])
def test_samples_are_flagged_by_the_size_of_the_bar(law):
    """Sixteen steps are few for these data: of the samples that are not flagged at most 1 % (3 binomial standard
    deviations above it) are off by more than 0.1 bits/dim, and the worst of all is flagged. Whether two halvings shrink
    says less: 1 to 3 % of those that passed were off by more, and under VP the worst passed."""
    sde = LAWS[law]
    x = CLUSTERS.sample(300, torch.Generator().manual_seed(1), torch.float64) * sde.alpha(sde.t_min)
    options = {"divergence": "exact", "prior": lambda z: CLUSTERS.log_prob(z, sde.knot(sde.t_max))}
    result = log_likelihood(CLUSTERS.reverse(sde), x, steps=16, **options)
    error = (result.log_prob - CLUSTERS.log_prob(x, sde.knot(sde.t_min))).abs()
    passed, limit = result.status == Status.OK, 0.1 * 8 * math.log(2.0)
    assert torch.equal(passed, 3 * result.discretization <= limit + result.precision)
    missed = (passed & (error > limit)).double().mean()
    assert float(missed) < 0.01 + 3 * math.sqrt(0.01 / 300) and not bool(passed[error.argmax()])


def test_precision_bar_covers_float32():
    """D = 16, float32 state and score, on fixed steps: the difference to float64 is below twice the
    reported size, and that is no blanket: below 1e-3 nats."""
    data = mixture((16,))
    rev = data.reverse(VPSDE())
    x = data.sample(40, torch.Generator().manual_seed(0), torch.float32)
    single = log_likelihood(rev, x, steps=32, divergence="exact")
    double = log_likelihood(rev, x.double(), steps=32, divergence="exact")
    assert (single.log_prob - double.log_prob).abs().median() < 2 * single.precision[0] < 2e-3
    assert double.precision[0] < 1e-13


def test_few_probes_say_that_they_tell_nothing():
    """Two kept probes agree in half of the cases where two elements are coupled: there is no bar, and a sentence says
    why; six agree in 3 % of them, and 95 % bars cover within three binomial standard deviations of 97 %."""
    coupled = VPSDE().reverse(noise=lambda x, t: x.flip(1))
    x = torch.zeros(400, 2, dtype=torch.float64)
    options = {"divergence": "hutchinson", "tol": 0.1, "doubling": False, "rng": 0}
    two, six = log_likelihood(coupled, x, num_probes=2, **options), log_likelihood(coupled, x, **options)
    exact = log_likelihood(coupled, x[:1], divergence="exact", tol=0.1, doubling=False).log_prob
    assert two.trace_se.isnan().all() and two.error().isnan().all() and two.ok and "num_probes=6" in two.message
    covered = ((six.log_prob - exact).abs() <= six.trace_bar()).double().mean()
    assert six.message == "" and abs(float(covered) - 0.97) < 3 * math.sqrt(0.03 * 0.97 / 400)
    one = log_likelihood(coupled, x[:1], steps=8, num_probes=1, divergence="hutchinson", rng=0)
    assert one.trace_se.isnan().all() and "num_probes=2" in one.message and one.message in str(one)
    more = one.refine(num_probes=1)
    assert not more.trace_se.isnan().any() and "num_probes" not in more.message


def test_print_says_what_it_is_and_how_far_off(capsys):
    data = mixture((6,))
    x = data.sample(4, torch.Generator().manual_seed(1), torch.float64)
    rev = data.reverse(VPSDE())
    result = log_likelihood(rev, x, steps=32, divergence="hutchinson", rng=0, progress=True)
    bar = capsys.readouterr().err
    assert f"{int(result.nfe[0])}call" in bar
    text = str(result)
    assert "4 samples in 6 dimensions" in text and "density at t = 0.001" in text and len(text.splitlines()) <= 6
    for cause in ("trace", "discretization", "precision", "truncation", "prior mismatch"):
        assert cause in text
    both = str(log_likelihood(rev, x[:1], steps=32, correct=["truncation", "prior"], rng=0))
    assert "1 sample in" in both and "density at t = 0 " in both and "not added" not in both
    assert capsys.readouterr().err == ""


# --- refine ----------------------------------------------------------------------------------------------------------


def test_refine_halves_the_error_without_solving_again():
    data = spectrum(24)
    log = []
    rev = Logged(data.reverse(VPSDE()), log)
    x = data.sample(30, torch.Generator().manual_seed(3), torch.float64)
    first = log_likelihood(rev, x, steps=16, num_probes=4, rng=0)
    exact = log_likelihood(rev, x, steps=16, divergence="exact")
    del log[:]
    finer = first.refine(num_probes=12)
    assert len(log) == 17 and int(finer.nfe[0]) == int(first.nfe[0]) + 17  # one call per knot, none of a solver
    assert abs(float((finer.trace_se / first.trace_se).square().mean().sqrt()) - 0.5) < 0.1
    z = (finer.log_prob - exact.log_prob) / finer.trace_se
    assert 0.5 < float(z.square().mean()) < 2.0
    once = log_likelihood(rev, x, steps=16, num_probes=16, rng=list(range(30)))
    twice = log_likelihood(rev, x, steps=16, num_probes=4, rng=list(range(30))).refine(num_probes=12)
    torch.testing.assert_close(once.log_prob, twice.log_prob)  # the same estimates, pooled
    # their scatter within and between the calls
    torch.testing.assert_close(once.trace_se, twice.trace_se, rtol=0.2, atol=0.0)
    assert float((first.log_prob - finer.log_prob).abs().max()) > 0  # and the first is left as it was


def test_refine_reaches_a_target_and_turns_exact_where_that_is_cheaper():
    data = spectrum(24)
    rev = data.reverse(VPSDE())
    x = data.sample(10, torch.Generator().manual_seed(3), torch.float64)
    first = log_likelihood(rev, x, steps=16, num_probes=2, rng=0)
    target = float(first.trace_se.median()) / 1.5
    near = first.refine(target_se=target)
    assert float(near.trace_se.square().mean().sqrt()) < target and (near.trace_se < 1.2 * target).all()
    assert (near.vjps < 17 * 30).all() and not near.refine(num_probes=1).trace_se.isnan().any()
    exact = log_likelihood(rev, x, steps=16, divergence="exact")
    sharp = log_likelihood(rev, x, steps=16, num_probes=2, rng=0, target_se=1e-4)
    assert (sharp.trace_se == 0).all() and torch.isinf(sharp.trace_dof).all()
    torch.testing.assert_close(sharp.log_prob, exact.log_prob)
    assert (sharp.refine(num_probes=3).vjps == sharp.vjps).all()  # nothing to add


# --- gradients, failures, arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_gradients_with_respect_to_x_and_to_parameters(divergence):
    """d log p / dx is the score; d log p / d(std) of a Gaussian is known."""
    sde = VPSDE()
    std = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def noise(x, t):
        k = sde.knot(t, ndim=x.ndim)
        return k.sigma / (k.alpha**2 * std**2 + k.sigma**2) * x

    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    result = log_likelihood(
        sde.reverse(noise=noise), x, steps=48, divergence=divergence, differentiable=True, doubling=False, rng=0
    )
    got_x, got_std = torch.autograd.grad(result.log_prob.sum(), (x, std))
    k = sde.knot(sde.t_min)
    variance = k.alpha**2 * 0.36 + k.sigma**2
    torch.testing.assert_close(got_x, -x.detach() / variance, rtol=1e-3, atol=1e-4)
    want = (x.detach().square() / variance - 1).sum() / variance * k.alpha**2 * 0.6
    torch.testing.assert_close(got_std, want, rtol=1e-3, atol=1e-3)


def test_a_network_whose_steps_do_not_settle_says_so():
    """Scores that oscillate fast in time, each sample's at a frequency of its own: every sample changes by nats between
    N / 2 and N steps, and the status says it, also where it changed by more before, by chance."""
    sde = VPSDE()

    def rough(x, t, frequency):
        return x * torch.sin(frequency * t)[:, None]

    x = torch.randn(60, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frequency = torch.linspace(3000.0, 6000.0, 60, dtype=torch.float64)
    options = {"divergence": "exact", "condition": {"frequency": frequency}}
    result = log_likelihood(sde.reverse(noise=rough), x, steps=16, **options)
    assert bool((result.status == Status.NOT_CONVERGED).all())
    assert "NOT_CONVERGED" in result.message and "more steps" in result.message
    assert not result.ok and torch.isfinite(result.log_prob).all()


def test_a_failing_sample_on_fixed_steps_costs_itself_only():
    def broken(v, t):
        return torch.where((t[:, None] > 0.5) & (v.sum(1, keepdim=True) > 0), math.nan, -v)

    x = torch.tensor([[0.5, 0.1], [-0.5, -0.1]], dtype=torch.float64)
    result = log_likelihood(VPSDE().reverse(score=broken), x, steps=32, divergence="exact")
    assert result.status[0] == Status.NON_FINITE and result.status[1] != Status.NON_FINITE
    assert math.isnan(result.log_prob[0]) and math.isfinite(result.log_prob[1])
    assert "sample 0" in result.message and "t = 0.5" in result.message


def test_what_did_not_settle_is_not_said_to_have_failed_and_hides_no_failure():
    def rough(v, t, factor):
        return v * (factor * torch.sin(4000.0 * t))[:, None]

    x, factor = torch.ones(2, 20, dtype=torch.float64), torch.tensor([1.0, math.nan], dtype=torch.float64)
    rev, options = VPSDE().reverse(noise=rough), {"steps": 16, "divergence": "hutchinson", "num_probes": 1}
    both = log_likelihood(rev, x, rng=[0, 1], condition={"factor": factor}, **options)
    assert both.status.tolist() == [Status.NOT_CONVERGED, Status.NON_FINITE]
    assert both.message.startswith("sample 1 failed at t = ") and "(NON_FINITE)" in both.message
    assert ". One probe per knot" in both.message
    one = log_likelihood(rev, x[:1], rng=[0], condition={"factor": factor[:1]}, **options)
    assert one.message.startswith("sample 0 (NOT_CONVERGED)")


def test_a_known_terminal_density_is_not_said_to_be_taken_for_the_prior():
    sde, data = VPSDE(), GaussianMixture([[0.5, 0.0]], std=0.5)
    x = torch.zeros(2, 2, dtype=torch.float64)
    known = log_likelihood(data.reverse(sde), x, prior=lambda z: data.log_prob(z, sde.knot(sde.t_max)))
    guessed = log_likelihood(data.reverse(sde), x)
    assert "taken for the prior" in str(guessed) and "prior mismatch" in str(guessed)
    assert "prior" not in str(known)


def test_a_device_that_is_too_small_says_what_to_change():
    def hungry(v, t):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    with pytest.raises(MemoryError, match="batch_rows"):
        log_likelihood(VPSDE().reverse(score=hungry), torch.zeros(2, 20), steps=8)


@pytest.mark.gpu
def test_tf32_is_as_asked_and_as_it_was(device):
    seen = []

    def score(v, t):
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return -v

    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for tf32, precision in ((False, "highest"), (True, "high")):
        result = log_likelihood(VPSDE().reverse(score=score), torch.zeros(2, 20, device=device), steps=8, tf32=tf32)
        assert seen[-1] == (tf32, precision)
        assert (result.precision > 1e-3).all() == tf32
    assert before == (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())


def test_without_the_check_nothing_is_looked_at():
    data = mixture((6,))
    x = data.sample(4, torch.Generator().manual_seed(1), torch.float64)
    options = {"steps": 16, "rng": [1, 2, 3, 4], "divergence": "hutchinson"}
    plain = log_likelihood(data.reverse(VPSDE()), x, **options)
    fast = log_likelihood(data.reverse(VPSDE()), x, check=False, **options)
    torch.testing.assert_close(plain.log_prob, fast.log_prob)


@pytest.mark.gpu
def test_fixed_steps_do_not_wait_for_the_device(device):
    """CUDA raises at any synchronisation while this runs; and the whole of it is captured as a graph."""
    data = GaussianMixture(torch.randn(4, 3, 8, 8), std=0.3)
    rev = data.reverse(VPSDE())
    x = data.sample(8, torch.Generator().manual_seed(0)).to(device)
    options = {"steps": 16, "rng": list(range(8)), "check": False, "divergence": "hutchinson"}
    want = log_likelihood(rev, x, **options).log_prob
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = log_likelihood(rev, x, **options).log_prob
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = log_likelihood(rev, x, **options).log_prob
    graph.replay()
    torch.testing.assert_close(captured, want)


def test_bad_arguments_are_refused():
    rev = GaussianMixture([[0.0]], std=1.0).reverse(VPSDE())
    x = torch.zeros(2, 1)
    for options, message in (
        ({"divergence": "exat"}, "exact"),
        ({"num_probes": 0}, "num_probes"),
        ({"probes": "cauchy"}, "Unknown probe"),
        ({"tol": 0.0}, "tol"),
        ({"steps": 32, "tol": 1e-3}, "not both"),
        ({"steps": 30}, "multiple of 4"),
        ({"steps": 2, "doubling": False}, "steps"),
        ({"tol": 1e-3, "target_se": 0.1}, "fixed steps"),
        ({"tol": 1e-3, "differentiable": True}, "fixed steps"),
        ({"steps": 8, "solver": EulerMaruyama()}, "deterministic"),
        ({"steps": 8, "solver": Heun(), "joint": True}, "joint=False"),
        ({"correct": ["trunc"]}, "truncation"),
        ({"correct": "truncation"}, "collection"),
        ({"correct": None}, "collection"),
        ({"sigma_data": 0.0}, "sigma_data"),
        ({"max_steps": 0}, "max_steps"),
        ({"batch_rows": 0}, "batch_rows"),
        ({"prior": lambda z: z}, r"tensor of shape \(2,\), got shape \(2, 1\)"),
        ({"prior": lambda z: 0.0}, "got float"),
    ):
        with pytest.raises(ValueError, match=message):
            log_likelihood(rev, x, **options)
    with pytest.raises(TypeError, match="`prior` must be a function"):
        log_likelihood(rev, x, prior=3)
    with pytest.raises(ValueError, match="NaN"):
        log_likelihood(rev, torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="chain"):
        log_likelihood(GaussianMixture([[0.0]], std=1.0).reverse(VPSDE().discretize(50)), x)
    with pytest.raises(ValueError, match="seed per sample"):
        log_likelihood(rev, x, divergence="hutchinson", rng=PerSample([1]))
    with pytest.raises(TypeError, match="ReverseSDE"):
        log_likelihood(lambda v, t: v, x)
    result = log_likelihood(rev, x, tol=1e-3)
    with pytest.raises(ValueError, match="fixed steps"):
        result.refine(num_probes=2)
    with pytest.raises(ValueError, match="num_probes"):
        result.refine()
