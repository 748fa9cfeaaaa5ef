"""Per-sample step control, and the libraries' solvers beside ours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import (
    SDE_NAMES,
    Spy,
    flow_map,
    gaussian,
    gaussian_weak_error,
    lambda_knots,
    make_sde,
    mixture,
    mp_free_moments,
    quantiles,
)
from torch import Tensor

from sde_lib import VPSDE, GaussianMixture, Knot, ReverseSDE
from solvers import (
    COORDINATES,
    DDIM,
    TABLEAUX,
    AdaptiveDPMSolver,
    AdaptiveRungeKutta,
    DPMpp2S,
    DPMpp3S,
    DPMSolver2,
    DPMSolver3,
    EulerMaruyama,
    Heun,
    Midpoint,
    RungeKutta,
    SciPyODE,
    SingleStep,
    SolverError,
    Status,
    TorchDiffEq,
    TorchSDE,
    solve,
)

every_sde = pytest.mark.parametrize("name", SDE_NAMES)
EMBEDDED = [k for k, v in TABLEAUX.items() if v.error is not None]


def flow_errors(solver: Any, name: str = "vp", **options: Any) -> tuple[Tensor, Any]:
    """|x - exact flow map| of the mixture between lambda -2 and 2.5, and the solution."""
    sde, data = make_sde(name), mixture()
    knots = lambda_knots(sde, 1)
    x = quantiles(data, knots[0], 41)
    out = solve(data.reverse(sde), x, solver, grid=knots, **options)
    return (out.x - flow_map(data, x, knots[0], knots[1])).abs(), out


def allowed(data: GaussianMixture, x: Tensor, ladder: Sequence[Knot], tol: float, steps: Tensor) -> Tensor:
    """What local errors of tol (1 + |y|) a step may grow to, per sample.

    y = x / r with r^2 = alpha^2 + sigma^2; an error made at a knot reaches the end stretched by dx_s / dx_u, which for
    a flow that keeps quantiles is the ratio of densities p_u(x_u) / p_s(x_s). Twice: the estimate is of lower order.
    """
    end = flow_map(data, x, ladder[0], ladder[-1])
    worst = torch.zeros_like(x)
    for knot in ladder:
        at = flow_map(data, x, ladder[0], knot)
        stretch = torch.exp(data.log_prob(at, knot) - data.log_prob(end, ladder[-1]))
        worst = torch.maximum(worst, (math.hypot(knot.alpha, knot.sigma) + at.abs()) * stretch)
    return 2.0 * tol * steps * worst


def check_within(error: Tensor, bound: Tensor) -> None:
    """Nine samples of ten within the bound, all within ten times: an estimate may pass through zero on a long step."""
    ratio = error / bound
    assert float((ratio < 1.0).double().mean()) >= 0.9 and float(ratio.max()) < 10.0, ratio


# --- tableaux -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLEAUX)
def test_order_conditions(name):
    """Butcher's conditions up to the declared order (all 17 of order 5), of the method and of its embedded partner."""
    tableau = TABLEAUX[name]
    s = tableau.stages
    a = torch.zeros(s, s, dtype=torch.float64)
    for i, row in enumerate(tableau.a, 1):
        a[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    b, c = (torch.tensor(v, dtype=torch.float64) for v in (tableau.b, tableau.c))
    torch.testing.assert_close(a.sum(1), c, rtol=1e-14, atol=1e-14)
    ac, ac2, aac = a @ c, a @ c**2, a @ (a @ c)
    conditions = {
        1: [(torch.ones(s).double(), 1)],
        2: [(c, 2)],
        3: [(c**2, 3), (ac, 6)],
        4: [(c**3, 4), (c * ac, 8), (ac2, 12), (aac, 24)],
        5: [
            (c**4, 5),
            (c**2 * ac, 10),
            (ac**2, 20),
            (c * ac2, 15),
            (a @ c**3, 20),
            (c * aac, 30),
            (a @ (c * ac), 40),
            (a @ ac2, 60),
            (a @ aac, 120),
        ],
    }
    for order in range(1, tableau.order + 1):
        for vector, inverse in conditions[order]:
            assert float(b @ vector) == pytest.approx(1.0 / inverse, rel=1e-13)
    if tableau.error is not None:
        embedded = b - torch.tensor(tableau.error, dtype=torch.float64)
        for order in range(1, tableau.order):
            for vector, inverse in conditions[order]:
                assert float(embedded @ vector) == pytest.approx(1.0 / inverse, rel=1e-12)
        # and it is a different method, so that the difference measures something
        assert any(abs(float(embedded @ v) - 1.0 / i) > 1e-5 for v, i in conditions[tableau.order])


# --- error control --------------------------------------------------------------------------------------------------


# one of low and one of high order in the quick suite
@pytest.mark.parametrize(
    "tableau", [k if k in ("midpoint", "dormand_prince") else pytest.param(k, marks=pytest.mark.slow) for k in EMBEDDED]
)
def test_error_is_proportional_to_the_tolerance(tableau):
    """Every sample within what its accepted steps allow, and falling with the tolerance at the expected slope."""
    tolerances = [1e-3, 1e-4, 1e-5, 1e-6] if TABLEAUX[tableau].order == 2 else [1e-4, 1e-6, 1e-8, 1e-10]
    worst = []
    data, ladder = mixture(), lambda_knots(make_sde("vp"), 40)
    x = quantiles(data, ladder[0], 41)
    for tol in tolerances:
        error, out = flow_errors(AdaptiveRungeKutta(tableau=tableau, rtol=tol, atol=tol))
        assert out.ok
        worst.append(float(error.max()))
        check_within(error, allowed(data, x, ladder, tol, out.stats["accepted"]))
    slope = math.log(worst[0] / worst[-1]) / math.log(tolerances[0] / tolerances[-1])
    # error per step control: the global error goes like tol^(p / (p + 1))
    p = TABLEAUX[tableau].order - 1
    assert slope > p / (p + 1) - 0.15


@every_sde
def test_adaptive_on_every_sde(name):
    """From t_max (alpha = 0 included) to t_min against the exact quantile map, at a tolerance with short steps."""
    sde, data = make_sde(name), mixture()
    knots = [sde.knot(sde.t_max), sde.knot(sde.t_min)]
    x = quantiles(data, knots[0], 21)
    out = solve(data.reverse(sde), x, AdaptiveRungeKutta(rtol=1e-8, atol=1e-8), strict=True)
    error = (out.x - flow_map(data, x, *knots)).abs()
    ladder = [knots[0], *lambda_knots(sde, 60, low=-8.0, high=8.0), knots[1]]
    check_within(error, allowed(data, x, ladder, 1e-8, out.stats["accepted"]))


def test_each_sample_has_its_own_steps():
    """Calls, accepted and rejected steps are per sample, and differ; calls = 1 + 6 tries for Dormand-Prince."""
    _, out = flow_errors(AdaptiveRungeKutta(rtol=1e-7, atol=1e-7))
    tries = out.stats["accepted"] + out.stats["rejected"]
    assert torch.equal(out.nfe, 1 + 6 * tries) and len(set(out.nfe.tolist())) > 1


def test_a_state_that_starts_at_zero():
    """It has no time scale, and its first step would be one too small to go on with. On a Gaussian quantiles stay."""
    law, data = make_sde("vp"), GaussianMixture([[0.7]], std=0.5)
    t, s = lambda_knots(law, 1)
    out = solve(data.reverse(law), torch.zeros(1, 1).double(), AdaptiveRungeKutta(rtol=1e-10, atol=1e-10), grid=(t, s))
    here, there = (math.hypot(0.5 * k.alpha, k.sigma) for k in (t, s))
    assert out.ok and float(out.x) == pytest.approx(0.7 * (s.alpha - there / here * t.alpha), abs=1e-8)


def test_finished_rows_leave_the_batch():
    """Rows shrink as samples finish, and rows in calls add up to the reported calls."""
    sde, data = make_sde("vp"), mixture()
    knots = lambda_knots(sde, 1)
    spy = Spy(data.reverse(sde))
    out = solve(spy, quantiles(data, knots[0], 41), AdaptiveRungeKutta(rtol=1e-8, atol=1e-8), grid=knots)
    rows = [n for _, n in spy.log]
    assert sum(rows) == int(out.nfe.sum()) and rows[0] == 41 and rows[-1] < 41
    assert all(a >= b for a, b in itertools.pairwise(rows))


DENSE = {name: AdaptiveRungeKutta(tableau=name, rtol=1e-4, atol=1e-4) for name in EMBEDDED} | {
    f"dpm_solver/{order}/{prediction}": AdaptiveDPMSolver(order=order, prediction=prediction, rtol=1e-4, atol=1e-4)
    for order, prediction in ((2, "noise"), (3, "noise"), (3, "data"), (3, "v"), (3, "flow"))
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("upward", [False, True], ids=["down", "up"])
def test_a_trajectory_costs_nothing(name, upward):
    """With it and without, on any grid between the same ends: the same result bitwise, the same calls and steps.

    The states in between are as good as the one at the end: within what the accepted steps allow there.
    """
    sde, data, solver = make_sde("vp"), mixture(), DENSE[name]
    knots = lambda_knots(sde, 13)
    knots = knots[::-1] if upward else knots
    x = quantiles(data, knots[0], 41)
    rev = data.reverse(sde)
    plain = solve(rev, x, solver, grid=[knots[0], knots[-1]])
    for trajectory in (False, True):
        out = solve(rev, x, solver, grid=knots, trajectory=trajectory)
        assert torch.equal(out.x, plain.x) and torch.equal(out.nfe, plain.nfe)
        assert all(torch.equal(out.stats[k], plain.stats[k]) for k in ("accepted", "rejected"))
    assert torch.equal(out.trajectory[0], x) and torch.equal(out.trajectory[-1], out.x)
    for k in range(1, 13):
        error = (out.trajectory[k] - flow_map(data, x, knots[0], knots[k])).abs()
        check_within(error, allowed(data, x, knots[: k + 1], 1e-4, plain.stats["accepted"]))


@pytest.mark.parametrize("name", DENSE)
def test_order_of_dense_output(name):
    """The interpolation error between the ends of the steps falls with the tolerance like the error at the end."""
    sde, data = make_sde("vp"), mixture()
    knots = lambda_knots(sde, 37)
    x = quantiles(data, knots[0], 41)
    exact = torch.stack([flow_map(data, x, knots[0], k) for k in knots[1:-1]])
    solver, worst = DENSE[name], []
    tolerances = (1e-3, 1e-6) if solver.order == 2 else (1e-4, 1e-8)
    for tol in tolerances:
        out = solve(data.reverse(sde), x, replace(solver, rtol=tol, atol=tol), grid=knots, trajectory=True)
        worst.append(float((out.trajectory[1:-1] - exact).square().mean().sqrt()))
    p = solver.order - 1
    assert math.log(worst[0] / worst[1]) / math.log(tolerances[0] / tolerances[1]) > p / (p + 1) - 0.15


def test_a_trajectory_of_a_sample_that_failed():
    """NaN where the sample did not get, in it alone."""
    sde, data = make_sde("vp"), mixture()
    knots = lambda_knots(sde, 8)

    def network(x: Tensor, knot: Knot) -> Tensor:
        raw = data.reverse(sde).network(x, knot)
        return torch.where((x > 0.0) & (knot.half_log_snr > 0.1), math.nan, raw)

    rev = ReverseSDE(sde, network, data.reverse(sde).parameterization)
    x = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    for solver in (AdaptiveRungeKutta(), AdaptiveDPMSolver()):
        with pytest.warns(RuntimeWarning, match="sample 1"):
            out = solve(rev, x, solver, grid=knots, trajectory=True)
        reached = torch.isfinite(out.trajectory[:-1])
        assert out.status.tolist() == [0, int(Status.NON_FINITE)] and bool(reached[:, 0].all())
        assert bool(reached[:3, 1].all()) and not bool(reached[5:, 1].any())


def test_few_steps_are_refused():
    """PI control: an eighth of the steps at most, fewer than by the last error alone, and calls or error do not pay."""
    sde, data = make_sde("vp"), mixture((2,))
    ends = [sde.knot(sde.t_max), sde.knot(sde.t_min)]
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rev = data.reverse(sde)
    exact = solve(rev, x, AdaptiveRungeKutta(rtol=1e-12, atol=1e-12), grid=ends).x
    for tol in (1e-3, 1e-5, 1e-7):
        figures = {}
        for beta in (0.0, 0.4):
            out = solve(rev, x, AdaptiveRungeKutta(rtol=tol, atol=tol, beta=beta), grid=ends)
            refused, taken = (float(out.stats[k].sum()) for k in ("rejected", "accepted"))
            error = float((out.x - exact).square().mean(1).sqrt().median())
            figures[beta] = refused / (refused + taken), float(out.nfe.double().mean()) * error ** (1 / 5)
        assert figures[0.4][0] < 0.12 and figures[0.4][0] < figures[0.0][0]
        # calls at equal error: calls^5 times error is constant for a method of order 5
        assert figures[0.4][1] < 1.05 * figures[0.0][1]


@pytest.mark.parametrize("dimensions", [1, 2, 16])
def test_the_error_is_of_the_size_of_the_tolerance(dimensions):
    """Median over samples within a twentieth of the tolerance and thrice it, over seven decades; all laws."""
    generator = torch.Generator().manual_seed(dimensions)
    means = torch.randn(5, dimensions, generator=generator, dtype=torch.float64)
    data = GaussianMixture(means, std=0.1 + 0.2 * torch.rand(5, generator=generator, dtype=torch.float64))
    for name in ("vp", "ve", "edm", "flow"):
        sde = make_sde(name)
        top = sde.knot(sde.t_max)
        noise = torch.randn(32, dimensions, generator=generator, dtype=torch.float64)
        x = top.alpha * data.sample(32, generator, torch.float64) + top.sigma * noise
        rev = data.reverse(sde)
        exact = solve(rev, x, AdaptiveRungeKutta(rtol=1e-12, atol=1e-12)).x
        for tol in (1e-2, 1e-4, 1e-6, 1e-8):
            out = solve(rev, x, AdaptiveRungeKutta(rtol=tol, atol=tol), strict=True)
            median = float((out.x - exact).square().mean(1).sqrt().median())
            assert tol / 50 < median < 3 * tol, (name, tol, median)


# --- DPM-Solver -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adaptive", "fixed"),
    [
        (AdaptiveDPMSolver(order=2), DPMSolver2()),
        (AdaptiveDPMSolver(order=3), DPMSolver3()),
        (AdaptiveDPMSolver(order=2, prediction="data"), DPMpp2S()),
        (AdaptiveDPMSolver(order=3, prediction="data"), DPMpp3S()),
        (AdaptiveDPMSolver(order=3, prediction="v"), SingleStep(stages=(1 / 3, 2 / 3), prediction="v")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(), (2, 2, 2)], ids=str)
def test_one_step_is_the_fixed_step(adaptive, fixed, shape):
    """Where every tolerance is met in one step it is that of the fixed-step method: the same formula, time per row."""
    sde, data = make_sde("vp"), mixture(shape)
    knots = lambda_knots(sde, 1, low=-0.3, high=0.2)
    x = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = solve(data.reverse(sde), x, replace(adaptive, rtol=1e3, atol=1e3), grid=knots)
    want = solve(data.reverse(sde), x, fixed, grid=knots)
    torch.testing.assert_close(out.x, want.x, rtol=1e-13, atol=1e-13)
    assert torch.equal(out.nfe, want.nfe)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("prediction", ["noise", "data", "v", "flow"])
def test_dpm_solver_error_follows_the_tolerance(order, prediction):
    """On the line against the exact quantile map: below ten tolerances, and falling at the slope of its order."""
    worst = []
    tolerances = (1e-3, 1e-5) if order == 2 else (1e-3, 1e-6)
    for tol in tolerances:
        error, out = flow_errors(AdaptiveDPMSolver(order=order, prediction=prediction, rtol=tol, atol=tol))
        assert out.ok and float(error.max()) < 10 * tol
        worst.append(float(error.square().mean().sqrt()))
    slope = math.log(worst[0] / worst[1]) / math.log(tolerances[0] / tolerances[1])
    assert slope > (order - 1) / order - 0.15


@every_sde
def test_dpm_solver_on_every_sde(name):
    """From t_max to t_min, alpha = 0 included, in both forms, against the exact quantile map."""
    sde, data = make_sde(name), mixture()
    knots = [sde.knot(sde.t_max), sde.knot(sde.t_min)]
    x = quantiles(data, knots[0], 21)
    for prediction in ("noise", "data"):
        solver = AdaptiveDPMSolver(prediction=prediction, rtol=1e-5, atol=1e-5)
        out = solve(data.reverse(sde), x, solver, strict=True)
        error = (out.x - flow_map(data, x, *knots)).abs()
        assert float(error.median()) < 1e-5 * 5 and float(error.max()) < 1e-3


def test_dpm_solver_calls():
    """One call per place that was reached, and order - 1 for every try."""
    for order in (2, 3):
        sde, data = make_sde("vp"), mixture()
        spy = Spy(data.reverse(sde))
        out = solve(spy, quantiles(data, sde.knot(sde.t_max), 41), AdaptiveDPMSolver(order=order, rtol=1e-4, atol=1e-4))
        taken, refused = out.stats["accepted"], out.stats["rejected"]
        assert torch.equal(out.nfe, taken + (order - 1) * (taken + refused)) and int(refused.sum()) > 0
        assert sum(n for _, n in spy.log) == int(out.nfe.sum())


@pytest.mark.parametrize("solver", [AdaptiveRungeKutta(), AdaptiveDPMSolver(rtol=1e-4, atol=1e-5)], ids=repr)
def test_single_precision(solver, device):
    """A float32 state on any device: as good as its tolerance, against the float64 run at a tighter one."""
    sde, data = make_sde("vp"), mixture((2,))
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(4))
    want = solve(data.reverse(sde), x.double(), replace(solver, rtol=1e-9, atol=1e-9), end="denoise").x
    out = solve(data.reverse(sde), x.to(device), solver, end="denoise", strict=True)
    assert out.x.dtype == torch.float32 and out.x.device.type == device.type
    assert float((out.x.cpu().double() - want).abs().median()) < 3 * solver.rtol


def test_bad_dpm_solvers():
    """Orders and predictions that are none."""
    for make, says in (
        (lambda: AdaptiveDPMSolver(order=1), "order"),
        (lambda: AdaptiveDPMSolver(prediction="score"), "prediction"),
        (lambda: AdaptiveDPMSolver(beta=-0.1), "beta"),
        (lambda: AdaptiveRungeKutta(beta=math.nan), "beta"),
    ):
        with pytest.raises(ValueError, match=says):
            make()


@pytest.mark.parametrize("coordinate", COORDINATES)
def test_coordinates_agree_in_the_limit(coordinate):
    """All coordinates, one solution; upward too."""
    error, _ = flow_errors(AdaptiveRungeKutta(rtol=1e-10, atol=1e-10, coordinate=coordinate))
    assert float(error.max()) < 1e-7
    sde, data = make_sde("vp"), mixture()
    knots = lambda_knots(sde, 1)[::-1]
    x = quantiles(data, knots[0], 11)
    out = solve(data.reverse(sde), x, AdaptiveRungeKutta(rtol=1e-10, atol=1e-10, coordinate=coordinate), grid=knots)
    torch.testing.assert_close(out.x, flow_map(data, x, *knots), rtol=0, atol=1e-6)


def test_giving_up():
    """max_steps and a jump in the model: a status per sample, where it stopped, and the finished rows unharmed."""
    with pytest.warns(RuntimeWarning, match="MAX_STEPS"):
        _, out = flow_errors(AdaptiveRungeKutta(rtol=1e-9, atol=1e-9, max_steps=3))
    assert bool((out.status == Status.MAX_STEPS).all()) and "t = " in out.message
    sde, data = make_sde("vp"), mixture()

    def network(x: Tensor, knot: Knot) -> Tensor:
        raw = data.reverse(sde).network(x, knot)
        # not Lipschitz: no step is small enough once x is positive
        return torch.where(x > 0, raw + 1e6 * torch.sign(torch.sin(1e15 * x)), raw)

    rev = ReverseSDE(sde, network, data.reverse(sde).parameterization)
    x = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="sample 1"):
        out = solve(rev, x, AdaptiveRungeKutta(max_steps=500), grid=lambda_knots(sde, 1))
    assert int(out.status[0]) == Status.OK and int(out.status[1]) in (Status.MAX_STEPS, Status.STEP_TOO_SMALL)
    with pytest.raises(SolverError, match="sample 1"):
        solve(rev, x, AdaptiveRungeKutta(max_steps=500), grid=lambda_knots(sde, 1), strict=True)


