"""The published formula of every method, written out, against our solvers: one method, many names.

Formulas are stated in half log-SNR lambda with h = lambda_s - lambda_t, s~ = sigma / alpha, D and eps the data and the
noise prediction, as their papers and codes print them, in a step from t to s. Every one is run over the same uneven
grid of every SDE, with networks of several parameterizations, and must agree with the solver to 1e-12.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SDE_NAMES, lambda_knots, make_sde, mixture
from torch import Tensor

from sde_lib import PARAMETERIZATIONS, SDE, Knot, ReverseSDE
from solvers import (
    DDIM,
    DEIS,
    ERSDE,
    SEEDS2,
    AnalyticAncestral,
    Ancestral,
    AnnealedLangevin,
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    DPMpp3S,
    DPMppSDE,
    DPMSolver2,
    DPMSolver3,
    EulerMaruyama,
    Heun,
    Langevin,
    LinearMultistep,
    Midpoint,
    Multistep,
    PredictorCorrector,
    Recorded,
    ReverseDiffusion,
    RungeKutta,
    SASolver,
    SDEDPMpp2M,
    SDEDPMpp3M,
    SingleStep,
    Solver,
    UniPC,
    solve,
)

TOLERANCE = 1e-12
SHAPE = (2,)
NETWORKS = ("noise", "data", "v")
RAMP: dict[str, Any] = {"starter": "ramp"}


def network(sde: SDE, name: str) -> ReverseSDE:
    """The exact reverse of the mixture as a network with the given output."""
    data, kind = mixture(SHAPE), PARAMETERIZATIONS[name]()

    def call(x: Tensor, knot: Knot) -> Tensor:
        p, q = kind.coefficients(knot)
        d, e = data._moments(x, knot)
        return p * d + q * e

    return ReverseSDE(sde, call, kind)


def uneven(sde: SDE) -> list[Knot]:
    """Five steps, no two of one length, from lambda = -1.2 to 1.6."""
    first, last = lambda_knots(sde, 1, low=-1.2, high=1.6)
    low, high = first.half_log_snr, last.half_log_snr
    return [sde.knot_at(low + (high - low) * u) for u in (0.0, 0.17, 0.31, 0.55, 0.74, 1.0)]


@dataclass
class Env:
    """One step by hand: where it is, what has been predicted, and fresh noise when asked."""

    sde: SDE
    rev: ReverseSDE
    x: Tensor
    t: Knot
    s: Knot
    draws: Iterator[Tensor]
    past: list[tuple[Knot, Tensor, Tensor]] = field(default_factory=list)

    def ask(self, x: Tensor, knot: Knot) -> tuple[Tensor, Tensor]:
        p = self.rev(x, knot)
        return p.data, p.noise

    @property
    def h(self) -> float:
        return self.s.half_log_snr - self.t.half_log_snr

    @property
    def data(self) -> Tensor:
        return self.past[-1][1]

    @property
    def noise(self) -> Tensor:
        return self.past[-1][2]

    @property
    def z(self) -> Tensor:
        return next(self.draws)

    def at(self, r: float) -> Knot:
        return self.sde.knot_at(self.t.half_log_snr + r * self.h)


Formula = Callable[[Env], Tensor]


def draws(n: int, x: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(n)]


def by_hand(formula: Formula, rev: ReverseSDE, x: Tensor, knots: list[Knot], noise: list[Tensor]) -> Tensor:
    past: list[tuple[Knot, Tensor, Tensor]] = []
    fresh = iter(noise)
    for t, s in itertools.pairwise(knots):
        env = Env(rev.law, rev, x, t, s, fresh, past)  # type: ignore[arg-type]
        if not past or past[-1][0] is not t:
            past.append((t, *env.ask(x, t)))
        x = formula(env)
    return x


def start(sde: SDE, knots: list[Knot]) -> Tensor:
    grid = torch.linspace(-1.4, 1.7, 6, dtype=torch.float64).reshape(3, 2)
    return math.hypot(knots[0].alpha, knots[0].sigma) * grid


def check(solver: Solver, formula: Formula, name: str, kind: str = "v", draws_per_step: int = 2) -> None:
    sde = make_sde(name)
    knots, rev = uneven(sde), network(sde, kind)
    x = start(sde, knots)
    noise = draws(draws_per_step * (len(knots) - 1), x)
    ours = solve(rev, x, solver, grid=knots, rng=Recorded(noise), strict=True).x
    hand = by_hand(formula, rev, x, knots, noise)
    scale = max(1.0, float(hand.abs().max()))
    assert float((ours - hand).abs().max()) <= TOLERANCE * scale


every_sde = pytest.mark.parametrize("name", SDE_NAMES)
every_network = pytest.mark.parametrize("kind", NETWORKS)


# --- U1: one step, one parameter kappa ------------------------------------------------------------------------------


def u1(env: Env, kappa: float) -> Tensor:
    noise = math.sqrt(1.0 - kappa) * env.noise
    if kappa:
        noise = noise + math.sqrt(kappa) * env.z
    return env.s.alpha * env.data + env.s.sigma * noise


def euler_in_ratio(env: Env) -> Tensor:
    u, w = env.t.sigma / env.t.alpha, env.s.sigma / env.s.alpha
    return env.s.alpha * (env.x / env.t.alpha + (w - u) * env.noise)


def dpm_solver_1(env: Env) -> Tensor:
    return env.s.alpha / env.t.alpha * env.x - env.s.sigma * math.expm1(env.h) * env.noise


def dpmpp_1(env: Env) -> Tensor:
    return env.s.sigma / env.t.sigma * env.x - env.s.alpha * math.expm1(-env.h) * env.data


@every_sde
@every_network
def test_ddim_is_euler_is_dpm_solver_1(name, kind):
    """DDIM(0) = Euler in sigma / alpha = DPM-Solver-1 = DPM-Solver++-1 = one knot of every multistep method whose
    prediction stays constant with D and eps (data, noise, flow)."""
    for solver in (
        DDIM(),
        RungeKutta(tableau="euler"),
        Multistep(predictor=1),
        Multistep(predictor=1, prediction="noise"),
        Multistep(predictor=1, prediction="flow"),
    ):
        for formula in (lambda e: u1(e, 0.0), euler_in_ratio, dpm_solver_1, dpmpp_1):
            check(solver, formula, name, kind)


def ancestral_k_diffusion(eta: float) -> Formula:
    """sigma_up = eta sqrt(b^2 (a^2 - b^2) / a^2), sigma_down^2 = b^2 - sigma_up^2 on x / alpha."""

    def step(env: Env) -> Tensor:
        a, b = env.t.sigma / env.t.alpha, env.s.sigma / env.s.alpha
        up = min(b, eta * math.sqrt(b * b * (a * a - b * b) / (a * a)))
        down = math.sqrt(b * b - up * up)
        y = env.x / env.t.alpha
        return env.s.alpha * (y + (y - env.data) / a * (down - a) + up * env.z)

    return step


def ddpm_posterior(env: Env) -> Tensor:
    """Ho et al. 2020, eqs. 6-7, with alpha_bar = alpha^2 / (alpha^2 + sigma^2) of the scaled chain; variance small."""
    a = env.t.alpha / env.s.alpha
    var = env.t.sigma**2 - a * a * env.s.sigma**2  # of x_t given x_s
    mean = a * env.s.sigma**2 / env.t.sigma**2 * env.x + env.s.alpha * var / env.t.sigma**2 * env.data
    return mean + math.sqrt(var) * env.s.sigma / env.t.sigma * env.z


def sde_dpmpp_1(env: Env) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), eq. 18."""
    h = env.h
    x = env.s.sigma / env.t.sigma * math.exp(-h) * env.x + env.s.alpha * -math.expm1(-2 * h) * env.data
    return x + env.s.sigma * math.sqrt(-math.expm1(-2 * h)) * env.z


