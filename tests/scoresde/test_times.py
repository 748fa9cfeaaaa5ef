"""Laws of times: draws against densities, on every SDE and on chains. Every entry of `TIMES` enrols itself."""

import math

import numpy as np
import pytest
import torch
from gaussian_scores import LAWS, STD, corners, exact

from scoresde.objectives import (
    TIMES,
    CosineTimes,
    DenoisingScoreMatching,
    LogitNormalTimes,
    LogNormalTimes,
    UniformTimes,
)
from sde_lib import VPSDE, CosineVPSDE, FlowSDE

each_law = pytest.mark.parametrize("name", sorted(LAWS))
each_times = pytest.mark.parametrize("times", sorted(TIMES))


def middles(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@each_law
@each_times
@pytest.mark.parametrize("corrected", [False, True], ids=["own", "corrected"])
def test_density_is_that_of_the_draws(times, name, corrected):
    """Between the times of u = 1/64, 2/64, … the density, relative to uniform times, integrates to 1/64: Gauss with 20
    points per cell is exact to far below 1e-8 for a density that is smooth over a cell (Laplace's kink lies at u = 1/2,
    a cell's edge where the law is not cut off; on the others the cell that holds it is off by less than 1e-3)."""
    law = LAWS[name]()
    drawer = TIMES[times]().on(law, corrected)
    u = torch.arange(1, 64, dtype=torch.float64) / 64
    t = drawer.draw(u)
    assert t.dtype == torch.float64 and bool((t.diff() > 0).all())
    assert law.t_min <= float(drawer.draw(torch.zeros(1, dtype=torch.float64))) <= float(t[0])
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(20))
    middle, half = 0.5 * (t[1:] + t[:-1])[:, None], 0.5 * t.diff()[:, None]
    places = (middle + half * nodes).flatten()
    density = torch.as_tensor(drawer.density(law.knot(places))).expand(len(places)).reshape(-1, 20)
    found = (half * weights * density).sum(1) / (drawer.t_max - drawer.t_min)
    worst = (found * 64 - 1.0).abs().sort().values
    if times == "laplace":
        assert float(worst[-1]) < 1e-2
        worst = worst[:-1]
    assert float(worst[-1]) < 1e-8
    # whole range: what lies outside the first and last of these times is the rest
    last = float(drawer.draw(torch.tensor([1.0 - 2.0**-40], dtype=torch.float64)))
    end = law.drift_t_max if corrected or times in ("importance", "half_log_snr") else law.t_max
    assert last <= end and drawer.t_max == end


@each_law
@each_times
@pytest.mark.parametrize("weighting", ["uniform", "likelihood"])
def test_corrected_times_have_the_expectation_of_uniform_ones(times, name, weighting):
    """The exact model's mean loss over drawn times is the integral of its closed form over uniform ones. Both are
    midpoint rules over one fine grid in lambda, the first with the clock's differences for weights, where it is not so
    far in a tail that they have no digits."""
    law, n = LAWS[name](), 4000
    made = TIMES[times](**({} if times == "uniform" else {"corrected": True}))
    objective = DenoisingScoreMatching(exact(law), made, weighting)
    first, last = law.knot(law.t_min), law.knot(law.drift_t_max)
    ends = torch.linspace(first.half_log_snr, last.half_log_snr, n + 1, dtype=torch.float64)
    edges, lam = law.knot(law.time_at(ends).clamp(first.t, last.t)), 0.5 * (ends[1:] + ends[:-1])
    t = law.time_at(lam)
    drawer = made.on(law, True)
    kept = torch.as_tensor(drawer.density(law.knot(t))).expand(n) > 1e-4
    x_0, noise = corners(n)
    losses = objective.at_times(x_0, t.repeat_interleave(4), noise).reshape(n, 4).mean(1)
    found = float((losses * made.clock(edges).diff() / drawer.range)[kept].sum())
    snr = torch.exp(2.0 * lam) * STD**2
    least = snr / (snr + 1.0)
    # g^2 / sigma^2 dt = -2 dlambda
    widths = -2.0 * ends.diff() if weighting == "likelihood" else edges.t.diff()
    wanted = float((least * widths)[kept].sum()) / (last.t - first.t)
    assert int(kept.sum()) > n / 10 and abs(found - wanted) < 1e-5 * wanted


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("times", ["uniform", "importance"])
@pytest.mark.parametrize("stratified", [True, False], ids=["lattice", "independent"])
def test_drawn_losses_estimate_the_objective(name, times, stratified):
    """Through `loss`, its own draws, within 4.5 standard errors of the closed form; a lattice does better."""
    law, n = LAWS[name](), 20_000
    objective = DenoisingScoreMatching(exact(law), times, "likelihood", stratified=stratified)
    rng = torch.Generator().manual_seed(0)
    losses = [float(objective.loss(STD * torch.randn(n, 1, generator=rng).double(), rng=rng)) for _ in range(10)]

    def integral(lam):  # of 2 least over lambda
        return math.log1p(math.exp(2.0 * lam) * STD**2)

    first, last = law.knot(law.t_min), law.knot(law.t_max)
    expected = (integral(first.half_log_snr) - integral(last.half_log_snr)) / (law.t_max - law.t_min)
    assert abs(np.mean(losses) - expected) < 4.5 * np.std(losses, ddof=1) / math.sqrt(len(losses))


