"""Variational bounds: tight for exact scores, too large by the known KL for wrong ones, honest about their noise."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scoresde import SDES, VPSDE, DataSpec, GaussianMixture, ScoreModel, elbo, elbo_of_data, log_likelihood
from scoresde.codecs import Affine
from scoresde.likelihood.bins import Bins
from scoresde.likelihood.bound import Run, Variances
from scoresde.likelihood.bound_chain import log_decoder, step_kl
from scoresde.likelihood.bound_sde import log_softmax
from sde_lib import VESDE, FlowSDE, ReverseSDE
from solvers import PerSample

LAWS = {name: SDES[name]() for name in ("vp", "sub_vp", "ve", "edm", "flow", "cosine")}
MIXTURE = GaussianMixture([[-0.6, 0.2], [0.5, -0.3], [0.1, 0.6]], std=[0.2, 0.3, 0.4], weights=[0.3, 0.5, 0.2])


@pytest.mark.parametrize("name", LAWS)
def test_tight_for_an_exact_score(name):
    """Sample by sample: with the exact score and little noise left at t_min the bound is -log p itself."""
    base = LAWS[name]
    law = type(base)(t_min=float(base.time_at(4.6)))  # sigma / alpha = 0.01, against scales of 0.2 and more
    x = MIXTURE.sample(12, torch.Generator().manual_seed(0), torch.float64)
    bound = elbo(MIXTURE.reverse(law), x, times=8192, draws=64, rng=0)
    z = (bound.nats + MIXTURE.log_prob(x)) / bound.standard_error
    # what the decoder's variance and the prior leave is some 1e-3 nats; the standard errors are above 0.02
    assert float(z.square().mean()) < 2.5 and float(z.abs().max()) < 4.0, z
    assert 0.02 < float(bound.standard_error.min()) and float(bound.standard_error.max()) < 0.2
    assert (bound.reconstruction + bound.diffusion + bound.prior - bound.nats).abs().max() < 1e-9
    plain = elbo(MIXTURE.reverse(law), x, times=8192, draws=64, rng=0, control_variate=False)
    assert float((plain.standard_error / bound.standard_error).mean()) > 1.1
    assert ((plain.nats - bound.nats).abs() < 4 * plain.standard_error).all()


@pytest.mark.parametrize("law", [VPSDE(), VPSDE().discretize(400)], ids=["continuous", "chain"])
def test_the_standard_error_is_honest(law):
    """400 repetitions of few times: unbiased, and the reported errors are those of the scatter."""
    x = MIXTURE.sample(1, torch.Generator().manual_seed(1), torch.float64)
    rev = MIXTURE.reverse(law)
    many = elbo(rev, x.expand(400, -1), times=32, rng=list(range(400)))
    chain = hasattr(law, "levels")
    sharp = elbo(rev, x.expand(200, -1), times=None if chain else 1000, rng=list(range(1000, 1200)))
    gap = many.nats - sharp.nats.mean()
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / 20 + 4 * float(sharp.nats.std()) / math.sqrt(200)
    ratio = float(many.standard_error.square().mean() / gap.var())
    assert 0.7 < ratio < 1.4, ratio
    if chain:  # every level once: the error comes from neighbours
        ratio = float(sharp.standard_error.square().mean() / sharp.nats.var())
        assert 0.6 < ratio < 1.6, ratio


LINEAR = GaussianMixture(torch.zeros(1, 24), covariances=torch.diag(torch.logspace(-2, 0.6, 24).double())[None])


@pytest.mark.parametrize("law", [VESDE(0.05, 10.0), VPSDE(beta_max=5.0)], ids=["ve", "vp"])
@pytest.mark.parametrize(("n", "times"), [(6, 128), (20, 128), (100, 128), (100, None)])
def test_bars_of_chains_cover(law, n, times):
    """2000 repetitions on short and long chains: the variance is unbiased, and 95 % bars cover within [0.93, 0.98].

    Squared second differences count the end levels a sixth, and see the steep trend next to the data as noise; with
    1.96 in place of the t-quantile bars covered 0.82 to 0.98 (1.8 times the variance) on these chains.
    """
    x = LINEAR.sample(1, torch.Generator().manual_seed(1), torch.float64).expand(2000, -1)
    bound = elbo(LINEAR.reverse(law.discretize(n)), x, times=times, rng=0)
    error = bound.nats - bound.nats.mean()
    covered = float((error.abs() < bound.bar(0.95)).double().mean())
    assert 0.93 < covered < 0.98, covered
    # of 2000 variances with 10 to 60 degrees of freedom, and of 2000 values: each known to 4 % at most
    assert abs(float(bound.standard_error.square().mean() / error.var()) - 1.0) < 0.16
    assert int(bound.nfe[0]) <= (128 if times else n + 3) + 8


def test_every_level_counts_once_in_the_error():
    """From one draw per level: unbiased for any variances of the levels, blind to a linear trend over four of them."""
    g = torch.Generator().manual_seed(0)
    for m in (2, 3, 4, 5, 6, 7, 9, 12):
        std = torch.exp(1.5 * torch.randn(m, generator=g, dtype=torch.float64))
        kl = std[:, None] * torch.randn(m, 40000, generator=g, dtype=torch.float64)
        variances = Variances.from_neighbours(kl).values.sum(0)
        # relative error of a mean of 40000 squares of normals: at most sqrt(2 / 40000)
        assert abs(float(variances.mean() / std.square().sum()) - 1.0) < 4 * math.sqrt(2 / 40000)
    slope = torch.arange(8.0, dtype=torch.float64)[:, None] * 3.0 + 1.0
    assert float(Variances.from_neighbours(slope).values.sum()) < 1e-20


def test_a_wrong_score_costs_its_kl():
    """For data N(0, 1) and the model of N(0, s^2): the bound is larger by KL of the laws at t_min on average, and the
    path's part by the integral of the squared error."""
    law = VPSDE(t_min=1e-4)
    right, wrong = (GaussianMixture([[0.0]], std=s) for s in (1.0, 0.7))
    x = right.sample(4000, torch.Generator().manual_seed(0), torch.float64)
    a, b = (elbo(data.reverse(law), x, times=64, rng=0) for data in (right, wrong))
    gap = b.nats - a.nats
    want = kl_divergence(Normal(0.0, 1.0), Normal(0.0, 0.7))
    # the reverse SDE of the wrong score is not the wrong model's own law: between its KL and that plus the prior's
    error = float(gap.std()) / math.sqrt(len(gap))
    assert abs(float(gap.mean()) - float(want)) < 4 * error + 0.01 * float(want)


