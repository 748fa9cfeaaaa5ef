"""Strong convergence: stochastic solvers on one Brownian path per sample, trajectory by trajectory.

The stated problem: the three-component mixture on the line under the VP law, lambda from -2 to 2.5 in equal steps, 1600
paths from the exact law at the first knot. The noise of the reverse SDE does not depend on the state, so Euler-Maruyama
is of strong order one, and no method that reads increments only can do better than one.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from oracles import FIXED, lambda_knots, make_sde, mixture, observed_order
from torch import Tensor

from sde_lib import DATA, Knot
from solvers import (
    DDIM,
    ERSDE,
    SEEDS2,
    AnalyticAncestral,
    Ancestral,
    BrownianPath,
    DPMppSDE,
    Draw,
    EulerMaruyama,
    Multistep,
    ReverseDiffusion,
    SASolver,
    SDEDPMpp2M,
    SDEDPMpp3M,
    SingleStep,
    Solver,
    solve,
)

PATHS, FINE = 1600, 2048
STEPS = (32, 64, 128, 256)
DATA_LAW = mixture()
SDE = make_sde("vp")
FIRST, LAST = lambda_knots(SDE, 1)


class Kept(Draw):
    """A Brownian path that remembers its values: increments between any two knots, from those since the first."""

    def __init__(self, x: Tensor, seed: int = 5) -> None:
        self.path = BrownianPath(seed).bind(x)
        self.values: dict[float, Tensor] = {round(float(FIRST.half_log_snr), 12): torch.zeros_like(x)}

    def at(self, knot: Knot) -> Tensor:
        lam = round(float(knot.half_log_snr), 12)  # a stage's knot comes back from its time
        if lam not in self.values:
            self.values[lam] = self.path(FIRST, knot) * math.sqrt(clock(knot) - clock(FIRST))
        return self.values[lam]

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        return (self.at(s) - self.at(t)) / math.sqrt(clock(s) - clock(t))

    def restart(self) -> Draw:
        return self


def clock(knot: Knot) -> float:
    return math.exp(2.0 * float(knot.half_log_snr))


@cache
def problem() -> tuple[Tensor, Kept]:
    generator = torch.Generator().manual_seed(1)
    x_0 = DATA_LAW.sample(PATHS, generator, torch.float64)
    x = FIRST.alpha * x_0 + FIRST.sigma * torch.randn(PATHS, generator=generator, dtype=torch.float64)
    return x, Kept(x)


@cache
def end(solver: Solver, steps: int) -> Tensor:
    x, path = problem()
    grid = lambda_knots(SDE, steps)
    return solve(DATA_LAW.reverse(SDE), x, solver, grid=grid, rng=path, strict=True).x


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square over the paths."""
    return float((a - b).square().mean().sqrt())


GAMMAS = tuple(-2.1 + 0.2 * i for i in range(24))
REVERSE_SDE: dict[str, Solver] = {
    "euler_maruyama": EulerMaruyama(),
    "reverse_diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
    "ancestral/large": Ancestral(variance="large"),
    "analytic": AnalyticAncestral(GAMMAS, tuple(0.3 / (1.0 + math.exp(2.0 * g)) for g in GAMMAS)),
    "ddim/eta=1": DDIM(eta=1.0),
    "multistep/one": Multistep(predictor=1, tau=1.0),
    "multistep/noise": Multistep(predictor=2, prediction="noise", tau=1.0),
    "sde_dpmpp_2m": SDEDPMpp2M(),
    "sde_dpmpp_2m/midpoint": SDEDPMpp2M(midpoint=True),
    "sde_dpmpp_3m": SDEDPMpp3M(),
    "sa_solver": SASolver(),
    "seeds_2": SEEDS2(),
    "seeds_2/noise": SingleStep(prediction="noise", tau=1.0),
    "dpmpp_sde": DPMppSDE(),
}
"""Methods of the reverse SDE itself: tau = 1."""

HALF_NOISE: dict[str, Solver] = {
    "ddim/eta=0.5": DDIM(eta=0.5),
    "euler_maruyama/eta=0.5": EulerMaruyama(eta=0.5),
    "sde_dpmpp_2m/tau=0.5": SDEDPMpp2M(tau=0.5),
    "sa_solver/tau=0.5": SASolver(tau=0.5),
    "seeds_2/tau=0.5": SingleStep(prediction="data", tau=0.5),
}
"""Methods of the SDE with half the noise, tau = eta = 1/2: the same laws, other paths.

DDIM's kappa = eta^2 (1 - e^-2h) and the exponential form's 1 - e^(-2 tau^2 h) agree to first order in h.
"""


@cache
def limit(tau: float = 1.0) -> Tensor:
    """The path of the SDE with noise tau, from 2048 steps of one of the methods with the smallest constant."""
    return end(SASolver(tau=tau), FINE)


