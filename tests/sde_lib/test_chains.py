"""DDPM and SMLD as discretized SDEs: definitions, posteriors, strides, the limit, and the published code's numbers."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import numpy as np
import pytest
import torch
from oracles import EPS, SDE_NAMES, make_sde, observed_order
from torch.distributions import Normal, kl_divergence

from sde_lib import DATA, VESDE, VPSDE, Chain, CosineVPSDE, TabulatedSDE

every_sde = pytest.mark.parametrize("name", SDE_NAMES)


def exact_ddpm(n: int, beta_min: str = "0.1", beta_max: str = "20") -> tuple[list, list]:
    """betas and cumulative products of 1 - beta in 50 digits."""
    with mp.workdps(50):
        low, high = mp.mpf(beta_min) / n, mp.mpf(beta_max) / n
        betas = [low + (high - low) * i / (n - 1) for i in range(n)]
        products, total = [], mp.mpf(1)
        for beta in betas:
            total *= 1 - beta
            products.append(total)
        return betas, products


# --- DDPM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [30, 1000])
def test_ddpm_definitions(n):
    """betas are linspace(0.1/n, 20/n, n), alpha^2 the cumulative product of 1 - beta, sigma^2 the rest."""
    chain, (betas, products) = VPSDE().discretize(n), exact_ddpm(n)
    for i in range(n):
        lam = abs(float(chain.half_log_snr[i]))
        with mp.workdps(50):
            assert float(abs(chain.alphas_cumprod[i].item() / products[i] - 1)) < 8 * EPS * (1.0 + i**0.5 + 10.0)
            sigma2 = 1 - products[i]
            assert float(abs(chain.sigma[i].item() ** 2 / sigma2 - 1)) < 16 * EPS * (1.0 + i**0.5)
            # beta = sigma_i^2 (1 - e^{2 dlambda}): EPS (1 + |lambda|) of lambda over dlambda ~ beta / (2 sigma^2)
            dlam = float(betas[i] / sigma2)
            assert float(abs(chain.betas[i].item() / betas[i] - 1)) < 64 * EPS * (1.0 + lam) / min(dlam, 1.0)
            assert float(abs(chain.forward_scale[i].item() / mp.sqrt(1 - betas[i]) - 1)) < 64 * EPS


def test_ddpm_posterior():
    """Ho et al. 2020, eqs. 6-7: posterior variance and both coefficients, from exact products."""
    n = 200
    chain, (betas, products) = VPSDE().discretize(n), exact_ddpm(n)
    for i in range(1, n):
        with mp.workdps(50):
            before, now, beta = products[i - 1], products[i], betas[i]
            variance = (1 - before) / (1 - now) * beta
            x_0 = mp.sqrt(before) * beta / (1 - now)
            x_t = mp.sqrt(1 - beta) * (1 - before) / (1 - now)
        assert chain.posterior_std[i].item() == pytest.approx(float(mp.sqrt(variance)), rel=1e-11)
        assert chain.posterior_x_0[i].item() == pytest.approx(float(x_0), rel=1e-11)
        assert chain.posterior_x_t[i].item() == pytest.approx(float(x_t), rel=1e-11)
    assert (chain.posterior_x_t[0], chain.posterior_x_0[0], chain.posterior_std[0]) == (0.0, 1.0, 0.0)


def test_ddpm_needs_more_levels_than_beta_max():
    """1 - beta must stay positive (the published code yields NaN at N = 10 and alpha = 0 at N = 20)."""
    for n in (10, 20):
        with pytest.raises(ValueError, match="beta_max"):
            VPSDE().discretize(n)
    assert VPSDE().discretize(21).n == 21


# --- SMLD -----------------------------------------------------------------------------------------------------------


def test_smld_definitions():
    """Geometric levels from sigma_min to sigma_max; step variances sigma_i^2 - sigma_{i-1}^2 with sigma_{-1} = 0."""
    n = 50
    chain = VESDE().discretize(n)
    with mp.workdps(40):
        sigmas = [mp.mpf("0.01") * mp.mpf(5000) ** (mp.mpf(i) / (n - 1)) for i in range(n)]
        steps = [s * s - b * b for b, s in zip([mp.mpf(0), *sigmas[:-1]], sigmas, strict=True)]
        small = [mp.sqrt(b * b * v / (s * s)) for b, s, v in zip([0, *sigmas[:-1]], sigmas, steps, strict=True)]
    for i in range(n):
        assert chain.sigma[i].item() == pytest.approx(float(sigmas[i]), rel=1e-14)
        assert chain.betas[i].item() == pytest.approx(float(steps[i]), rel=1e-13)
        # Song et al. 2021, eq. 47: the ancestral step's standard deviation
        assert chain.posterior_std[i].item() == pytest.approx(float(small[i]), rel=1e-13)
    assert torch.equal(chain.alpha, torch.ones(n, dtype=torch.float64))
    assert torch.equal(chain.forward_scale, torch.ones(n, dtype=torch.float64))
    assert chain.prior_std == 50.0


# --- every chain ----------------------------------------------------------------------------------------------------


@every_sde
def test_chain_kernels_compose_to_its_marginals(name):
    """alpha_i = prod of scales; sigma_i^2 = scale_i^2 sigma_{i-1}^2 + beta_i, from the data on."""
    chain = make_sde(name).discretize(40)
    alpha, variance = 1.0, 0.0
    for i in range(chain.n):
        scale, beta = float(chain.forward_scale[i]), float(chain.betas[i])
        alpha, variance = alpha * scale, scale * scale * variance + beta
        assert alpha == pytest.approx(float(chain.alpha[i]), rel=1e-12, abs=1e-300)
        assert variance == pytest.approx(float(chain.sigma[i]) ** 2, rel=1e-11)


@every_sde
def test_kl_weights_are_gaussian_kls(name):
    """kl_weights |eps_hat - eps|^2 is the KL between two posteriors whose x_0 differ by sigma/alpha (eps_hat - eps)."""
    chain = make_sde(name).discretize(25)
    assert chain.kl_weights[0] == math.inf
    for i in range(1, chain.n):
        if float(chain.alpha[i]) == 0.0:
            continue
        std, gap = chain.posterior_std[i], chain.posterior_x_0[i] * chain.sigma[i] / chain.alpha[i] * 0.37
        want = kl_divergence(Normal(torch.zeros_like(gap), std), Normal(gap, std))
        torch.testing.assert_close(chain.kl_weights[i] * 0.37**2, want, rtol=1e-11, atol=0)


@every_sde
def test_knots_of_a_chain(name):
    """A level as an int, a 0-d and a (B,) tensor; labels are indices; times and floats are refused."""
    chain = make_sde(name).discretize(30)
    knot = chain.knot(7)
    assert (knot.index, knot.t, knot.alpha) == (7, float(chain.times[7]), float(chain.alpha[7])) and knot.law is chain
    assert chain.knot(torch.tensor(7)) is knot
    rows = chain.knot(torch.tensor([0, 29, 7]), ndim=3)
    assert rows.sigma.shape == (3, 1, 1) and rows.sigma.flatten().tolist() == chain.sigma[[0, 29, 7]].tolist()
    assert rows.index.flatten().tolist() == [0, 29, 7]
    for bad in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
        with pytest.raises(TypeError, match="level"):
            chain.knot(bad)
    for bad in (-1, 30):
        with pytest.raises(ValueError, match=r"0\.\.29"):
            chain.knot(bad)
    for bad in (torch.tensor([0, 30]), torch.tensor([-1, 3])):
        with pytest.raises((ValueError, IndexError)):
            chain.knot(bad)


@every_sde
def test_a_chain_has_no_continuous_time(name):
    """No drift, no diffusion, no velocity, no time between levels: each says what to do instead."""
    chain = make_sde(name).discretize(30)
    rev = chain.reverse(v=lambda x, i: x)
    prediction = rev(torch.ones(2, 3), chain.knot(4))
    for call in (
        lambda: chain.knot(3).f,
        lambda: chain.knot(3).g2,
        lambda: chain.knot(3).rates,
        lambda: chain.knot_at(0.0),
        lambda: prediction.velocity,
        lambda: prediction.drift,
    ):
        with pytest.raises(ValueError, match=r"chain\.continuous"):
            call()
    assert torch.isfinite(prediction.data).all() and torch.isfinite(prediction.score).all()


@every_sde
def test_perturb_and_labels(name):
    """x_i = alpha_i x_0 + sigma_i noise, one level or one per sample; a score function is called with int64 (B,)."""
    chain = make_sde(name).discretize(30)
    x_0, noise = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)).double(), torch.ones(3, 2, 2).double()
    levels = torch.tensor([0, 12, 29])
    got = chain.perturb(x_0, levels, noise)
    for b, i in enumerate(levels.tolist()):
        torch.testing.assert_close(got[b], chain.alpha[i] * x_0[b] + chain.sigma[i] * noise[b])
        torch.testing.assert_close(chain.perturb(x_0, i, noise)[b], got[b])
    assert chain.perturb(x_0.float(), levels).dtype == torch.float32
    seen = []
    rev = chain.reverse(noise=lambda x, i: (seen.append(i), x)[1])
    rev(x_0, chain.knot(5))
    rev(x_0, chain.knot(levels, ndim=3))
    assert seen[0].dtype == torch.int64 and seen[0].tolist() == [5, 5, 5] and seen[1].tolist() == [0, 12, 29]


# --- strides --------------------------------------------------------------------------------------------------------

STRIDES = [(1000, s) for s in (1, 2, 3, 7, 10, 19, 50, 333, 999, 1000)] + [(30, s) for s in range(1, 31)]


def _ties(numerator: int, denominator: int, count: int) -> bool:
    """Whether i numerator / denominator ends in one half for some i < count: there numpy rounds its own round-off."""
    return any(2 * i * numerator % denominator == 0 and 2 * i * numerator // denominator % 2 for i in range(count))


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize(("n", "steps"), STRIDES)
def test_strides(n, steps, spacing):
    """`steps` distinct levels in descending order, then the data; the ends that each spacing promises."""
    chain = _chain(n)
    knots = chain.descend(steps, spacing)
    picked = [k.index for k in knots[:-1]]
    assert len(picked) == steps and knots[-1] is DATA
    assert all(a > b for a, b in itertools.pairwise(picked)) and 0 <= picked[-1] and picked[0] < n
    assert all(k is chain.levels[k.index] for k in knots[:-1])
    if spacing in ("trailing", "linspace"):
        assert picked[0] == n - 1  # starts in the prior, one step included
    if spacing in ("leading", "linspace") and steps > 1:
        assert picked[-1] == 0


@pytest.mark.parametrize(("n", "steps"), STRIDES)
def test_strides_are_the_published_ones(n, steps):
    """Lin et al. 2023, table 2, as diffusers codes it: round(arange(N, 0, -N/S)) - 1; leading: arange(S) (N // S)."""
    chain = _chain(n)
    if not _ties(n, steps, steps):
        trailing = (np.round(np.arange(n, 0, -n / steps)).astype(int) - 1)[:steps]
        assert [k.index for k in chain.descend(steps, "trailing")[:-1]] == trailing.tolist()
    leading = (np.arange(steps) * (n // steps))[::-1]
    assert [k.index for k in chain.descend(steps, "leading")[:-1]] == leading.tolist()
    if steps > 1 and not _ties(n - 1, steps - 1, steps):
        linspace = np.linspace(0, n - 1, steps).round().astype(int)[::-1]
        assert [k.index for k in chain.descend(steps, "linspace")[:-1]] == linspace.tolist()


_CHAINS: dict[int, Chain] = {}


def _chain(n: int) -> Chain:
    if n not in _CHAINS:
        _CHAINS[n] = VPSDE().discretize(n)
    return _CHAINS[n]


def test_bad_strides():
    """Too many or no steps, unknown spacings."""
    chain = _chain(30)
    for steps in (0, -1, 31):
        with pytest.raises(ValueError, match="1 to 30 steps"):
            chain.descend(steps)
    with pytest.raises(ValueError, match="trailing"):
        chain.descend(3, "trailin")


# --- the limit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.2, 0.5, 1.0])
def test_ddpm_converges_to_the_vp_sde(t):
    """log alpha and lambda of level n t - 1 tend to the SDE's at t like 1/n: log(1 - beta) against -beta."""
    sde = VPSDE()
    errors = []
    for n in (400, 800, 1600, 3200):
        chain = sde.discretize(n)
        i = round(n * t) - 1
        assert float(chain.times[i]) == pytest.approx(t, rel=1e-14)
        errors.append(
            (
                abs(math.log(float(chain.alpha[i])) - sde.log_alpha(t)),
                abs(float(chain.half_log_snr[i]) - sde.half_log_snr(t)),
            )
        )
    for quantity in range(2):
        for coarse, fine in itertools.pairwise(errors):
            # the next term of the expansion is O(1/n), so the order is 1 + O(1/n)
            assert observed_order(coarse[quantity], fine[quantity]) == pytest.approx(1.0, abs=0.05)


def test_ddpm_steps_converge_to_drift_and_diffusion():
    """n beta_i -> g^2 and n (scale_i - 1) -> f at rate 1/n, at a fixed time."""
    sde, t, errors = VPSDE(), 0.5, []
    for n in (500, 1000, 2000):
        chain = sde.discretize(n)
        i = round(n * t) - 1
        errors.append(
            (abs(n * float(chain.betas[i]) - sde.g2(t)), abs(n * (float(chain.forward_scale[i]) - 1) - sde.f(t)))
        )
    for quantity in range(2):
        for coarse, fine in itertools.pairwise(errors):
            assert observed_order(coarse[quantity], fine[quantity]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", [n for n in SDE_NAMES if n not in ("vp", "ve")])
def test_other_chains_are_exact_marginals(name):
    """Without a published discretization, levels are the SDE's own marginals at equispaced times, ends included."""
    sde = make_sde(name)
    chain = sde.discretize(11)
    assert chain.times.tolist() == pytest.approx(np.linspace(sde.t_min, sde.t_max, 11).tolist(), rel=1e-14)
    for i, t in enumerate(chain.times.tolist()):
        t = min(max(t, sde.t_min), sde.t_max)
        assert float(chain.alpha[i]) == pytest.approx(sde.alpha(t), rel=1e-12, abs=1e-15)
        assert float(chain.sigma[i]) == pytest.approx(sde.sigma(t), rel=1e-12)
    assert chain.prior_std == sde.prior_std


def test_a_table_goes_through_its_chain():
    """TabulatedSDE(chain.alphas_cumprod) has the chain's alpha and sigma at its knots, and stays close between them."""
    chain = VPSDE().discretize(100)
    sde = TabulatedSDE(chain.alphas_cumprod)
    for i, t in enumerate(sde._times):
        assert sde.alpha(t) == pytest.approx(float(chain.alpha[i]), rel=1e-13)
        # 1 - alpha^2 cancels in a table of alphas_cumprod: EPS / sigma^2
        assert sde.sigma(t) == pytest.approx(float(chain.sigma[i]), rel=4 * EPS / float(chain.sigma[i]) ** 2)
    fine = torch.linspace(sde.t_min, sde.t_max, 2001, dtype=torch.float64)
    assert bool((sde.half_log_snr(fine).diff() < 0).all())
    # between two knots the gap to the SDE is at most the larger gap at them, plus the O(h^3) of the cubic
    vp = VPSDE()
    at_knots = torch.tensor([abs(float(k.half_log_snr) - vp.half_log_snr(k.t)) for k in chain.levels]).double()
    for i in range(10, 99):
        middle = (sde._times[i] + sde._times[i + 1]) / 2
        gap = abs(sde.half_log_snr(middle) - vp.half_log_snr(middle))
        assert gap < float(at_knots[i : i + 2].max()) + 1e-4


def test_chain_construction():
    """Levels must descend in lambda."""
    for lams in ([1.0, 1.0], [0.0, 1.0], [1.0, math.nan], []):
        with pytest.raises(ValueError, match="descending"):
            Chain([0.1 * i for i in range(len(lams))], lams, [1.0] * len(lams), [1.0] * len(lams), 1.0)
    for bad in (0, 1):
        with pytest.raises(ValueError, match="an int >= 2"):
            CosineVPSDE().discretize(bad)


# --- the published code ---------------------------------------------------------------------------------------------


def make_reference(tag: str, params) -> object:
    from sde_lib import SubVPSDE

    a, b = float(params[0]), float(params[1])
    kind = tag.split("_")[0]
    return {"vp": VPSDE, "subvp": SubVPSDE, "ve": VESDE}[kind](a, b)


TAGS = ["vp", "vp_n50", "subvp", "subvp_n50", "ve", "ve_n50"]


@pytest.mark.parametrize("tag", TAGS)
def test_golden_sde(golden, tag):
    """drift, diffusion, kernel, reverse drift and prior of score_sde_pytorch in float64.

    It computes 1 - exp(2 lm) there, off by EPS / sigma^2 relative at small times; ours uses expm1.
    """
    with np.load(golden / "sde.npz") as file:
        keys = ("drift", "diffusion", "mean", "mean_coef", "std", "prior_logp", "rev_drift_pf0", "rev_drift_pf1")
        get = {k: torch.from_numpy(file[f"{tag}/f64/{k}"]) for k in keys}
        t, x, score, z = (torch.from_numpy(file[k]) for k in ("t", "x", "score", "prior_z"))
        sde = make_reference(tag, file[f"{tag}/params"])
    torch.testing.assert_close(sde.prior_logp(z), get["prior_logp"], rtol=1e-12, atol=0)
    for i, ti in enumerate(t.tolist()):
        if ti == 0.0:  # no model there, but the law: its limits
            continue
        sigma = sde.sigma(ti)
        loss = 4 * EPS * (1.0 + 1.0 / min(sigma, 1.0) ** 2)
        assert float(get["std"][i]) == pytest.approx(sigma, rel=loss)
        assert float(get["diffusion"][i]) == pytest.approx(sde.diffusion(ti), rel=loss)
        mean, _ = sde.marginal_prob(x[i], ti)
        torch.testing.assert_close(mean, get["mean"][i], rtol=1e-13, atol=0)
        torch.testing.assert_close(sde.drift(x[i], ti), get["drift"][i], rtol=1e-13, atol=0)
        f, g2 = sde.f(ti), sde.g2(ti)
        for factor, key in ((1.0, "rev_drift_pf0"), (0.5, "rev_drift_pf1")):
            want = f * x[i] - factor * g2 * score[i]
            scale = float((f * x[i]).abs().max() + (g2 * score[i]).abs().max())
            torch.testing.assert_close(get[key][i], want, rtol=1e-12, atol=loss * scale)
            rev = sde.reverse(score=lambda x, t, s=score[i]: s)
            got = rev(x[i], sde.knot(ti)).drift if factor == 1.0 else rev(x[i], sde.knot(ti)).velocity
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13 * scale)


@pytest.mark.parametrize("tag", ["vp", "subvp"])
def test_golden_float32_is_wrong_near_the_data_and_ours_is_not(golden, tag):
    """The published float32 standard deviation is off by more than 1e-3 at t = 1e-5; ours by its rounding."""
    with np.load(golden / "sde.npz") as file:
        t, std = file["t"], file[f"{tag}/f32/std"]
        sde = make_reference(tag, file[f"{tag}/params"])
    i = int(np.argmin(np.abs(t - 1e-5)))
    with mp.workdps(40):
        b = mp.mpf(t[i]) * mp.mpf("0.1") + mp.mpf(t[i]) ** 2 * mp.mpf("19.9") / 2
        exact = float(mp.sqrt(1 - mp.exp(-b)) if tag == "vp" else 1 - mp.exp(-b))
    assert abs(float(std[i]) / exact - 1) > 1e-3
    ours = float(sde.sigma(torch.tensor(t[i], dtype=torch.float32)))
    # the float32 time is itself off by 6e-8
    assert abs(ours / exact - 1) < 3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("tag", ["vp", "vp_n50", "ve", "ve_n50"])
def test_golden_tables(golden, tag):
    """Tables and one-step discretizations of score_sde_pytorch in float64: our chain's levels, by index."""
    with np.load(golden / "sde.npz") as file:
        g = {
            k.removeprefix(f"{tag}/f64/"): torch.from_numpy(file[k]) for k in file.files if k.startswith(f"{tag}/f64/")
        }
        x, params = torch.from_numpy(file["x"]), file[f"{tag}/params"]
    chain = make_reference(tag, params).discretize(int(params[2]))
    index = g["disc_index"]
    if tag.startswith("vp"):
        torch.testing.assert_close(chain.betas, g["discrete_betas"], rtol=1e-11, atol=0)
        torch.testing.assert_close(chain.alphas_cumprod, g["alphas_cumprod"], rtol=1e-12, atol=0)
        torch.testing.assert_close(chain.sigma, g["sqrt_1m_alphas_cumprod"], rtol=1e-11, atol=0)
        torch.testing.assert_close(chain.forward_scale.square(), g["alphas"], rtol=1e-12, atol=0)
    else:
        torch.testing.assert_close(chain.sigma, g["discrete_sigmas"], rtol=1e-13, atol=0)
    torch.testing.assert_close(chain.betas[index].sqrt(), g["disc_G"], rtol=1e-11, atol=0)
    want = (chain.forward_scale[index] - 1)[:, None, None, None] * x
    torch.testing.assert_close(want, g["disc_f"], rtol=1e-10, atol=1e-15)


def test_golden_ddpm_parameters(golden):
    """The table inside the published DDPM networks is the same chain."""
    with np.load(golden / "sde.npz") as file:
        betas, products = file["get_ddpm_params/betas"], file["get_ddpm_params/alphas_cumprod"]
        sigmas = file["get_sigmas"]
    chain = VPSDE().discretize(1000)
    np.testing.assert_allclose(chain.betas.numpy(), betas, rtol=1e-11)
    np.testing.assert_allclose(chain.alphas_cumprod.numpy(), products, rtol=1e-12)
    np.testing.assert_allclose(VESDE().discretize(1000).sigma.numpy()[::-1], sigmas, rtol=1e-12)