def test_neither_beats_the_ode():
    """On average over data the bound of an imperfect score is above the ODE's -log p of a perfect one (Gibbs), and the
    ODE value of the same perfect score agrees with its bound."""
    law = VPSDE(t_min=1e-3)
    x = MIXTURE.sample(300, torch.Generator().manual_seed(0), torch.float64)
    rev = MIXTURE.reverse(law)
    ode = -log_likelihood(rev, x, tol=1e-3, correct=["truncation"]).log_prob
    exact = elbo(rev, x, times=512, rng=0)
    gap = exact.nats - ode
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(300) + 0.01
    skewed = ReverseSDE(law, lambda v, k: rev.network(v, k) * 2.0, rev.parameterization)
    worse = elbo(skewed, x, times=512, rng=0).nats - exact.nats  # the same noise
    assert float(worse.mean()) > 5 * float(worse.std()) / math.sqrt(300)


# --- integers --------------------------------------------------------------------------------------------------------

LINE = GaussianMixture([[-0.4], [0.5]], std=[0.15, 0.1], weights=[0.6, 0.4])
SPEC = DataSpec((1,), 16)
CODEC = Affine.fit(SPEC)
BINS = Bins(16, CODEC)


class OfBins(torch.nn.Module):
    """The exact score of data that sit in the middles of the bins: a mixture of points."""

    def __init__(self, weights, law):
        super().__init__()
        middles = CODEC.encode(torch.arange(16.0) + 0.5)
        self.data, self.law = GaussianMixture(middles[:, None], std=0.0, weights=weights), law

    def forward(self, x, noise_level, class_label=None):
        noise_level = noise_level.long() if hasattr(self.law, "levels") else noise_level
        return self.data.reverse(self.law)(x, self.law.knot(noise_level, ndim=x.ndim)).v


