"""Two-sample distances against closed forms, and the Gaussian baseline against torch.distributions."""

import math

import pytest
import torch

from scoresde import DataSpec, energy_distance, gaussian_bits_per_dim, sliced_wasserstein


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
    assert abs(sliced_wasserstein(x, (x + v)[:250], projections=4096) / expected - 1) < 0.15


def test_the_gaussian_baseline_is_the_expected_log_density():
    """Closed form over the dequantization noise against Monte Carlo over the same noise."""
    spec = DataSpec.integers((3,), 9)
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