@every_sde
@every_network
def test_ancestral_is_sde_dpmpp_1_is_ddim_1(name, kind):
    """DDPM's posterior = k-diffusion's Euler ancestral = SDE-DPM-Solver++-1 = DDIM(1) = gamma 0 of Analytic-DPM."""
    for solver in (
        Ancestral(),
        DDIM(eta=1.0),
        Multistep(predictor=1, tau=1.0),
        SDEDPMpp2M(predictor=1),
        AnalyticAncestral((0.0,), (0.0,)),
    ):
        for formula in (
            lambda e: u1(e, -math.expm1(-2 * e.h)),
            ancestral_k_diffusion(1.0),
            ddpm_posterior,
            sde_dpmpp_1,
        ):
            check(solver, formula, name, kind)


@every_sde
@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_ddim_with_noise(name, eta):
    """kappa = eta^2 (1 - e^-2h); k-diffusion's eta is ours, azula's is its square."""
    check(DDIM(eta=eta), lambda e: u1(e, eta**2 * -math.expm1(-2 * e.h)), name)
    check(DDIM(eta=eta), ancestral_k_diffusion(eta), name)
    azula = eta**2
    check(DDIM(eta=eta), lambda e: u1(e, min(max(azula * -math.expm1(-2 * e.h), 0.0), 1.0)), name)


