"""Independent references for the tests: cases drawn from the tables, high-precision laws, exact weak errors.

Nothing here calls the formula under test: laws are restated in mpmath, Gaussian moments come from linear algebra, and
expectations from quadrature.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath as mp
import torch
from torch import Tensor

from sde_lib import DATA, SDE, SDES, GaussianMixture, Knot, ReverseSDE
from solvers import SOLVERS, Recommended, Recorded, Solver, solve

EPS = torch.finfo(torch.float64).eps

# --- cases from the tables ------------------------------------------------------------------------------------------


def ddpm_table(n: int = 1000) -> list[float]:
    """DDPM's cumulative products (Ho et al. 2020: betas linear from 1e-4 to 0.02 for n = 1000), in 40 digits."""
    with mp.workdps(40):
        total, out = mp.mpf(1), []
        for i in range(n):
            total *= 1 - (mp.mpf("0.1") + mp.mpf(i) / (n - 1) * (mp.mpf(20) - mp.mpf("0.1"))) / n
            out.append(float(total))
    return out


SDE_OPTIONS: dict[str, dict[str, Any]] = {"tabulated": {"alphas_cumprod": ddpm_table()}}
"""Constructor options of SDEs that have no defaults; every other entry of `SDES` enrols itself."""

SDE_NAMES = tuple(SDES)


def make_sde(name: str, **options: Any) -> SDE:
    """The SDE of a table entry with its defaults."""
    return SDES[name](**{**SDE_OPTIONS.get(name, {}), **options})


def times_of(sde: SDE, n: int = 25, drift: bool = False) -> list[float]:
    """Both ends and n times between them: equispaced, and geometric towards t_min. Never a knot of a table."""
    low, high = sde.t_min, sde.drift_t_max if drift else sde.t_max
    inner = [low + (high - low) * (i + 0.618) / n for i in range(n)]
    near = [low * (high / low) ** ((i + 0.5) / 12) for i in range(12)]
    return sorted({low, *near, *inner, high})


def extended_times(sde: SDE) -> list[float]:
    """`times_of`, and times far below t_min where the law (not the model) goes on: all SDEs but a tabulated one."""
    below = [] if type(sde) is SDES.get("tabulated") else [1e-6, 3e-6, 1e-5, 1e-4]
    return sorted({*below, *times_of(sde)})


# --- the laws, restated in arbitrary precision ----------------------------------------------------------------------


def _mp_linear_beta(t: Any) -> Any:
    return t * mp.mpf("0.1") + t * t * (mp.mpf(20) - mp.mpf("0.1")) / 2


def _mp_vp(t: Any) -> tuple[Any, Any]:
    b = _mp_linear_beta(t)
    return mp.exp(-b / 2), mp.sqrt(1 - mp.exp(-b))


def _mp_sub_vp(t: Any) -> tuple[Any, Any]:
    b = _mp_linear_beta(t)
    return mp.exp(-b / 2), 1 - mp.exp(-b)


def _mp_ve(t: Any) -> tuple[Any, Any]:
    return mp.mpf(1), mp.mpf("0.01") * (mp.mpf(50) / mp.mpf("0.01")) ** t


def _mp_cosine(t: Any) -> tuple[Any, Any]:
    s = mp.mpf("0.008")
    alpha = mp.cos((t + s) / (1 + s) * mp.pi / 2) / mp.cos(s / (1 + s) * mp.pi / 2)
    return alpha, mp.sqrt(1 - alpha * alpha)


MP_LAWS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "vp": _mp_vp,
    "sub_vp": _mp_sub_vp,
    "ve": _mp_ve,
    "cosine": _mp_cosine,
    "edm": lambda t: (mp.mpf(1), t),
    "flow": lambda t: (1 - t, t),
}
"""(alpha, sigma) of each default SDE as its paper states it; differences of nearly equal numbers are harmless here."""


def mp_law(name: str, t: float) -> tuple[Any, Any]:
    """(alpha, sigma) at the double t, to 60 digits."""
    with mp.workdps(60):
        return MP_LAWS[name](mp.mpf(t))


def relative(got: float, want: Any) -> float:
    """|got / want - 1| in 60 digits."""
    with mp.workdps(60):
        return float(abs(mp.mpf(got) / want - 1)) if want != 0 else float(abs(mp.mpf(got)))


# --- data -----------------------------------------------------------------------------------------------------------


def gaussian(shape: tuple[int, ...] = (), mean: float = 0.7, std: float = 0.5) -> GaussianMixture:
    """One Gaussian; mean and spread of the same order, so that no moment of it is in a method's null space."""
    return GaussianMixture(torch.full((1, *shape), mean), std=std)