def test_mixture_in_sixteen_dimensions(golden):
    """The accuracy problem in R^16: 512 samples from t = 1 to 1e-3 against a dopri5 reference good to 2e-9 rms."""
    import numpy as np

    with np.load(golden / "mixture16.npz") as file:
        g = {k: torch.from_numpy(np.asarray(file[k])) for k in file.files}
    sde = VPSDE(float(g["beta_min"]), float(g["beta_max"]), t_min=float(g["t_end"]))
    data = GaussianMixture(g["means"], std=g["stds"], weights=g["log_weights"].exp())
    rev, scale = data.reverse(sde), sde.alpha(sde.t_min)

    def rms(x: Tensor) -> Tensor:
        return ((x - g["x_end"]) / scale).square().mean(1).sqrt()

    out = solve(rev, g["x_T"], AdaptiveRungeKutta(rtol=1e-9, atol=1e-9), strict=True)
    assert float(rms(out.x).median()) < 1e-7
    # fixed steps converge to the same end, median over samples (a few trajectories sit on basin boundaries)
    medians = [
        float(rms(solve(rev, g["x_T"], Heun(), steps=n, grid="uniform_half_log_snr").x).median()) for n in (40, 80, 160)
    ]
    assert 1.7 < math.log2(medians[1] / medians[2]) < 2.5 and medians[2] < medians[1] < medians[0]