@every_sde
@pytest.mark.parametrize("tau", [0.4, 1.3])
def test_noise_of_the_exponential_form(name, tau):
    """One knot with tau: kappa = 1 - e^(-2 tau^2 h); k-diffusion's "eta" of 2M SDE is tau^2."""
    check(Multistep(predictor=1, tau=tau), lambda e: u1(e, -math.expm1(-2 * tau**2 * e.h)), name)


@every_sde
def test_er_sde_1(name):
    """kappa = 1 - (phi(u_s) u_t / (phi(u_t) u_s))^2, phi(u) = u (e^(u^0.3) + 10) (Cui et al. 2023)."""

    def phi(u: float) -> float:
        return u * (math.exp(u**0.3) + 10.0)

    def kappa(e: Env) -> float:
        a, b = e.t.sigma / e.t.alpha, e.s.sigma / e.s.alpha
        return 1.0 - (phi(b) * a / (phi(a) * b)) ** 2

    check(ERSDE(), lambda e: u1(e, kappa(e)), name)


def test_smld_ancestral():
    """x + (sigma_t^2 - sigma_s^2) score + sqrt(sigma_s^2 (sigma_t^2 - sigma_s^2) / sigma_t^2) z (Song 2021)."""

    def step(e: Env) -> Tensor:
        a, b = e.t.sigma**2, e.s.sigma**2
        return e.x - (a - b) / e.t.sigma * e.noise + math.sqrt(b * (a - b) / a) * e.z

    for name in ("ve", "edm"):
        check(Ancestral(), step, name)


@every_sde
def test_large_variance(name):
    """The other of DDPM's two: the forward kernel's, with the same mean."""

    def step(e: Env) -> Tensor:
        a = e.t.alpha / e.s.alpha
        var = e.t.sigma**2 - a * a * e.s.sigma**2
        return (e.x - var / e.t.sigma * e.noise) / a + math.sqrt(var) * e.z

    check(Ancestral(variance="large"), step, name)


@every_sde
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_euler_maruyama(name, eta):
    """x - [f x - (1 + eta^2) / 2 g^2 score] dt + eta g sqrt(dt) z with the SDE's own f and g."""

    def step(e: Env) -> Tensor:
        dt = e.t.t - e.s.t
        score = -e.noise / e.t.sigma
        x = e.x - (e.t.f * e.x - 0.5 * (1 + eta**2) * e.t.g2 * score) * dt
        return x + eta * math.sqrt(e.t.g2 * dt) * e.z if eta else x

    check(EulerMaruyama(eta=eta), step, name)


@every_sde
def test_reverse_diffusion(name):
    """x - f_i + G_i^2 score + G_i z with the forward kernel x_i = x + f_i + G_i z of the interval; half, no noise."""

    def step(e: Env, share: float = 1.0) -> Tensor:
        a = e.t.alpha / e.s.alpha
        g2 = e.t.sigma**2 - a * a * e.s.sigma**2
        x = e.x - (a - 1.0) * e.x - share * g2 / e.t.sigma * e.noise
        return x + math.sqrt(g2) * e.z if share == 1.0 else x

    check(ReverseDiffusion(), step, name)
    check(ReverseDiffusion(probability_flow=True), lambda e: step(e, 0.5), name)


# --- multistep ------------------------------------------------------------------------------------------------------


def differences(env: Env, of: int) -> tuple[float, Tensor] | None:
    """r = h_last / h and q_0 - q_1 of the last two predictions (1: data, 2: noise)."""
    if len(env.past) < 2:
        return None
    (k1, *q1), (k0, *q0) = env.past[-2:]
    return (k0.half_log_snr - k1.half_log_snr) / env.h, q0[of - 1] - q1[of - 1]