def mixture(shape: tuple[int, ...] = ()) -> GaussianMixture:
    """Three components, asymmetric: a nonlinear score."""
    k, d = 3, max(math.prod(shape), 1)
    means = torch.tensor([-0.9, 0.2, 0.8], dtype=torch.float64)[:, None] * (1.0 + 0.1 * torch.arange(d))
    return GaussianMixture(
        means.reshape(k, *shape), std=torch.tensor([0.25, 0.4, 0.3]), weights=torch.tensor([0.3, 0.5, 0.2])
    )


def mp_free_moments(data: GaussianMixture, knot: Knot) -> tuple[float, float]:
    """Exact mean and variance of x_t for data on the line, from the kernel alone."""
    mean, variance = float(data.mean), float(data.covariance)
    return float(knot.alpha) * mean, float(knot.alpha) ** 2 * variance + float(knot.sigma) ** 2


# --- recording ------------------------------------------------------------------------------------------------------


class Spy(ReverseSDE):
    """A reverse SDE that keeps the knots of its calls, the number of rows and the state of each."""

    def __init__(self, rev: ReverseSDE, log: list[tuple[Any, int]] | None = None) -> None:
        super().__init__(rev.law, rev.network, rev.parameterization, rev.condition)
        self.inner = rev
        self.log: list[tuple[Any, int]] = [] if log is None else log
        self.states: list[Tensor] = []

    def __call__(self, x: Tensor, t: Any) -> Any:
        knot = t if isinstance(t, Knot) else self.law.knot(t, ndim=x.ndim)
        self.log.append((knot, len(x)))
        self.states.append(x)
        return self.inner(x, knot)

    def select(self, rows: Tensor) -> ReverseSDE:
        return Spy(self.inner.select(rows), self.log)

    def given(self, **condition: Any) -> ReverseSDE:
        return Spy(self.inner.given(**condition), self.log)

    @property
    def times(self) -> list[float]:
        """Every time at which the network was called, rows of per-sample calls included."""
        out: list[float] = []
        for knot, _ in self.log:
            out += knot.t.flatten().tolist() if isinstance(knot.t, Tensor) else [float(knot.t)]
        return out


class CountingNoise(Recorded):
    """Zero noise of any length that counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__([])
        self.count = 0

    def bind(self, x: Tensor) -> Any:
        source = self
        bound = super().bind(x)

        class Zero(type(bound)):  # type: ignore[misc]
            def normal(self, *key: Any) -> Tensor:
                source.count += 1
                return torch.zeros_like(x)

            def restart(self) -> Any:
                return self

        bound.__class__ = Zero
        return bound


def draws_of(rev: ReverseSDE, solver: Solver, shape: tuple[int, ...] = (), **run: Any) -> int:
    """Number of noise draws of a run."""
    noise = CountingNoise()
    solve(rev, torch.zeros(1, *shape, dtype=torch.float64), solver, rng=noise, **run)
    return noise.count


# --- exact weak error on affine-Gaussian data -----------------------------------------------------------------------


def affine_map(
    rev: ReverseSDE, solver: Solver, shape: tuple[int, ...] = (), **run: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(A, b, C) of x_end = A x_T + b + sum_k C_k z_k, by impulses.

    One batch holds all of them: row 0 is zero state and zero noise, row 1 a unit state, row 2 + k a unit k-th draw. The
    data must be Gaussian with independent, equal elements, so that the map is affine and the same for each.
    """
    count = draws_of(rev, solver, shape, **run)
    x = torch.zeros(count + 2, *shape, dtype=torch.float64)
    x[1] = 1.0
    noise = [torch.zeros_like(x) for _ in range(count)]
    for k, z in enumerate(noise):
        z[k + 2] = 1.0
    end = solve(rev, x, solver, rng=Recorded(noise), **run).x
    b = end[0]
    return end[1] - b, b, end[2:] - b


def gaussian_weak_error(sde: SDE, data: GaussianMixture, solver: Solver, knots: Sequence[Knot]) -> tuple[float, float]:
    """Signed errors of mean and variance at the last knot, exact: the start has the exact law at the first knot."""
    start, end = mp_free_moments(data, knots[0]), mp_free_moments(data, knots[-1])
    a, b, c = affine_map(data.reverse(sde), solver, grid=list(knots))
    mean = float(a) * start[0] + float(b)
    variance = float(a) ** 2 * start[1] + float(c.square().sum())
    return mean - end[0], variance - end[1]


