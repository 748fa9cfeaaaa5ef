"""Our solvers on the recorded runs of score_sde_pytorch, diffusers, k-diffusion and (by --golden) EDM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sde_lib import DATA, EDMSDE, SDE, VESDE, VPSDE, GaussianMixture, Knot, Law, ReverseSDE, ScorePrediction, SubVPSDE
from solvers import (
    DDIM,
    AdaptiveRungeKutta,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    Heun,
    Karras,
    Langevin,
    PredictorCorrector,
    Recorded,
    ReverseDiffusion,
    solve,
)

DATA_DIR = Path(__file__).parent.parent / "data"


def load(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind in "fi"}


@pytest.fixture(scope="module")
def song() -> dict[str, Tensor]:
    return load(DATA_DIR / "score_sde_pytorch.npz")


@pytest.fixture(scope="module")
def diffusers() -> dict[str, Tensor]:
    return load(DATA_DIR / "diffusers.npz")


@pytest.fixture(scope="module")
def kdiff() -> dict[str, Tensor]:
    return load(DATA_DIR / "k_diffusion.npz")


def mixture_of(g: dict[str, Tensor]) -> GaussianMixture:
    return GaussianMixture(g["gmm/means"], std=g["gmm/stds"], weights=g["gmm/weights"])


def given_scores(law: Law, scores: list[Tensor]) -> ReverseSDE:
    """A score model that hands out recorded scores, in the order of the calls."""
    left: Iterator[Tensor] = iter(scores)
    return ReverseSDE(law, lambda x, knot: next(left), ScorePrediction())


# --- score_sde_pytorch: single updates ------------------------------------------------------------------------------

STEPS = [("vp", "t1"), ("vp", "t2"), ("ve", "t1")]


def laws(song: dict[str, Tensor], tag: str) -> SDE:
    a, b, _, _ = song[f"{tag}/params"].tolist()
    return {"vp": VPSDE, "subvp": SubVPSDE, "ve": VESDE}[tag](a, b)


def level(song: dict[str, Tensor], tag: str, at: str) -> tuple[Knot, Knot]:
    """The table row of an update and the row below it (the data below row 0)."""
    index, n = int(song[f"{tag}/{at}/index"]), int(song[f"{tag}/params"][2])
    chain = laws(song, tag).discretize(n)
    return chain.knot(index), chain.knot(index - 1) if index else DATA


def take(solver, law: Law, t: Knot, s: Knot, song: dict[str, Tensor], key: str) -> Tensor:
    x = song[f"{key}/x"]
    rev = given_scores(law, [song[f"{key}/score"]])
    return solver.step(rev, x, t, s, (), Recorded([song[f"{key}/z_pred"]]).bind(x)).x


@pytest.mark.parametrize(("tag", "at"), [*STEPS[::2], ("subvp", "t1")])
def test_euler_maruyama_update(song, tag, at):
    """x - (f x - g^2 score)/N + g z / sqrt(N): our step between t and t - 1/N."""
    sde, key, n = laws(song, tag), f"{tag}/{at}", float(song[f"{tag}/params"][2])
    t = float(song[f"{key}/t"][0])
    got = take(EulerMaruyama(), sde, sde.knot(t), sde.knot(t - 1.0 / n), song, key)
    torch.testing.assert_close(got, song[f"{key}/euler_maruyama/x_next"], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("tag", "at"), STEPS)
@pytest.mark.parametrize(
    ("name", "solver"),
    [("reverse_diffusion", ReverseDiffusion()), ("reverse_diffusion_pf", ReverseDiffusion(probability_flow=True))],
)
def test_reverse_diffusion_update(song, tag, at, name, solver):
    """The reverse of the table's own forward step, row 0 down to the data included."""
    t, s = level(song, tag, at)
    got = take(solver, t.law, t, s, song, f"{tag}/{at}")
    torch.testing.assert_close(got, song[f"{tag}/{at}/{name}/x_next"], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("tag", "at"), STEPS)
def test_ancestral_update(song, tag, at):
    """Published with the large variance on VP and the small one on VE."""
    t, s = level(song, tag, at)
    solver = Ancestral(variance="large" if tag == "vp" else "small")
    key = f"{tag}/{at}"
    got = take(solver, t.law, t, s, song, key)
    torch.testing.assert_close(got, song[f"{key}/ancestral_sampling/x_next"], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("tag", "at"), STEPS)