@pytest.mark.parametrize("kind", ["continuous", "chain"])
def test_integers_of_a_known_law(kind):
    """All 16 levels enumerated, with the exact score: the bound is -log2 P(k) of each, and its mean the entropy."""
    g = torch.Generator().manual_seed(0)
    p = torch.rand(16, generator=g, dtype=torch.float64) + 0.05
    p /= p.sum()
    sde = VPSDE(t_min=1e-4)
    law = sde if kind == "continuous" else sde.discretize(1000)
    noise_level = "time" if kind == "continuous" else "index"
    model = ScoreModel(OfBins(p, law), law, "v", noise_level, SPEC, 1.0, "none").double()
    result = elbo_of_data(model, torch.arange(16)[:, None].repeat(40, 1), times=512, dequantization="none")
    figures = result.per_sample.reshape(40, 16)
    error = figures.std(0) / math.sqrt(40)
    gap = figures.mean(0) + p.log2()
    slack = 0.0 if kind == "continuous" else 0.05  # a chain of 1000 steps is not quite its limit
    assert (gap.abs() < 4.5 * error + 0.01 + slack).all(), gap
    entropy = -float((p * p.log2()).sum())
    scatter = 4 * float((p * error).square().sum().sqrt())
    assert abs(float((p * figures.mean(0)).sum()) - entropy) < scatter + slack
    assert scatter < 0.4
    assert "integers" in result.what and result.standard_error > 0 and set(result.summary()) >= {"mean", "diffusion"}


def test_decoders_are_laws_of_the_levels():
    """Their probabilities sum to one, in the middle and far outside."""
    middles = CODEC.encode(torch.arange(16.0, dtype=torch.float64)[:, None] + 0.5)
    chain = VPSDE().discretize(50)
    for state in (-30.0, -0.3, 0.0, 0.9, 4.0):
        y = torch.full_like(middles, state)
        torch.testing.assert_close(log_softmax(BINS, y, middles, 0.05).exp().sum(), torch.tensor(1.0).double())
        prediction = LINE.reverse(chain)(y, chain.knot(torch.zeros(16, dtype=torch.int64), 2))
        run = Run(LINE.reverse(chain), middles, None, BINS, 0.0, 16)
        for variance in ("small", "large", lambda v, k: torch.full_like(v, -3.0)):
            got = log_decoder(run, chain, prediction, torch.zeros_like(y), variance)
            assert torch.isfinite(got).all() or state == -30.0
            torch.testing.assert_close(got.exp().sum(), torch.tensor(1.0).double())


# --- the chain against textbook formulas -----------------------------------------------------------------------------


def test_steps_are_the_kl_of_gaussians():
    chain = VPSDE().discretize(50)
    x = MIXTURE.sample(6, torch.Generator().manual_seed(0), torch.float64)
    rev = MIXTURE.reverse(chain)
    for i in (1, 7, 49):
        knot = chain.knot(torch.full((6,), i), 2)
        prediction = rev(knot.alpha * x + knot.sigma * 0.3, knot)
        c, s = float(chain.posterior_x_0[i]), float(chain.posterior_std[i])
        true = Normal(chain.posterior_x_t[i] * prediction.x + c * x, s)
        mean = chain.posterior_x_t[i] * prediction.x + c * prediction.data
        run, eps = Run(rev, x, None, None, 0.0, 16), torch.full_like(x, 0.3)
        for variance, std in (("small", s), ("large", float(chain.betas[i].sqrt())), (lambda v, k: 0 * v - 4.0, 0.5)):
            want = kl_divergence(true, Normal(mean, std if isinstance(variance, str) else math.exp(-2.0))).sum(1)
            torch.testing.assert_close(step_kl(run, chain, prediction, eps, variance), want)