def dpmpp_2m(midpoint: bool, p: float = 0.0) -> Formula:
    """DPM-Solver++(2M) and, p = tau^2 > 0, k-diffusion's 2M SDE: "midpoint" and "heun"."""

    def step(env: Env) -> Tensor:
        h, a, big = env.h, env.s.alpha, (1.0 + p) * env.h
        x = env.s.sigma / env.t.sigma * math.exp(-p * h) * env.x - a * math.expm1(-big) * env.data
        pair = differences(env, 1)
        if pair is not None:
            r, d = pair
            x = x + a * (-0.5 * math.expm1(-big) if midpoint else math.expm1(-big) / big + 1.0) / r * d
        return x + env.s.sigma * math.sqrt(-math.expm1(-2 * p * h)) * env.z if p else x

    return step


@every_sde
@every_network
def test_two_knots(name, kind):
    """DPM-Solver++(2M), SDE-DPM-Solver++(2M) at tau = 1 and 0.6, with the exact weight and the midpoint's."""
    for midpoint in (True, False):
        check(DPMpp2M(midpoint=midpoint, **RAMP), dpmpp_2m(midpoint), name, kind)
        check(SDEDPMpp2M(midpoint=midpoint, tau=0.0, **RAMP), dpmpp_2m(midpoint), name, kind)
        check(SDEDPMpp2M(midpoint=midpoint), dpmpp_2m(midpoint, 1.0), name, kind)
        check(SDEDPMpp2M(midpoint=midpoint, tau=0.6), dpmpp_2m(midpoint, 0.36), name, kind)
        check(SASolver(predictor=2, corrector=0, midpoint=midpoint), dpmpp_2m(midpoint, 1.0), name, kind)


def third(doubled: bool, p: float) -> Formula:
    """DPM-Solver++(3M) and 3M SDE as in code, D2 = (D1_0 - D1_1) / (r0 + r1), or twice that."""

    def step(env: Env) -> Tensor:
        if len(env.past) < 3:
            return dpmpp_2m(False, p)(env)
        (k2, d2, _), (k1, d1, _), (k0, d0, _) = env.past[-3:]
        h, big, a = env.h, (1.0 + p) * env.h, env.s.alpha
        r0, r1 = (k0.half_log_snr - k1.half_log_snr) / h, (k1.half_log_snr - k2.half_log_snr) / h
        s0, s1 = (d0 - d1) / r0, (d1 - d2) / r1
        first = s0 + r0 / (r0 + r1) * (s0 - s1)
        second = (s0 - s1) / (r0 + r1) * (2.0 if doubled else 1.0)
        phi2 = math.expm1(-big) / big + 1.0
        phi3 = phi2 / big - 0.5
        x = env.s.sigma / env.t.sigma * math.exp(-p * h) * env.x - a * math.expm1(-big) * d0
        x = x + a * phi2 * first - a * phi3 * second
        return x + env.s.sigma * math.sqrt(-math.expm1(-2 * p * h)) * env.z if p else x

    return step


@every_sde
@every_network
def test_three_knots(name, kind):
    """3M and 3M SDE: ours is the published formula with D2 doubled; `half_d2` is the formula as published in code."""
    check(DPMpp3M(**RAMP), third(True, 0.0), name, kind)
    check(DPMpp3M(half_d2=True, **RAMP), third(False, 0.0), name, kind)
    check(SDEDPMpp3M(), third(True, 1.0), name, kind)
    check(SDEDPMpp3M(half_d2=True), third(False, 1.0), name, kind)
    check(SASolver(predictor=3, corrector=0), third(True, 1.0), name, kind)


def dpm_solver_2m(tau2: float, midpoint: bool = True) -> Formula:
    """DPM-Solver multistep 2 and, doubled with noise, "sde-dpmsolver" (SEEDS-1's second order): in eps."""

    def step(env: Env) -> Tensor:
        h, b, c = env.h, env.s.sigma, 1.0 + tau2
        x = env.s.alpha / env.t.alpha * env.x - c * b * math.expm1(h) * env.noise
        pair = differences(env, 2)
        if pair is not None:
            r, d = pair
            x = x - c * b * (0.5 * math.expm1(h) if midpoint else math.expm1(h) / h - 1.0) / r * d
        return x + b * math.sqrt(tau2 * math.expm1(2 * h)) * env.z if tau2 else x

    return step


