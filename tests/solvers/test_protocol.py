"""What every solver of the table promises the driver: calls, batches, seeds, domain, failures, hooks, bad input."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from oracles import CASES, FIXED, SDE_NAMES, Spy, lambda_knots, make_sde, mixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sde_lib import DATA, SDE, VPSDE, GaussianMixture, Knot, ReverseSDE, VPrediction
from solvers import (
    DDIM,
    RK4,
    SOLVERS,
    AdaptiveRungeKutta,
    Ancestral,
    DormandPrince,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    RungeKutta,
    Solver,
    SolverError,
    Status,
    StepInfo,
    TorchSDE,
    as_draw,
    sample,
    solve,
)
from solvers.solver import Hooks

every_sde = pytest.mark.parametrize("name", SDE_NAMES)
every_case = pytest.mark.parametrize("case", CASES)
FREE = [k for k, v in CASES.items() if not v.batch_coupled]
SEEDED = [k for k, v in CASES.items() if v.stochastic and not isinstance(v, TorchSDE)]


def run_options(solver: Solver, sde: SDE, steps: int = 4) -> dict[str, Any]:
    """A short run that the solver and the SDE support: well inside the domain, equal times for torchsde."""
    top, end = lambda_knots(sde, 1)
    if isinstance(solver, TorchSDE):
        return {"grid": torch.linspace(top.t, end.t, steps + 1, dtype=torch.float64)}
    return {"grid": lambda_knots(sde, steps)}


def start(n: int, shape: tuple[int, ...], sde: SDE, dtype: torch.dtype = torch.float64) -> Tensor:
    knot = lambda_knots(sde, 1)[0]
    x = mixture(shape).sample(n, torch.Generator().manual_seed(11), torch.float64)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    return (knot.alpha * x + knot.sigma * noise).to(dtype)


def test_every_solver_is_in_the_cases():
    """A new entry of SOLVERS enrols itself with its defaults."""
    assert set(SOLVERS) <= set(CASES)


# --- calls ----------------------------------------------------------------------------------------------------------


@every_sde
@pytest.mark.parametrize("case", FIXED)
@pytest.mark.parametrize("end", ["stop", "denoise"])
def test_declared_calls_are_the_calls_made(case, name, end):
    """nfe(steps, end) = counted = Solution.nfe, for every sample; the batch is never split or repeated."""
    solver, sde = FIXED[case], make_sde(name)
    for steps in (1, 2, 5):
        spy = Spy(mixture().reverse(sde))
        out = solve(spy, start(3, (), sde), solver, end=end, rng=0, **run_options(solver, sde, steps))
        assert len(spy.log) == solver.nfe(steps, end)
        assert out.nfe.tolist() == [len(spy.log)] * 3 and out.nfe.dtype == torch.int64
        assert all(rows == 3 for _, rows in spy.log)


@pytest.mark.parametrize("case", FIXED)
@pytest.mark.parametrize("end", ["stop", "denoise"])
def test_a_budget_is_used_and_kept(case, end):
    """steps_for(nfe) is the largest number of steps whose calls fit; solve(nfe=) stays within the budget."""
    solver, sde = FIXED[case], make_sde("vp")
    for budget in range(solver.nfe(1, end), 40):
        steps = solver.steps_for(budget, end)
        assert solver.nfe(steps, end) <= budget < solver.nfe(steps + 1, end)
    with pytest.raises(ValueError, match="network calls"):
        solver.steps_for(solver.nfe(1, end) - 1, end)
    spy = Spy(mixture().reverse(sde))
    out = solve(spy, start(2, (), sde), solver, nfe=23, end=end, rng=0)
    assert len(spy.log) == int(out.nfe[0]) == solver.nfe(solver.steps_for(23, end), end) <= 23


@pytest.mark.parametrize("case", FIXED)
def test_calls_on_a_chain(case):
    """Strided chains end in the posterior mean: n steps are n - 1 of the solver's and the one that denoises."""
    solver = FIXED[case]
    chain = VPSDE().discretize(50)
    for steps in (2, 7, 50):
        spy = Spy(mixture().reverse(chain))
        try:
            out = solve(spy, start(2, (), VPSDE()), solver, grid=chain, steps=steps, rng=0)
        except ValueError as error:
            assert "chain" in str(error).lower()
            return
        assert len(spy.log) == int(out.nfe[0]) == solver.on(chain).nfe(steps - 1, "denoise")
        assert all(isinstance(k.index, int) and 0 <= k.index < 50 for k, _ in spy.log)


