"""Probe vectors and the divergence: unbiased, with the variance that is claimed, against matrices known in full."""

import math

import pytest
import torch
from scipy.special import stdtrit

from scoresde.likelihood import (
    PROBES,
    BasisProbes,
    CosineProbes,
    DilutedProbes,
    GaussianProbes,
    HaarProbes,
    RademacherProbes,
    divergence,
)
from scoresde.likelihood.divergence import Traces
from scoresde.likelihood.pool import Pool
from scoresde.likelihood.probes import as_probes, cosine_matrix, haar_matrix
from scoresde.networks import NETWORKS

SHAPE = (3, 4, 4)
D = math.prod(SHAPE)


def matrix(seed=0):
    """Smooth along the pixels, correlated over channels, not symmetric."""
    g = torch.Generator().manual_seed(seed)
    c, h = torch.arange(3.0, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    near = torch.exp(-(h[:, None] - h).abs() / 2)
    a = torch.kron(torch.kron(torch.exp(-(c[:, None] - c).abs() / 5), near), near)
    return a + 0.05 * torch.randn(D, D, generator=g, dtype=torch.float64)


def estimates(probes, a, n=20_000):
    z = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return sum(((v.flatten(1) @ a.T) * v.flatten(1)).sum(1) for v in probes.group(z))


def expected_variance(probes, a):
    """The formulas of the module's docstring, from the full matrix."""
    s = (a + a.T) / 2
    if isinstance(probes, GaussianProbes):
        return 2 * s.square().sum()
    if isinstance(probes, DilutedProbes):
        eye = torch.zeros(1, *SHAPE, dtype=torch.float64)
        colours = torch.stack([v.abs().flatten() for v in probes.group(eye + 1.0)])
        same = colours.T @ colours
        return 2 * (same * s.square()).sum() - 2 * s.diagonal().square().sum()
    u = torch.eye(D, dtype=torch.float64)
    if isinstance(probes, CosineProbes | HaarProbes):
        side = cosine_matrix(4) if isinstance(probes, CosineProbes) else haar_matrix(4)
        u = torch.kron(torch.kron(cosine_matrix(3), side), side)
    if isinstance(probes, BasisProbes):
        u = probes.matrix
    r = u @ s @ u.T
    return 2 * (r.square().sum() - r.diagonal().square().sum())


def every_kind():
    q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return [*(kind() for kind in PROBES.values()), DilutedProbes(2), DilutedProbes(2, channels=False), BasisProbes(q)]


@pytest.mark.parametrize("probes", every_kind(), ids=lambda p: type(p).__name__)
def test_unbiased_with_the_stated_variance(probes):
    a = matrix()
    got, variance = estimates(probes, a), float(expected_variance(probes, a))
    assert abs(got.mean() - a.trace()) < 4 * math.sqrt(variance / len(got)) + 1e-9
    # the estimates' kurtosis is below 15 here: the variance of 20,000 is known to 3 %
    assert abs(got.var() / max(variance, 1e-12) - 1) < 0.12 or variance < 1e-9


def test_the_data_basis_and_dilution_pay():
    """What they are for: less variance than pixel signs where the Jacobian is smooth, by the formulas alone."""
    a = matrix()
    kinds = (RademacherProbes(), CosineProbes(), HaarProbes(), DilutedProbes(2))
    signs, cosine, haar, diluted = (float(expected_variance(p, a)) for p in kinds)
    assert cosine < signs / 10 and haar < signs / 5
    # 12 products an estimate: less than 12 estimates by signs leave
    assert diluted < signs / kinds[-1].size(SHAPE)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8])
def test_bases_are_orthonormal(n):
    for basis in (cosine_matrix(n), haar_matrix(n)):
        torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64))
    if n == 8:  # constant first, then differences of halves, quarters, neighbours
        torch.testing.assert_close(haar_matrix(8)[0], torch.full((8,), 8**-0.5, dtype=torch.float64))
        assert (haar_matrix(8) != 0).sum(1).tolist() == [8, 8, 4, 4, 2, 2, 2, 2]


