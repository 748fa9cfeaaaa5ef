"""The door: solvers by name, budgets with guidance, the default grid, steps that libraries need, what a result says."""

from __future__ import annotations

import pytest
import torch
from oracles import make_sde

from scoresde.guidance import ClassifierFreeGuidance, ClipData
from sde_lib import SDES, VPSDE, GaussianMixture
from solvers import (
    DDIM,
    GRIDS,
    AdaptiveRungeKutta,
    Blended,
    DPMpp2M,
    EulerMaruyama,
    Heun,
    Multistep,
    SciPyODE,
    TorchDiffEq,
    TorchSDE,
    make_knots,
    recommend,
    sample,
    solve,
)

SPOTS = GaussianMixture([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.0]], std=[0.1, 0.2, 0.3])


def conditional():
    """A network that reads a class; its calls are counted by evaluations."""
    exact = SPOTS.reverse(VPSDE())
    seen = []

    def v(x, t, class_label=None):
        seen.append(class_label is not None)
        return exact.network(x, VPSDE().knot(float(t[0])))

    return VPSDE().reverse(v=v), seen


@pytest.mark.parametrize("name", SDES)
def test_the_default_grid_is_near_the_best(name):
    """Root mean square error of three common solvers at common budgets: at most twice that of the best named grid."""
    sde = make_sde(name)
    rev = SPOTS.reverse(sde)
    x = sde.prior_std * torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts, truth = {sde.t_max, sde.drift_t_max}, {}
    for t in starts:
        if t <= sde.drift_t_max:
            fine = Multistep(5, 6, prediction="flow", starter="ramp")
            truth[t] = solve(rev, x, fine, steps=200, grid=Blended(t_start=t), end="denoise").x
        else:
            fine = AdaptiveRungeKutta(rtol=1e-8, atol=1e-8, coordinate="angle")
            truth[t] = solve(rev, x, fine, grid=[t, sde.t_min], end="denoise").x
    for solver, nfe in ((Heun(), 35), (DPMpp2M(), 20), (DDIM(), 37)):
        steps, errors = solver.steps_for(nfe, "denoise"), {}
        for grid in (None, *GRIDS):
            knots = make_knots(sde, grid, steps, "denoise", solver.needs_drift)
            found = solve(rev, x, solver, grid=knots).x - truth[knots[0].t]
            errors[grid] = float(found.square().sum(1).mean().sqrt())
        assert errors[None] <= 2.0 * min(errors.values()), (solver, errors)


def test_every_door_takes_the_same_default():
    """`sample`, `solve` and the model's own: the blended grid, named in the result; the chain on a chain."""
    sde = SDES["edm"]()
    rev = SPOTS.reverse(sde)
    out = sample(rev, (4000, 2), "heun", steps=18, rng=0)
    assert out.grid == Blended() and "by heun on blended" in repr(out)
    exact = SPOTS.sample(4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out.x.std(0), exact.std(0), rtol=0.05, atol=0)
    assert torch.equal(out.x, sample(rev, (4000, 2), Heun(), steps=18, rng=0, grid="blended").x)
    chain = VPSDE().discretize(30)
    assert solve(SPOTS.reverse(chain), torch.zeros(1, 2), "ddim").grid is chain


@pytest.mark.parametrize("solver", ["heun", "dpmpp_3m", "adaptive", "scipy", "unipc"])
def test_progress_counts_calls(solver, capsys):
    """The bar ends full, where its end is known, and changes no number; without it nothing is written."""
    rev, x = SPOTS.reverse(VPSDE()), torch.ones(3, 2)
    steps = {} if solver in ("adaptive", "scipy") else {"steps": 7}
    quiet = solve(rev, x, solver, **steps, end="denoise")
    assert capsys.readouterr().err == ""
    told = solve(rev, x, solver, **steps, end="denoise", progress=True)
    assert torch.equal(quiet.x, told.x)
    shown, calls = capsys.readouterr().err, int(told.nfe.max())
    assert f"{calls}/{calls}" in shown or (not steps and "call" in shown)
    if steps:
        twice = ClassifierFreeGuidance(rev, 1.0, null={})
        calls = int(solve(twice, x, solver, **steps, end="denoise", progress=True).nfe.max())
        assert f"{calls}/{calls}" in capsys.readouterr().err


def test_solvers_by_name():
    rev, x = SPOTS.reverse(VPSDE()), torch.ones(3, 2)
    assert torch.equal(solve(rev, x, "dpmpp_2m", nfe=10).x, solve(rev, x, DPMpp2M(), nfe=10).x)
    with pytest.raises(ValueError, match=r"Unknown solver 'heum'. Did you mean 'heun'\?"):
        solve(rev, x, "heum", nfe=10)
    with pytest.raises(TypeError, match='such as "ddim"'):
        solve(rev, x, Heun, nfe=10)