@pytest.mark.parametrize("name", ["edm", "vp", "ve"])
def test_lognormal_times_are_normal_between_the_ends(name):
    """log(sigma / alpha) has the quantiles of a normal law, cut off at the ends: from scipy's truncated normal."""
    from scipy.stats import truncnorm

    law = LAWS[name]()
    mean, std = -0.4, 1.5
    drawer = LogNormalTimes(mean, std).on(law)
    low, high = (-law.knot(t).half_log_snr for t in (law.t_min, law.t_max))
    u = middles(500)
    wanted = truncnorm.ppf(u.numpy(), (low - mean) / std, (high - mean) / std, mean, std)
    found = -law.knot(drawer.draw(u)).half_log_snr
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-8)


def test_names_of_one_law():
    """On a flow, t / (1 - t) is the noise ratio: logit normal times are lognormal. A law whose clock is the angle of
    its knots itself draws cosine times uniformly: alpha = cos, sigma = sin on a flow in the variable of its angle."""
    flow, u = FlowSDE(), middles(100)
    torch.testing.assert_close(
        LogitNormalTimes(0.3, 1.4).on(flow).draw(u), LogNormalTimes(0.3, 1.4).on(flow).draw(u), rtol=1e-12, atol=0
    )
    knot = flow.knot(CosineTimes().on(flow).draw(u))
    angles = torch.atan2(torch.as_tensor(knot.sigma), torch.as_tensor(knot.alpha))
    torch.testing.assert_close(angles.diff(), angles.diff()[:1].expand(99), rtol=1e-9, atol=0)


@each_times
def test_levels_of_a_chain(times):
    """Frequencies of a lattice of draws are the probabilities, n times them the density; and a fine chain has the SDE's
    density at its levels, to O(1 / n)."""
    law = CosineVPSDE()  # whose chains are marginals of the SDE; DDPM's are not
    chain = law.discretize(50)
    made = TIMES[times]()
    drawer = made.on(chain)
    p = torch.tensor(made.probabilities(chain), dtype=torch.float64)
    assert abs(float(p.sum()) - 1.0) < 1e-12 and float(p.min()) > 0.0
    levels = drawer.draw((torch.arange(100_000, dtype=torch.float64) + 0.37) / 100_000)
    assert levels.dtype == torch.int64
    frequencies = torch.bincount(levels, minlength=50) / 100_000
    assert float((frequencies - p).abs().max()) <= 1.01e-5
    every = chain.knot(torch.arange(50), ndim=2)
    torch.testing.assert_close(torch.as_tensor(drawer.density(every)), 50 * p[:, None], rtol=1e-12, atol=0)
    assert abs(drawer.density(chain.knot(7)) - 50 * float(p[7])) < 1e-12
    fine, inside = law.discretize(2000), torch.arange(100, 1900)
    chained = torch.as_tensor(made.on(fine).density(fine.knot(inside)))
    smooth = torch.as_tensor(made.on(law).density(law.knot(fine.times[inside]))).expand(len(inside))
    torch.testing.assert_close(chained, smooth, rtol=2e-2, atol=1e-6)


def test_a_level_without_signal_needs_times_that_reach_it():
    chain = FlowSDE().discretize(10)  # alpha = 0 at the last level
    assert len(CosineTimes().probabilities(chain)) == 10
    with pytest.raises(ValueError, match="alpha = 0"):
        TIMES["importance"]().on(chain)


def test_bad_options_are_named():
    for make in (LogNormalTimes, LogitNormalTimes):
        with pytest.raises(ValueError, match="std"):
            make(std=0.0)
    with pytest.raises(ValueError, match="scale"):
        TIMES["laplace"](scale=-1.0)
    with pytest.raises(ValueError, match="no probability"):
        LogNormalTimes(mean=1e3).on(VPSDE())
    with pytest.raises(TypeError):
        UniformTimes(corrected=True)
