"""Order and exactness of every solver on every SDE, without Monte Carlo.

Three problems. Affine: on Gaussian data a run is x_end = A x_T + b + sum C_k z_k, whose coefficients impulses read
off, so mean and variance of the output are exact numbers. Nonlinear: on a mixture, expectations of test functions by
backward quadrature through the solver's own steps (affine drift is blind to some errors). Flow: on a mixture,
deterministic solvers against the exact probability-flow map, which keeps quantiles. Grids are equispaced in lambda and
stay away from t = 1 and t = 0, where an order needs finer steps to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles import (
    CASES,
    FIXED,
    ORDERED,
    SDE_NAMES,
    Spy,
    affine_map,
    flow_map,
    gaussian,
    gaussian_weak_error,
    lambda_knots,
    make_sde,
    mixture,
    mp_free_moments,
    nonlinear_weak_error,
    observed_order,
    quantiles,
    remembers,
    tree_weak_error,
)

from sde_lib import DATA, GaussianMixture
from solvers import (
    DDIM,
    SEEDS2,
    Ancestral,
    AnnealedLangevin,
    Heun,
    PredictorCorrector,
    Recorded,
    Step,
    sample,
    solve,
)

SLACK = 0.15
every_sde = pytest.mark.parametrize("name", SDE_NAMES)


def on_two_sdes(cases: Iterable[str]) -> list[Any]:
    """Every case on every SDE; in the quick suite on VP and on one other, in turn, so that all SDEs occur."""
    others = [name for name in SDE_NAMES if name != "vp"]
    quick = {case: ("vp", others[i % len(others)]) for i, case in enumerate(cases)}
    return [
        pytest.param(case, name, marks=() if name in quick[case] else pytest.mark.slow)
        for case in quick
        for name in SDE_NAMES
    ]


STOCHASTIC = [k for k, v in ORDERED.items() if v.stochastic]
VP = make_sde("vp")
MARKOV = [k for k in STOCHASTIC if not remembers(ORDERED[k], gaussian().reverse(VP), lambda_knots(VP, 2))]
DETERMINISTIC = [k for k, v in ORDERED.items() if not v.stochastic]


def check_order(
    errors: Callable[[int], list[float]], order: int, start: int, floor: float, equal: bool = False
) -> None:
    """Halving the step divides each error by 2^order at least (`equal`: exactly), within `SLACK`.

    Steps double from `start`. An expansion c h^p (1 + O(h)) shows p only for small h, and an error may cross zero on
    the way, so two successive halvings out of seven must show it. An error below `floor` (rounding, quadrature) has
    nothing left to show: if all are, one halving is enough, and none where the method is exact.
    """
    before = errors(start)
    seen: list[list[float]] = []
    good, shown = 0, False
    for halving in range(1, 8):
        now = errors(start * 2**halving)
        orders = [observed_order(a, b) for a, b in zip(before, now, strict=True) if abs(b) > floor]
        seen.append(orders)
        right = all(o > order - SLACK and (not equal or o < order + SLACK) for o in orders)
        good = good + 1 if right else 0
        shown = shown or bool(orders and right)
        if right and (good == 2 or not orders) and (shown or not equal):
            return
        before = now
    raise AssertionError(f"declared order {order}, observed at successive halvings: {seen}")


def steps_of(order: int) -> int:
    """Coarsest grid on which the expansion is expected to hold."""
    return {1: 40, 2: 24, 3: 20, 4: 16}.get(order, 12)


# --- affine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "name"), on_two_sdes(ORDERED))
def test_weak_order_on_gaussian_data(case, name):
    """Mean and variance converge at the declared order at least, on every SDE."""
    solver, sde = ORDERED[case], make_sde(name)

    def errors(steps: int) -> list[float]:
        return list(gaussian_weak_error(sde, gaussian(), solver, lambda_knots(sde, steps)))

    # rounding: each step adds a few EPS of a variance of order one to ten
    check_order(errors, solver.order, steps_of(solver.order), floor=1e-12)


@pytest.mark.slow
@every_sde
@pytest.mark.parametrize("case", [k for k in ORDERED if not ORDERED[k].stochastic])
def test_flow_map_on_gaussian_data(case, name):
    """Deterministic: A -> sqrt(v_s / v_t) and b -> m_s - A m_t, the exact flow of a Gaussian, at the declared order."""
    solver, sde, data = ORDERED[case], make_sde(name), gaussian()

    def errors(steps: int) -> list[float]:
        knots = lambda_knots(sde, steps)
        (m_t, v_t), (m_s, v_s) = mp_free_moments(data, knots[0]), mp_free_moments(data, knots[-1])
        a, b, c = affine_map(data.reverse(sde), solver, grid=knots)
        assert len(c) == 0
        return [float(a) - math.sqrt(v_s / v_t), float(a * m_t + b) - m_s]

    check_order(errors, solver.order, steps_of(solver.order), floor=1e-12)


@pytest.mark.parametrize("case", FIXED)
@pytest.mark.parametrize("shape", [(1,), (2, 2, 2)], ids=str)
def test_the_affine_map_does_not_depend_on_the_shape_of_the_data(case, shape):
    """(B, 1) and images of independent, equal elements: each element has the map of the line."""
    solver, sde = FIXED[case], make_sde("vp")
    if "langevin" in repr(solver).lower() and "annealed" not in repr(solver).lower():
        pytest.skip("Langevin's step size is a norm over elements: not affine, and a function of their number")
    knots = lambda_knots(sde, 8)
    line = affine_map(gaussian().reverse(sde), solver, grid=knots)
    image = affine_map(gaussian(shape).reverse(sde), solver, shape, grid=knots)
    for got, want in zip(image, line, strict=True):
        want = want.reshape(*want.shape, *[1] * len(shape)).expand_as(got)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


# --- nonlinear ------------------------------------------------------------------------------------------------------


def nonlinear(case: str, name: str, equal: bool) -> None:
    solver, sde, data = ORDERED[case], make_sde(name), mixture()

    def errors(steps: int) -> list[float]:
        # one norm over four test functions: a single one may cross zero on the way
        return [float(nonlinear_weak_error(data, data.reverse(sde), solver, lambda_knots(sde, steps)).norm())]

    # quintic splines on 241 points over 16 standard deviations, functions of scale one: (16/240)^6 / 6! ~ 1e-10 a step
    check_order(errors, solver.order, {1: 48, 2: 24}[solver.order], floor=1e-7, equal=equal)


@pytest.mark.parametrize("case", MARKOV)
def test_weak_order_on_the_stated_nonlinear_problem(case):
    """The stated problem of the stochastic solvers: three-component mixture under VP, lambda from -2 to 2.5.

    Observed weak order equals the declared one within 0.15.
    """
    nonlinear(case, "vp", equal=True)


@pytest.mark.slow
@every_sde
@pytest.mark.parametrize("case", MARKOV)
def test_weak_order_on_nonlinear_problems(case, name):
    """Not below the declared order on any SDE."""
    nonlinear(case, name, equal=False)


@every_sde
@pytest.mark.parametrize("case", [k for k in STOCHASTIC if k not in MARKOV])
def test_weak_order_of_methods_with_memory_on_nonlinear_problems(case, name):
    """The same mixture over 1.2 units of lambda by 2, 4 and 8 steps, every path of three-point noise counted.

    Expansions are far from their limit here and errors change sign, so the order is asked of the decrease to 8 steps
    from either coarser grid. Noise of a method of order one (DDIM, eta = 1) shows 0.9 from both.
    """
    solver, sde, data = ORDERED[case], make_sde(name), mixture()

    def errors(steps: int) -> float:
        knots = lambda_knots(sde, steps, low=-0.4, high=0.8)
        return float(tree_weak_error(data, data.reverse(sde), solver, knots, nodes=3, start=7).norm())

    two, four, eight = errors(2), errors(4), errors(8)
    seen = observed_order(two, eight, 4.0), observed_order(four, eight)
    assert max(seen) > solver.order - SLACK, f"declared order {solver.order}, observed {seen}"


def test_independent_noise_for_stage_and_step_is_of_order_one():
    """What the composed noise is for: SEEDS-2 with unrelated draws for the stage and for the step."""

    class Unrelated(SEEDS2):
        order = 1

        def step(self, rev, x, t, s, past, draw):
            rule = self._rule
            nodes = ((t, rev(x, t)),)
            middle = rev.law.knot_at(0.5 * (t.half_log_snr + s.half_log_snr))
            x_r = rule.advance(x, t, middle, nodes, 0, 1.0, rule.noise(t, middle, 1.0, draw(t, middle)))
            nodes = (*nodes, (middle, rev(x_r, middle)))
            return Step(rule.advance(x, t, s, nodes, 0, 1.0, rule.noise(t, s, 1.0, draw(t, s))))

    sde, data = make_sde("vp"), mixture()

    def errors(steps: int) -> list[float]:
        return [float(nonlinear_weak_error(data, data.reverse(sde), Unrelated(), lambda_knots(sde, steps)).norm())]

    check_order(errors, 1, 48, floor=1e-7, equal=True)


def flow_error(case: str, name: str) -> Callable[[int], list[float]]:
    solver, sde, data = ORDERED[case], make_sde(name), mixture()

    def errors(steps: int) -> list[float]:
        knots = lambda_knots(sde, steps)
        x = quantiles(data, knots[0])
        gap = solve(data.reverse(sde), x, solver, grid=knots).x - flow_map(data, x, knots[0], knots[-1])
        return [float(gap.square().mean().sqrt())]

    return errors


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_order_on_the_stated_flow(case):
    """The stated problem of the deterministic solvers: the same mixture under VP, against its exact quantile map."""
    order = ORDERED[case].order
    # the quantile map is exact to EPS over the density, 0.02 at 2.5 standard deviations, and long runs round; order 5
    # is at 1e-12 within 100 steps, where it only begins to show
    check_order(flow_error(case, "vp"), order, {5: 24}.get(order, 40), floor={5: 1e-14}.get(order, 1e-13), equal=True)


def test_linear_multistep_is_of_order_four_though_coarse_steps_show_less():
    """An error C h^4 (1 - a h) shows an order below 4 by an amount that halves with h: it is 0.5 at 20 steps."""
    error = flow_error("lms", "vp")
    errors = [error(steps)[0] for steps in (20, 40, 80, 160)]
    short = [4.0 - observed_order(coarse, fine) for coarse, fine in pairwise(errors)]
    # the next term is of order h^2, a tenth of the shortfall here
    assert all(b == pytest.approx(a / 2, rel=0.2) for a, b in pairwise(short)), short
    assert 0.3 < short[0] < 0.6


@every_sde
@pytest.mark.parametrize("case", DETERMINISTIC)
def test_order_on_nonlinear_flows(case, name):
    """Not below the declared order on any SDE, trajectory by trajectory."""
    order = ORDERED[case].order
    check_order(flow_error(case, name), order, {5: 24}.get(order, 40), floor=1e-13)


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_order_upward(case):
    """Inversion: from the data side to the noise, at the same order, against the same map."""
    solver, sde, data = ORDERED[case], make_sde("vp"), mixture()

    def errors(steps: int) -> list[float]:
        knots = lambda_knots(sde, steps)[::-1]
        x = quantiles(data, knots[0])
        gap = solve(data.reverse(sde), x, solver, grid=knots).x - flow_map(data, x, knots[0], knots[-1])
        return [float(gap.square().mean().sqrt())]

    check_order(errors, solver.order, {5: 24}.get(solver.order, 40), floor=1e-13)


@pytest.mark.slow
@every_sde
@pytest.mark.parametrize("case", ORDERED)
def test_default_grids_converge(case, name):
    """On the SDE's own range, t_max to t_min by default, the errors of mean and variance fall like 1 / steps at least.

    The grid is Karras': uniform times cannot resolve the small noise levels of EDM and VE in a few hundred steps. Four
    times the steps, twice if the first time two terms of the expansion still compete.
    """
    solver, sde, data = ORDERED[case], make_sde(name), gaussian()
    rev = data.reverse(sde)
    (m_t, v_t), (m_s, v_s) = (mp_free_moments(data, sde.knot(t)) for t in (sde.drift_t_max, sde.t_min))

    def errors(steps: int) -> tuple[float, float]:
        a, b, c = affine_map(rev, solver, steps=steps, grid="karras")
        return abs(float(a) * m_t + float(b) - m_s), abs(float(a) ** 2 * v_t + float(c.square().sum()) - v_s)

    gaps = [errors(100)]
    for steps in (400, 1600):
        gaps.append(errors(steps))
        if all(fine < 4.0 ** -(1.0 - SLACK) * coarse or fine < 1e-11 for coarse, fine in zip(*gaps[-2:], strict=True)):
            return
    raise AssertionError(f"errors of mean and variance with 100, 400, 1600 steps: {gaps}")


@pytest.mark.parametrize("case", [k for k, v in ORDERED.items() if v.order == 1])
def test_default_grid_from_the_prior(case):
    """The flow SDE from t = 1 (alpha = 0) on the default grid: sixteen times the steps, a third of the error at most.

    An O(1) error of the first step, whatever its length, would stay in a deterministic run. (Solvers that use f start
    0.001 before its pole: below a thousand steps none of them is near its order.)
    """
    solver, sde, data = ORDERED[case], make_sde("flow"), gaussian()
    gaps = []
    for steps in (100, 1600):
        a, b, c = affine_map(data.reverse(sde), solver, steps=steps)
        start = sde.knot(sde.drift_t_max if solver.needs_drift else sde.t_max)
        (m_t, v_t), (m_s, v_s) = mp_free_moments(data, start), mp_free_moments(data, sde.knot(sde.t_min))
        gaps.append((abs(float(a) * m_t + float(b) - m_s), abs(float(a) ** 2 * v_t + float(c.square().sum()) - v_s)))
    for coarse, fine in zip(*gaps, strict=True):
        assert fine < coarse / 3.0 or fine < 1e-11


# --- exactness ------------------------------------------------------------------------------------------------------


@every_sde
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "solver", [DDIM(), DDIM(eta=0.5), DDIM(eta=1.0), Ancestral(), Heun(), Heun(s_churn=3.0)], ids=repr
)
def test_exact_on_a_point(name, solver, steps):
    """Data at one point: E[x_0 | x] is constant and the step of every one of these is exact in law, however long."""
    sde, data = make_sde(name), GaussianMixture([0.7], std=0.0)
    knots = lambda_knots(sde, steps)
    a, b, c = affine_map(data.reverse(sde), solver, grid=knots)
    (m_t, v_t), (m_s, v_s) = mp_free_moments(data, knots[0]), mp_free_moments(data, knots[-1])
    assert float(a) * m_t + float(b) == pytest.approx(m_s, rel=1e-11)
    assert float(a) ** 2 * v_t + float(c.square().sum()) == pytest.approx(v_s, rel=1e-11)


@every_sde
def test_churn_is_seen_by_the_network(name):
    """Algorithm 2: the first call of every step, of the posterior mean too, is at the raised level (1 + gamma) u."""
    sde, data = make_sde(name), mixture()
    knots = lambda_knots(sde, 4, low=-1.5)
    spy = Spy(data.reverse(sde))
    x = quantiles(data, knots[0], 3)
    out = solve(spy, x, Heun(s_churn=1.0), grid=knots, end="denoise", rng=0)
    firsts = [k for k, _ in spy.log][::2]
    assert len(firsts) == 5
    for knot, raised in zip(knots, firsts, strict=True):  # gamma = 1 / 5
        assert raised.half_log_snr == pytest.approx(knot.half_log_snr - math.log(1.2), abs=1e-9)
    # the last call is where its state is: for data at a point every posterior mean is the point
    point = GaussianMixture([0.7], std=0.0)
    assert solve(
        point.reverse(sde), x, Heun(s_churn=1.0), grid=knots, end="denoise", rng=0
    ).x.tolist() == pytest.approx([0.7] * 3, abs=1e-9)
    assert out.ok


@every_sde
def test_ancestral_is_ddim_with_eta_one(name):
    """DDPM's small variance and DDIM's eta = 1 are one step (Song et al. 2020), coefficient by coefficient."""
    sde = make_sde(name)
    knots = lambda_knots(sde, 7)
    one, other = (affine_map(gaussian().reverse(sde), s, grid=knots) for s in (Ancestral(), DDIM(eta=1.0)))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@every_sde
@pytest.mark.parametrize("case", FIXED)
def test_one_step_grids(case, name):
    """A grid of one interval is a run: finite, at the last knot, with the declared calls."""
    solver, sde = FIXED[case], make_sde(name)
    knots = lambda_knots(sde, 1)
    x = quantiles(mixture(), knots[0], 5)
    out = solve(mixture().reverse(sde), x, solver, grid=knots, rng=0, strict=True)
    assert torch.isfinite(out.x).all() and out.nfe.tolist() == [solver.nfe(1)] * 5
    assert out.times.tolist() == [knots[0].t, knots[1].t]


@every_sde
@pytest.mark.parametrize("case", FIXED)
def test_denoising_ends_in_the_posterior_mean(case, name):
    """end="denoise" is the same run, then E[x_0 | x] at its last knot."""
    solver, sde, data = FIXED[case], make_sde(name), mixture()
    knots = lambda_knots(sde, 4)
    x = quantiles(data, knots[0], 7)
    stop = solve(data.reverse(sde), x, solver, grid=knots, rng=0)
    clean = solve(data.reverse(sde), x, solver, grid=knots, end="denoise", rng=0)
    # churn and lowered orders count intervals, of which there is one more; churn raises the last level too
    if getattr(solver, "s_churn", 0.0) or getattr(solver, "lower_final", False):
        assert torch.isfinite(clean.x).all()
        return
    assert clean.times[-1] == 0.0
    if getattr(solver, "corrector_first", False):  # corrects at the last level once more, as published
        assert clean.nfe.tolist() == [int(stop.nfe[0]) + solver._corrector.steps + 1] * 7
        return
    if solver.shares_calls:  # the mean is already known; with a corrector at the predicted state
        spy = Spy(data.reverse(sde))
        solve(spy, x, solver, grid=knots, rng=0)
        assert clean.nfe.equal(stop.nfe) and spy.log[-1][0] is knots[-1]
        spied = data.reverse(sde)(spy.states[-1], knots[-1]).data
        torch.testing.assert_close(clean.x, spied, rtol=1e-12, atol=1e-12)
        return
    torch.testing.assert_close(clean.x, data.reverse(sde)(stop.x, knots[-1]).data, rtol=1e-12, atol=1e-12)


# --- correctors on a Gaussian ---------------------------------------------------------------------------------------


@every_sde
def test_annealed_langevin_keeps_a_gaussian_up_to_its_known_bias(name):
    """n moves x - e (x - m) / v + sqrt(2 e) z: mean m + r^n (m_0 - m), variance r^2n v_0 + v (1 - r^2n) / (1 - e / 2v).

    With r = 1 - e / v and e = 2 a (snr sigma)^2: the stationary variance v / (1 - e / 2v) is the only bias.
    """
    sde, data = make_sde(name), gaussian()
    t, s = lambda_knots(sde, 4)[1:3]
    for moves in (1, 3, 40):
        solver = PredictorCorrector(predictor=None, corrector=AnnealedLangevin(snr=0.4, steps=moves))
        a, b, c = affine_map(data.reverse(sde), solver, grid=[t, s])
        m, v = mp_free_moments(data, s)
        e = 2.0 * (t.alpha / s.alpha) ** 2 * (0.4 * s.sigma) ** 2
        r = 1.0 - e / v
        assert len(c) == moves
        assert float(a) == pytest.approx(r**moves, rel=1e-9, abs=1e-12)
        assert float(b) == pytest.approx(m * (1.0 - r**moves), rel=1e-9, abs=1e-12)
        variance = r ** (2 * moves) * v + float(c.square().sum())
        want = r ** (2 * moves) * v + v * (1.0 - r ** (2 * moves)) / (1.0 - e / (2.0 * v))
        assert float(a) ** 2 * v + float(c.square().sum()) == pytest.approx(want, rel=1e-9)
        assert variance == pytest.approx(want, rel=1e-9)


def test_data_knot_is_the_end():
    """A grid may end in the data knot by itself."""
    sde, data = make_sde("vp"), mixture()
    knots = lambda_knots(sde, 3)
    x = quantiles(data, knots[0], 5)
    by_hand = solve(data.reverse(sde), x, DDIM(), grid=[*knots, DATA]).x
    assert torch.equal(by_hand, solve(data.reverse(sde), x, DDIM(), grid=knots, end="denoise").x)


# --- one step code for both kinds of knots --------------------------------------------------------------------------


@every_sde
@pytest.mark.parametrize("case", FIXED)
def test_steps_with_one_time_per_sample(case, name):
    """A step between (B, 1) knots is, row by row, the step between their float knots with the same noise."""
    solver, sde, data = FIXED[case], make_sde(name), mixture((3,))
    if getattr(solver, "s_churn", 0.0):
        pytest.skip("churn is decided on the host, level by level of a grid")
    ladder = lambda_knots(sde, 6)
    pairs = [(ladder[0], ladder[2]), (ladder[3], ladder[4]), (ladder[2], ladder[5])]
    bound = solver.bind(ladder)
    x = torch.linspace(-1.5, 1.4, 9, dtype=torch.float64).reshape(3, 3) * ladder[2].sigma
    noise = torch.linspace(1.0, -2.0, 72, dtype=torch.float64).reshape(8, 3, 3)
    t, s = (sde.knot(torch.tensor([p[i].t for p in pairs], dtype=torch.float64), ndim=2) for i in (0, 1))
    rev = data.reverse(sde)
    rows = bound.step(rev, x, t, s, (), Recorded(noise).bind(x)).x
    if solver.batch_coupled:
        assert torch.isfinite(rows).all()
        return
    for i, (a, b) in enumerate(pairs):
        one = bound.step(rev, x[i : i + 1], a, b, (), Recorded(noise[:, i : i + 1]).bind(x[i : i + 1])).x
        torch.testing.assert_close(rows[i : i + 1], one, rtol=1e-9, atol=1e-10 * (1.0 + float(one.abs().max())))


# --- from the prior to the data -------------------------------------------------------------------------------------


LAWFUL = [
    "euler_maruyama",
    "ancestral",
    "ddim/eta=0.5",
    "heun",
    "heun/churn",
    "adaptive",
    "predictor_corrector",
    "pc/ald",
    "pc/batch",
]


@pytest.mark.parametrize("case", LAWFUL)
@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_samples_have_the_law_of_the_data(case, name):
    """20 000 samples of a mixture, prior to t_min: the empirical distribution function within its 1e-9 band (Dvoretzky-
    Kiefer-Wolfowitz, 0.023) plus 0.02 for 100 steps of a first-order method (its weak error on indicators, order h).
    """
    n, sde, data = 20_000, make_sde(name), mixture()
    solver = CASES[case]
    options = {} if solver.adaptive else {"steps": 100, "grid": "karras"}
    x = sample(data.reverse(sde), (n,), solver, rng=8, end="stop", dtype=torch.float64, strict=True, **options).x
    end = sde.knot(sde.t_min)
    ordered = x.sort().values
    std = (end.alpha**2 * data._variances[:, 0] + end.sigma**2).sqrt()
    z = (ordered[:, None] - end.alpha * data._means[:, 0]) / std
    exact = (data._log_weights.exp() * torch.special.ndtr(z)).sum(1)
    empirical = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    band = math.sqrt(math.log(2e9) / (2 * n))
    assert float((exact - empirical).abs().max()) < band + 0.02