@pytest.mark.parametrize("case", ["ddim", "ancestral", "heun", "predictor_corrector", "dormand_prince"])
def test_a_budget_on_a_chain_is_used(case):
    """solve(nfe=) on a chain takes as many steps as fit, the last of which costs one call."""
    solver, chain = FIXED[case], VPSDE().discretize(60)
    for budget in (13, 14, 15):
        spy = Spy(mixture().reverse(chain))
        try:
            solve(spy, start(2, (), VPSDE()), solver, grid=chain, nfe=budget, rng=0)
        except ValueError as error:
            assert "chain" in str(error).lower()
            return
        used = len(spy.log)
        per_step = solver.nfe(2, "denoise") - solver.nfe(1, "denoise")
        assert used <= budget < used + per_step


@pytest.mark.parametrize("case", [k for k, v in CASES.items() if v.adaptive])
def test_solvers_that_need_time_say_so_on_a_chain(case):
    """Adaptive and external solvers on a model of a chain: a ValueError that names the chain, before any call."""
    chain = VPSDE().discretize(50)
    spy = Spy(mixture().reverse(chain))
    with pytest.raises(ValueError, match="chain"):
        solve(spy, start(2, (), VPSDE()), CASES[case], rng=0)
    assert not spy.log


@pytest.mark.parametrize("case", FIXED)
def test_a_chain_is_a_grid_for_a_continuous_model(case):
    """The chain's knots on a model of the SDE: called at its nominal times in order, by stages also between them."""
    solver, sde = FIXED[case], VPSDE()
    chain, seen = sde.discretize(50), []

    def v(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return 0.3 * x

    try:
        solve(sde.reverse(v=v), start(2, (), sde), solver, grid=chain, steps=5, rng=0)
    except ValueError as error:
        assert "chain" in str(error).lower()
        return
    assert chain.t_min <= min(seen) and max(seen) <= chain.t_max
    if solver.nfe_per_step == 1 and not solver.nfe_to_start:
        assert set(seen) <= set(chain.times.tolist()) and seen == sorted(seen, reverse=True)


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for the device, and notes results without dimensions."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")

    def __init__(self) -> None:
        super().__init__()
        self.scalars: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.WAITS, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 0:
            self.scalars.append(name)
        return out


@pytest.mark.parametrize("case", FIXED)
@pytest.mark.parametrize("rng", [0, [1, 2, 3]], ids=["one seed", "a seed per sample"])
def test_a_fixed_step_loop_never_waits_for_the_device(case, rng):
    """No host synchronisation and no tensor without dimensions inside the loop: it can be captured as a graph."""
    solver, sde = FIXED[case], make_sde("vp")
    rev = ReverseSDE(sde, lambda x, knot: 0.3 * x, VPrediction())
    knots = tuple(lambda_knots(sde, 4))
    x = start(3, (2, 2), sde)
    draw = as_draw(rng, x)
    with NoSync() as watch:
        solver.run(rev, x, knots, draw, Hooks())
    # Langevin's step size is made on the device from norms, and may meet a constant there
    assert not watch.scalars or "langevin" in repr(solver).lower()