# --- libraries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize(
    ("method", "ours"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun2", "heun")], ids=lambda v: str(v)
)
def test_torchdiffeq_fixed_steps_are_ours(method, ours, coordinate):
    """The same tableau on the same grid in the same coordinate: equal to rounding, step by step."""
    sde, data = make_sde("vp"), mixture()
    knots = lambda_knots(sde, 6)
    x = quantiles(data, knots[0], 9)
    rev = data.reverse(sde)
    theirs = solve(rev, x, TorchDiffEq(method=method, coordinate=coordinate), grid=knots, trajectory=True)
    mine = solve(rev, x, RungeKutta(tableau=ours, coordinate=coordinate), grid=knots, trajectory=True)
    torch.testing.assert_close(theirs.trajectory, mine.trajectory, rtol=1e-9, atol=1e-10)
    assert torch.equal(theirs.nfe, mine.nfe)


@every_sde
@pytest.mark.parametrize("cls", [TorchDiffEq, SciPyODE])
def test_ode_wrappers_agree_in_the_limit(cls, name):
    """Tight tolerances: the exact flow map, and so ours; never outside [t_min, t_max], counted calls."""
    solver = cls(rtol=1e-9, atol=1e-9, coordinate="angle")
    error, out = flow_errors(solver, name)
    assert float(error.max()) < 1e-6
    sde, data = make_sde(name), mixture()
    spy = Spy(data.reverse(sde))
    x = quantiles(data, sde.knot(sde.t_max), 5)
    out = solve(spy, x, cls(rtol=1e-4, atol=1e-4, coordinate="angle"), steps=1, end="denoise")
    assert out.nfe.tolist() == [len(spy.log)] * 5
    assert min(spy.times) >= sde.t_min and max(spy.times) <= sde.t_max


