"""Two-sample distances against closed forms, and the Gaussian baseline against torch.distributions."""

import math

import pytest
import torch
from scipy.stats import wasserstein_distance

from scoresde import (
    DataSpec,
    energy_distance,
    energy_distance_error,
    frechet_distance,
    gaussian_bits_per_dim,
    mmd2,
    sliced_wasserstein,
)
from scoresde.metrics import FEATURES, METRICS, _gaps, _quantile_coupling


def normal(n, d, seed, mean=0.0):
    return mean + torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_energy_distance_of_two_shifted_gaussians():
    """In one dimension 2 E|X - Y| - E|X - X'| - E|Y - Y'| has a closed form for N(0, 1) and N(m, 1)."""
    m, n = 1.0, 3000
    folded = math.sqrt(2) * math.sqrt(2 / math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)  # E|N(m, 2)|
    exact = 2 * folded - 2 * math.sqrt(4 / math.pi)
    # standard error of a two-sample U-statistic of scale one at n = 3000: about 2 / sqrt(n)
    assert abs(energy_distance(normal(n, 1, 0), normal(n, 1, 1, m)) - exact) < 4 * 2 / math.sqrt(n)
    assert abs(energy_distance(normal(n, 1, 0), normal(n, 1, 2))) < 4 * 2 / math.sqrt(n)


def test_sliced_wasserstein_of_a_shift():
    """A shift by v moves the projection on a direction by its component along it: root mean square |v| / sqrt(d)."""
    x = normal(500, 3, 0)
    v = torch.tensor([0.6, -0.8, 2.0], dtype=torch.float64)
    expected = float(v.norm()) / math.sqrt(3)
    assert abs(sliced_wasserstein(x, x + v, projections=4096) / expected - 1) < 0.05
    assert sliced_wasserstein(x, x.flip(0)) == 0.0


@pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 4), (7, 5), (2, 9)])
def test_wasserstein_distance_of_samples_of_unequal_sizes(n, m):
    """On a line it is exact: repeated until both have lcm(n, m) points, sorted samples are matched one to one."""
    x, y = normal(n, 1, 0), 2 * normal(m, 1, 1, 1.0)
    whole = math.lcm(n, m)
    a, b = (v.repeat_interleave(whole // len(v), 0).sort(0).values for v in (x, y))
    exact = float((a - b).square().mean().sqrt())
    assert sliced_wasserstein(x, y) == pytest.approx(exact, rel=1e-12)
    assert sliced_wasserstein(y, x) == pytest.approx(exact, rel=1e-12)
    of_x, of_y, mass = _quantile_coupling(n, m)
    first = float(mass @ (x.sort(0).values[of_x] - y.sort(0).values[of_y]).abs().flatten())
    assert first == pytest.approx(wasserstein_distance(x.flatten(), y.flatten()), rel=1e-12)
    assert sliced_wasserstein(x, x.repeat(3, 1)) == 0.0  # one empirical law


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [60, 45])
def test_moving_both_samples_changes_nothing(metric, m):
    """The only rounding is that of the moved data, at 2^13 at most 1e-12 in each of forty coordinates.

    Distances, and their squares where values are of order one, change by a few times the sum of these.
    """
    x, y = normal(60, 40, 0), normal(m, 40, 1, 0.5)
    distance = METRICS[metric]
    offset = 2.0**13
    assert distance(x + offset, y + offset) == pytest.approx(distance(x, y), abs=2 * 40 * 1e-12)
    assert float(_gaps(x + offset, x + offset).diagonal().max()) == 0.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_not_finite_are_refused(metric, bad):
    x, y = normal(20, 2, 0), normal(20, 2, 1)
    y[3, 1] = bad
    for pair, name in (((x, y), "`y`"), ((y, x), "`x`")):
        with pytest.raises(ValueError, match=f"1 of 20 samples of {name}"):
            METRICS[metric](*pair)


@pytest.mark.parametrize("h", [0.7, 2.0])
def test_kernel_distance_of_two_gaussians(h):
    """E k for N(0, I) and N(m, I) under the Gaussian kernel: (h^2 / (h^2 + 2))^(d / 2) exp(-|m|^2 / (2 (h^2 + 2)))."""
    n, d, m = 3000, 2, 0.8
    factor = (h * h / (h * h + 2)) ** (d / 2)
    exact = 2 * factor * (1 - math.exp(-d * m * m / (2 * (h * h + 2))))
    # the standard error of a U-statistic of a kernel bounded by one is below 2 / sqrt(n)
    assert abs(mmd2(normal(n, d, 0), normal(n, d, 1, m), bandwidth=h) - exact) < 4 * 2 / math.sqrt(n) * 0.5
    values = [mmd2(normal(200, d, s), normal(200, d, 100 + s), bandwidth=h) for s in range(40)]
    mean, se = sum(values) / 40, torch.tensor(values).std() / math.sqrt(40)
    assert abs(mean) < 4 * float(se) and min(values) < 0  # unbiased around zero


def test_polynomial_kernel_distance():
    """(x y / d + 1)^3 sees the first three moments: its expectation over products of moments, in one dimension."""
    x, y = normal(4000, 1, 0), normal(4000, 1, 1, 0.5)

    def expected(a: list[float], b: list[float]) -> float:
        return sum(math.comb(3, k) * a[k] * b[k] for k in range(4))

    zero, half = [1.0, 0.0, 1.0, 0.0], [1.0, 0.5, 1.25, 0.125 + 1.5]
    exact = expected(zero, zero) + expected(half, half) - 2 * expected(zero, half)
    assert mmd2(x, y, kernel="polynomial") == pytest.approx(exact, rel=0.15)


def test_blocks_do_not_change_a_distance():
    """More samples than one block of rows: against all pairs at once."""
    x, y = normal(1500, 2, 0), normal(1300, 2, 1, 0.3)
    within = [torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in (x, y)]
    exact = float(2 * torch.cdist(x, y).mean() - within[0] - within[1])
    assert energy_distance(x, y) == pytest.approx(exact, rel=1e-9)


def test_frechet_distance_of_known_moments():
    """Samples whitened to exact means and covariances: the closed form, with commuting and other covariances."""
    g = torch.Generator().manual_seed(0)

    def with_moments(n: int, mean, cov) -> torch.Tensor:
        z = torch.randn(n, 3, generator=g, dtype=torch.float64)
        z = z - z.mean(0)
        z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T)).T)
        return z @ torch.linalg.cholesky(cov).T + mean

    a, b = (torch.randn(3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    a, b = a @ a.T + 0.1 * torch.eye(3), b @ b.T + 0.1 * torch.eye(3)
    m = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).sqrt().sum()
    exact = float(m.square().sum() + torch.trace(a) + torch.trace(b) - 2 * cross)
    x, y = with_moments(60, torch.zeros(3), a), with_moments(80, m, b)
    assert frechet_distance(x, y) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(x, x + m) == pytest.approx(float(m.square().sum()), rel=1e-9)
    assert frechet_distance(x, x.flip(0)) < 1e-12
    first = x[:, 0]
    assert frechet_distance(x, 2 * x, lambda v: v[:, :1]) == pytest.approx(float(first.mean() ** 2 + first.var()))
    collinear = torch.cat([x, x.sum(1, keepdim=True)], 1)
    assert frechet_distance(collinear, collinear + 1.0) == pytest.approx(4.0, rel=1e-9)


def test_features_and_what_is_refused():
    """Named features, functions, too few samples, features of the wrong length."""
    x, y = normal(200, 4, 0), normal(200, 4, 1)
    same, far = (frechet_distance(x, v, "random_relu") for v in (y, 3 * y))
    assert set(FEATURES) == {"identity", "random_relu"} and far > 5 * same
    assert set(METRICS) == {"sliced_wasserstein", "energy_distance", "mmd2", "frechet_distance"}
    for bad, says in (
        (lambda: frechet_distance(x[:4], y), "at least 5 samples"),
        (lambda: frechet_distance(x, y, "inception"), "features"),
        (lambda: frechet_distance(x, y, lambda v: v[:1]), "rows"),
        (lambda: mmd2(x, y, kernel="laplace"), "kernel"),
        (lambda: mmd2(x, y, bandwidth=0.0), "bandwidth"),
        (lambda: mmd2(x, torch.zeros(5, 4)), "median"),
    ):
        with pytest.raises(ValueError, match=says):
            bad()
    with pytest.raises(TypeError, match="function"):
        frechet_distance(x, y, 3)


def test_the_gaussian_baseline_is_the_expected_log_density():
    """Closed form over the dequantization noise against Monte Carlo over the same noise."""
    spec = DataSpec((3,), 9)
    generator = torch.Generator().manual_seed(0)
    train, held = (torch.randint(0, 9, (n, 3), generator=generator) for n in (400, 50))
    bits, error = gaussian_bits_per_dim(train, held, spec)
    centred = train.double() + 0.5
    cov = torch.cov(centred.T, correction=0) + torch.eye(3) / 12
    density = torch.distributions.MultivariateNormal(centred.mean(0), cov)
    u = torch.rand(20_000, 50, 3, generator=generator, dtype=torch.float64)
    expected = -density.log_prob(held + u).mean(0) / (3 * math.log(2))
    assert abs(bits - float(expected.mean())) < 1e-3
    assert abs(error - float(expected.std() / math.sqrt(50))) < 1e-3


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        energy_distance(torch.zeros(3, 2), torch.zeros(3, 4))


def test_the_bootstrap_error_is_the_scatter_of_the_distance():
    """Two normal laws, 120 independent pairs of samples: the mean reported error against the deviation that the
    distances have. The deviation of 120 numbers is known to 1 / sqrt(240) = 6.5 %."""
    g = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(90, 3, generator=g, dtype=torch.float64) + 0.6, torch.randn(60, 3, generator=g).double())
        for _ in range(120)
    ]
    scatter = float(torch.tensor([energy_distance(x, y) for x, y in pairs]).std())
    reported = [energy_distance_error(x, y, draws=60) for x, y in pairs]
    assert abs(sum(reported) / len(reported) / scatter - 1.0) < 3 * 0.065
    assert energy_distance_error(*pairs[0], draws=60) == reported[0]