@pytest.mark.parametrize(("solver", "operations"), [(DDIM(), 2), (EulerMaruyama(eta=0.0), 2), (Ancestral(), 4)])
def test_a_step_is_a_weighted_sum(solver, operations):
    """Tensor operations per step beyond the network: x times a plus F times b, and one draw added."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            type(self).calls += 1
            return func(*args, **(kwargs or {}))

    sde = make_sde("vp")
    rev = ReverseSDE(sde, lambda x, knot: x, VPrediction())
    x = start(3, (2, 2), sde)
    draw = as_draw(0, x)
    with Count():
        solver.run(rev, x, tuple(lambda_knots(sde, 10)), draw, Hooks())
    assert Count.calls <= 10 * operations


def test_guidance_counts_double():
    """A wrapper that states nfe_per_call = 2 doubles the reported calls."""

    class Twice(Spy):
        nfe_per_call = 2

    rev = Twice(mixture().reverse(make_sde("vp")))
    assert solve(rev, start(2, (), make_sde("vp")), DDIM(), steps=5).nfe.tolist() == [10, 10]


# --- batches and seeds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FREE)
@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sample_does_not_depend_on_its_batch(case, shape, dtype):
    """Bitwise, with a row-wise closed-form score and one seed per sample: alone, in any order, in any batch."""
    solver, sde = FREE_CASES[case], make_sde("vp")
    rev, x, seeds = mixture(shape).reverse(sde), start(9, shape, sde, dtype), [70 + i for i in range(9)]
    options = run_options(solver, sde)
    whole = solve(rev, x, solver, rng=seeds, end="denoise", **options)
    for rows in ([0], [8], [3, 1], list(reversed(range(9)))):
        part = solve(rev, x[rows], solver, rng=[seeds[i] for i in rows], end="denoise", **options)
        assert torch.equal(part.x, whole.x[rows])
        assert torch.equal(part.nfe, whole.nfe[rows])


FREE_CASES = {k: CASES[k] for k in FREE}


@pytest.mark.parametrize("case", [k for k, v in CASES.items() if v.batch_coupled])
def test_coupled_solvers_say_so(case):
    """The solvers exempt from batch invariance, by name."""
    assert case in {"torchdiffeq", "torchsde", "scipy", "pc/batch"}


@every_case
def test_same_seed_same_result(case):
    """Bitwise; another seed gives another sample if the solver draws."""
    solver, sde = CASES[case], make_sde("vp")
    rev, x = mixture((2,)).reverse(sde), start(4, (2,), sde)
    options = run_options(solver, sde)
    one, two, other = (solve(rev, x, solver, rng=seed, **options).x for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert torch.equal(one, other) != solver.stochastic


@every_case
def test_global_generator_rules_without_rng(case):
    """rng=None follows torch.manual_seed; and no solver touches the global generator when it was given a seed."""
    solver, sde = CASES[case], make_sde("vp")
    rev, x = mixture((2,)).reverse(sde), start(3, (2,), sde)
    options = run_options(solver, sde)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(solve(rev, x, solver, **options).x)
    assert torch.equal(*runs)
    state = torch.get_rng_state()
    solve(rev, x, solver, rng=1, **options)
    assert torch.equal(state, torch.get_rng_state())


@every_case
def test_a_generator_goes_on(case):
    """A torch.Generator is consumed: the second run differs, a rewound one repeats."""
    solver, sde = CASES[case], make_sde("vp")
    rev, x = mixture((2,)).reverse(sde), start(3, (2,), sde)
    options = run_options(solver, sde)
    generator = torch.Generator().manual_seed(0)
    first, second = (solve(rev, x, solver, rng=generator, **options).x for _ in range(2))
    generator.manual_seed(0)
    assert torch.equal(first, solve(rev, x, solver, rng=generator, **options).x)
    assert torch.equal(first, second) != solver.stochastic


@every_case
def test_the_start_is_not_written_to(case):
    """x_T keeps its values, and so do the network's outputs, even where they are handed through unchanged."""
    solver, sde = CASES[case], make_sde("vp")
    x = start(3, (2,), sde)
    kept, outputs = x.clone(), []

    def data(x: Tensor, t: Tensor) -> Tensor:
        out = torch.tanh(x)
        outputs.append((out, out.clone()))
        return out

    solve(sde.reverse(data=data), x, solver, rng=0, end="denoise", **run_options(solver, sde))
    assert torch.equal(x, kept)
    assert all(torch.equal(now, then) for now, then in outputs)


