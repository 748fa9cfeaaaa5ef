"""Variational bounds: their exact value for exact scores, the known cost of wrong ones, and honest standard errors."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scoresde.likelihood.bounds import Bound, _Bins, _gaussian_kl, _log_mass, _log_softmax, elbo, elbo_of_data
from scoresde.score_model import DataSpec, ScoreModel
from sde_lib import DATA, SDES, VESDE, VPSDE, FlowSDE, GaussianMixture, ReverseSDE
from solvers import PerSample

F64 = torch.float64
LAWS = {name: SDES[name]() for name in ("vp", "sub_vp", "ve", "edm", "flow", "cosine")}
PLANE = GaussianMixture([[-0.6, 0.2], [0.5, -0.3], [0.1, 0.6]], std=[0.2, 0.3, 0.4], weights=[0.3, 0.5, 0.2])
LINE = GaussianMixture([[-0.5], [0.6]], std=[0.3, 0.2], weights=[0.6, 0.4])
SPEC = DataSpec.integers((1,), 16)
MIDDLES = (torch.arange(16, dtype=F64) + 0.5 - SPEC.shift) / SPEC.scale


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gauss_hermite(d, n=40):
    """Nodes (N, d) and weights (N,) of the expectation over N(0, I): Golub-Welsch on the Hermite recurrence."""
    off = torch.arange(1, n, dtype=F64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    w = vectors[0].square()
    grid = torch.cartesian_prod(*[nodes] * d).reshape(-1, d)
    return grid, torch.cartesian_prod(*[w] * d).reshape(-1, d).prod(1)


def log_normal(x, mean, std):
    return Normal(mean, std).log_prob(x).sum(-1)


def exact_bound(data, x, clean, noisy, prior_std, decoder_std):
    """What the bound is with the exact score: -log p(x), plus what the prior and the decoder lose, by quadrature.

    The exact reverse process retraces the forward one sample by sample, so the path loses nothing; what is lost is
    E log p_T(x_T) / pi(x_T), and E log p(x | x_0) / decoder(x | x_0) with the true posterior p(x | x_0).
    """
    nodes, w = gauss_hermite(x.shape[1])
    out = []
    for one in x:
        log_p = data.log_prob(one[None])
        end = noisy.alpha * one + noisy.sigma * nodes
        lost = w @ (data.log_prob(end, noisy) - log_normal(end, torch.zeros(()), torch.tensor(prior_std)))
        start = clean.alpha * one + clean.sigma * nodes
        true = log_p + log_normal(start, clean.alpha * one, torch.tensor(clean.sigma)) - data.log_prob(start, clean)
        mean = data.reverse(clean.law)(start, clean).data
        lost = lost + w @ (true - log_normal(one, mean, torch.tensor(decoder_std)))
        out.append(lost - log_p)
    return torch.cat(out)


def of_sde(data, x, law):
    clean, noisy = law.knot(law.t_min), law.knot(law.drift_t_max)
    return exact_bound(data, x, clean, noisy, law.prior_std, clean.sigma / clean.alpha)


# --- continuous time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAWS)
def test_an_exact_score_is_tight_sample_by_sample(name):
    base = LAWS[name]
    law = type(base)(t_min=float(base.time_at(3.0)))  # sigma / alpha = 0.05: the decoder's loss is visible, and known
    x = PLANE.sample(8, seeded(), F64)
    bound = elbo(PLANE.reverse(law), x.repeat(40, 1), times=512, draws=16, rng=list(range(320)))
    nats = bound.nats.reshape(40, 8)
    want = of_sde(PLANE, x, law)
    z = (nats.mean(0) - want) / (bound.standard_error.reshape(40, 8).square().sum(0).sqrt() / 40)
    assert float(z.abs().max()) < 4.0 and float(z.square().mean()) < 2.6, z
    assert float(bound.standard_error.max()) / math.sqrt(40) < 0.1
    lost = want + PLANE.log_prob(x)
    assert float(lost.abs().max()) < 0.15 and (bound.nfe == 512 + 16).all()
    torch.testing.assert_close(bound.nats, bound.reconstruction + bound.diffusion + bound.prior)


def test_the_decoders_loss_of_gaussian_data_in_closed_form():
    """N(m, c) data: E log of true posterior over decoder is 1/2 log(1 + s^2/c) - E(x - D)^2 / (2 c), which vanishes
    with s^2; the quadrature of the other tests says the same."""
    data, c = GaussianMixture([[0.3]], std=0.5), 0.25
    x = torch.tensor([[-0.4], [0.3], [1.4]], dtype=F64)
    for s in (0.3, 0.1, 0.03):
        law = VESDE(sigma_min=s, sigma_max=300.0)
        far = 0.5 * math.log((c + 9e4) / 9e4)  # and what little the prior loses
        square = (s**4 * (x - 0.3).square() + c**2 * s**2).sum(1) / (c + s * s) ** 2
        lost = 0.5 * math.log1p(s * s / c) - square / (2 * c)
        torch.testing.assert_close(of_sde(data, x, law) + data.log_prob(x), lost, atol=1e-5 + far, rtol=0)
        assert float(lost.abs().max()) < 10 * s * s


def test_the_flow_ends_where_its_lambda_is_finite():
    bound = elbo(LINE.reverse(FlowSDE()), LINE.sample(3, seeded(), F64), times=4, rng=0)
    assert "0.999" in bound.what and "infinite" in bound.what and torch.isfinite(bound.nats).all()


def test_a_wrong_score_costs_the_kl_of_the_data_and_its_model():
    """The score of N(m', c): sample by sample the bound of that law; over data of N(m, c), entropy plus their KL."""
    law = VPSDE(t_min=1e-4)
    right, wrong = GaussianMixture([[0.0]], std=0.5), GaussianMixture([[0.4]], std=0.5)
    x = right.sample(3000, seeded(), F64)
    a, b = (elbo(data.reverse(law), x, times=64, rng=0) for data in (right, wrong))
    z = (b.nats - of_sde(wrong, x[:200], law).repeat(15)[: len(x)])[:200] / b.standard_error[:200]
    assert abs(float(z.mean())) < 4 / math.sqrt(200)
    excess = b.nats - a.nats  # the same noise
    want = float(kl_divergence(Normal(0.0, 0.5), Normal(0.4, 0.5)))
    assert want == pytest.approx(0.32)
    assert abs(float(excess.mean()) - want) < 4 * float(excess.std()) / math.sqrt(3000) + 0.005


def test_a_constant_error_costs_its_square():
    """eps_hat off by d at every time: the mean excess is d^2 per dimension and unit of lambda, d^2 / 2 for the decoder."""
    law = VPSDE()
    rev, d = PLANE.reverse(law), 0.2

    def off(v, t):
        return rev(v, law.knot(t, ndim=2)).noise + d

    x = PLANE.sample(4000, seeded(), F64)
    a, b = elbo(rev, x, times=64, rng=0), elbo(law.reverse(noise=off), x, times=64, rng=0)
    span = law.half_log_snr(law.t_min) - law.half_log_snr(law.t_max)
    for part, want in (("diffusion", 2 * d * d * span), ("reconstruction", d * d), ("prior", 0.0)):
        excess = getattr(b, part) - getattr(a, part)
        assert abs(float(excess.mean()) - want) < 4 * float(excess.std()) / math.sqrt(4000) + 1e-12, part
    assert b.nats.mean() > a.nats.mean() + 1.0


@pytest.mark.parametrize(
    ("law", "options"),
    [
        (VPSDE(), {"times": 64, "draws": 4}),
        (VPSDE(), {"times": 64, "draws": 4, "stratified": False}),
        (VPSDE().discretize(200), {"times": 60, "draws": 4}),
        (VPSDE().discretize(200), {"times": 60, "draws": 4, "stratified": False}),
        (VPSDE().discretize(60), {"times": None, "draws": 3}),
    ],
    ids=["sde", "sde-plain", "chain", "chain-plain", "chain-full"],
)
def test_the_standard_error_is_honest(law, options):
    """400 seeds: unbiased, the squared errors have the variance of the figures as their mean, and z-scores are ~1."""
    x = PLANE.sample(1, seeded(1), F64)
    rev, n = PLANE.reverse(law), 400
    bound = elbo(rev, x.expand(n, -1), rng=list(range(n)), variance="large", **options)
    if isinstance(law, VPSDE):
        truth, slack = float(of_sde(PLANE, x, law)), 0.0
    else:
        sharp = elbo(rev, x.expand(500, -1), times=None, rng=list(range(1000, 1500)), variance="large").nats
        truth, slack = float(sharp.mean()), 4 * float(sharp.std()) / math.sqrt(500)
    assert abs(float(bound.nats.mean()) - truth) < 4 * float(bound.nats.std()) / math.sqrt(n) + slack
    ratio = float(bound.standard_error.square().mean() / bound.nats.var())
    assert 0.72 < ratio < 1.35, ratio  # sqrt(2 / 400) = 7 % for a Gaussian figure
    z = (bound.nats - truth) / bound.standard_error
    assert 0.75 < float(z.square().mean()) < 1.45
    assert 0.90 < float((z.abs() < 2).double().mean()) < 0.99


def test_stratification_pays():
    x = PLANE.sample(50, seeded(2), F64)
    even, plain = (elbo(PLANE.reverse(VESDE()), x, times=64, stratified=s, rng=0) for s in (True, False))
    assert float((plain.standard_error / even.standard_error).square().mean()) > 1.5


# --- integers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softmax", "discretized", "chain"])
def test_integers_of_a_known_law(kind):
    """Data that sit in the middles of 16 bins with known weights: the exact score makes the bound -log P(k)."""
    p = torch.rand(16, generator=seeded(), dtype=F64) + 0.05
    p /= p.sum()
    data = GaussianMixture(MIDDLES[:, None], std=0.0, weights=p)
    sde = VPSDE(t_min=1e-4)  # sigma / alpha = 0.003, against bins of 1 / 8
    law = sde.discretize(2000) if kind == "chain" else sde
    n = 50 if kind == "chain" else 100
    options = {"times": 512} if kind != "chain" else {"times": 256, "variance": "small"}
    bound = elbo(
        data.reverse(law), MIDDLES[:, None].repeat(n, 1), levels=SPEC, rng=0,
        decoder="auto" if kind == "chain" else kind, **options,
    )  # fmt: skip
    figures = bound.nats.reshape(n, 16)
    error = (figures.std(0) / math.sqrt(n)).clamp(min=1e-9)
    gap = figures.mean(0) + p.log()
    slack = 0.06 if kind == "chain" else 1e-3  # a chain loses a little at every step
    assert (gap > -4 * error - 1e-3).all() and (gap < 4 * error + slack).all(), gap
    entropy = -float((p * p.log()).sum())
    assert abs(float(p @ figures.mean(0)) - entropy) < 4 * float((p * error).square().sum().sqrt()) + slack
    assert float(bound.reconstruction.abs().max()) < 1e-9 and "integers" in bound.what
    bits, se = bound.bits_per_dim(1)
    torch.testing.assert_close(bits, bound.nats / math.log(2.0))
    torch.testing.assert_close(se, bound.standard_error / math.log(2.0))
    assert (bound.nfe == (512 if kind == "softmax" else 520 if kind == "discretized" else 264)).all()


def test_it_bounds_the_probability_of_the_model():
    """A continuous score whose model gives P(k) = int p(x_0) P(k | x_0): for every k the bound is above, and its value is
    that of the quadrature with the true posterior replaced by the encoder."""
    law = VPSDE(t_min=0.02)
    clean, noisy = law.knot(law.t_min), law.knot(law.t_max)
    s = clean.sigma / clean.alpha
    assert 0.3 < s / 0.125 < 0.8
    bound = elbo(LINE.reverse(law), MIDDLES[:, None].repeat(200, 1), times=64, draws=8, levels=SPEC, rng=0)
    figures = bound.nats.reshape(200, 16)
    error = figures.std(0) / math.sqrt(200)
    y = torch.linspace(-4, 4, 80001, dtype=F64)  # x_0 / alpha
    log_density = LINE.log_prob(clean.alpha * y[:, None], clean) + math.log(clean.alpha)
    decode = torch.log_softmax(-0.5 * ((y[:, None] - MIDDLES) / s).square(), 1)
    step = float(y[1] - y[0])
    p = (log_density[:, None] + decode).exp().sum(0) * step
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)
    assert (figures.mean(0) > -p.log() - 4 * error).all()
    # -E log p(x_0) P(k | x_0) / q(x_0 | k), plus the prior's mismatch
    q = Normal(MIDDLES, s).log_prob(y[:, None])
    value = -(q.exp() * (log_density[:, None] + decode - q)).sum(0) * step
    nodes, w = gauss_hermite(1)
    end = noisy.alpha * MIDDLES[:, None] + noisy.sigma * nodes[:, 0]
    lost = LINE.log_prob(end.reshape(-1, 1), noisy).reshape(16, -1) - Normal(0.0, 1.0).log_prob(end)
    z = (figures.mean(0) - value - lost @ w) / error
    assert float(z.abs().max()) < 4.0, z
    assert float(figures.mean(0).neg().exp().sum()) < 1.0