@pytest.mark.parametrize("moves", [1, 3])
@pytest.mark.parametrize(
    ("name", "corrector"),
    [("langevin", Langevin(snr=0.16, norm="batch")), ("ald", AnnealedLangevin(snr=0.16))],
    ids=["langevin", "ald"],
)
def test_corrector_update(song, tag, at, name, corrector, moves):
    """The published Langevin (norms averaged over the batch) and annealed Langevin moves on the mixture's score.

    Their factor is 1 - beta_i of the table row (1 on VE), ours (alpha_t / alpha_s)^2 of the step: equal between
    neighbouring rows.
    """
    from dataclasses import replace

    sde, key = laws(song, tag), f"{tag}/{at}"
    t, s = level(song, tag, at)
    shrink = (t.alpha / s.alpha) ** 2
    x = song[f"{key}/x"]
    draw = Recorded(song[f"{key}/z_corr"]).bind(x)
    knot = sde.knot(float(song[f"{key}/t"][0]))
    rev = mixture_of(song).reverse(sde)
    torch.testing.assert_close(rev(x, knot).score, song[f"{key}/score"], rtol=1e-9, atol=1e-9)
    got = replace(corrector, steps=moves).correct(rev, x, knot, shrink, draw)
    # the published sigma loses EPS / sigma^2 at small times
    torch.testing.assert_close(got, song[f"{key}/{name}_n{moves}/x_next"], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("tag", ["vp", "subvp", "ve"])
def test_probability_flow_on_a_gaussian(song, tag):
    """The recorded ODE sampler's problem: our adaptive solution hits the exact one, theirs (RK45, float32) nearby."""
    from dataclasses import replace

    mean, std, eps = song[f"ode_gauss_{tag}/params"].tolist()
    sde = replace({"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE()}[tag], t_min=eps)
    x_T, exact = song[f"ode_gauss_{tag}/x_T"].double(), song[f"ode_gauss_{tag}/exact"]
    data = GaussianMixture(torch.full((1, *x_T.shape[1:]), mean), std=std)
    out = solve(data.reverse(sde), x_T, AdaptiveRungeKutta(rtol=1e-10, atol=1e-10), strict=True)
    torch.testing.assert_close(out.x, exact, rtol=1e-7, atol=1e-7 * float(exact.abs().max()))
    assert float((song[f"ode_gauss_{tag}/sample"].double() - exact).abs().max() / exact.abs().max()) < 2e-5
    # the published setting, float32 and 1e-5: tol (1 + |y|) a step with |y| < 4, and this flow only contracts
    single = solve(data.reverse(sde), x_T.float(), AdaptiveRungeKutta(), strict=True)
    bound = 2.0 * 1e-5 * 5.0 * single.stats["accepted"].max()
    assert float((single.x.double() - exact).abs().max() / exact.abs().max()) < float(bound)


# --- diffusers ------------------------------------------------------------------------------------------------------


def ten_levels(run: dict[str, Tensor], name: str) -> tuple[VPSDE, list[Knot]]:
    """The recorded timesteps as knots of DDPM's chain."""
    chain = VPSDE().discretize(1000)
    steps = list(dict.fromkeys(int(t) for t in run[f"{name}/timesteps"]))
    return chain, [*(chain.knot(i) for i in steps), DATA]


FROM_TABLE = {"rtol": 2e-5, "atol": 1e-5}
"""Their tables are float32: 1 - alpha^2 of level 0 is off by 3e-4, later products of up to 1000 factors by 1e-6."""


@pytest.mark.parametrize(
    ("name", "solver", "spacing"),
    [
        ("ddpm_small", Ancestral(), "leading"),
        ("ddpm_large", Ancestral(variance="large"), "leading"),
        ("ddpm_trailing", Ancestral(), "trailing"),
        ("ddim_eta0", DDIM(), "leading"),
        ("ddim_eta05", DDIM(eta=0.5), "leading"),
    ],
)
def test_ddpm_and_ddim(diffusers, name, solver, spacing):
    """DDPMScheduler and DDIMScheduler, ten strided steps of the thousand, from the first state to the sample."""
    chain, knots = ten_levels(diffusers, name)
    assert [k.label for k in knots] == [k.label for k in chain.descend(10, spacing)]
    noise = diffusers.get(f"{name}/noise", torch.zeros(0, 2, 3, 8, 8, dtype=torch.float64))
    rev = mixture_of(diffusers).reverse(chain)
    out = solve(rev, diffusers[f"{name}/start"], solver, grid=knots, rng=Recorded(noise), strict=True)
    torch.testing.assert_close(out.x, diffusers[f"{name}/end"], **FROM_TABLE)
    assert int(out.nfe[0]) == 10


@pytest.mark.parametrize(
    ("name", "solver", "calls"),
    [("heun", Heun(), 19), ("euler", DDIM(), 10), ("euler_ancestral", DDIM(eta=1.0), 10)],
)
def test_noise_ratio_schedulers(diffusers, name, solver, calls):
    """Heun, Euler and ancestral Euler in sigma / alpha, on the chain: states there are x / alpha."""
    chain, knots = ten_levels(diffusers, name)
    assert [k.label for k in knots] == [k.label for k in chain.descend(10, "linspace")]
    start = diffusers[f"{name}/start"] * knots[0].alpha
    noise = diffusers.get(f"{name}/noise", torch.zeros(0, 2, 3, 8, 8, dtype=torch.float64))
    rev = mixture_of(diffusers).reverse(chain)
    out = solve(rev, start, solver, grid=knots, rng=Recorded(noise), strict=True)
    torch.testing.assert_close(out.x, diffusers[f"{name}/end"], **FROM_TABLE)
    assert int(out.nfe[0]) == calls


def test_score_sde_ve(diffusers):
    """ScoreSdeVeScheduler: twelve levels of VE, each corrected (batch-mean Langevin) and then stepped, the last one to
    the mean; replayed on its own scores and noise."""
    g = {k.removeprefix("score_sde_ve/"): v for k, v in diffusers.items() if k.startswith("score_sde_ve/")}
    chain = VESDE().discretize(12)
    torch.testing.assert_close(chain.sigma, g["discrete_sigmas"].double(), rtol=1e-6, atol=0)
    scores, noise = [], []
    for i in range(12):
        scores += [g["score_corr"][i], g["score_pred"][i]]
        noise += [g["noise_corr"][i].double(), g["noise_pred"][i]]
    solver = PredictorCorrector(ReverseDiffusion(), Langevin(snr=0.16, norm="batch"), corrector_first=True)
    out = solve(given_scores(chain, scores), g["start"], solver, grid=chain, rng=Recorded(noise), strict=True)
    # their sigmas are float32, and states up to 100 are carried down by them
    torch.testing.assert_close(out.x, g["end"], rtol=1e-5, atol=1e-4)
    assert int(out.nfe[0]) == 24


# --- k-diffusion and EDM --------------------------------------------------------------------------------------------


def times(sigmas: Tensor) -> list[float]:
    """Noise levels without the closing zero."""
    return [float(s) for s in sigmas if float(s) > 0.0]


@pytest.mark.parametrize(("name", "solver"), [("euler", DDIM()), ("heun", Heun()), ("euler_ancestral", DDIM(eta=1.0))])
def test_k_diffusion(kdiff, name, solver):
    """sample_euler, sample_heun and sample_euler_ancestral on EDM's SDE: the same floats."""
    sde = EDMSDE(t_min=0.01, t_max=20.0)
    noise = kdiff.get(f"{name}/noise", torch.zeros(0, 2, 3, 8, 8, dtype=torch.float64))
    rev = mixture_of(kdiff).reverse(sde)
    out = solve(rev, kdiff["x_T"], solver, grid=times(kdiff["sigmas"]), end="denoise", rng=Recorded(noise), strict=True)
    torch.testing.assert_close(out.x, kdiff[f"{name}/x"], rtol=1e-10, atol=1e-10)
    if name == "heun":
        assert int(out.nfe[0]) == len(kdiff["heun/sigmas_called"])


def churned_rows(sigmas: list[float], noise: Tensor, low: float, high: float) -> Tensor:
    """The recorded draws that are used: the codes draw at every step, with or without churn."""
    keep = torch.tensor([low <= s <= high for s in sigmas])
    return noise[: len(sigmas)][keep]


def test_k_diffusion_churn(kdiff):
    """sample_heun with s_churn: noise first, then both calls at the raised level."""
    sde = EDMSDE(t_min=0.01, t_max=20.0)
    sigmas = times(kdiff["sigmas"])
    solver = Heun(s_churn=4.0, s_min=0.05, s_max=8.0, s_noise=1.003)
    seen = []
    rev = mixture_of(kdiff).reverse(sde)
    spied = ReverseSDE(sde, lambda x, k: (seen.append(k.t), rev.network(x, k))[1], rev.parameterization)
    noise = churned_rows(sigmas, kdiff["heun_churn/noise"], 0.05, 8.0)
    out = solve(spied, kdiff["x_T"], solver, grid=sigmas, end="denoise", rng=Recorded(noise), strict=True)
    torch.testing.assert_close(torch.tensor(seen).double(), kdiff["heun_churn/sigmas_called"], rtol=1e-7, atol=0)
    torch.testing.assert_close(out.x, kdiff["heun_churn/x"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("run", "sde", "grid", "solver"),
    [
        ("edm", EDMSDE(), Karras(), Heun()),
        ("edm_rho5", EDMSDE(t_min=0.01, t_max=20.0), Karras(rho=5.0), Heun()),
        ("edm_churn", EDMSDE(t_max=200.0), Karras(t_start=80.0), Heun("heun", "noise_ratio", 20.0, 0.05, 50.0, 1.003)),
        ("abl_euler_edm_linear_none", EDMSDE(), Karras(), DDIM()),
    ],
)  # fmt: skip
def test_edm_sampler(golden, run, sde, grid, solver):
    """edm_sampler and its ablation on the mixture: 8 noise levels, Algorithm 2 with the last step to zero."""
    with np.load(golden / "edm.npz") as file:
        g = {k: torch.from_numpy(file[k]) for k in ("gmm/means", "gmm/stds", "gmm/weights", "sampler/latents")}
        want, called = (
            torch.from_numpy(file[f"sampler/{run}/x"]),
            torch.from_numpy(file[f"sampler/{run}/sigmas_called"]),
        )
        noise = torch.from_numpy(file[f"sampler/{run}/noise"])
    seen = []
    rev = mixture_of(g).reverse(sde)
    spied = ReverseSDE(sde, lambda x, k: (seen.append(k.t), rev.network(x, k))[1], rev.parameterization)
    knots = [k for k in dict.fromkeys(called.tolist())]
    if len(noise):
        levels = grid.times(sde, 7)
        noise = churned_rows(levels, noise, solver.s_min, solver.s_max)
        knots = levels
    x_T = g["sampler/latents"] * knots[0]
    out = solve(spied, x_T, solver, steps=7, grid=grid, end="denoise", rng=Recorded(noise), strict=True)
    torch.testing.assert_close(torch.tensor(seen).double(), called, rtol=1e-7, atol=0)
    torch.testing.assert_close(out.x, want, rtol=1e-9, atol=1e-9)


def test_extracts_are_the_golden_numbers(golden):
    """The committed extracts are verbatim."""
    with np.load(golden / "kdiff.npz") as file, np.load(DATA_DIR / "k_diffusion.npz") as ours:
        assert all(np.array_equal(file[k], ours[k]) for k in ours.files)
    with np.load(golden / "diffusers.npz") as file, np.load(DATA_DIR / "diffusers.npz") as ours:
        for k in ("x_T", "ddpm_small/noise", "gmm/means", "heun/timesteps"):
            assert np.array_equal(file[k], ours[k])
        assert np.array_equal(file["ddpm_small/x"][-1], ours["ddpm_small/end"])
    with np.load(golden / "steps.npz") as file, np.load(DATA_DIR / "score_sde_pytorch.npz") as ours:
        for k in ("x", "z_pred", "z_corr", "langevin_n3/x_next"):
            assert np.array_equal(file[f"vp/N25/t1/{k}"], ours[f"vp/t1/{k}"])