@every_sde
@every_case
def test_float32_state(case, name):
    """A float32 run stays float32 and within a few hundred float32 ulp of the float64 run with the same noise."""
    solver, sde = CASES[case], make_sde(name)
    options = run_options(solver, sde)
    x = start(4, (2,), sde, torch.float32)
    rev = mixture((2,)).reverse(sde)
    single = solve(rev, x, solver, rng=[1, 2, 3, 4], **options).x
    assert single.dtype == torch.float32 and torch.isfinite(single).all()
    if isinstance(solver, TorchSDE):
        return  # its path is drawn in the dtype of the state
    double = solve(rev, x.double(), solver, rng=[1, 2, 3, 4], **options).x
    # chosen steps may differ where a run adapts: its tolerance, not the dtype, is the scale there
    tolerance = 5e-3 if solver.adaptive else 2e-4
    assert float((single.double() - double).abs().max()) < tolerance * (1.0 + float(double.abs().max()))


# --- domain ---------------------------------------------------------------------------------------------------------


@every_sde
@every_case
def test_nothing_is_evaluated_outside_the_domain(case, name):
    """Every time of every call lies in [t_min, t_max], on the default grid and range; the end is hit exactly."""
    solver, sde = CASES[case], make_sde(name)
    spy = Spy(mixture().reverse(sde))
    knot = sde.knot(sde.drift_t_max if solver.needs_drift else sde.t_max)
    x = knot.sigma * torch.linspace(-1, 1.2, 3, dtype=torch.float64) + 0.1 * knot.alpha
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # six steps may well diverge on a stiff law
        solve(spy, x, solver, steps=6, end="denoise", rng=0)
    times = spy.times
    assert times and min(times) >= sde.t_min and max(times) <= sde.t_max
    # churn raises the last level too before its posterior mean
    assert times[-1] == sde.t_min or getattr(solver, "s_churn", 0.0) > 0.0


@every_case
def test_the_grid_is_what_is_walked(case):
    """Fixed solvers start every step at a knot of the grid: first calls of the steps are the knots in order."""
    solver = CASES[case]
    if solver.adaptive or getattr(solver, "s_churn", 0) or not solver.nfe_per_step:
        return
    sde = make_sde("vp")
    spy = Spy(mixture().reverse(sde))
    knots = lambda_knots(sde, 5)
    solve(spy, start(2, (), sde), solver, grid=knots, rng=0)
    called = spy.times
    assert set(called) <= {k.t for k in knots} or solver.nfe_per_step > 1 or solver.nfe_to_start
    wanted = [k.t for k in knots[:-1]]
    if isinstance(solver, PredictorCorrector) and solver.predictor is None:
        wanted = [k.t for k in knots[1:]]
    at = iter(called)
    assert all(t in at for t in wanted)  # a subsequence


# --- failures -------------------------------------------------------------------------------------------------------


def breaks_below(sde: SDE, t_bad: float, rows: slice = slice(None)) -> ReverseSDE:
    """A score model whose output turns NaN once t <= t_bad, on some rows."""
    data = mixture((2,))

    def network(x: Tensor, knot: Knot) -> Tensor:
        raw = data.reverse(sde).network(x, knot).clone()
        if isinstance(knot.t, Tensor):
            bad = (knot.t <= t_bad).reshape(-1)
            raw[bad] = math.nan
        elif knot.t <= t_bad:
            raw[rows] = math.nan
        return raw

    return ReverseSDE(sde, network, data.reverse(sde).parameterization)


@pytest.mark.parametrize("case", FIXED)
def test_nan_is_reported_with_its_step_and_quantity(case):
    """The network fails at the third knot: rows, time, step and quantity are named; the other rows are solved."""
    solver, sde = FIXED[case], make_sde("vp")
    knots = lambda_knots(sde, 6)
    rev = breaks_below(sde, knots[2].t, slice(1, 2))
    x = start(3, (2,), sde)
    with pytest.warns(RuntimeWarning, match="not finite"):
        out = solve(rev, x, solver, grid=knots, rng=0)
    coupled = solver.batch_coupled
    assert out.status.tolist() == [int(coupled), 1, int(coupled)] and not out.ok
    assert coupled or (torch.isfinite(out.x[[0, 2]]).all() and not torch.isfinite(out.x[1]).any())
    # an ahead or stage call may meet the bad time one step early; a pure corrector corrects at s
    assert any(f"step {i} of 6" in out.message for i in (2, 3)), out.message
    assert "network" in out.message and "rows 1" in out.message and "t = " in out.message
    with pytest.raises(SolverError, match=r"step [23] of 6.*network"):
        solve(rev, x, solver, grid=knots, rng=0, strict=True)