@every_sde
@every_network
def test_noise_multistep(name, kind):
    """DPM-Solver's multistep in eps, DEIS-2 in log rho (the same with exact weights), and its SDE version."""
    for midpoint in (True, False):
        eps = {"predictor": 2, "prediction": "noise", "midpoint": midpoint}
        check(Multistep(**eps, **RAMP), dpm_solver_2m(0.0, midpoint), name, kind)
        check(Multistep(**eps, tau=1.0), dpm_solver_2m(1.0, midpoint), name, kind)
    check(DEIS(predictor=2, **RAMP), dpm_solver_2m(0.0, False), name, kind)


def deis_3(env: Env) -> Tensor:
    """DEIS in log rho with three knots: y += sum eps_j int l_j(log rho) d rho, integrated in closed form."""
    nodes = env.past[-3:]
    u0, u1 = -env.t.half_log_snr, -env.s.half_log_snr
    y = env.x / env.t.alpha
    for j, (kj, _, e) in enumerate(nodes):
        basis = np.poly1d([1.0])
        for k, (kk, _, _) in enumerate(nodes):
            if k != j:
                basis *= np.poly1d([1.0, kk.half_log_snr]) / (kk.half_log_snr - kj.half_log_snr)
        # int p(u) e^u du = e^u (p - p' + p'' …)
        series, sign, p = np.poly1d([0.0]), 1.0, basis
        while True:
            series = series + sign * p
            if p.order == 0:
                break
            p, sign = p.deriv(), -sign
        y = y + (math.exp(u1) * series(u1) - math.exp(u0) * series(u0)) * e
    return env.s.alpha * y


def adams_bashforth(count: int, variable: Callable[[Knot], float], scale: Callable[[Knot], float], of: int) -> Formula:
    """y += sum q_j int l_j(u) du along `variable`, y = x / scale: linear multistep, by exact polynomials."""

    def step(env: Env) -> Tensor:
        nodes = env.past[-count:]
        at = [variable(k) for k, _, _ in nodes]
        y = env.x / scale(env.t)
        for j, (_, d, e) in enumerate(nodes):
            basis = np.poly1d([1.0])
            for k, u in enumerate(at):
                if k != j:
                    basis *= np.poly1d([1.0, -u]) / (at[j] - u)
            whole = basis.integ()
            q = e if of == 2 else e - d
            y = y + float(whole(variable(env.s)) - whole(variable(env.t))) * q
        return scale(env.s) * y

    return step


@every_sde
def test_linear_multistep(name):
    """LMS-k is Adams-Bashforth in sigma / alpha on x / alpha with eps; vAB-k in sigma / (alpha + sigma) with eps - D;
    DEIS-3 in log rho."""

    def ratio(k: Knot) -> float:
        return k.sigma / k.alpha

    def share(k: Knot) -> float:
        return k.sigma / (k.alpha + k.sigma)

    for count in (2, 3, 4):
        lms = adams_bashforth(count, ratio, lambda k: k.alpha, 2)
        check(LinearMultistep(predictor=count, **RAMP), lms, name)
        vab = adams_bashforth(count, share, lambda k: k.alpha + k.sigma, 3)
        check(Multistep(predictor=count, prediction="flow", variable="noise_share", **RAMP), vab, name)
    check(DEIS(**RAMP), deis_3, name)


def unipc(order: int, bh2: bool, eps: bool = False, half: bool = True) -> Formula:
    """UniPC-p (Zhao et al. 2023, and its code): solve R rho = b for predictor and corrector; PEC.

    `half`: the code's rho = 1/2 where R is 1 x 1.
    """

    def step(env: Env) -> Tensor:
        p = min(order, len(env.past))
        h = env.h
        hh = h if eps else -h
        q = [d if not eps else e for _, d, e in env.past]
        lams = [k.half_log_snr for k, _, _ in env.past]
        r = [(lams[-1 - i] - lams[-1]) / h for i in range(1, p)]
        dq = [(q[-1 - i] - q[-1]) / ri for i, ri in zip(range(1, p), r, strict=True)]
        b_h = math.expm1(hh) if bh2 else hh

        def rho(points: list[float]) -> list[float]:
            n = len(points)
            if n == 1 and half:
                return [0.5]
            rows, rhs, g, factorial = [], [], math.expm1(hh) / hh - 1.0, 1.0
            for j in range(1, n + 1):
                rows.append([ri ** (j - 1) for ri in points])
                factorial *= j
                rhs.append(g * factorial / b_h)
                g = g / hh - 1.0 / math.factorial(j + 1)
            return list(np.linalg.solve(np.array(rows), np.array(rhs)))

        if eps:
            base = env.s.alpha / env.t.alpha * env.x - env.s.sigma * math.expm1(h) * q[-1]
            scale = -env.s.sigma
        else:
            base = env.s.sigma / env.t.sigma * env.x - env.s.alpha * math.expm1(-h) * q[-1]
            scale = -env.s.alpha
        x = base
        for c, d in zip(rho(r) if r else [], dq, strict=True):
            x = x + scale * b_h * c * d
        new = env.ask(x, env.s)
        env.past.append((env.s, *new))
        full = [*dq, (new[1] if eps else new[0]) - q[-1]]
        x = base
        for c, d in zip(rho([*r, 1.0]), full, strict=True):
            x = x + scale * b_h * c * d
        return x

    return step