# --- exact weak error on nonlinear problems, by quadrature ----------------------------------------------------------

_HERMITE_NODES = 21
TEST_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "x": lambda x: x,
    "x^2": lambda x: x * x,
    "cos": lambda x: torch.cos(1.7 * x + 0.4),
    "tanh": lambda x: torch.tanh(1.5 * x - 0.3),
}


def gauss_hermite(n: int = _HERMITE_NODES) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E[f(z)], z standard normal."""
    import numpy as np

    z, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(z), torch.from_numpy(w / math.sqrt(2.0 * math.pi))


def mixture_expectation(data: GaussianMixture, knot: Knot, fn: Callable[[Tensor], Tensor], nodes: int = 4001) -> float:
    """E[f(x_t)] for a mixture on the line: the trapezoidal rule on 9 standard deviations either side of every mean.

    For a smooth, decaying integrand the rule converges faster than any power of its spacing.
    """
    means, variances = data._means[:, 0], data._variances[:, 0]
    std = (float(knot.alpha) ** 2 * variances + float(knot.sigma) ** 2).sqrt()
    centres = float(knot.alpha) * means
    x = torch.linspace(float((centres - 9 * std).min()), float((centres + 9 * std).max()), nodes, dtype=torch.float64)
    z = (x - centres[:, None]) / std[:, None]
    density = (
        data._log_weights.exp()[:, None] * torch.exp(-0.5 * z * z) / (std[:, None] * math.sqrt(2 * math.pi))
    ).sum(0)
    return float((density * fn(x)).sum() * (x[1] - x[0]))


def nonlinear_weak_error(
    data: GaussianMixture, rev: ReverseSDE, solver: Solver, knots: Sequence[Knot], points: int = 241
) -> Tensor:
    """Errors of E[f(x_end)] for every test function, without Monte Carlo.

    Backward Kolmogorov: u_k(x) = E_z[u_{k+1}(step(x, z))] with Gauss-Hermite in z and a quintic spline of u_{k+1} on
    points within 8 standard deviations of the exact law; the step is the solver's own, run on all (point, node) pairs
    as one batch. The last expectation is over the exact mixture at the first knot. At most two draws per step, and no
    memory.
    """
    from scipy.interpolate import make_interp_spline

    bound = solver.bind(knots)
    count = draws_of(rev, solver, grid=list(knots[:2]))
    nodes, w = gauss_hermite(_HERMITE_NODES if count < 2 else 11)
    z = torch.cartesian_prod(*[nodes] * count).reshape(-1, count) if count else torch.zeros(1, 0, dtype=torch.float64)
    w = torch.cartesian_prod(*[w] * count).reshape(-1, count).prod(1) if count else torch.ones(1, dtype=torch.float64)
    ladder = torch.linspace(-8.0, 8.0, points, dtype=torch.float64)

    def nodes_at(knot: Knot) -> Tensor:
        mean, variance = mp_free_moments(data, knot)
        return mean + math.sqrt(variance) * ladder

    value: Callable[[Tensor], Tensor]

    def last(x: Tensor) -> Tensor:
        return torch.stack([fn(x) for fn in TEST_FUNCTIONS.values()], -1)

    value = last
    for t, s in reversed(list(itertools.pairwise(knots))):
        x = nodes_at(t)
        batch = x[:, None].expand(-1, len(z)).reshape(-1).clone()
        draw = Recorded([z[:, k].expand(len(x), -1).reshape(-1).clone() for k in range(count)]).bind(batch)
        take = bound.finish if s.is_data else bound.step
        landed = take(rev, batch, t, s, (), draw).x
        averaged = (value(landed).reshape(len(x), len(z), -1) * w[:, None]).sum(1)
        spline = make_interp_spline(x.numpy(), averaged.numpy(), k=5)
        value = _from_spline(spline)
    out = []
    for i, fn in enumerate(TEST_FUNCTIONS.values()):
        current = value
        got = mixture_expectation(data, knots[0], lambda x, i=i, u=current: u(x)[:, i])  # type: ignore[misc]
        out.append(got - mixture_expectation(data, knots[-1], fn))
    return torch.tensor(out, dtype=torch.float64)


def _from_spline(spline: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.from_numpy(spline(x.numpy()))


def remembers(solver: Solver, rev: ReverseSDE, knots: Sequence[Knot]) -> bool:
    """Whether a step leaves something for the next to read: more than a Markov kernel in x."""
    x = torch.zeros(2, dtype=torch.float64)
    return len(solver.bind(knots).step(rev, x, knots[0], knots[1], (), CountingNoise().bind(x)).past) > 0


def tree_weak_error(
    data: GaussianMixture, rev: ReverseSDE, solver: Solver, knots: Sequence[Knot], nodes: int, start: int = 9
) -> Tensor:
    """Errors of E[f(x_end)] for every test function and any solver: all paths of Gauss-Hermite nodes as one batch.

    Every draw takes `nodes` values, so a run of n draws is nodes^n rows for each of `start` nodes per component of the
    exact law at the first knot. With three nodes moments are right up to the fifth, which is what weak order 2 needs.
    """
    draws = draws_of(rev, solver, grid=knots)
    z, w = gauss_hermite(nodes)
    z_0, w_0 = gauss_hermite(start)
    alpha, sigma = float(knots[0].alpha), float(knots[0].sigma)
    std = (alpha**2 * data._variances[:, 0] + sigma**2).sqrt()
    x_0 = (alpha * data._means[:, 0, None] + std[:, None] * z_0).reshape(-1)
    weight = (data._log_weights.exp()[:, None] * w_0).reshape(-1)
    paths = nodes**draws
    x = x_0.repeat_interleave(paths)
    weight = weight.repeat_interleave(paths)
    index = torch.arange(paths)
    noise = []
    for k in range(draws):
        digit = (index // nodes**k % nodes).repeat(len(x_0))
        noise.append(z[digit])
        weight = weight * w[digit]
    end = solve(rev, x, solver, grid=list(knots), rng=Recorded(noise)).x
    return torch.stack(
        [(weight * fn(end)).sum() - mixture_expectation(data, knots[-1], fn) for fn in TEST_FUNCTIONS.values()]
    )


# --- the probability-flow map on the line ---------------------------------------------------------------------------


def flow_map(data: GaussianMixture, x: Tensor, t: Knot, s: Knot) -> Tensor:
    """Where the probability-flow ODE carries x from t to s, exactly: on the line it keeps quantiles, F_s^-1(F_t(x)).

    The inverse is found by bisection on the mixture's distribution function, 80 halvings.
    """

    def cdf(x: Tensor, knot: Knot) -> Tensor:
        means, variances = data._means[:, 0], data._variances[:, 0]
        std = (float(knot.alpha) ** 2 * variances + float(knot.sigma) ** 2).sqrt()
        z = (x[:, None] - float(knot.alpha) * means) / std
        return (data._log_weights.exp() * torch.special.ndtr(z)).sum(1)

    target = cdf(x, t)
    centre, spread = float(s.alpha) * float(data.mean), 40.0 * (1.0 + float(s.sigma))
    low, high = torch.full_like(x, centre - spread), torch.full_like(x, centre + spread)
    for _ in range(80):
        middle = 0.5 * (low + high)
        above = cdf(middle, s) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * (low + high)


def quantiles(data: GaussianMixture, knot: Knot, n: int = 101) -> Tensor:
    """Points within 2.5 standard deviations of the law at a knot, where its distribution function has digits left."""
    mean, variance = mp_free_moments(data, knot)
    return mean + math.sqrt(variance) * torch.linspace(-2.5, 2.5, n, dtype=torch.float64)


# --- grids and orders -----------------------------------------------------------------------------------------------


def lambda_knots(sde: SDE, steps: int, low: float = -2.0, high: float = 2.5) -> list[Knot]:
    """Knots equispaced in lambda between `low` and `high`, cut to where the SDE and its drift are defined."""
    first = max(low, sde.half_log_snr(sde.drift_t_max))
    last = min(high, sde.half_log_snr(sde.t_min))
    return [sde.knot_at(first + (last - first) * i / steps) for i in range(steps + 1)]


def observed_order(coarse: float, fine: float, ratio: float = 2.0) -> float:
    """log_ratio of the error's decrease."""
    return math.log(abs(coarse) / abs(fine)) / math.log(ratio)