@pytest.mark.parametrize("case", [k for k, v in CASES.items() if v.adaptive])
def test_nan_in_a_solver_with_steps_of_its_own(case):
    """Adaptive and external: no hang and no foreign exception; status and message, or SolverError under strict."""
    solver, sde = CASES[case], make_sde("vp")
    rev = breaks_below(sde, 0.2)
    options = run_options(solver, sde)
    x = start(3, (2,), sde)
    with pytest.warns(RuntimeWarning, match=r"t = |not finite"):
        out = solve(rev, x, solver, rng=0, **options)
    assert not out.ok and bool((out.status != Status.OK).all()) and out.message
    with pytest.raises(SolverError):
        solve(rev, x, solver, rng=0, strict=True, **options)


@every_case
def test_nan_start(case):
    """A start with one NaN row: reported, and under strict raised."""
    solver, sde = CASES[case], make_sde("vp")
    x = start(3, (2,), sde)
    x[1, 0] = math.nan
    options = run_options(solver, sde)
    rev = mixture((2,)).reverse(sde)
    with pytest.warns(RuntimeWarning, match=r"finite|t = "):
        out = solve(rev, x, solver, rng=0, **options)
    assert int(out.status[1]) != Status.OK
    assert solver.batch_coupled or out.status[[0, 2]].tolist() == [0, 0]
    with pytest.raises(SolverError):
        solve(rev, x, solver, rng=0, strict=True, **options)


def test_a_good_run_says_so():
    """status OK, no message, no warning, steps counted."""
    sde = make_sde("vp")
    out = solve(mixture().reverse(sde), start(2, (), sde), DDIM(), steps=5, strict=True)
    assert out.ok and out.message == "" and out.status.tolist() == [0, 0] and out.stats["steps"] == 5


# --- trajectory, callback, project ----------------------------------------------------------------------------------


@every_case
def test_trajectory(case):
    """States at all knots, the start first, the result last; times are the knots', the data end counting as 0."""
    solver, sde = CASES[case], make_sde("vp")
    x = start(3, (2,), sde)
    options = run_options(solver, sde, 4)
    out = solve(mixture((2,)).reverse(sde), x, solver, rng=0, end="denoise", trajectory=True, **options)
    assert out.trajectory.shape == (6, 3, 2) and out.times.shape == (6,)
    assert torch.equal(out.trajectory[0], x) and torch.equal(out.trajectory[-1], out.x)
    assert bool((out.times.diff() < 0).all()) and out.times[-1] == 0.0
    plain = solve(mixture((2,)).reverse(sde), x, solver, rng=0, end="denoise", **options)
    assert plain.trajectory is None
    torch.testing.assert_close(plain.x, out.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", FIXED)
def test_callback_sees_every_step(case):
    """Step number, total, both knots and the state after it."""
    solver, sde = FIXED[case], make_sde("vp")
    seen: list[StepInfo] = []
    knots = lambda_knots(sde, 4)
    x = start(3, (2,), sde)
    out = solve(mixture((2,)).reverse(sde), x, solver, grid=knots, rng=0, callback=seen.append, trajectory=True)
    assert [(i.step, i.steps) for i in seen] == [(k, 4) for k in range(4)]
    assert [i.t for i in seen] == knots[:-1] and [i.s for i in seen] == knots[1:]
    for info, state in zip(seen, out.trajectory[1:], strict=True):
        assert torch.equal(info.x, state)
        assert info.prediction is None or info.prediction.x.shape == x.shape


@pytest.mark.parametrize("case", FIXED)
def test_project_is_applied_at_every_knot(case):
    """x -> 0 on one coordinate at every knot: it stays 0, the last state included, and is called steps + 1 times."""
    solver, sde = FIXED[case], make_sde("vp")
    at = []

    def project(x: Tensor, knot: Knot, draw: Any) -> Tensor:
        at.append(knot)
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)

    knots = lambda_knots(sde, 4)
    rev = mixture((2,)).reverse(sde)
    out = solve(rev, start(3, (2,), sde), solver, grid=knots, rng=0, project=project, trajectory=True)
    assert at == knots and bool((out.trajectory[:, :, 0] == 0).all())
    free = solve(rev, start(3, (2,), sde), solver, grid=knots, rng=0)
    assert not torch.equal(out.x[:, 1], free.x[:, 1])


