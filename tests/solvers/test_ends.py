"""The two ends of time, and low precision near them: sigma = 0, alpha = 0, float32 states, bfloat16 networks."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from oracles import (
    CASES,
    FIXED,
    ORDERED,
    SDE_NAMES,
    affine_map,
    flow_map,
    gaussian,
    lambda_knots,
    make_sde,
    mixture,
    mp_free_moments,
    quantiles,
)
from torch import Tensor

from sde_lib import DATA, EDMSDE, SDE, VESDE, VPSDE, FlowSDE, GaussianMixture, Knot, NoisePrediction, ReverseSDE
from solvers import (
    DDIM,
    ERSDE,
    AdaptiveRungeKutta,
    AnalyticAncestral,
    Ancestral,
    Multistep,
    PredictorCorrector,
    Recorded,
    RungeKutta,
    Solver,
    TorchSDE,
    sample,
    solve,
)

EPS32 = 2.0**-24
every_sde = pytest.mark.parametrize("name", SDE_NAMES)
DETERMINISTIC = [k for k, v in ORDERED.items() if not v.stochastic]
STOCHASTIC = [k for k, v in ORDERED.items() if v.stochastic]


# --- sigma = 0 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [DDIM(), DDIM(eta=0.5), DDIM(eta=1.0), Ancestral(), ERSDE(), AnalyticAncestral((0.0,), (0.0,)),
     Multistep(predictor=1), Multistep(predictor=1, prediction="noise"), Multistep(predictor=1, tau=1.0)],
    ids=repr,
)  # fmt: skip
def test_the_last_step_is_the_limit_of_short_noise(solver):
    """A first-order step down to sigma_s becomes E[x_0 | x_t] as sigma_s vanishes, which is what `finish` takes."""
    sde, data = EDMSDE(t_min=1e-12), mixture()
    rev, t = data.reverse(sde), sde.knot(0.7)
    x = quantiles(data, t, 9)
    z = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    mean = solver.finish(rev, x, t, DATA, (), Recorded([]).bind(x)).x
    torch.testing.assert_close(mean, rev(x, t).data, rtol=0, atol=0)
    for small in (1e-4, 1e-8, 1e-12):
        end = solver.step(rev, x, t, sde.knot(small), (), Recorded([z]).bind(x)).x
        # sigma_s (eps, z) is all that is left, with |eps| < 4 and |z| <= 2; ten roundings
        assert float((end - mean).abs().max()) <= 6.0 * small + 10 * 2.0**-52 * float(x.abs().max())


@every_sde
@pytest.mark.parametrize("case", FIXED)
def test_a_point_is_found_from_the_prior(case, name):
    """All of time, prior to sigma = 0, every solver on every law: finite, and the point itself for data at a point."""
    solver, sde = FIXED[case], make_sde(name)
    data = GaussianMixture([0.7], std=0.0)
    for dtype in (torch.float64, torch.float32):
        out = sample(data.reverse(sde), (5,), solver, steps=40, grid="karras", rng=3, dtype=dtype, trajectory=True)
        assert out.ok and out.x.dtype == dtype
        # the posterior mean alpha x - sigma v of a state x: its rounding, of the largest state on the way
        size = float(out.trajectory[-2].abs().max()) + 1.0
        assert float((out.x - 0.7).abs().max()) <= 16 * torch.finfo(dtype).eps * size


# --- alpha = 0 ------------------------------------------------------------------------------------------------------


def kept(solver: Solver) -> float:
    """sqrt(1 - kappa) of an infinitely long step: DDIM keeps sqrt(1 - eta^2) of eps, other noise is all fresh."""
    if not solver.stochastic:
        return 1.0
    return math.sqrt(1.0 - solver.eta**2) if isinstance(solver, DDIM) else 0.0


FROM_NO_SIGNAL = [
    k
    for k, v in FIXED.items()
    if not v.needs_drift and not isinstance(v, RungeKutta | PredictorCorrector) and k != "ancestral/large"
]


@pytest.mark.parametrize("case", FROM_NO_SIGNAL)
def test_the_first_step_from_no_signal(case):
    """From alpha = 0 the state says nothing of the data: alpha_s E[x_0] + sigma_s (sqrt(1 - kappa) x + sqrt(kappa) z).

    Whatever the method's order and history; x itself is eps there. (Ancestral's "large" variance is the forward
    kernel's, here all of sigma_t^2: not the law's, as published.)
    """
    solver, sde, data = FIXED[case], FlowSDE(), mixture((2,))
    t, s = sde.knot(1.0), sde.knot(0.6)
    assert t.alpha == 0.0 and t.half_log_snr == -math.inf
    x = torch.linspace(-2.0, 2.0, 6, dtype=torch.float64).reshape(3, 2)
    z = torch.linspace(1.0, -1.5, 6, dtype=torch.float64).reshape(3, 2)
    got = solver.bind([t, s, sde.knot(0.3)]).step(data.reverse(sde), x, t, s, (), Recorded([z]).bind(x)).x
    keep = kept(solver)
    want = s.alpha * data.mean + s.sigma * (keep * x + math.sqrt(1.0 - keep * keep) * z)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", [k for k, v in CASES.items() if not v.needs_drift])
def test_a_noise_network_is_refused_where_there_is_no_signal(case):
    """eps says nothing of the data at alpha = 0: a sentence that says what to do, not a division by zero.

    With one time per sample the knot's numbers are tensors nobody looks at: there the run reports the failure.
    """
    solver = CASES[case]
    if isinstance(solver, PredictorCorrector) and solver.predictor is None:
        pytest.skip("stays where it is at the first knot")
    rev = ReverseSDE(FlowSDE(), lambda x, knot: 0.1 * x, NoisePrediction())
    if isinstance(solver, AdaptiveRungeKutta):
        out = solve(rev, torch.ones(3, dtype=torch.float64), solver, rng=0)
        assert not out.ok and "t = 1" in out.message
        return
    with pytest.raises(ValueError, match="does not determine the data"):
        solve(rev, torch.ones(3, dtype=torch.float64), solver, steps=4, rng=0)


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_flow_from_no_signal(case):
    """The exact map of the flow law from its very start, in equal angles, down to t_min: four times the steps, a third
    of the error at most, whatever the order inside.

    Solvers that need a finite lambda start at drift_t_max, and take equal steps of lambda there: in any coordinate that
    ends in a pole (lambda's own, f's) the first angle would be one long step.
    """
    solver, sde, data = ORDERED[case], FlowSDE(), mixture()
    errors = []
    for steps in (24, 96):
        out = solve(
            data.reverse(sde),
            torch.linspace(-2.3, 2.4, 31, dtype=torch.float64),
            solver,
            steps=steps,
            grid="uniform_half_log_snr" if solver.needs_drift else "uniform_angle",
            trajectory=True,
            strict=True,
        )
        first, last = sde.knot(float(out.times[0])), sde.knot(float(out.times[-1]))
        assert first.alpha == 0.0 or solver.needs_drift
        errors.append(float((out.x - flow_map(data, out.trajectory[0], first, last)).square().mean().sqrt()))
    assert errors[1] < max(errors[0] / 3.0, 1e-7), errors
    # the reverse of the forward step divides by alpha_s / alpha_t: its constant is large near alpha = 0
    assert errors[1] < (0.5 if case == "reverse_diffusion/flow" else 0.05)


@pytest.mark.parametrize("case", STOCHASTIC)
def test_law_from_no_signal(case):
    """Mean and variance at t_min from the flow law's start: exact Gaussian arithmetic, 24 and 96 steps."""
    solver, sde, data = ORDERED[case], FlowSDE(), gaussian()
    start = sde.knot(sde.drift_t_max if solver.needs_drift else sde.t_max)
    (m_t, v_t), (m_s, v_s) = mp_free_moments(data, start), mp_free_moments(data, sde.knot(sde.t_min))
    gaps = []
    for steps in (100, 400):
        a, b, c = affine_map(data.reverse(sde), solver, steps=steps, grid="uniform_angle")
        gaps.append((abs(float(a) * m_t + float(b) - m_s), abs(float(a) ** 2 * v_t + float(c.square().sum()) - v_s)))
    for coarse, fine in zip(*gaps, strict=True):
        assert fine < max(coarse / 2.5, 1e-10), gaps