@pytest.mark.parametrize("solver", [DDIM(), Heun(), DPMpp2M(), recommend(20).solver], ids=repr)
def test_a_budget_counts_guidance(solver):
    """20 evaluations are 20 evaluations: what guidance spends on its second one is missing elsewhere."""
    rev, seen = conditional()
    guided = ClassifierFreeGuidance(rev, 2.0).given(class_label=torch.ones(3))
    out = solve(guided, torch.ones(3, 2), solver, nfe=20)
    assert len(seen) == int(out.nfe[0]) and 17 <= len(seen) <= 20
    assert sum(seen) == len(seen) // 2
    with pytest.raises(ValueError, match="One call costs 2"):
        solve(guided, torch.ones(3, 2), solver, nfe=1)


@pytest.mark.parametrize("budget", [{"nfe": 1}, {"steps": 1}], ids=repr)
def test_recommended_in_one_call_on_a_chain(budget):
    """From the last level straight to the data: the posterior mean, as by any other solver."""
    rev, x = SPOTS.reverse(VPSDE().discretize(30)), torch.ones(3, 2)
    assert torch.equal(solve(rev, x, "recommended", **budget).x, solve(rev, x, DDIM(), steps=1).x)


@pytest.mark.parametrize(("start", "end", "named"), [(1.0, 1e-3, "start"), (1e-3, 1.0, "end")])
def test_where_alpha_is_zero_is_refused_at_both_ends(start, end, named):
    """Heun along sigma / alpha has no number for t = 1 of the flow SDE, as a start or, upward, as an end; DDIM has."""
    rev, x = SPOTS.reverse(SDES["flow"]()), torch.ones(3, 2)
    grid = Blended(t_start=start, t_end=end)
    with pytest.raises(ValueError, match=f"cannot {named} at t = 1.0"):
        solve(rev, x, Heun(), steps=4, grid=grid)
    with pytest.raises(ValueError, match=f"cannot {named} at t = 1.0"):
        solve(rev, x, Heun(), grid=[start, 0.5, end])
    assert solve(rev, x, DDIM(), steps=4, grid=grid).ok


def test_guidance_leaves_out_what_is_there():
    """Whatever the conditions are called; none at all, or a scale that is no number, is an error that says so."""
    rev, seen = conditional()
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="given none"):
        solve(ClassifierFreeGuidance(rev, 2.0), x, DDIM(), steps=1)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            ClassifierFreeGuidance(rev, scale)
    text = VPSDE().reverse(v=lambda x, t, prompt=None: x if prompt is None else x + prompt[:, None])
    guided = ClassifierFreeGuidance(text.given(prompt=torch.arange(3.0)), 3.0)(x, 0.5)
    torch.testing.assert_close(guided.raw, x + 3.0 * torch.arange(3.0)[:, None])
    assert ClipData(ClassifierFreeGuidance(rev, 2.0)).describes == "guided" and not seen


@pytest.mark.parametrize("solver", [TorchSDE(), TorchDiffEq("euler"), TorchDiffEq("rk4"), Heun()], ids=repr)
def test_fixed_steps_must_be_counted(solver):
    """One step from end to end is never what was meant."""
    rev, x = SPOTS.reverse(VPSDE()), torch.ones(3, 2)
    with pytest.raises(ValueError, match="`steps`"):
        solve(rev, x, solver)
    assert solve(rev, x, solver, steps=5, rng=0).ok


@pytest.mark.parametrize("solver", [TorchDiffEq(), SciPyODE(), AdaptiveRungeKutta()], ids=repr)
def test_adaptive_steps_need_no_number(solver):
    assert solve(SPOTS.reverse(VPSDE()), torch.ones(3, 2), solver).ok


@pytest.mark.parametrize("name", ["vp", "edm", "ve"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "srk", "heun"])
def test_torchsde_on_the_default_grid(name, method):
    """Its equal steps are those of a clock that walks any grid; equal times would be hopeless for EDM and VE."""
    sde, n, std = make_sde(name), 4000, 0.5
    rev = GaussianMixture([0.0], std=std).reverse(sde)
    found = sample(rev, (n,), TorchSDE(method=method), steps=60, rng=0).x
    # Euler-Maruyama's bias with 60 steps, the largest of the four, and four standard errors of a sample's deviation
    bias = abs(float(sample(rev, (100_000,), EulerMaruyama(), steps=60, rng=1).x.std()) - std)
    assert float(found.std()) == pytest.approx(std, abs=1.5 * bias + 4 * std / (2 * n) ** 0.5)


def test_torchsde_euler_is_ours():
    """The network is asked at the knots of the grid, once each: the steps of Euler-Maruyama."""
    law = make_sde("edm")
    exact, x = SPOTS.reverse(law), torch.ones(3, 2, dtype=torch.float64)
    knots = make_knots(law, "karras", 10)
    asked = []

    def v(x, t):
        asked.append(float(t[0]))
        return exact(x, float(t[0])).v

    solve(law.reverse(v=v), x, TorchSDE(), grid=knots, rng=0)
    # torchsde looks at shapes with one call before it starts
    assert asked[1:] == pytest.approx([k.t for k in knots[:-1]], rel=1e-6)