def test_the_bound_of_ddpm_written_out():
    """Ho et al.'s L_T + sum L_t + L_0 from betas alone, with the same noise."""
    n, levels = 40, 8
    chain = VPSDE().discretize(n)
    spec = DataSpec((3,), levels)
    g = torch.Generator().manual_seed(3)
    k = torch.randint(0, levels, (5, 3), generator=g)
    x = Affine.fit(spec).encode(spec.dequantize(k, dtype=torch.float64))
    weight = torch.randn(3, 3, generator=g, dtype=torch.float64)

    def eps(v, i):
        return torch.tanh(v @ weight + 0.01 * i[:, None])

    seeds = [1, 2, 3, 4, 5]
    options = {"times": None, "data_spec": spec, "variance": "large", "control_variate": False, "draws": 2}
    got = elbo(chain.reverse(noise=eps), x, rng=seeds, **options)
    draw = PerSample(seeds).bind(x)
    beta = torch.linspace(0.1 / n, 20.0 / n, n, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1), bar[:-1]])
    tilde = beta * (1 - before) / (1 - bar)
    total = 0.5 * (bar[-1] * x.square() + (1 - bar[-1]) - 1 - (1 - bar[-1]).log()).sum(1)
    # the first four levels are drawn twice
    drawn = [i for i in range(1, n) for _ in range(2 if i <= 4 else 1)]
    for i, key in [(0, ("decoder", 0)), (0, ("decoder", 1)), *((i, ("noise", j)) for j, i in enumerate(drawn))]:
        z, share = draw.normal(*key), 1.0 / (2 if i <= 4 else 1)
        x_i = bar[i].sqrt() * x + (1 - bar[i]).sqrt() * z
        e = eps(x_i, torch.full((5,), i))
        mean = (x_i - beta[i] / (1 - bar[i]).sqrt() * e) / (1 - beta[i]).sqrt()
        if i == 0:
            std = tilde[1].sqrt()
            edges = [-math.inf, *[2 * j / levels - 1 for j in range(1, levels)], math.inf]
            low, high = (torch.tensor(edges)[k + j].double() for j in (0, 1))
            p = Normal(mean, std).cdf(high) - Normal(mean, std).cdf(low)
            total = total - share * p.clamp(min=1e-300).log().sum(1)
            continue
        true = before[i].sqrt() * beta[i] * x + (1 - beta[i]).sqrt() * (1 - before[i]) * x_i
        true = true / (1 - bar[i])
        total = total + share * kl_divergence(Normal(true, tilde[i].sqrt()), Normal(mean, beta[i].sqrt())).sum(1)
    torch.testing.assert_close(got.nats, total, rtol=1e-9, atol=1e-8)
    assert int(got.nfe[0]) == n - 1 + 4 + 2


def test_the_chain_tends_to_continuous_time():
    """The same exact score on the geometric levels of SMLD: the sum over steps is above the integral, and the gap
    halves when the steps are doubled."""
    sde = VESDE(sigma_min=0.02, sigma_max=20.0)
    x = MIXTURE.sample(20, torch.Generator().manual_seed(0), torch.float64).repeat(100, 1)
    limit = float(elbo(MIXTURE.reverse(sde), x, times=512, rng=0).diffusion.mean())
    gaps = []
    for n in (20, 40, 80):
        bound = elbo(MIXTURE.reverse(sde.discretize(n)), x, times=None, rng=1)
        gaps.append(float(bound.diffusion.mean()) - limit)
    assert all(1.7 < a / b < 2.6 for a, b in itertools.pairwise(gaps)), gaps