@pytest.mark.parametrize("case", [k for k, v in CASES.items() if v.adaptive])
def test_hooks_are_refused_where_steps_are_hidden(case):
    """project and callback need steps between knots of the grid's own."""
    sde = make_sde("vp")
    for hook in ({"project": lambda x, k, d: x}, {"callback": print}):
        with pytest.raises(ValueError, match="fixed-step"):
            solve(mixture().reverse(sde), start(2, (), sde), CASES[case], steps=2, **hook)


def test_condition_reaches_the_network():
    """condition= is passed by keyword to every call, and sliced with the batch by an adaptive solver."""
    sde = make_sde("vp")
    centre = torch.tensor([[-1.0], [2.0], [0.5]], dtype=torch.float64)

    def data(x: Tensor, t: Tensor, centre: Tensor, scale: float) -> Tensor:
        assert len(centre) == len(x)
        return scale * centre.expand_as(x)

    for solver in (DDIM(), AdaptiveRungeKutta(rtol=1e-8, atol=1e-8)):
        out = solve(
            sde.reverse(data=data),
            torch.zeros(3, 2, dtype=torch.float64),
            solver,
            steps=3,
            condition={"centre": centre, "scale": 2.0},
            end="denoise",
        )
        torch.testing.assert_close(out.x, 2.0 * centre.expand(3, 2))


def test_differentiable():
    """By default nothing is recorded; differentiable=True gives the gradient of the whole run."""
    sde = make_sde("vp")
    x = start(2, (2,), sde).requires_grad_(True)
    rev = mixture((2,)).reverse(sde)
    assert not solve(rev, x, Heun(), steps=3).x.requires_grad
    for solver in (DDIM(), Heun(), RK4(), Ancestral()):
        end = solve(rev, x, solver, steps=3, differentiable=True, rng=0).x
        (gradient,) = torch.autograd.grad(end[0, 0], x)
        h = 1e-6
        bumped = x.detach().clone()
        bumped[0, 0] += h
        got = (solve(rev, bumped, solver, steps=3, rng=0).x[0, 0] - end[0, 0].detach()) / h
        # forward difference: h times a second derivative of order 10
        assert float(gradient[0, 0]) == pytest.approx(float(got), rel=1e-3, abs=1e-4)
        assert float(gradient[1].abs().max()) == 0.0


# --- sample ---------------------------------------------------------------------------------------------------------


