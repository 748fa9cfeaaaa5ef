"""The ground truth of the project against torch.distributions, autograd and Monte Carlo."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import EPS, SDE_NAMES, make_sde, times_of
from torch import Tensor
from torch.distributions import MultivariateNormal

from sde_lib import DATA, GaussianMixture, Knot

every_sde = pytest.mark.parametrize("name", SDE_NAMES)
SHAPES = [(), (1,), (3,), (2, 2, 2)]


def spd(k: int, d: int, seed: int = 0) -> Tensor:
    """Random covariances with eigenvalues between 0.05 and 1."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(k, d, d, generator=generator, dtype=torch.float64)).Q
    values = 0.05 + 0.95 * torch.rand(k, d, generator=generator, dtype=torch.float64)
    covariances = (q * values[:, None, :]) @ q.mT
    return 0.5 * (covariances + covariances.mT)


def make(kind: str, shape: tuple[int, ...], k: int = 3) -> tuple[GaussianMixture, Tensor, Tensor, Tensor]:
    """A mixture, and its (means, covariances, weights) on flat data."""
    d = max(math.prod(shape), 1)
    generator = torch.Generator().manual_seed(d)
    means = torch.randn(k, *shape, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    if kind == "iso":
        std = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
        covariances = std[:, None, None] ** 2 * torch.eye(d, dtype=torch.float64)
        return GaussianMixture(means, std=std, weights=weights), means.reshape(k, d), covariances, weights
    if kind == "diag":
        std = 0.1 + torch.rand(k, *shape, generator=generator, dtype=torch.float64)
        covariances = torch.diag_embed(std.reshape(k, d) ** 2)
        return GaussianMixture(means, std=std, weights=weights), means.reshape(k, d), covariances, weights
    covariances = spd(k, d)
    mixture = GaussianMixture(means, covariances=covariances, weights=weights)
    return mixture, means.reshape(k, d), covariances, weights


def reference_log_prob(x: Tensor, knot: Knot, means: Tensor, covariances: Tensor, weights: Tensor) -> Tensor:
    """log sum_k w_k N(x; alpha mu_k, alpha^2 C_k + sigma^2 I) through Cholesky factors."""
    alpha, sigma = float(knot.alpha), float(knot.sigma)
    eye = torch.eye(means.shape[1], dtype=torch.float64)
    law = MultivariateNormal(alpha * means, alpha**2 * covariances + sigma**2 * eye)
    return torch.logsumexp(law.log_prob(x.reshape(len(x), 1, -1)) + weights.log(), 1)


def points(mixture: GaussianMixture, knot: Knot, n: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x_0 = mixture.sample(n, generator, torch.float64)
    return knot.alpha * x_0 + knot.sigma * torch.randn(x_0.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["iso", "diag", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SDE_NAMES)
def test_log_prob_and_score(name, shape, kind):
    """log p_t against MultivariateNormal, the score against autograd of that, at both ends and between."""
    mixture, means, covariances, weights = make(kind, shape)
    sde = make_sde(name)
    for knot in (sde.knot(sde.t_min), sde.knot(0.4 * sde.t_max), sde.knot(sde.t_max)):
        x = points(mixture, knot).requires_grad_(True)
        want = reference_log_prob(x, knot, means, covariances, weights)
        (score,) = torch.autograd.grad(want.sum(), x)
        got = mixture.log_prob(x, knot)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(mixture.score(x.detach(), knot), score, rtol=1e-9, atol=1e-10)
        (own,) = torch.autograd.grad(got.sum(), x)
        torch.testing.assert_close(own, score, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["iso", "diag", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_density_of_the_data(shape, kind):
    """Without a knot: the law of x_0 itself."""
    mixture, means, covariances, weights = make(kind, shape)
    x = mixture.sample(7, torch.Generator().manual_seed(1), torch.float64)
    torch.testing.assert_close(
        mixture.log_prob(x), reference_log_prob(x, DATA, means, covariances, weights), rtol=1e-12, atol=1e-12
    )


@every_sde
@pytest.mark.parametrize("kind", ["iso", "diag", "full"])
def test_reverse_is_the_exact_posterior(name, kind):
    """data = E[x_0 | x] and noise = E[eps | x], from conditioning every component; on the SDE and on its chain."""
    mixture, means, covariances, weights = make(kind, (3,))
    sde = make_sde(name)
    chain = sde.discretize(25)
    eye = torch.eye(3, dtype=torch.float64)
    for law, knot in [(sde, sde.knot(t)) for t in times_of(sde, 3)] + [(chain, k) for k in chain.levels[::6]]:
        x = points(mixture, knot)
        prediction = mixture.reverse(law)(x, knot)
        total = knot.alpha**2 * covariances + knot.sigma**2 * eye
        joint = MultivariateNormal(knot.alpha * means, total).log_prob(x[:, None]) + weights.log()
        r = torch.softmax(joint, 1)[..., None]
        white = torch.linalg.solve(total, (x[:, None] - knot.alpha * means)[..., None])
        data = (r * (means + knot.alpha * (covariances @ white)[..., 0])).sum(1)
        noise = (r * knot.sigma * white[..., 0]).sum(1)
        scale = float(data.abs().max() + noise.abs().max())
        # data of a v prediction: alpha x - sigma v over alpha^2 + sigma^2; its terms are as large as x
        big = scale + float(x.abs().max()) / float(knot.alpha**2 + knot.sigma**2) ** 0.5
        torch.testing.assert_close(prediction.data, data, rtol=1e-9, atol=1e-11 * big)
        torch.testing.assert_close(prediction.noise, noise, rtol=1e-9, atol=1e-11 * big)
        torch.testing.assert_close(prediction.score * knot.sigma, -noise, rtol=1e-9, atol=1e-11 * big)


@pytest.mark.parametrize("kind", ["iso", "diag", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(shape, kind):
    """mean and covariance by the law of total variance, and against 200 000 samples within 5 standard errors."""
    mixture, means, covariances, weights = make(kind, shape)
    d = means.shape[1]
    mean = (weights[:, None] * means).sum(0)
    second = (weights[:, None, None] * (covariances + means[:, :, None] * means[:, None, :])).sum(0)
    torch.testing.assert_close(mixture.mean.reshape(d), mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mixture.covariance, second - mean[:, None] * mean, rtol=1e-11, atol=1e-13)
    n = 200_000
    x = mixture.sample(n, torch.Generator().manual_seed(2), torch.float64)
    assert x.shape == (n, *shape)
    flat = x.reshape(n, d) - mean
    assert bool((flat.mean(0).abs() < 5 * flat.std(0) / math.sqrt(n)).all())
    products = flat[:, :, None] * flat[:, None, :]
    error = (products.mean(0) - mixture.covariance).abs()
    assert bool((error < 5 * products.std(0) / math.sqrt(n)).all())


def test_components_are_drawn_with_their_weights():
    """Counts of well separated components within 5 standard deviations of the multinomial."""
    weights = [0.05, 0.7, 0.25]
    mixture = GaussianMixture([-10.0, 0.0, 10.0], std=0.1, weights=weights)
    n = 100_000
    x = mixture.sample(n, torch.Generator().manual_seed(0))
    for centre, w in zip((-10, 0, 10), weights, strict=True):
        count = int(((x - centre).abs() < 2).sum())
        assert abs(count - n * w) < 5 * math.sqrt(n * w * (1 - w))


def test_isotropic_diagonal_and_full_agree():
    """The same law in three notations: densities, scores and posteriors to rounding."""
    means = torch.tensor([[0.5, -1.0], [1.0, 0.3]], dtype=torch.float64)
    std = torch.tensor([0.4, 0.7], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    laws = [
        GaussianMixture(means, std=std),
        GaussianMixture(means, std=std[:, None].expand(2, 2)),
        GaussianMixture(means, covariances=std[:, None, None] ** 2 * eye),
    ]
    knot = make_sde("vp").knot(0.3)
    x = points(laws[0], knot)
    for law in laws[1:]:
        torch.testing.assert_close(law.log_prob(x, knot), laws[0].log_prob(x, knot), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(law.score(x, knot), laws[0].score(x, knot), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(law.covariance, laws[0].covariance, rtol=1e-13, atol=1e-15)
    one = GaussianMixture(means, std=0.4)
    both = GaussianMixture(means, std=[0.4, 0.4])
    torch.testing.assert_close(one.log_prob(x, knot), both.log_prob(x, knot), rtol=0, atol=0)


@every_sde
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_per_sample_knots_equal_float_knots(name, shape):
    """Row i at its own time is the batch-of-one result at that time."""
    mixture, *_ = make("diag", shape)
    sde = make_sde(name)
    at = [t for t in times_of(sde, 4) if t <= sde.drift_t_max]
    x = torch.randn(len(at), *shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    knot = sde.knot(torch.tensor(at, dtype=torch.float64), ndim=x.ndim)
    rows = mixture.reverse(sde)(x, knot)
    log_prob, score = mixture.log_prob(x, knot), mixture.score(x, knot)
    for i, t in enumerate(at):
        one = sde.knot(t)
        torch.testing.assert_close(log_prob[i : i + 1], mixture.log_prob(x[i : i + 1], one), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(score[i : i + 1], mixture.score(x[i : i + 1], one), rtol=1e-11, atol=1e-12)
        want = mixture.reverse(sde)(x[i : i + 1], one)
        torch.testing.assert_close(rows.raw[i : i + 1], want.raw, rtol=1e-11, atol=1e-12 * (1 + one.sigma))


@pytest.mark.parametrize("kind", ["iso", "diag"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_do_not_depend_on_their_mates(shape, kind, dtype):
    """Bitwise: row i of a batch of 37 is the same alone, in any order and in any smaller batch."""
    mixture, *_ = make(kind, shape)
    sde = make_sde("vp")
    knot = sde.knot(0.37)
    x = torch.randn(37, *shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)
    rev = mixture.reverse(sde)
    whole, log_prob = rev(x, knot).raw, mixture.log_prob(x, knot)
    for rows in ([0], [36], [5, 6], list(range(16)), list(reversed(range(37)))):
        assert torch.equal(rev(x[rows], knot).raw, whole[rows])
        assert torch.equal(mixture.log_prob(x[rows], knot), log_prob[rows])


def test_point_masses():
    """std = 0 is allowed: data on a finite set; the score is that of the noise around it."""
    mixture = GaussianMixture([[1.0], [-1.0]], std=0.0)
    knot = make_sde("vp").knot(0.2)
    x = torch.tensor([[0.3], [2.0]], dtype=torch.float64)
    data = torch.tanh(knot.alpha * x / knot.sigma**2)
    torch.testing.assert_close(mixture.reverse(make_sde("vp"))(x, knot).data, data, rtol=1e-10, atol=1e-12)


def test_weights_are_a_distribution():
    """Float32 weights (a softmax, say) sum to one only to 1e-7: the density must still integrate to one in float64."""
    weights = torch.softmax(torch.linspace(0, 3, 11), 0)
    mixture = GaussianMixture(torch.linspace(-1, 1, 11), std=0.3, weights=weights)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    mass = float(mixture.log_prob(x).exp().sum() * (x[1] - x[0]))
    assert abs(mass - 1.0) < 1e3 * EPS


def test_dtypes_and_far_away():
    """float32 in, float32 out; far from every mode the log density and score stay finite."""
    mixture, *_ = make("iso", (3,))
    knot = make_sde("vp").knot(0.5)
    x = torch.full((2, 3), 1e4)
    assert mixture.log_prob(x, knot).dtype == torch.float32
    assert torch.isfinite(mixture.log_prob(x, knot)).all() and torch.isfinite(mixture.score(x, knot)).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(means=[[0.0]]), "exactly one"),
        (dict(means=[[0.0]], std=1.0, covariances=torch.eye(1)[None]), "exactly one"),
        (dict(means=[[0.0], [1.0]], std=[1.0]), "std"),
        (dict(means=[[0.0], [1.0]], std=-1.0), "std"),
        (dict(means=[[0.0], [1.0]], std=math.nan), "std"),
        (dict(means=[[0.0]], std=1.0, weights=[0.5]), "weights"),
        (dict(means=[[0.0], [1.0]], std=1.0, weights=[0.5, 0.6]), "weights"),
        (dict(means=[[0.0], [1.0]], std=1.0, weights=[1.5, -0.5]), "weights"),
        (dict(means=[[0.0], [1.0]], std=1.0, weights=[1.0]), "weights"),
        (dict(means=[[0.0, 1.0]], covariances=torch.eye(3)[None]), "covariances"),
        (dict(means=[[0.0, 1.0]], covariances=torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])), "symmetric"),
        (dict(means=[[0.0, 1.0]], covariances=torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])), "semi-definite"),
        (dict(means=[[math.nan, 1.0]], std=1.0), "means"),
        (dict(means=[[0.0, 1.0]], covariances=torch.full((1, 2, 2), math.nan)), "covariances"),
    ],
)
def test_bad_mixtures(arguments, says):
    """Shapes, signs and sums are checked at construction."""
    with pytest.raises(ValueError, match=says):
        GaussianMixture(**arguments)


def test_wrong_shape_of_x():
    """x must have the shape of the data."""
    mixture, *_ = make("iso", (3,))
    for x in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match=r"\(B, 3\)"):
            mixture.log_prob(x)