def test_decoders_are_laws_of_the_levels():
    """Their probabilities sum to one, in the middle, far outside, and for narrow and wide ones."""
    k = torch.arange(16, dtype=F64)[:, None]
    bins = _Bins(k, 16, float(MIDDLES[0]), 0.125)
    torch.testing.assert_close(bins.middle(k)[:, 0], MIDDLES)
    one = torch.ones(1, dtype=F64)
    for state in (-30.0, -0.9, -0.3, 0.0, 0.061, 0.9, 4.0):
        y = torch.full_like(k, state)
        for s in (0.004, 0.05, 0.3, 20.0):
            soft, mass = _log_softmax(bins, y, s), _log_mass(bins, k, y, torch.tensor(s, dtype=F64))
            torch.testing.assert_close(soft.exp().sum(0), one)
            torch.testing.assert_close(mass.exp().sum(0), one)
            torch.testing.assert_close(soft, torch.log_softmax(-0.5 * ((y - MIDDLES[:, None]) / s).square(), 0))
    far = _log_mass(bins, k, torch.full_like(k, 0.95), torch.tensor(0.01, dtype=F64))[3]  # 1 - Phi(z) ~ phi(z) / z
    z = (0.95 - float(MIDDLES[3]) - 0.0625) / 0.01
    assert float(far) == pytest.approx(-0.5 * z * z - math.log(z * math.sqrt(2 * math.pi)), rel=1e-5)