def test_principal_components_diagonalize_the_jacobian_of_gaussian_data():
    """For Gaussian data the denoiser's Jacobian has the eigenvectors of the covariance: no variance is left."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=g, dtype=torch.float64)
    data = torch.randn(4000, 5, generator=g, dtype=torch.float64) @ root
    cov = torch.cov(data.T)
    jacobian = cov @ torch.linalg.inv(cov + torch.eye(5))
    _, trace, error, _ = divergence(
        lambda v: v @ jacobian.T, data[:6], "hutchinson", probes=BasisProbes.principal(data), num_probes=4, rng=0
    )
    torch.testing.assert_close(trace, jacobian.trace().expand(6))
    assert float(error.max()) < 1e-9


def test_exact_divergence_is_the_trace_of_the_jacobian():
    def fn(v):
        return torch.sin(v) * v.roll(1, -1) + v.sum((1, 2), keepdim=True) ** 2

    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for chunk in (1, 3, 16):
        value, trace, error, vjps = divergence(fn, x, chunk=chunk)
        torch.testing.assert_close(value, fn(x))
        assert vjps == 8 and (error == 0).all()
        for i in range(3):
            jacobian = torch.func.jacrev(lambda v: fn(v[None])[0])(x[i]).reshape(8, 8)
            torch.testing.assert_close(trace[i], jacobian.trace())


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_networks_with_attention(name):
    """Batched products of the exact trace, and gradients of a trace, which torch's fused attention does not know: equal
    to products one by one, and to central differences."""
    torch.manual_seed(0)
    options = {"dit": {"width": 16, "depth": 1, "heads": 2}, "unet": {"channels": 8, "multipliers": (1,)}}[name]
    net = NETWORKS[name]((1, 4, 4), **options).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    noise_level = torch.tensor([3.0, 500.0], dtype=torch.float64)

    def fn(y):
        return net(y, noise_level)

    together, alone = (divergence(fn, x, "exact", chunk=chunk).trace for chunk in (16, 1))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)
    along = torch.randn_like(x)
    y = x.clone().requires_grad_()
    # one by one: torch cannot differentiate batched products through a group norm
    (gradient,) = torch.autograd.grad(divergence(fn, y, "exact", chunk=1, differentiable=True).trace.sum(), y)
    step = 1e-5
    ahead, behind = (divergence(fn, x + s * along, "exact").trace.sum() for s in (step, -step))
    torch.testing.assert_close((gradient * along).sum(), (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("probes", every_kind(), ids=lambda p: type(p).__name__)
def test_the_standard_error_is_that_of_the_law(probes):
    """2000 points, a symmetric Jacobian: on average the variance is that of the formulas. By signs two estimates know
    it better than two sums: those are off by 140 % for normal ones."""
    a, k = (matrix() + matrix().T) / 2, 2
    x = torch.zeros(2000, *SHAPE, dtype=torch.float64)
    _, _, error, vjps = divergence(
        lambda v: (v.flatten(1) @ a.T).reshape(v.shape), x, "hutchinson", probes=probes, num_probes=k, rng=0
    )
    assert vjps == k * probes.size(SHAPE)
    got, want = k * error.square(), float(expected_variance(probes, a))
    scatter = float(got.std())
    assert abs(float(got.mean()) - want) < 4 * scatter / math.sqrt(len(got)) + 1e-9
    assert isinstance(probes, GaussianProbes) or scatter < want + 1e-9


def jacobian_of(kind, d=24):
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    coupled = torch.zeros(d, d, dtype=torch.float64)
    coupled[0, 1] = coupled[1, 0] = 1.0
    return {"rank one": torch.ones_like(a), "full": a + a.T, "not symmetric": a, "one coupling": coupled}[kind]


@pytest.mark.parametrize("kind", ["rank one", "full", "not symmetric", "one coupling"])
def test_bars_of_a_few_estimates_cover(kind):
    """Sums over four knots, 3000 cases: 95 % bars cover 93 to 98 % (binomial standard deviation 0.4 %) with 2, 4 and 6
    estimates per knot, and the variance is known to 5 %. Without symmetry, where half of it is noise, it is too large
    by E max(0, 1 - y) = 0.27 with two estimates, y a mean of four squares of normals. With 4, bars from the scatter of
    the sums miss 9 % at rank one: their skewness is that of a sum of 16 squares, 0.7."""
    n, a = 3000, jacobian_of(kind)
    d, g = len(a), torch.Generator().manual_seed(0)
    for k in (2, 4, 6):
        z = torch.sign(torch.randn(4, n, k, d, generator=g, dtype=torch.float64))
        shares = z * (z @ a)
        sums = shares.sum(3)
        plain = [Traces(t).squares(0, k) for t in sums]
        told = [Traces(t, *both).squares(0, k) for t, *both in zip(sums, z, shares, strict=True)]
        error = (sums.mean(2) - a.trace()).sum(0)
        covered = []
        for found in (told, plain):
            variance, dof = Pool(list(sums.mean(2)), found, float(k)).variance([1.0] * 4)
            bar = torch.from_numpy(stdtrit(dof.clamp(max=1e9).numpy(), 0.975)) * variance.sqrt()
            covered.append(float((error.abs() <= bar).double().mean()))
            if found is told:
                assert 0.95 < float(variance.mean() / error.var()) < (1.34 if kind == "not symmetric" else 1.06)
        assert 0.93 < covered[0] < 0.98, (k, covered)
        assert covered[1] < 0.92 or kind != "rank one" or k != 4


def test_pooled_estimates_are_those_of_one_sample():
    """Means to rounding; the scatter of the parts and of their means adds up to that of all (exactly so for sums)."""
    t = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [Pool([t[:, i:j].mean(1)], [Traces(t).squares(i, j)], float(j - i)) for i, j in ((0, 3), (3, 4), (4, 7))]
    got = parts[0].joined(parts[1]).joined(parts[2])
    whole = Pool([t.mean(1)], [Traces(t).squares(0, 7)], 7.0)
    torch.testing.assert_close(got.means, whole.means)
    torch.testing.assert_close(got.squares, whole.squares)
    for a, b in zip(got.variance([2.0]), (4 * t.var(1) / 7, torch.full((5,), 6.0, dtype=torch.float64)), strict=True):
        torch.testing.assert_close(a, b)


def test_differentiable_traces():
    """The gradient of the trace of a field with a known Jacobian, through the exact trace and through probes."""
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for method in ("exact", "hutchinson"):
        trace = divergence(lambda v: v**3, x, method, rng=0, differentiable=True).trace
        (grad,) = torch.autograd.grad(trace.sum(), x)  # trace = sum 3 x^2, and probes of signs see the diagonal exactly
        torch.testing.assert_close(grad, 6 * x.detach())


def test_a_field_that_ignores_its_input():
    _, trace, _, _ = divergence(lambda v: torch.ones_like(v), torch.zeros(2, 3))
    assert (trace == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exat"}, "exact"),
        ({"num_probes": 0}, "num_probes"),
        ({"chunk": 0}, "chunk"),
        ({"method": "hutchinson", "probes": "rademacker"}, "Did you mean 'rademacher'"),
        ({"method": "hutchinson", "probes": BasisProbes(torch.eye(3))}, r"\(2, 2\)"),
        ({"method": "hutchinson", "probes": BasisProbes(2 * torch.eye(2))}, "orthogonal"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        divergence(lambda v: v, torch.zeros(1, 2), **options)
    with pytest.raises(ValueError, match="shape"):
        divergence(lambda v: v[:1], torch.zeros(2, 2))
    with pytest.raises(ValueError, match="block"):
        DilutedProbes(0)
    with pytest.raises(TypeError, match="Probes"):
        as_probes(3, (2,))