# --- float32 states near both ends ----------------------------------------------------------------------------------

WIDE: dict[str, SDE] = {
    "vp": VPSDE(t_min=1e-5),
    "ve": VESDE(sigma_min=1e-5, sigma_max=1e4),
    "edm": EDMSDE(t_min=1e-5, t_max=1e4),
}


def exact_noise(n: int, x: Tensor) -> list[Tensor]:
    """Draws that float32 holds exactly."""
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float32).double() for _ in range(n)]


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("case", FIXED)
def test_float32_state_over_nine_decades(case, name):
    """VP from t = 1 to 1e-5, VE and EDM from sigma = 1e4 to 1e-5: float32 against float64 on the same noise.

    Coefficients are float64 numbers on the host, so the only loss is the rounding of the state, of the network's
    output and of each product: a dozen EPS32 of the largest term per call. On Gaussian data every run is linear and, in
    units of the standard deviation of p_t, contracts, so calls add up. Only polynomials through past noise predictions
    do not contract by themselves (x is carried whole, sigma eps subtracted): the sum of their |weights|, up to 16 with
    four knots, comes in.
    """
    solver, sde, data = FIXED[case], WIDE[name], gaussian()
    first = sde.knot(sde.t_max)
    x = quantiles(data, first, 33).float()
    noise = exact_noise(400, x)
    low = sde.half_log_snr(sde.t_max)
    high = sde.half_log_snr(sde.t_min)
    steps = math.ceil((high - low) / 0.5)
    knots = [sde.knot_at(low + (high - low) * i / steps) for i in range(steps + 1)]
    rev = data.reverse(sde)
    one, two = (
        solve(rev, v, solver, grid=knots, end="denoise", rng=Recorded(noise), trajectory=True, strict=True)
        for v in (x, x.double())
    )
    assert one.x.dtype == torch.float32
    calls = int(one.nfe[0])
    std = [math.sqrt(mp_free_moments(data, k)[1]) for k in knots] + [math.sqrt(float(data.covariance))]
    gap = max(
        float((a.double() - b).abs().max()) / (s + float(b.abs().max()))
        for a, b, s in zip(one.trajectory, two.trajectory, std, strict=True)
    )
    spread = 16 if getattr(solver, "prediction", "") == "noise" and isinstance(solver, Multistep) else 1
    assert gap <= 12 * EPS32 * calls * spread