# --- a chain ---------------------------------------------------------------------------------------------------------


def test_steps_are_the_kl_of_gaussians():
    g = seeded()
    gap, log_q, log_p = (torch.randn(50, generator=g, dtype=F64) for _ in range(3))
    q, p = (Normal(m, torch.exp(0.5 * v)) for m, v in ((torch.zeros_like(gap), log_q), (gap, log_p)))
    torch.testing.assert_close(_gaussian_kl(gap, log_q, log_p), kl_divergence(q, p))


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("integers", [True, False])
def test_the_bound_of_ddpm_written_out(variance, integers):
    """Ho et al.'s L_T + sum L_t + L_0 from betas alone, for any eps function, with the same noise."""
    n, levels, seeds = 40, 8, [1, 2, 3, 4, 5]
    spec = DataSpec.integers((3,), levels)
    g = seeded(3)
    k = torch.randint(0, levels, (5, 3), generator=g)
    x = spec.encode(k, dtype=F64)
    weight = torch.randn(3, 3, generator=g, dtype=F64)

    def eps(v, i):
        return v + 0.3 * torch.tanh(v @ weight + 0.01 * i[:, None])

    rev = VPSDE().discretize(n).reverse(noise=eps)
    got = elbo(rev, x, times=None, levels=spec if integers else None, variance=variance, rng=seeds, batch_rows=37)
    draw = PerSample(seeds).bind(x)
    beta = torch.linspace(0.1 / n, 20.0 / n, n, dtype=F64)
    bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=F64), bar[:-1]])
    tilde = beta * (1 - before) / (1 - bar)
    model = beta if variance == "large" else torch.cat([tilde[1:2], tilde[1:]])
    total = kl_divergence(Normal(bar[-1].sqrt() * x, (1 - bar[-1]).sqrt()), Normal(0 * x, 1.0)).sum(1)
    for i in range(n):
        z = draw.normal("noise", i - 1) if i else draw.normal("decoder", 0)
        x_i = bar[i].sqrt() * x + (1 - bar[i]).sqrt() * z
        e = eps(x_i, torch.full((5,), i))
        mean = (x_i - beta[i] / (1 - bar[i]).sqrt() * e) / (1 - beta[i]).sqrt()
        step = Normal(mean, model[i].sqrt())
        if i == 0 and integers:
            edges = torch.tensor([-math.inf, *[2 * j / levels - 1 for j in range(1, levels)], math.inf], dtype=F64)
            total = total - (step.cdf(edges[k + 1]) - step.cdf(edges[k])).log().sum(1)
        elif i == 0:
            total = total - step.log_prob(x).sum(1)
        else:
            true = before[i].sqrt() * beta[i] * x + (1 - beta[i]).sqrt() * (1 - before[i]) * x_i
            total = total + kl_divergence(Normal(true / (1 - bar[i]), tilde[i].sqrt()), step).sum(1)
    assert torch.isfinite(total).all()
    torch.testing.assert_close(got.nats, total, rtol=1e-10, atol=1e-10)
    assert (got.nfe == n).all() and got.standard_error.isnan().all()  # one draw per level: unknown