@every_sde
@every_case
def test_sample_draws_the_prior_first(case, name):
    """sample() is prior_std z, then solve() with the rest of the same noise; the end is denoised by default."""
    solver, sde = CASES[case], make_sde(name)
    rev = mixture((2,)).reverse(sde)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # five steps may well diverge on a stiff law
        out = sample(rev, (3, 2), solver, steps=5, rng=4, trajectory=True, dtype=torch.float64)
    want = sde.prior_std * torch.randn(3, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(out.trajectory[0], want)
    assert out.x.shape == (3, 2) and out.x.dtype == torch.float64 and out.times[-1] == 0.0


@pytest.mark.parametrize("case", SEEDED)
def test_per_sample_seeds_from_the_prior_on(case):
    """sample(rng=[...]): sample i is the same in any batch, prior included."""
    solver, rev = CASES[case], mixture((2,)).reverse(make_sde("vp"))
    if solver.batch_coupled:
        return
    whole = sample(rev, (5, 2), solver, steps=4, rng=[9, 8, 7, 6, 5]).x
    part = sample(rev, (2, 2), solver, steps=4, rng=[7, 9]).x
    assert torch.equal(part, whole[[2, 0]])


# --- bad input ------------------------------------------------------------------------------------------------------


def test_upward_with_noise_is_refused():
    """Inversion is for deterministic solvers; every stochastic one refuses an upward grid by name."""
    sde = make_sde("vp")
    rev, x = mixture().reverse(sde), start(2, (), sde)
    for case, solver in CASES.items():
        options: dict[str, Any] = {"grid": [0.3, 0.5, 0.7]}
        if solver.stochastic:
            with pytest.raises(ValueError, match="deterministic"):
                solve(rev, x, solver, rng=0, **options)
        else:
            out = solve(rev, x, solver, **options)
            assert out.ok, case
    with pytest.raises(ValueError, match="stop"):
        solve(rev, x, DDIM(), grid=[0.3, 0.5], end="denoise")


@pytest.mark.parametrize("case", [k for k, v in CASES.items() if not v.stochastic])
def test_up_and_down_again(case):
    """A deterministic solver inverts itself as its steps shrink: the gap after a round trip falls at least like h."""
    solver, sde = CASES[case], make_sde("vp")
    rev, x = mixture().reverse(sde), start(5, (), sde)
    gaps = []
    for steps in (200, 800):
        grid = torch.linspace(0.9, 0.2, steps + 1 if not solver.adaptive else 2, dtype=torch.float64)
        down = solve(rev, x, solver, grid=grid)
        gaps.append(float((solve(rev, down.x, solver, grid=grid.flip(0)).x - x).abs().max()))
    # an adaptive solver has its tolerance (1e-3 at most), carried back up by a flow that stretches less than tenfold;
    # the published tolerance of the adaptive DPM-Solver is larger, and relative
    allowed = max(1e-2, getattr(solver, "rtol", 0.0)) if solver.adaptive else 1e-10
    assert gaps[1] < 0.3 * gaps[0] or gaps[1] < allowed


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x_T": [1.0]}, TypeError, "x_T"),
        ({"x_T": torch.zeros(3, dtype=torch.int64)}, TypeError, "floating point"),
        ({"x_T": torch.tensor(1.0)}, ValueError, "x_T"),
        ({"x_T": torch.zeros(0, 3)}, ValueError, "B >= 1"),
        ({"solver": DDIM}, TypeError, "Solver instance"),
        ({"solver": "dim"}, ValueError, "Unknown solver"),
        ({"rev": lambda x, t: x}, TypeError, "ReverseSDE"),
        ({"rng": "seed"}, (TypeError, ValueError), "rng|seeds"),
        ({"rng": 1.5}, TypeError, "rng"),
        ({"rng": True}, TypeError, "rng"),
        ({"rng": [1, 2]}, ValueError, "2 seeds for a batch of 3"),
        ({"rng": [1, 2, 3.0]}, ValueError, "ints"),
        ({"rng": []}, ValueError, "seeds"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": -3}, ValueError, "steps"),
        ({"steps": 2.5}, ValueError, "steps"),
        ({"steps": True}, ValueError, "steps"),
        ({"steps": None}, ValueError, "steps"),
        ({"nfe": 10}, ValueError, "not both"),
        ({"steps": None, "nfe": 0}, ValueError, "network calls"),
        ({"end": "stopp"}, ValueError, "end"),
    ],
)
def test_bad_arguments(change, error, says):
    """Refused at entry, in words, before any step."""
    spy = Spy(mixture((2,)).reverse(make_sde("vp")))
    arguments: dict[str, Any] = {"rev": spy, "x_T": torch.zeros(3, 2), "solver": Ancestral(), "steps": 3, **change}
    with pytest.raises(error, match=says):
        solve(arguments.pop("rev"), arguments.pop("x_T"), arguments.pop("solver"), **arguments)
    assert not spy.log


