"""Codes of the probability-flow ODE against the closed form for Gaussians, and there and back."""

import pytest
import torch

from scoresde import SDES, VPSDE, GaussianMixture, decode, encode, interpolate, log_likelihood
from solvers import Ancestral, Heun, TorchDiffEq

DATA = GaussianMixture([[0.3, -0.2, 0.1]], std=0.6)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "edm", "flow", "cosine"])
def test_the_code_of_a_gaussian_is_known(name):
    """The ODE keeps the standard score: z = alpha_T mu + s_T (x - alpha mu) / s, and decoding leads back."""
    sde = SDES[name]()
    rev = DATA.reverse(sde)
    first, last = sde.knot(sde.t_min), sde.knot(sde.t_max)
    x = float(first.alpha) * DATA.sample(8, torch.Generator().manual_seed(0), torch.float64)
    std = [float(k.alpha**2 * 0.36 + k.sigma**2) ** 0.5 for k in (first, last)]
    want = last.alpha * DATA.mean + (x - first.alpha * DATA.mean) * std[1] / std[0]
    z = encode(rev, x, tol=1e-9)
    torch.testing.assert_close(z, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decode(rev, z, tol=1e-9), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_likelihood(rev, x, tol=1e-4).latent, want, rtol=1e-5, atol=1e-4)


def test_any_deterministic_solver():
    rev = DATA.reverse(VPSDE())
    x = DATA.sample(4, torch.Generator().manual_seed(0), torch.float64)
    tight = encode(rev, x, tol=1e-9)
    errors = [float((encode(rev, x, solver=Heun(), steps=n, grid="blended") - tight).abs().max()) for n in (20, 40)]
    assert errors[1] < errors[0] / 3
    z = encode(rev, x, solver=Heun(), steps=200, grid="blended")
    torch.testing.assert_close(decode(rev, z, solver=Heun(), steps=200, grid="blended"), x, rtol=0, atol=1e-3)


def test_interpolation_keeps_the_norm():
    g = torch.Generator().manual_seed(0)
    z_0, z_1 = torch.randn(2, 5, 3, 8, 8, generator=g, dtype=torch.float64)
    z_1 = z_1 * z_0.flatten(1).norm(dim=1)[:, None, None, None] / z_1.flatten(1).norm(dim=1)[:, None, None, None]
    for w in (0.0, 0.3, 1.0, torch.linspace(0, 1, 5)):
        z = interpolate(z_0, z_1, w)
        torch.testing.assert_close(z.flatten(1).norm(dim=1), z_0.flatten(1).norm(dim=1))
    torch.testing.assert_close(interpolate(z_0, z_1, 0.0), z_0)
    torch.testing.assert_close(interpolate(z_0, z_1, 1.0), z_1)
    torch.testing.assert_close(interpolate(z_0, z_0, 0.4), z_0)
    with pytest.raises(ValueError, match="one shape"):
        interpolate(z_0, z_1[:1], 0.5)


def test_what_has_no_code_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="chain"):
        encode(DATA.reverse(VPSDE().discretize(50)), x)
    with pytest.raises(ValueError, match="deterministic"):
        encode(DATA.reverse(VPSDE()), x, solver=Ancestral(), steps=5)
    with pytest.raises(ValueError, match="solver"):
        encode(DATA.reverse(VPSDE()), x, steps=5)


def test_solvers_by_name_and_libraries_that_walk_a_grid():
    """A name, and a library's fixed-step method with as many steps as asked, not one from end to end."""
    data = GaussianMixture([[0.5, -0.2]], std=[0.4])
    rev, x = data.reverse(VPSDE()), data.sample(3, torch.Generator().manual_seed(0), torch.float64)
    want = encode(rev, x, tol=1e-9)
    torch.testing.assert_close(encode(rev, x, solver="dpmpp_3m", steps=200), want, rtol=0, atol=1e-3)
    torch.testing.assert_close(encode(rev, x, solver=TorchDiffEq("rk4"), steps=200), want, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="`steps`"):
        encode(rev, x, solver=TorchDiffEq("rk4"))