def check_order_one(solver: Solver, target: Tensor) -> list[float]:
    """Errors on 32 … 256 steps: from first to last an observed order of 0.85 … 1.15, each halving 0.75 … 1.25.

    The target is an eighth of the last error away from its own limit, which moves the order over three halvings by
    log2(8/7) / 3 = 0.06 at most. The rest is what 1600 paths scatter: they are the same in all errors, but their
    increments are not.
    """
    errors = [distance(end(solver, n), target) for n in STEPS]
    assert 0.85 < observed_order(errors[0], errors[-1], STEPS[-1] / STEPS[0]) < 1.15, errors
    assert all(0.75 < observed_order(a, b) < 1.25 for a, b in itertools.pairwise(errors)), errors
    return errors


@pytest.mark.parametrize("case", REVERSE_SDE)
def test_strong_order_one_to_one_path(case):
    """Every method of the reverse SDE converges to the same 1600 end points, at strong order one."""
    errors = check_order_one(REVERSE_SDE[case], limit())
    assert errors[-1] < 0.01  # of a standard deviation of 0.8


@pytest.mark.parametrize("case", HALF_NOISE)
def test_strong_order_of_another_process(case):
    """With half the noise every method goes to the path of that SDE, driven by the same Brownian motion: not to the
    reverse SDE's, which is half a standard deviation away.
    """
    errors = check_order_one(HALF_NOISE[case], limit(0.5))
    assert errors[-1] < 0.01 and distance(limit(0.5), limit()) > 0.3


def test_strong_order_of_er_sde():
    """ER-SDE's kernel is a process of its own: its own limit, at strong order one."""
    own = end(ERSDE(), FINE)
    check_order_one(ERSDE(), own)
    assert min(distance(own, limit()), distance(own, limit(0.5))) > 0.1


def test_history_and_stages_buy_a_constant():
    """Same order, smaller errors: more knots (1 > 2 > 3), and a stage at twice the calls, against plain ancestral."""
    n = 128
    one, two, three = (distance(end(REVERSE_SDE[k], n), limit()) for k in ("ancestral", "sde_dpmpp_2m", "sde_dpmpp_3m"))
    stage, euler = (distance(end(REVERSE_SDE[k], n), limit()) for k in ("seeds_2", "euler_maruyama"))
    assert three < 1.05 * two and two < 0.8 * one and stage < 0.8 * one and one < 1.5 * euler


def test_ancestral_reads_the_increment_itself():
    """In z = x alpha / sigma^2 the reverse SDE is dz = D d tau + dB_tau: an ancestral step adds B(tau_s) - B(tau_t)."""
    x, path = problem()
    t, s = lambda_knots(SDE, 3)[1:3]
    rev = DATA_LAW.reverse(SDE)
    got = Ancestral().step(rev, x, t, s, (), path).x
    z = x * t.alpha / t.sigma**2 + rev(x, t).data * (clock(s) - clock(t)) + path.at(s) - path.at(t)
    torch.testing.assert_close(got, z * s.sigma**2 / s.alpha, rtol=1e-11, atol=1e-11)


def test_the_path_itself_gives_the_same_run():
    """Increments asked of `BrownianPath` step by step are those kept above.

    A stage's lambda comes back from its time rounded by EPS, and B moves by sqrt(2 EPS tau) over that: 3e-9 at
    lambda = -2, where one unit of B is e^4 of x, twice per step.
    """
    x, _ = problem()
    for solver in (Ancestral(), SEEDS2()):
        direct = solve(DATA_LAW.reverse(SDE), x, solver, grid=lambda_knots(SDE, 64), rng=BrownianPath(5), strict=True).x
        torch.testing.assert_close(direct, end(solver, 64), rtol=0, atol=1e-6)


def test_unrelated_noise_does_not_converge():
    """What the path is for: with one seed and another number of draws the end points are unrelated."""
    x, _ = problem()
    rev = DATA_LAW.reverse(SDE)
    ends = [solve(rev, x, Ancestral(), grid=lambda_knots(SDE, n), rng=5).x for n in (256, 512)]
    assert distance(*ends) > 0.2
    assert distance(end(Ancestral(), 256), end(Ancestral(), 512)) < 0.02


def test_every_stochastic_fixed_step_solver_is_here():
    """Of the table: the rest have draws that belong to no interval (churn, correctors)."""
    classes = {type(s) for s in (*REVERSE_SDE.values(), *HALF_NOISE.values(), ERSDE())}
    for name, solver in FIXED.items():
        if not solver.stochastic:
            continue
        between = type(solver) in classes
        other = getattr(solver, "s_churn", 0.0) > 0.0 or getattr(solver, "_corrector", None) is not None
        assert between or other, name


def test_the_data_end_draws_nothing():
    """The step to sigma = 0 is the posterior mean: the path is not asked beyond the last knot."""
    x, path = problem()
    end(Ancestral(), 64)
    before = len(path.values)
    solve(DATA_LAW.reverse(SDE), x, Ancestral(), grid=[*lambda_knots(SDE, 64), DATA], rng=path, strict=True)
    assert len(path.values) == before