def test_the_chain_tends_to_continuous_time():
    """DDPM with n steps and variances beta, exact mixture score: what it loses against -log p falls like 1 / n."""
    sde = VPSDE(beta_max=8.0)
    x = LINE.sample(8, seeded(), F64)
    gaps = []
    for n, copies in ((10, 4000), (30, 2000), (100, 2000), (300, 2000)):
        chain = sde.discretize(n)
        bound = elbo(LINE.reverse(chain), x.repeat(copies, 1), times=None, variance="large", rng=0, batch_rows=65536)
        last = chain.levels[-1]
        nodes, w = gauss_hermite(1)
        end = last.alpha * x + last.sigma * nodes[:, 0]
        lost = LINE.log_prob(end.reshape(-1, 1), last).reshape(8, -1) - Normal(0.0, 1.0).log_prob(end)
        gaps.append(float((bound.nats.reshape(copies, 8).mean(0) + LINE.log_prob(x) - lost @ w).mean()))
        error = float(bound.nats.reshape(copies, 8).mean(1).std()) / math.sqrt(copies)
        assert error < 0.12 * gaps[-1], (n, error, gaps)
    orders = [math.log(a / b) / math.log(m / l) for (a, b), (l, m) in zip(
        itertools.pairwise(gaps), itertools.pairwise((10, 30, 100, 300)), strict=True)]  # fmt: skip
    assert all(0.7 < order < 1.4 for order in orders), (gaps, orders)