@pytest.mark.parametrize("method", ["dopri8", "bosh3", "adaptive_heun", "fehlberg2", "rk4", "heun3"])
def test_torchdiffeq_methods(method):
    """Every method of the docstring runs and converges on the mixture."""
    sde, data = make_sde("vp"), mixture()
    knots = lambda_knots(sde, 60)
    x = quantiles(data, knots[0], 9)
    out = solve(data.reverse(sde), x, TorchDiffEq(method=method, rtol=1e-6, atol=1e-6, coordinate="angle"), grid=knots)
    torch.testing.assert_close(out.x, flow_map(data, x, knots[0], knots[-1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["RK23", "DOP853", "LSODA", "Radau", "BDF"])
def test_scipy_methods(method):
    """Every method of the docstring runs and converges on the mixture."""
    error, _ = flow_errors(SciPyODE(method=method, rtol=1e-7, atol=1e-7, coordinate="angle"))
    assert float(error.max()) < 1e-4


@pytest.mark.parametrize(
    ("cls", "method"),
    [(TorchDiffEq, "dopri"), (SciPyODE, "rk45"), (TorchSDE, "eulr")],
    ids=["torchdiffeq", "scipy", "torchsde"],
)
def test_unknown_methods(cls, method):
    """A misspelt method is named in the error."""
    sde = make_sde("vp")
    with pytest.raises(ValueError, match=method):
        solve(mixture().reverse(sde), torch.ones(2).double(), cls(method=method), steps=2)


@pytest.mark.parametrize("method", ["euler", "milstein", "srk", "midpoint", "heun", "euler_heun"])
def test_torchsde_samples_the_reverse_sde(method):
    """Mean and variance of 20 000 paths on Gaussian data: exact values within 5 standard errors plus the weak error of
    Euler-Maruyama on the same grid (torchsde's other methods have less)."""
    sde, data, n, steps = make_sde("vp"), gaussian(), 20_000, 64
    top, end = sde.knot(0.9), sde.knot(0.1)
    grid = torch.linspace(top.t, end.t, steps + 1, dtype=torch.float64)
    (m_t, v_t), (m_s, v_s) = mp_free_moments(data, top), mp_free_moments(data, end)
    generator = torch.Generator().manual_seed(0)
    x = m_t + math.sqrt(v_t) * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    spy = Spy(gaussian((1,)).reverse(sde))
    out = solve(spy, x, TorchSDE(method=method), grid=grid, rng=1)
    knots = [sde.knot(float(t)) for t in grid]
    bias = gaussian_weak_error(sde, data, EulerMaruyama(), knots)
    assert abs(float(out.x.mean()) - m_s) < 5 * math.sqrt(v_s / n) + 2 * abs(bias[0])
    assert abs(float(out.x.var()) - v_s) < 5 * v_s * math.sqrt(2 / n) + 2 * abs(bias[1])
    assert int(out.nfe[0]) == len(spy.log)
    if method == "euler":
        # the same method: its bias too, within the standard errors; one call a step, and one look at the shapes
        assert len(spy.log) == steps + 1
        assert abs(float(out.x.mean()) - m_s - bias[0]) < 5 * math.sqrt(v_s / n)
        assert abs(float(out.x.var()) - v_s - bias[1]) < 5 * v_s * math.sqrt(2 / n)


def test_wrappers_on_images():
    """(B, C, H, W) states through every library, equal to ours in the limit."""
    sde, data = make_sde("vp"), mixture((2, 2, 2))
    knots = lambda_knots(sde, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 2, 2, generator=generator, dtype=torch.float64)
    rev = data.reverse(sde)
    want = solve(rev, x, AdaptiveRungeKutta(rtol=1e-10, atol=1e-10), grid=knots).x
    for solver in (TorchDiffEq(rtol=1e-9, atol=1e-9), SciPyODE(rtol=1e-9, atol=1e-9)):
        torch.testing.assert_close(solve(rev, x, solver, grid=knots).x, want, rtol=0, atol=1e-6)
    grid = torch.linspace(knots[0].t, knots[1].t, 5, dtype=torch.float64)
    assert solve(rev, x, TorchSDE(), grid=grid, rng=0).x.shape == x.shape


def test_declared_calls_of_solvers_with_steps_of_their_own():
    """They cannot promise a number of calls, and say where to read it."""
    for solver in (AdaptiveRungeKutta(), TorchDiffEq(), SciPyODE(), TorchSDE()):
        with pytest.raises(ValueError, match=r"Solution\.nfe"):
            solver.nfe(3)
        with pytest.raises(ValueError):
            solver.steps_for(30)


def test_fixed_solvers_tend_to_the_adaptive_one():
    """DDIM, Heun and midpoint with 2000 steps against the adaptive solution of the same start."""
    sde, data = make_sde("cosine"), mixture()
    knots = lambda_knots(sde, 2000)
    x = quantiles(data, knots[0], 9)
    want = solve(data.reverse(sde), x, AdaptiveRungeKutta(rtol=1e-9, atol=1e-9), grid=[knots[0], knots[-1]]).x
    for solver, tolerance in ((DDIM(), 5e-3), (Heun(), 1e-6), (Midpoint(), 1e-6)):
        torch.testing.assert_close(solve(data.reverse(sde), x, solver, grid=knots).x, want, rtol=0, atol=tolerance)