def test_network_output_of_the_wrong_shape():
    """A score function that returns another shape is named, not broadcast."""
    sde = make_sde("vp")
    for wrong in (lambda x, t: x[:, :1], lambda x, t: x.sum(), lambda x, t: torch.cat([x, x], 1), lambda x, t: None):
        with pytest.raises((ValueError, TypeError), match=r"shape|tensor"):
            solve(sde.reverse(noise=wrong), torch.ones(3, 2), DDIM(), steps=2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EulerMaruyama(eta=-1.0), "eta"),
        (lambda: EulerMaruyama(eta=math.nan), "eta"),
        (lambda: DDIM(eta=1.5), "eta"),
        (lambda: DDIM(eta="1"), "eta"),
        (lambda: Ancestral(variance="learned"), "variance"),
        (lambda: Heun(s_churn=-1.0), "s_churn"),
        (lambda: Heun(s_noise=-1.0), "s_noise"),
        (lambda: Heun(s_churn=1.0, s_min=2.0, s_max=1.0), "s_min"),
        (lambda: Heun(tableau="huen"), "Did you mean 'heun'"),
        (lambda: Heun(coordinate="angel"), "Did you mean 'angle'"),
        (lambda: RungeKutta(tableau="rk5"), "tableau"),
        (lambda: AdaptiveRungeKutta(rtol=0.0), "rtol"),
        (lambda: AdaptiveRungeKutta(atol=-1.0), "atol"),
        (lambda: AdaptiveRungeKutta(tableau="rk4"), "embedded error"),
        (lambda: AdaptiveRungeKutta(max_steps=0), "max_steps"),
        (lambda: PredictorCorrector(predictor="eulermaruyama"), "Did you mean 'euler_maruyama'"),
        (lambda: PredictorCorrector(corrector="langvin"), "Did you mean 'langevin'"),
        (lambda: PredictorCorrector(predictor=None, corrector=None), "predictor or a corrector"),
    ],
)
def test_bad_solvers(make, says):
    """Options are checked at construction."""
    with pytest.raises(ValueError, match=says):
        make()


def test_solvers_are_values():
    """Frozen, comparable, hashable, with a repr that builds them again."""
    for cls in SOLVERS.values():
        one, two = cls(), cls()
        assert one == two and hash(one) == hash(two)
        with pytest.raises(AttributeError):
            one.order_of_magnitude = 3  # type: ignore[attr-defined]
    assert repr(DDIM(eta=0.5)) == "DDIM(eta=0.5)" and DDIM(eta=0.5) != DDIM()
    assert Heun(s_churn=1.0) != Heun()


def test_a_rejected_sample_argument():
    """sample() takes solve()'s options by name; an unknown one is named."""
    with pytest.raises(TypeError, match="trajectry"):
        sample(mixture((2,)).reverse(make_sde("vp")), (2, 2), DDIM(), steps=2, trajectry=True)


def test_fsal_shares_its_calls():
    """Dormand-Prince: 6 per step and one more, which the posterior mean at the end reuses."""
    assert DormandPrince().nfe(3) == 19 == DormandPrince().nfe(3, "denoise")
    assert Heun().nfe(17, "denoise") == 35  # Karras et al. 2022: 18 noise levels, 35 calls


def test_data_as_start_of_a_grid_is_refused():
    """Upward from sigma = 0 there is no prediction: a clear error, and the network is never called there."""
    chain = VPSDE().discretize(30)
    for rev, grid in (
        (mixture().reverse(chain), tuple(reversed(chain.descend(5)))),
        (mixture().reverse(make_sde("vp")), (DATA, make_sde("vp").knot(0.5))),
    ):
        spy = Spy(rev)
        with pytest.raises(ValueError, match=r"noise-free|data"):
            solve(spy, torch.zeros(2, dtype=torch.float64), DDIM(), grid=grid)
        assert not spy.log


def test_given_knots_are_checked():
    """Knots outside [t_min, t_max], or of another law, are refused like given times are."""
    sde = make_sde("vp")
    rev = mixture().reverse(sde)
    x = torch.zeros(2, dtype=torch.float64)
    for grid in ([sde.knot(1.5), sde.knot(0.5)], [sde.knot(0.5), sde.knot(1e-5)]):
        with pytest.raises(ValueError, match="t_min"):
            solve(rev, x, DDIM(), grid=grid)
    with pytest.raises(ValueError):
        solve(rev, x, DDIM(), grid=[make_sde("edm").knot(40.0), make_sde("edm").knot(1.0)])


def test_point_data_needs_no_luck():
    """The exact reverse of a point: one DDIM step and one denoising call give the point itself."""
    sde = make_sde("flow")
    out = solve(
        GaussianMixture([0.7], std=0.0).reverse(sde), torch.tensor([1.3]).double(), DDIM(), steps=1, end="denoise"
    )
    assert float(out.x) == pytest.approx(0.7, abs=1e-14)