def test_variances_of_the_steps():
    """A learned variance that says "small" is "small"; Gaussian data's own is below both fixed ones, and tight."""
    data, c = GaussianMixture([[0.0, 0.0]], std=0.6), 0.36
    chain = VPSDE().discretize(50)
    rev = data.reverse(chain)
    x = data.sample(4000, seeded(), F64)

    def small(v, knot):
        assert v.shape[1:] == (2,) and knot.label.shape == (len(v), 1)
        return (2 * torch.cat([chain.posterior_std[1:2], chain.posterior_std[1:]])[knot.label].log()).expand_as(v)

    def own(v, knot):  # the posterior's variance, and what x_i does not tell of x_0
        unknown = c * knot.sigma**2 / (knot.alpha**2 * c + knot.sigma**2)
        v_0 = chain.posterior_std.square()[knot.label] + chain.posterior_x_0.square()[knot.label] * unknown
        return v_0.log().expand_as(v)

    kinds = {"small": "small", "large": "large", "learned": small, "own": own}
    nats = {name: elbo(rev, x, times=None, variance=v, rng=0).nats for name, v in kinds.items()}
    torch.testing.assert_close(nats["learned"], nats["small"])
    for name in ("small", "large"):
        excess = nats[name] - nats["own"]
        assert float(excess.mean()) > 5 * float(excess.std()) / math.sqrt(4000), name
    # Gaussian steps of the right variance are exact in law: the average is the entropy plus the prior's mismatch
    gap = nats["own"] + data.log_prob(x)
    last = chain.levels[-1]
    end = Normal(0.0, math.sqrt(last.alpha**2 * c + last.sigma**2))
    lost = 2 * float(kl_divergence(end, Normal(0.0, 1.0)))
    assert abs(float(gap.mean()) - lost) < 4 * float(gap.std()) / math.sqrt(4000)