def test_large_variances_tend_to_the_density():
    """With the forward step's variance throughout, DDPM's chain loses about 1 / n."""
    x = MIXTURE.sample(20, torch.Generator().manual_seed(0), torch.float64).repeat(200, 1)
    gaps = []
    for n in (30, 100, 300):
        chain = VPSDE(beta_max=8.0).discretize(n)
        bound = elbo(MIXTURE.reverse(chain), x, times=None, rng=1, variance="large")
        gaps.append(float((bound.nats + MIXTURE.log_prob(x)).mean()))
    assert gaps[0] > 2 * gaps[1] > 3 * gaps[2] and gaps[2] < 0.06, gaps


def test_a_chain_that_ends_without_signal():
    """The flow's last level has alpha = 0: its step is finite, and a noise prediction is refused there."""
    chain = FlowSDE().discretize(40)
    x = MIXTURE.sample(200, torch.Generator().manual_seed(0), torch.float64)
    for times in (None, 16):
        bound = elbo(MIXTURE.reverse(chain), x, times=times, rng=0)
        assert torch.isfinite(bound.nats).all() and (bound.prior == 0).all()
        assert float((bound.nats + MIXTURE.log_prob(x)).mean()) > -4 * float(bound.nats.std()) / math.sqrt(200)
    with pytest.raises(ValueError, match="alpha = 0"):
        elbo(chain.reverse(noise=lambda v, i: v), x)


def test_variances_of_the_steps():
    """A learned variance that says "small" gives "small"; the optimal one is below both fixed ones."""
    data = GaussianMixture([[0.0, 0.0]], std=0.6)
    chain = VPSDE().discretize(50)
    rev = data.reverse(chain)
    x = data.sample(4000, torch.Generator().manual_seed(0), torch.float64)

    def small(v, knot):
        table = torch.cat([chain.posterior_std[1:2], chain.posterior_std[1:]])
        return (2 * table[knot.index].log()).expand_as(v)

    def optimal(v, knot):  # the posterior's variance and what is not known of x_0
        unknown = 0.36 * knot.sigma**2 / (knot.alpha**2 * 0.36 + knot.sigma**2)
        table = chain.posterior_std.square()[knot.index] + chain.posterior_x_0.square()[knot.index] * unknown
        return table.log().expand_as(v)

    options = {"times": None, "rng": 0}
    kinds = {"small": "small", "large": "large", "learned": small, "optimal": optimal}
    value = {name: elbo(rev, x, variance=v, control_variate=False, **options).nats for name, v in kinds.items()}
    torch.testing.assert_close(value["learned"], value["small"])
    best = float(value["optimal"].mean())
    assert best < float(value["small"].mean()) and best < float(value["large"].mean())
    # with it every step is exact in law, so the bound is tight on average
    gap = value["optimal"] + data.log_prob(x)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(4000)


# --- batches, arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [VPSDE(), VPSDE().discretize(60)], ids=["continuous", "chain"])
def test_a_sample_does_not_know_its_batch_mates(law):
    x = MIXTURE.sample(5, torch.Generator().manual_seed(0), torch.float64)
    rev = MIXTURE.reverse(law)
    together = elbo(rev, x, times=20, rng=[1, 2, 3, 4, 5])
    seen = []
    counted = ReverseSDE(law, lambda v, k: seen.append(len(v)) or rev.network(v, k), rev.parameterization)
    elbo(counted, x, times=20, rng=0, batch_rows=2)
    assert max(seen) == 2
    for rows in (1, 7, 33):
        torch.testing.assert_close(elbo(rev, x, times=20, rng=[1, 2, 3, 4, 5], batch_rows=rows).nats, together.nats)
    alone = elbo(rev, x[3:4], times=20, rng=[4])
    torch.testing.assert_close(alone.nats[0], together.nats[3])
    torch.testing.assert_close(alone.standard_error[0], together.standard_error[3])