@every_sde
@every_network
def test_unipc(name, kind):
    """UniPC-1, 2, 3 with B_1 and B_2 from the paper's linear system; with rho = 1/2 that is `midpoint` and B_2."""
    for bh2 in (True, False):
        for order in (1, 2, 3):
            solver = UniPC(predictor=order, corrector=order + 1, **RAMP)
            check(solver, unipc(order, bh2, half=False), name, kind)
            noisy = UniPC(predictor=order, corrector=order + 1, prediction="noise", **RAMP)
            check(noisy, unipc(order, bh2, eps=True, half=False), name, kind)
    for order in (2, 3):
        published = UniPC(predictor=order, corrector=order + 1, midpoint=True, **RAMP)
        check(published, unipc(order, True), name, kind)
    check(SASolver(predictor=3, corrector=4, tau=0.0, **RAMP), unipc(3, False, half=False), name, kind)


def sa_solver(p: float) -> Formula:
    """SA-Solver, predictor 2 and corrector 2 (the line through t and s), the corrector with the predictor's noise."""

    def step(env: Env) -> Tensor:
        h, big, a = env.h, (1.0 + p) * env.h, env.s.alpha
        z = env.z
        noise = env.s.sigma * math.sqrt(-math.expm1(-2 * p * h)) * z
        base = env.s.sigma / env.t.sigma * math.exp(-p * h) * env.x - a * math.expm1(-big) * env.data + noise
        slope = a * (math.expm1(-big) / big + 1.0)
        pair = differences(env, 1)
        x = base if pair is None else base + slope / pair[0] * pair[1]
        old = env.data
        new = env.ask(x, env.s)
        env.past.append((env.s, *new))
        return base + slope * (new[0] - old)

    return step


@every_sde
@every_network
def test_sa_solver(name, kind):
    """Two and two, tau = 1 and 0.5."""
    for tau in (1.0, 0.5):
        solver = SASolver(predictor=2, corrector=2, tau=tau)
        check(solver, sa_solver(tau**2), name, kind, draws_per_step=1)


# --- one-step -------------------------------------------------------------------------------------------------------


def dpm_solver_2(env: Env) -> Tensor:
    """Lu et al. 2022a, Algorithm 1 with r1 = 1/2."""
    mid, r = env.at(0.5), 0.5
    u = mid.alpha / env.t.alpha * env.x - mid.sigma * math.expm1(r * env.h) * env.noise
    _, e = env.ask(u, mid)
    x = env.s.alpha / env.t.alpha * env.x - env.s.sigma * math.expm1(env.h) * env.noise
    return x - env.s.sigma / (2 * r) * math.expm1(env.h) * (e - env.noise)


def k_diffusion_dpm_2(env: Env) -> Tensor:
    """sample_dpm_2: Euler to the geometric middle of the levels, then a whole step with the slope there."""
    a, b = env.t.sigma / env.t.alpha, env.s.sigma / env.s.alpha
    mid = math.exp(0.5 * (math.log(a) + math.log(b)))
    y = env.x / env.t.alpha
    knot = env.at(0.5)
    _, e = env.ask(knot.alpha * (y + (mid - a) * env.noise), knot)
    return env.s.alpha * (y + (b - a) * e)