# --- a bfloat16 network under a float32 state -----------------------------------------------------------------------


@pytest.mark.parametrize("output", ["noise", "data", "v"])
@pytest.mark.parametrize("case", CASES)
def test_a_bfloat16_network_under_a_float32_state(case, output):
    """A network whose values bfloat16 holds exactly gives the same trajectory, bit by bit, in either dtype: the state,
    the coefficients and every sum stay float32.
    """
    solver, sde = CASES[case], VPSDE()
    knots = lambda_knots(sde, 6)
    options = {"grid": [k.t for k in knots]}
    if isinstance(solver, TorchSDE):
        options = {"grid": torch.linspace(knots[0].t, knots[-1].t, 7, dtype=torch.float64)}
    x = torch.linspace(-1.5, 1.6, 12).reshape(4, 3)

    def network(dtype: torch.dtype):
        def call(x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == t.dtype == torch.float32
            return (0.7 * torch.tanh(x)).bfloat16().to(dtype)

        return sde.reverse(**{output: call})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = (solve(network(d), x, solver, rng=5, **options).x for d in (torch.bfloat16, torch.float32))
    assert low.dtype == high.dtype == torch.float32 and torch.equal(low, high)
    assert not torch.equal(low, low.bfloat16().float())


def test_per_sample_knots_do_not_lower_the_state():
    """(B, 1) float64 coefficients on float32 states: float32 out, from a bfloat16 network too."""
    sde = VPSDE()
    t, s = (sde.knot(torch.tensor(v, dtype=torch.float64), ndim=2) for v in ([0.9, 0.6, 0.3], [0.7, 0.5, 0.1]))
    x = torch.linspace(-1.0, 1.0, 6).reshape(3, 2)
    z = torch.ones(3, 2)
    rev = sde.reverse(noise=lambda x, t: (0.5 * x).bfloat16())
    for case, solver in FIXED.items():
        if getattr(solver, "s_churn", 0.0) or type(solver).step is Solver.step:  # no step of its own: `Recommended`
            continue
        out = solver.step(rev, x, t, s, (), Recorded([z] * 8).bind(x)).x
        assert out.dtype == torch.float32, case


def test_coefficients_are_float64_on_the_host():
    """A knot of a float grid holds Python floats; of per-sample times float64 tensors, whatever the times came in."""
    for name in SDE_NAMES:
        sde = make_sde(name)
        knot = sde.knot(0.5)
        assert all(type(v) is float for v in (knot.t, knot.alpha, knot.sigma, knot.half_log_snr))
        rows = sde.knot(torch.tensor([0.4, 0.5], dtype=torch.float32))
        assert all(isinstance(v, Tensor) and v.dtype == torch.float64 for v in (rows.alpha, rows.sigma))
    assert isinstance(Knot(0.5, 1.0, 0.5, math.log(2.0), 0.5).alpha, float)
    assert replace(VPSDE(), t_min=1e-5).knot(1e-5).sigma == pytest.approx(1.00045e-3, rel=1e-3)