SOLVER_NAMES = tuple(SOLVERS)


def solver_cases() -> dict[str, Solver]:
    """A default instance of every table entry, and the variants that have code of their own."""
    from solvers import (
        DDIM,
        AdaptiveRungeKutta,
        Ancestral,
        AnnealedLangevin,
        DPMpp2M,
        DPMpp3M,
        DPMSolver3,
        EulerMaruyama,
        Heun,
        Langevin,
        Multistep,
        PredictorCorrector,
        ReverseDiffusion,
        RungeKutta,
        SASolver,
        SingleStep,
        UniPC,
    )

    cases: dict[str, Solver] = {name: cls() for name, cls in SOLVERS.items()}
    cases |= {
        "euler_maruyama/eta=0": EulerMaruyama(eta=0.0),
        "euler_maruyama/eta=0.5": EulerMaruyama(eta=0.5),
        "ddim/eta=0.5": DDIM(eta=0.5),
        "ddim/eta=1": DDIM(eta=1.0),
        "ancestral/large": Ancestral(variance="large"),
        "reverse_diffusion/flow": ReverseDiffusion(probability_flow=True),
        "heun/churn": Heun(s_churn=3.0),
        "heun/time": Heun(coordinate="time"),
        "heun/angle": Heun(coordinate="angle"),
        "heun/half_log_snr": Heun(coordinate="half_log_snr"),
        "runge_kutta/euler": RungeKutta(tableau="euler"),
        "bogacki_shampine/angle": RungeKutta(tableau="bogacki_shampine", coordinate="angle"),
        "adaptive/bs": AdaptiveRungeKutta(tableau="bogacki_shampine"),
        "adaptive/heun": AdaptiveRungeKutta(tableau="heun", rtol=1e-3, atol=1e-3),
        "dpmpp_2m/midpoint": DPMpp2M(midpoint=True),
        "dpmpp_3m/published": DPMpp3M(half_d2=True, midpoint=True, starter="ramp"),
        "dpmpp_3m/ramp": DPMpp3M(starter="ramp"),
        "multistep/lower_final": Multistep(predictor=3, lower_final=True),
        "multistep/one": Multistep(predictor=1),
        "unipc/noise": UniPC(prediction="noise"),
        "unipc/v": UniPC(prediction="v", variable="angle"),
        "unipc/2": UniPC(predictor=2, corrector=3, midpoint=True),
        "unipc/flow": UniPC(predictor=2, corrector=2, prediction="flow", variable="noise_share"),
        "unipc/5": UniPC(predictor=4, corrector=5, prediction="v", variable="angle"),
        "sa_solver/noise": SASolver(prediction="noise", predictor=2, corrector=2, tau=0.7),
        "sa_solver/interval": SASolver(tau_min=0.3, tau_max=3.0),
        "dpm_solver_3/taylor": DPMSolver3(all_stages=True),
        "seeds_2/noise": SingleStep(prediction="noise", tau=0.5),
        "pc/unipc": PredictorCorrector(predictor=UniPC(), corrector="annealed_langevin"),
        "pc/dpmpp_3m": PredictorCorrector(predictor=DPMpp3M(), corrector="annealed_langevin", corrector_first=True),
        "pc/unipc+none": PredictorCorrector(predictor=UniPC(), corrector=None),
        "pc/langevin": PredictorCorrector(corrector="langevin"),
        "pc/first": PredictorCorrector(corrector="langevin", corrector_first=True),
        "pc/ald": PredictorCorrector(predictor="ancestral", corrector=AnnealedLangevin(snr=0.1, steps=2)),
        "pc/batch": PredictorCorrector(corrector=Langevin(norm="batch")),
        "pc/heun": PredictorCorrector(predictor=Heun(), corrector="annealed_langevin"),
        "pc/none+ald": PredictorCorrector(predictor=None, corrector="annealed_langevin"),
        "pc/ddim+none": PredictorCorrector(predictor="ddim", corrector=None),
    }
    return cases


CASES = solver_cases()
FIXED = {k: v for k, v in CASES.items() if not v.adaptive}
# `Recommended` is another method at every number of steps: it has no order to observe
ORDERED = {k: v for k, v in FIXED.items() if v.order > 0 and not isinstance(v, Recommended)}

__all__ = [
    "CASES",
    "DATA",
    "EPS",
    "FIXED",
    "MP_LAWS",
    "ORDERED",
    "SDE_NAMES",
    "SDE_OPTIONS",
    "SOLVER_NAMES",
    "TEST_FUNCTIONS",
    "CountingNoise",
    "Spy",
    "affine_map",
    "ddpm_table",
    "draws_of",
    "extended_times",
    "flow_map",
    "gauss_hermite",
    "gaussian",
    "gaussian_weak_error",
    "lambda_knots",
    "make_sde",
    "mixture",
    "mixture_expectation",
    "mp_free_moments",
    "mp_law",
    "nonlinear_weak_error",
    "observed_order",
    "quantiles",
    "relative",
    "remembers",
    "solver_cases",
    "times_of",
    "tree_weak_error",
]
