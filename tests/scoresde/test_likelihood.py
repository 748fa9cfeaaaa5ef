"""log p against closed forms, the divergence against autograd, bits/dim against enumeration."""

import math

import numpy as np
import pytest
import torch

from scoresde import (
    SDES,
    VPSDE,
    ClassifierFreeGuidance,
    DataSpec,
    GaussianMixture,
    ScoreModel,
    bits_per_dim,
    log_likelihood,
)
from scoresde.likelihood.divergence import divergence, make_probes
from sde_lib import PARAMETERIZATIONS
from solvers import PerSample, Status


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
        rtol=1e-8,
        atol=1e-8,
        atol_nats=1e-8,
        prior=lambda z: data.log_prob(z, sde.knot(sde.t_max)),
    )
    exact = data.log_prob(x, sde.knot(sde.t_min))
    torch.testing.assert_close(result.log_prob, exact, rtol=0, atol=1e-6)
    assert result.ok and (result.trace_se == 0).all()


def test_the_standard_priors_mismatch_is_what_it_should_be():
    """With the default prior the difference from the exact density is log N(x_T; 0, I) - log p_T(x_T), no more."""
    sde, data = VPSDE(), mixture()
    x = data.sample(12, torch.Generator().manual_seed(1), torch.float64)
    options = {"rtol": 1e-8, "atol": 1e-8, "atol_nats": 1e-8}
    standard = log_likelihood(data.reverse(sde), x, **options)
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


def test_hutchinson_is_unbiased_and_its_standard_error_is_honest():
    """200 seeds: z-scores of the mean within 4, mean square of (estimate - exact) / reported within 25 % of one."""
    data = mixture((6,))
    rev = data.reverse(VPSDE())
    x = data.sample(1, torch.Generator().manual_seed(3), torch.float64)
    exact = log_likelihood(rev, x, divergence="exact", rtol=1e-4, atol=1e-4).log_prob
    n, probes = 200, 16
    many = log_likelihood(
        rev, x.expand(n, -1), divergence="hutchinson", probes=probes, rng=list(range(n)), rtol=1e-4, atol=1e-4
    )
    error = many.log_prob - exact
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(n)
    # a t-distributed ratio: E[z^2] = (k - 1) / (k - 3) = 1.15 for k = 16 probes; its own error over 200 is 0.13
    ratio = float((error / many.trace_se).square().mean())
    assert 0.75 < ratio < 1.6


def test_gaussian_probes_are_unbiased_too_and_noisier():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, generator=generator, dtype=torch.float64) + 3 * torch.eye(5)
    x = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    z = torch.randn(1, 4000, 5, generator=generator, dtype=torch.float64)
    s = (a + a.T) / 2
    expected = {"gaussian": 2 * s.square().sum(), "rademacher": 2 * (s.square().sum() - s.diagonal().square().sum())}
    for kind, variance in expected.items():
        value, div = divergence(lambda v: v @ a.T, x, make_probes(z, kind))
        torch.testing.assert_close(value, x @ a.T)
        assert abs(div.mean() - a.trace()) < 4 * math.sqrt(variance / 4000)
        assert abs(div.var() / variance - 1) < 0.2  # 4000 draws: about 5 % standard error (kurtosis included)


def test_exact_divergence_is_the_trace_of_the_jacobian():
    def fn(v):
        return torch.sin(v) * v.roll(1, -1) + v.sum(-1, keepdim=True) ** 2

    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, div = divergence(fn, x)
    for i in range(3):
        jacobian = torch.func.jacrev(lambda v: fn(v[None])[0])(x[i]).reshape(8, 8)
        torch.testing.assert_close(div[i, 0], jacobian.trace())


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
    options = {"rtol": 1e-9, "atol": 1e-9, "atol_nats": 1e-9}
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
    result = log_likelihood(data.reverse(sde), x, divergence="exact", rtol=1e-8, atol=1e-8, atol_nats=1e-7)
    exact = torch.from_numpy(z[f"gauss_{name}/logp_ode_exact"])
    torch.testing.assert_close(result.log_prob, exact, rtol=1e-6, atol=1e-4)


class Exact(torch.nn.Module):
    """A 'network' that knows the score: what a trained one would be at best."""

    def __init__(self, data, law, sigma_data):
        super().__init__()
        self.data, self.law, self.sigma_data = data, law, sigma_data

    def forward(self, x, label, class_label=None):
        return self.data.reverse(self.law)(x, self.law.knot(label, ndim=x.ndim)).v