def dpm_solver_3(taylor: bool) -> Formula:
    """Lu et al. 2022a, Algorithm 2 (r = 1/3, 2/3), and the code's "taylor" variant."""

    def step(env: Env) -> Tensor:
        h, e0, r1, r2 = env.h, env.noise, 1 / 3, 2 / 3
        k1, k2 = env.at(r1), env.at(r2)
        u1_ = k1.alpha / env.t.alpha * env.x - k1.sigma * math.expm1(r1 * h) * e0
        _, e1 = env.ask(u1_, k1)
        u2_ = k2.alpha / env.t.alpha * env.x - k2.sigma * math.expm1(r2 * h) * e0
        u2_ = u2_ - k2.sigma * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1.0) * (e1 - e0)
        _, e2 = env.ask(u2_, k2)
        x = env.s.alpha / env.t.alpha * env.x - env.s.sigma * math.expm1(h) * e0
        phi2 = math.expm1(h) / h - 1.0
        if not taylor:
            return x - env.s.sigma / r2 * phi2 * (e2 - e0)
        d10, d11 = (e1 - e0) / r1, (e2 - e0) / r2
        d1 = (r2 * d10 - r1 * d11) / (r2 - r1)
        d2 = 2 * (d11 - d10) / (r2 - r1)
        return x - env.s.sigma * phi2 * d1 - env.s.sigma * (phi2 / h - 0.5) * d2

    return step


def dpmpp_2s(env: Env) -> Tensor:
    """Lu et al. 2022b, Algorithm 1 with r = 1/2."""
    mid, r = env.at(0.5), 0.5
    u = mid.sigma / env.t.sigma * env.x - mid.alpha * math.expm1(-r * env.h) * env.data
    d, _ = env.ask(u, mid)
    x = env.s.sigma / env.t.sigma * env.x
    return x - env.s.alpha * math.expm1(-env.h) * (env.data + (d - env.data) / (2 * r))


def dpmpp_3s(env: Env) -> Tensor:
    """DPM-Solver++(3S), r = 1/3, 2/3."""
    h, d0, r1, r2 = env.h, env.data, 1 / 3, 2 / 3
    k1, k2 = env.at(r1), env.at(r2)
    d1, _ = env.ask(k1.sigma / env.t.sigma * env.x - k1.alpha * math.expm1(-r1 * h) * d0, k1)
    u = k2.sigma / env.t.sigma * env.x - k2.alpha * math.expm1(-r2 * h) * d0
    u = u + r2 / r1 * k2.alpha * (math.expm1(-r2 * h) / (r2 * h) + 1.0) * (d1 - d0)
    d2, _ = env.ask(u, k2)
    x = env.s.sigma / env.t.sigma * env.x - env.s.alpha * math.expm1(-h) * d0
    return x + env.s.alpha * (math.expm1(-h) / h + 1.0) / r2 * (d2 - d0)


@every_sde
@every_network
def test_stages(name, kind):
    """DPM-Solver-2 = k-diffusion's dpm_2, DPM-Solver-3 (= dpm_fast's steps) and its taylor variant, 2S, 3S."""
    check(DPMSolver2(), dpm_solver_2, name, kind)
    check(DPMSolver2(), k_diffusion_dpm_2, name, kind)
    check(DPMSolver3(), dpm_solver_3(False), name, kind)
    check(DPMSolver3(all_stages=True), dpm_solver_3(True), name, kind)
    check(DPMpp2S(), dpmpp_2s, name, kind)
    check(DPMpp3S(), dpmpp_3s, name, kind)
    # without noise DPM++ SDE is 2S, and SEEDS-2 the same with the exact weight
    check(DPMppSDE(tau=0.0), dpmpp_2s, name, kind)


def seeds_2(eta: float, r: float, midpoint: bool = False) -> Formula:
    """SEEDS-2 in data prediction (Gonzalez et al. 2023) with eta = tau^2; its noises are one path's.

    `midpoint`: DPM++ SDE's weights D (1 - 1/2r) + D_u / 2r instead.
    """

    def step(env: Env) -> Tensor:
        h, big, d0, mid = env.h, (1.0 + eta) * env.h, env.data, env.at(r)
        n1 = math.sqrt(-math.expm1(-2 * r * eta * h)) * env.z if eta else 0.0
        u = mid.sigma / env.t.sigma * math.exp(-r * eta * h) * env.x - mid.alpha * math.expm1(-r * big) * d0
        d, _ = env.ask(u + mid.sigma * n1, mid)
        b2 = (math.expm1(-big) + big) / -big / r  # phi(-H) = (e^-H - 1 + H) / (-H)
        if midpoint:
            b2 = math.expm1(-big) / (2 * r)
        b1 = math.expm1(-big) - b2
        x = env.s.sigma / env.t.sigma * math.exp(-eta * h) * env.x - env.s.alpha * (b1 * d0 + b2 * d)
        if not eta:
            return x
        n = n1 * math.exp((r - 1) * eta * h) + math.sqrt(-math.expm1(2 * (r - 1) * eta * h)) * env.z
        return x + env.s.sigma * n

    return step


