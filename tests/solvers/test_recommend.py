"""`recommend`: fits its budget everywhere, and beats well-known methods on problems it was not chosen on."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from oracles import SDE_NAMES, gaussian_weak_error, make_sde, mixture
from torch import Tensor

from sde_lib import EDMSDE, VPSDE, FlowSDE, GaussianMixture
from solvers import (
    DDIM,
    DEIS,
    SEEDS2,
    AdaptiveRungeKutta,
    Ancestral,
    DPMpp2M,
    DPMpp3M,
    Grid,
    Heun,
    SDEDPMpp2M,
    Solver,
    UniPC,
    make_knots,
    recommend,
    sample,
    solve,
)


@pytest.mark.parametrize("name", SDE_NAMES)
def test_fits_the_budget(name):
    """Never more calls than asked for, at most one fewer; finite on every SDE, from the prior to either end."""
    rev = mixture((2,)).reverse(make_sde(name))
    for nfe in (1, 2, 3, 5, 6, 7, 12, 13, 23, 24, 44, 45, 75, 130):
        for stochastic in (False, True):
            for end in ("stop", "denoise"):
                if nfe < 2 + stochastic + (end == "denoise"):
                    continue
                best = recommend(nfe, stochastic)
                assert best.solver.stochastic == stochastic
                out = sample(rev, (3, 2), best.solver, nfe=nfe, grid=best.grid, end=end, rng=0, dtype=torch.float64)
                assert nfe - 1 <= int(out.nfe[0]) <= nfe and out.ok


def blobs(seed: int, d: int, k: int) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    std = 0.1 + 0.3 * torch.rand(k, generator=g, dtype=torch.float64)
    return GaussianMixture(torch.randn(k, d, generator=g, dtype=torch.float64), std=std)


HELD_OUT = {
    "vp": (blobs(101, 10, 7), VPSDE()),
    "edm": (blobs(102, 5, 4), EDMSDE()),
    "flow": (blobs(103, 20, 9), FlowSDE()),
}


@functools.cache
def tight(problem: str, n: int = 64) -> tuple[Tensor, Tensor]:
    """Starts, and the ends of the flow from them: once per problem, for every solver and budget."""
    data, sde = HELD_OUT[problem]
    first, last = sde.knot(sde.drift_t_max), sde.knot(sde.t_min)
    g = torch.Generator().manual_seed(5)
    x = data.sample(n, g, torch.float64)
    start = first.alpha * x + first.sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return start, solve(data.reverse(sde), start, AdaptiveRungeKutta(rtol=1e-10, atol=1e-10), grid=[first, last]).x


def median_error(problem: str, nfe: int, solver: Solver, grid: Grid | str) -> float:
    data, sde = HELD_OUT[problem]
    start, end = tight(problem)
    got = solve(data.reverse(sde), start, solver, nfe=nfe, grid=grid).x
    return float((got - end).norm(dim=1).median()) / sde.alpha(sde.t_min) / math.sqrt(data.shape[0])


@pytest.mark.parametrize("nfe", [5, 8, 12, 20, 30, 60])
@pytest.mark.parametrize("problem", HELD_OUT)
def test_better_than_the_well_known(problem, nfe):
    """Median error on held-out mixtures below that of DDIM, Heun, 2M, 3M, DEIS and UniPC-3 on their usual grids."""
    best = recommend(nfe)
    ours = median_error(problem, nfe, best.solver, best.grid)
    for solver in (DDIM(), Heun(), DPMpp2M(), DPMpp3M(), DEIS(), UniPC()):
        for grid in ("uniform_half_log_snr", "karras"):
            if solver.nfe(1) <= nfe:
                assert ours < median_error(problem, nfe, solver, grid), (solver, grid)


@pytest.mark.parametrize(("nfe", "bar"), [(12, 6e-3), (20, 1.3e-3), (30, 3.2e-4), (60, 1.4e-5), (120, 3.3e-6)])
def test_the_published_problem(golden, nfe, bar):
    """A 16-dimensional mixture under VP: below the best of the other libraries at every budget."""
    with np.load(golden / "mixture16.npz") as file:
        p = {k: torch.from_numpy(np.atleast_1d(file[k])) for k in file.files}
    sde = VPSDE(beta_min=float(p["beta_min"]), beta_max=float(p["beta_max"]), t_min=float(p["t_end"]))
    weights = p["log_weights"].exp()
    rev = GaussianMixture(p["means"], std=p["stds"], weights=weights / weights.sum()).reverse(sde)
    best = recommend(nfe)
    got: Tensor = solve(rev, p["x_T"], best.solver, nfe=nfe, grid=best.grid).x
    error = (got - p["x_end"]).square().mean(1).sqrt() / sde.alpha(sde.t_min)
    assert float(error.median()) < bar


@pytest.mark.parametrize("nfe", [12, 20, 40])
@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_stochastic_on_gaussians(name, nfe):
    """Exact error of the variance on narrow and wide Gaussians, together below ancestral sampling, 2M and SEEDS-2."""
    sde = make_sde(name)

    def error(solver, grid) -> float:
        total = 0.0
        for std in (0.05, 0.2, 0.5, 1.0):
            data = GaussianMixture(0.6 * torch.ones(1, dtype=torch.float64), std=std)
            solver_, steps = solver.within(nfe)
            knots = make_knots(sde, grid, steps, needs_drift=solver.needs_drift)
            _, off = gaussian_weak_error(sde, data, solver_, knots)
            last = knots[-1]
            total += (off / (last.alpha**2 * std**2 + last.sigma**2)) ** 2
        return total

    best = recommend(nfe, stochastic=True)
    ours = error(best.solver, best.grid)
    for other in (Ancestral(), SDEDPMpp2M(), SEEDS2()):
        for grid in ("uniform_half_log_snr", "karras"):
            assert ours < error(other, grid), (other, grid)


def test_the_measurement_behind_it():
    """The nearest measured budget, and errors that fall with it."""
    exact = [recommend(n).exact for n in (5, 12, 20, 30, 60, 120)]
    learned = [recommend(n).learned for n in (5, 12, 20, 30, 60)]
    for values in (exact, learned):
        assert all(a > b > 0 for a, b in itertools.pairwise(values))
    assert recommend(19).measured_at == 20 and recommend(500).measured_at == 120 and recommend(1).measured_at == 3
    assert recommend(20, stochastic=True).learned is None and 0 < recommend(20, stochastic=True).exact < 1


@pytest.mark.parametrize("bad", [0, -1, 2.0, "12", None, True])
def test_bad_budgets(bad):
    """An int, at least 1; at least 2 for stochastic solvers."""
    with pytest.raises(ValueError, match="nfe"):
        recommend(bad)
    with pytest.raises(ValueError, match=">= 2"):
        recommend(1, stochastic=True)


def test_a_recommendation_in_words():
    assert "for 20 network calls: Multistep" in repr(recommend(20))
    assert "0.00033 on exact scores, 0.00049 on trained networks" in repr(recommend(20))
    assert "distance to the law at 10 calls" in repr(recommend(11, stochastic=True))