def test_bits_per_dim_of_a_known_discrete_law_bounds_its_entropy():
    """All 16 levels of a one-dimensional law: the bound is above the cross entropy, and within its own noise of the
    exact expectation E_u[-log p(k + u)], computed by quadrature of the known density."""
    levels = 16
    spec = DataSpec.integers((1,), levels)
    # a density on the line: mixture in model units; P(k) is its mass of the bin, renormalised over the range
    data = GaussianMixture([[-0.4], [0.5]], std=[0.15, 0.1], weights=[0.6, 0.4])
    sde = VPSDE(t_min=1e-4)
    model = ScoreModel(Exact(data, sde, 1.0), sde, "v", "time", spec, sigma_data=1.0, input_scaling="none")
    counts = torch.arange(levels)[:, None]
    result = bits_per_dim(model, counts, samples=64, rtol=1e-6, atol=1e-6)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    z = (counts.double() + u - spec.shift) / spec.scale
    knot = sde.knot(sde.t_min)
    log_p = data.log_prob(z.reshape(-1, 1), knot).reshape(levels, -1) - math.log(spec.scale)
    expected = -log_p.mean(1) / math.log(2)
    spread = log_p.std(1) / math.log(2) / math.sqrt(64)
    assert ((result.per_sample - expected).abs() < 4.5 * spread + 1e-4).all()
    mass = log_p.exp().mean(1)
    assert (result.per_sample > -mass.log2() - 4.5 * spread - 1e-4).all()  # Jensen, bin by bin
    weighted = float((mass * result.per_sample).sum() / mass.sum())
    entropy = float(-(mass * mass.log2()).sum() / mass.sum())
    assert entropy < weighted < entropy + 0.15
    assert "16 levels" in result.what and result.standard_error > 0


def test_bits_per_dim_does_not_depend_on_the_batch_size_and_repeats():
    spec = DataSpec.integers((2,), 5)
    data = GaussianMixture([[-0.4, 0.1], [0.5, 0.2]], std=[0.3, 0.2])
    sde = VPSDE()
    model = ScoreModel(Exact(data, sde, 1.0).double(), sde, "v", "time", spec, 1.0, "none")
    counts = torch.randint(0, 5, (7, 2), generator=torch.Generator().manual_seed(0))
    first = bits_per_dim(model, counts, batch_size=7, divergence="hutchinson", seed=3)
    second = bits_per_dim(model, counts, batch_size=2, divergence="hutchinson", seed=3)
    torch.testing.assert_close(first.per_sample, second.per_sample, rtol=0, atol=1e-5)
    assert not torch.equal(first.per_sample, bits_per_dim(model, counts, divergence="hutchinson", seed=4).per_sample)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.rand(4, 2), "integers"),
        (torch.full((4, 2), 7), "0 … 4"),
        (torch.zeros(4, 3, dtype=torch.int64), "shape"),
        (torch.tensor([[math.nan, 0.0]]), "NaN"),
        (torch.zeros(0, 2, dtype=torch.int64), "empty"),
    ],
)
def test_bad_data_is_refused(data, message):
    spec = DataSpec.integers((2,), 5)
    sde = VPSDE()
    model = ScoreModel(Exact(GaussianMixture([[0.0, 0.0]], std=1.0), sde, 1.0), sde, "v", "time", spec, 1.0, "none")
    with pytest.raises(ValueError, match=message):
        bits_per_dim(model, data)


def test_bad_arguments_are_refused():
    rev = GaussianMixture([[0.0]], std=1.0).reverse(VPSDE())
    x = torch.zeros(2, 1)
    cauchy = {"probe": "cauchy", "divergence": "hutchinson"}
    for options in ({"divergence": "exat"}, {"probes": 0}, cauchy, {"rtol": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            log_likelihood(rev, x, **options)
    with pytest.raises(ValueError, match="NaN"):
        log_likelihood(rev, torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="chain"):
        log_likelihood(GaussianMixture([[0.0]], std=1.0).reverse(VPSDE().discretize(50)), x)
    with pytest.raises(ValueError, match="seed per sample"):
        log_likelihood(rev, x, divergence="hutchinson", rng=PerSample([1]))