def test_a_subset_of_levels_estimates_their_sum():
    chain = VPSDE().discretize(100)
    rev = PLANE.reverse(chain)
    x = PLANE.sample(1, seeded(4), F64).expand(2000, -1)
    full, some = elbo(rev, x, times=100, rng=0), elbo(rev, x, times=18, draws=1, rng=0)
    for part in ("diffusion", "reconstruction"):
        a, b = getattr(full, part), getattr(some, part)
        assert abs(float(a.mean() - b.mean())) < 4 * math.sqrt(float(a.var() + b.var()) / 2000), part
    assert (full.nfe == 100).all() and (some.nfe == 19).all() and some.standard_error.isnan().all()
    assert "all of them" in full.what and "18 of them" in some.what


def test_chains_that_end_in_pure_noise_or_have_one_level():
    x = PLANE.sample(3, seeded(), F64)
    flow = FlowSDE().discretize(20)
    assert flow.levels[-1].alpha == 0.0
    assert torch.isfinite(elbo(PLANE.reverse(flow), x, rng=0).nats).all()
    with pytest.raises(ValueError, match="does not determine the data"):
        elbo(flow.reverse(noise=lambda v, i: v), x)
    from sde_lib import Chain

    single = Chain([0.5], [0.0], [0.5], [0.5], 1.0)
    bound = elbo(single.reverse(data=lambda v, i: v), x, times=None, draws=2, rng=0)
    assert float(bound.diffusion.abs().max()) == 0.0 and torch.isfinite(bound.standard_error).all()


# --- batches, data, arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [20, None], ids=["some", "all"])
@pytest.mark.parametrize("law", [VPSDE(), VPSDE().discretize(30)], ids=["sde", "chain"])
def test_a_sample_does_not_know_its_batch_mates(law, times):
    times = times or (None if hasattr(law, "levels") else 128)
    x = PLANE.sample(5, seeded(), F64)
    shift = torch.arange(5, dtype=F64) / 10
    exact = PLANE.reverse(law)
    rev = ReverseSDE(law, lambda v, k, shift: exact.network(v, k) + shift[:, None], exact.parameterization)

    def run(rows, **options):
        return elbo(rev, x[rows], times=times, draws=2, rng=rows, condition={"shift": shift[rows]}, **options)

    together = run([0, 1, 2, 3, 4])
    for other, rows in ((run([3]), [3]), (run([4, 0, 3]), [4, 0, 3]), (run([0, 1, 2, 3, 4], batch_rows=3), range(5))):
        for part in ("nats", "standard_error", "reconstruction", "diffusion", "prior"):
            torch.testing.assert_close(getattr(other, part), getattr(together, part)[list(rows)], rtol=1e-12, atol=0)
    assert together.nats.dtype == F64 and len(set(together.nats.tolist())) == 5


def test_network_calls_stay_below_batch_rows_and_keep_no_graph():
    law, seen = VPSDE(), []

    def eps(v, t):
        seen.append(len(v))
        assert not torch.is_grad_enabled()
        return v

    elbo(law.reverse(noise=eps), torch.zeros(5, 2), times=12, draws=3, batch_rows=17, rng=0)
    assert max(seen) <= 17 and sum(seen) == 5 * 15 and len(seen) == 5
    seen.clear()
    elbo(law.reverse(noise=eps), torch.zeros(5, 2), times=2, draws=2, batch_rows=2, rng=0)
    assert seen == [2, 2, 1] * 4


def test_float32_and_other_shapes():
    data = GaussianMixture(torch.zeros(1, 2, 3), std=0.5)
    x = data.sample(4, seeded(), F64)
    wide = elbo(data.reverse(VPSDE()), x, times=2000, rng=0)
    narrow = elbo(data.reverse(VPSDE()), x.float(), times=2000, rng=0)
    assert narrow.nats.dtype == F64
    assert ((wide.nats - narrow.nats).abs() < 6 * wide.standard_error).all()
    flat = GaussianMixture([0.0], std=0.5)  # states of shape (B,)
    assert elbo(flat.reverse(VPSDE()), torch.zeros(4), times=8, rng=0).nats.shape == (4,)


class Exact(torch.nn.Module):
    def __init__(self, data, law):
        super().__init__()
        self.data, self.law = data, law

    def forward(self, x, label):
        return self.data.reverse(self.law)(x, self.law.knot(label, ndim=x.ndim)).v