def test_integers_dequantized_uniformly():
    """The bound of the density at k + u is on average that of the density itself, for an exact score."""
    law = VPSDE(t_min=1e-4)

    class Exact(torch.nn.Module):
        def forward(self, x, noise_level):
            return LINE.reverse(law)(x, law.knot(noise_level, ndim=x.ndim)).v

    model = ScoreModel(Exact(), law, "v", "time", SPEC, 1.0, "none").double()
    k = torch.tensor([[5], [12]]).repeat(300, 1)
    result = elbo_of_data(model, k, times=256)
    assert "dequantized uniformly" in result.what
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    want = -LINE.log_prob(CODEC.encode(SPEC.dequantize(k[:2], u, torch.float64)).reshape(-1, 1)).reshape(2, -1).mean(1)
    want = (want + math.log(CODEC.scale)) / math.log(2)
    figures = result.per_sample.reshape(300, 2)
    assert ((figures.mean(0) - want).abs() < 4 * figures.std(0) / math.sqrt(300) + 0.005).all()


def test_data_sets_are_whole_and_in_bits():
    law = VPSDE(t_min=1e-4)

    class Exact(torch.nn.Module):
        def forward(self, x, noise_level):
            return MIXTURE.reverse(law)(x, law.knot(noise_level, ndim=x.ndim)).v

    model = ScoreModel(Exact(), law, "v", "time", DataSpec((2,)), 1.0, "none", codec=Affine((2,), 1.0, 2.0)).double()
    z = model.decode(MIXTURE.sample(7, torch.Generator().manual_seed(0), torch.float64))
    first, second = (elbo_of_data(model, z, batch_size=b, times=512) for b in (7, 3))
    torch.testing.assert_close(first.per_sample, second.per_sample, rtol=1e-5, atol=1e-5)
    want = -(MIXTURE.log_prob(model.encode(z, dtype=torch.float64)) - 2 * math.log(2.0)) / (2 * math.log(2))
    assert ((first.per_sample - want).abs() < 5 * first.sample_error + 0.01).all()


def test_bad_arguments_are_refused():
    rev = MIXTURE.reverse(VPSDE())
    x = torch.zeros(2, 2)
    for options, message in (
        ({"times": 7}, "even"),
        ({"times": None}, "chain"),
        ({"draws": 1}, "draws"),
        ({"variance": "medium"}, "small, large"),
        ({"batch_rows": 0}, "batch_rows"),
    ):
        with pytest.raises(ValueError, match=message):
            elbo(rev, x, **options)
    with pytest.raises(TypeError, match="ReverseSDE"):
        elbo(MIXTURE, x)
    with pytest.raises(ValueError, match="NaN"):
        elbo(rev, x * math.nan)
    with pytest.raises(ValueError, match="middles of the bins"):
        elbo(LINE.reverse(VPSDE()), torch.tensor([[0.1]]), data_spec=SPEC)
    model = ScoreModel(torch.nn.Identity(), VPSDE(), "v", "time", SPEC, 1.0, "none")
    with pytest.raises(ValueError, match="auto, none or uniform"):
        elbo_of_data(model, torch.zeros(2, 1, dtype=torch.int64), dequantization="normal")
    for options, message in (
        ({"condition": [0, 1]}, "must be a mapping"),
        ({"condition": {"class_label": torch.zeros(3)}}, "a row per sample at every depth, 2"),
        ({"time": 8}, "Did you mean 'times'"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            elbo_of_data(model, torch.zeros(2, 1, dtype=torch.int64), **options)
    with pytest.raises(TypeError, match="needs a ScoreModel"):
        elbo_of_data(rev, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log variance like x"):
        elbo(MIXTURE.reverse(VPSDE().discretize(50)), x, variance=lambda v, k: v[:, 0])