@every_sde
@every_network
def test_stochastic_stages(name, kind):
    """SEEDS-2 with the stage at 1/2 and elsewhere, DPM++ SDE on one path; without noise DPM-Solver++'s one-step family
    with the exact weight."""
    check(SEEDS2(), seeds_2(1.0, 0.5), name, kind)
    check(SingleStep(stages=(0.4,), prediction="data", tau=0.7), seeds_2(0.49, 0.4), name, kind)
    check(DPMppSDE(), seeds_2(1.0, 0.5, midpoint=True), name, kind)
    check(SEEDS2(tau=0.0), seeds_2(0.0, 0.5), name, kind)


@every_sde
@every_network
def test_karras_heun(name, kind):
    """Karras et al. 2022, Algorithm 1, on x / alpha along sigma / alpha; and its midpoint member (alpha = 1/2)."""

    def heun(env: Env, a: float) -> Tensor:
        u, w = env.t.sigma / env.t.alpha, env.s.sigma / env.s.alpha
        y, h = env.x / env.t.alpha, w - u
        knot = env.s if a == 1.0 else env.sde.knot_at(-math.log(u + a * h))
        d = (y - env.data) / u
        data, _ = env.ask(knot.alpha * (y + a * h * d), knot)
        other = (y + a * h * d - data) / (u + a * h)
        return env.s.alpha * (y + h * ((1 - 1 / (2 * a)) * d + other / (2 * a)))

    check(Heun(), lambda e: heun(e, 1.0), name, kind)
    check(Midpoint(), lambda e: heun(e, 0.5), name, kind)


# --- correctors -----------------------------------------------------------------------------------------------------


@every_sde
def test_langevin(name):
    """Song et al. 2021, Algorithms 4 and 5: x + e score + sqrt(2 e) z after a DDIM step, e = 2 a (r |z| / |score|)^2.

    |z| is sqrt(d) in our per-sample rule, and e is capped at sigma^2.
    """

    def step(env: Env, annealed: bool) -> Tensor:
        x = u1(env, 0.0)
        _, e = env.ask(x, env.s)
        score = -e / env.s.sigma
        a = (env.t.alpha / env.s.alpha) ** 2
        norms = score.norm(dim=1, keepdim=True)
        size = 2 * a * (0.16 * math.sqrt(2.0) / norms) ** 2
        size = torch.full_like(size, 2 * a * (0.16 * env.s.sigma) ** 2) if annealed else size.clamp(max=env.s.sigma**2)
        return x + size * score + (2 * size).sqrt() * env.z

    check(PredictorCorrector(predictor=DDIM(), corrector=Langevin(snr=0.16)), lambda e: step(e, False), name)
    check(PredictorCorrector(predictor=DDIM(), corrector=AnnealedLangevin(snr=0.16)), lambda e: step(e, True), name)


# --- the formulas themselves tell methods apart ---------------------------------------------------------------------


def test_different_methods_differ():
    """The tolerance is not slack: neighbouring methods are 1e-6 apart at least on this grid."""
    sde = make_sde("vp")
    knots, rev = uneven(sde), network(sde, "v")
    x = start(sde, knots)
    solvers = [
        DDIM(),
        Multistep(predictor=1, prediction="v"),
        DPMpp2M(**RAMP),
        DPMpp2M(midpoint=True, **RAMP),
        DPMpp3M(**RAMP),
        DPMpp3M(half_d2=True, **RAMP),
        DEIS(**RAMP),
        DEIS(predictor=2, **RAMP),
        LinearMultistep(**RAMP),
        UniPC(**RAMP),
        UniPC(midpoint=True, **RAMP),
        DPMSolver2(),
        DPMSolver3(),
        DPMSolver3(all_stages=True),
        DPMpp2S(),
        DPMpp3S(),
        SEEDS2(tau=0.0),
        Heun(),
        Midpoint(),
    ]
    ends = [solve(rev, x, s, grid=knots).x for s in solvers]
    for (a, one), (b, two) in itertools.combinations(zip(solvers, ends, strict=True), 2):
        assert float((one - two).abs().max()) > 1e-6, (a, b)