def test_data_units():
    law = VPSDE(t_min=1e-4)
    spec = DataSpec((2,), shift=1.0, scale=2.0)
    model = ScoreModel(Exact(PLANE, law), law, "v", "time", spec, 1.0, "none")
    z = spec.decode(PLANE.sample(6, seeded(), F64))
    bound = elbo_of_data(model, z, times=1024, rng=0)
    want = -PLANE.log_prob(spec.encode(z, dtype=F64)) + 2 * math.log(2.0)
    assert ((bound.nats - want).abs() < 4.5 * bound.standard_error + 0.01).all()
    torch.testing.assert_close(bound.nats, bound.reconstruction + bound.diffusion + bound.prior)

    data = GaussianMixture(MIDDLES[:, None], std=0.0)
    model = ScoreModel(Exact(data, law), law, "v", "time", SPEC, 1.0, "none")
    k = torch.arange(16)[:, None]
    bound = elbo_of_data(model, k, times=64, rng=0)
    inner = elbo(model.reverse(), SPEC.encode(k), levels=SPEC, times=64, rng=0)
    torch.testing.assert_close(bound.nats, inner.nats)
    assert isinstance(bound, Bound)
    with pytest.raises(ValueError, match="integers 0 … 15"):
        elbo_of_data(model, k + 1)
    with pytest.raises(ValueError, match="empty"):
        elbo_of_data(model, k[:0])
    with pytest.raises(ValueError, match="data_spec"):
        elbo_of_data(ScoreModel(Exact(data, law), law, "v", "time", None, 1.0, "none"), k)


def test_bad_arguments_are_refused():
    rev, chain = LINE.reverse(VPSDE()), LINE.reverse(VPSDE().discretize(50))
    x = torch.zeros(2, 1)
    middles = SPEC.encode(torch.zeros(2, 1))
    for r, v, options, message in (
        (rev, x, {"times": 7}, "even.*7"),
        (rev, x, {"times": 1}, ">= 2, got 1"),
        (rev, x, {"times": None}, "chain"),
        (chain, x, {"times": 7}, "even.*7"),
        (rev, x, {"draws": 0}, "draws.*0"),
        (rev, x, {"batch_rows": 0}, "batch_rows.*0"),
        (chain, x, {"variance": "smal"}, "Did you mean 'small'"),
        (rev, x, {"decoder": "gausian"}, "Did you mean 'gaussian'"),
        (rev, x, {"decoder": "softmax"}, "a density needs"),
        (rev, middles, {"decoder": "gaussian", "levels": SPEC}, "integers need"),
        (chain, middles, {"decoder": "softmax", "levels": SPEC}, "is for an SDE"),
        (rev, x + 0.03, {"levels": SPEC}, "middles of the bins"),
        (rev, middles + 2.0, {"levels": SPEC}, "levels 16 to 16 where 0 to 15"),
        (rev, x, {"levels": DataSpec((1,))}, "continuous data"),
        (rev, torch.zeros(2, 3), {"levels": SPEC}, r"\(B, 1\), got \(2, 3\)"),
        (rev, x, {"condition": {"label": torch.zeros(3)}}, "3 rows for a batch of 2"),
        (rev, x * math.nan, {}, "NaN"),
        (rev, x, {"rng": [1]}, "one seed per sample"),
        (chain, x, {"variance": lambda v, k: v[:, 0]}, r"shape \(2500?, 1\)|shape \(\d+, 1\), got"),
    ):
        with pytest.raises(ValueError, match=message):
            elbo(r, v, **options)
    for r, v, options, message in (
        (LINE, x, {}, "ReverseSDE.*GaussianMixture"),
        (rev, x.long(), {}, "floating point"),
        (rev, [[0.0]], {}, "tensor"),
        (rev, x, {"times": 8.0}, "times.*float"),
        (rev, x, {"draws": True}, "draws.*bool"),
        (rev, x, {"levels": 16}, "DataSpec, got int"),
        (chain, x, {"variance": 0.1}, "name or a function"),
    ):
        with pytest.raises(TypeError, match=message):
            elbo(r, v, **options)
    with pytest.raises(ValueError, match="dims"):
        elbo(rev, x, times=2, rng=0).bits_per_dim(0)
    assert DATA.is_data
