"""Grids: every rule on every SDE, in both directions, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import mpmath as mp
import pytest
import scipy.stats
import torch
from oracles import SDE_NAMES, make_sde

from sde_lib import DATA, EDMSDE, VPSDE
from solvers import (
    AYS_TABLES,
    GRIDS,
    IDDPM,
    AlignYourSteps,
    Beta,
    Blended,
    Cosine,
    Geometric,
    Karras,
    Polyexponential,
    Quadratic,
    Shifted,
    UniformAngle,
    UniformHalfLogSNR,
    UniformTime,
    make_knots,
)

every_sde = pytest.mark.parametrize("name", SDE_NAMES)
every_grid = pytest.mark.parametrize("grid", GRIDS)


@every_sde
@every_grid
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_grids_are_monotone_and_hit_their_ends(grid, name, steps):
    """`steps` intervals, ends exactly the law's (or where the spaced quantity is finite), strictly monotone inside."""
    sde = make_sde(name)
    for needs_drift in (False, True):
        knots = make_knots(sde, grid, steps, needs_drift=needs_drift)
        times = [k.t for k in knots]
        assert len(times) == steps + 1 and times[-1] == sde.t_min
        assert times[0] in ({sde.drift_t_max} if needs_drift else {sde.t_max, sde.drift_t_max})
        assert all(a > b for a, b in itertools.pairwise(times))
        assert all(math.isfinite(k.alpha) and k.sigma > 0 and k.law is sde for k in knots)


@every_sde
@pytest.mark.parametrize("grid", [g for g in GRIDS if g not in ("iddpm", "align_your_steps")])
def test_grids_space_what_they_say(grid, name):
    """The spaced quantity has equal differences, computed from the times alone."""
    sde = make_sde(name)
    rule = GRIDS[grid]()
    low, high = sde.t_min, sde.drift_t_max
    times = [k.t for k in make_knots(sde, GRIDS[grid](t_start=high, t_end=low), 9)]

    def share(lam: float, of: Callable[[float], float]) -> float:
        """The part of the run's range of `of` that lies before lam."""
        a, b = of(sde.half_log_snr(high)), of(sde.half_log_snr(low))
        return (of(lam) - a) / (b - a)

    def cosine_time(lam: float) -> float:
        """tau of Nichol & Dhariwal's schedule, eq. 17, in 40 digits."""
        with mp.workdps(40):
            first = mp.pi / 2 * mp.mpf(0.008) / mp.mpf(1.008)
            alpha = 1 / mp.sqrt(1 + mp.exp(-2 * mp.mpf(lam)))
            return float(mp.acos(alpha * mp.cos(first)) - first)

    def spaced(t: float) -> float:
        lam = sde.half_log_snr(t)
        return {
            "uniform_time": lambda: t,
            "quadratic": lambda: math.sqrt(t),
            "geometric": lambda: math.log(t),
            "uniform_half_log_snr": lambda: lam,
            "karras": lambda: math.exp(-lam / rule.rho),
            "uniform_angle": lambda: math.atan(math.exp(-lam)),
            "blended": lambda: share(lam, lambda v: v) + share(lam, lambda v: math.atan(math.exp(-v) / 0.7)),
            "polyexponential": lambda: max(0.0, sde.half_log_snr(low) - lam) ** (1 / 1.5),
            "cosine": lambda: cosine_time(lam),
            "beta": lambda: float(scipy.stats.beta(0.6, 0.6).cdf((t - sde.t_min) / (sde.t_max - sde.t_min))),
            "shifted": lambda: 1 / (1 + 3 * math.exp(lam)),
        }[grid]()

    values = torch.tensor([spaced(t) for t in times], dtype=torch.float64)
    differences = values.diff()
    # times are exact to a few EPS (1 + |lambda|) / |lambda'|: relative to the total range that is far below 1e-9
    assert float((differences - differences.mean()).abs().max()) < 1e-9 * float(differences.abs().sum())


def test_karras_formula():
    """Karras et al. 2022, eq. 5, on EDM's SDE: 18 noise levels from 80 to 0.002, rho = 7, in 40 digits."""
    times = [k.t for k in make_knots(make_sde("edm"), Karras(), 17)]
    with mp.workdps(40):
        a, b = mp.mpf(80) ** (mp.mpf(1) / 7), mp.mpf("0.002") ** (mp.mpf(1) / 7)
        for i, t in enumerate(times):
            assert float(abs(t / (a + mp.mpf(i) / 17 * (b - a)) ** 7 - 1)) < 1e-13
    times = [k.t for k in make_knots(make_sde("edm"), Karras(rho=3.0, t_start=10.0, t_end=0.1), 4)]
    assert times[2] == pytest.approx(((10 ** (1 / 3) + 0.1 ** (1 / 3)) / 2) ** 3, rel=1e-13)


@every_sde
@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_blended_ends_are_the_pure_grids(name, sigma_data):
    """mix = 0 spaces lambda, mix = 1 the angle."""
    sde = make_sde(name)
    low, high = sde.t_min, sde.drift_t_max
    for mix, other in ((0.0, UniformHalfLogSNR(high, low)), (1.0, UniformAngle(high, low, sigma_data))):
        got = Blended(high, low, mix=mix, sigma_data=sigma_data).times(sde, 12)
        assert got == pytest.approx(other.times(sde, 12), rel=1e-9)


def test_polyexponential_formula():
    """k-diffusion's ramp^rho between log sigma_max and log sigma_min; rho = 1 is uniform in lambda."""
    sde = make_sde("edm")
    got = Polyexponential(rho=2.5).times(sde, 8)
    a, b = math.log(80.0), math.log(0.002)
    want = [math.exp((1 - i / 8) ** 2.5 * (a - b) + b) for i in range(9)]
    assert got == pytest.approx(want, rel=1e-12)
    assert Polyexponential(rho=1.0).times(sde, 8) == pytest.approx(UniformHalfLogSNR().times(sde, 8), rel=1e-12)


def test_iddpm_levels():
    """Karras et al. 2022, Table 1: the recursion in 40 digits, at every level, when the steps are the levels."""
    sde = make_sde("edm")
    with mp.workdps(40):

        def alpha_bar(j: int) -> mp.mpf:
            return mp.sin(mp.pi / 2 * mp.mpf(j) / (1000 * (mp.mpf("0.008") + 1))) ** 2

        u = [mp.mpf(0)]
        for j in range(1000, 0, -1):
            u.insert(0, mp.sqrt((u[0] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), mp.mpf("0.001")) - 1))
        inside = [float(v) for v in u if 0.002 < v < 80]
    got = IDDPM().times(sde, len(inside) + 1)
    assert got == pytest.approx([80.0, *inside, 0.002], rel=1e-10)
    # the paper's rounded steps lie next to the interpolated ones
    coarse = IDDPM().times(sde, 17)
    every = [80.0, *inside, 0.002]
    for i, t in enumerate(coarse):
        k = round((len(every) - 1) * i / 17)
        assert every[min(k + 1, len(every) - 1)] <= t <= every[max(k - 1, 0)]


@pytest.mark.parametrize("table", AYS_TABLES)
def test_align_your_steps(table):
    """Ten steps over the table's own range are the table; twenty pass through it; the levels are the models' own."""
    levels = AYS_TABLES[table]
    sde = EDMSDE(t_min=levels[-1], t_max=levels[0])
    assert AlignYourSteps(table=table).times(sde, 10) == pytest.approx(levels, rel=1e-12)
    twenty = AlignYourSteps(table=table).times(sde, 20)
    assert twenty[::2] == pytest.approx(levels, rel=1e-12)
    assert twenty[1] == pytest.approx(math.sqrt(levels[0] * levels[1]), rel=1e-12)
    steps = {
        "sd": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
        "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
    }
    if table in steps:  # the published time steps of Stable Diffusion's schedule have these levels, to three digits
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = (1 - beta).cumprod(0)
        sigma = ((1 - kept) / kept).sqrt()
        assert list(levels[:10]) == pytest.approx([float(sigma[i]) for i in steps[table]], rel=0.02)


@every_sde
@every_grid
def test_upward(grid, name):
    """t_end > t_start reverses the same times."""
    sde = make_sde(name)
    a, b = sde.t_min * 1.5, 0.5 * (sde.t_min + sde.drift_t_max)
    down = [k.t for k in make_knots(sde, GRIDS[grid](t_start=b, t_end=a), 6)]
    up = [k.t for k in make_knots(sde, GRIDS[grid](t_start=a, t_end=b), 6)]
    assert up == pytest.approx(down[::-1], rel=1e-9) and up[0] == a and up[-1] == b


def test_given_times():
    """Lists, tensors of either precision, numpy; a float32 end is taken for the law's own."""
    sde = VPSDE()
    times = [1.0, 0.4, 1e-3]
    for given in (times, tuple(times), torch.tensor(times), torch.tensor(times, dtype=torch.float64)):
        knots = make_knots(sde, given, None)
        assert [k.t for k in knots] == pytest.approx(times, rel=1e-6)
        assert knots[0].t <= sde.t_max and knots[-1].t >= sde.t_min
    assert make_knots(sde, torch.tensor(times).numpy(), None)[-1].t == pytest.approx(1e-3, rel=1e-6)
    assert make_knots(sde, times, None, "denoise")[-1] is DATA


def test_defaults():
    """No grid: blended steps on an SDE, every level on a chain; the end is explicit."""
    sde = VPSDE()
    assert [k.t for k in make_knots(sde, None, 4)] == [k.t for k in make_knots(sde, "blended", 4)]
    chain = sde.discretize(30)
    knots = make_knots(chain, None, None)
    assert [k.index for k in knots] == [*range(29, -1, -1), -1] and knots[-1] is DATA
    assert len(make_knots(chain, chain, 5)) == 6
    assert make_knots(sde, "karras", 4) and make_knots(sde, Quadratic(), 4, "denoise")[-1] is DATA
    strided = chain.descend(5, "leading")
    assert make_knots(chain, strided, None) == strided


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((None, None), "steps"),
        ((UniformTime(), None), "steps"),
        ((UniformTime(), 0), "steps"),
        ((UniformTime(), 1.5), "steps"),
        ((UniformTime(), "3"), "steps"),
        (("uniform", 4), "Did you mean"),
        (([0.5, 0.2], 3), "given times"),
        (([0.5], None), "at least two"),
        (([], None), "at least two"),
        (([0.5, 0.5], None), "monotone"),
        (([0.5, 0.2, 0.3], None), "entries 1 and 2"),
        (([0.5, 0.2, math.nan], None), "monotone|nan"),
        (([math.nan, 0.2], None), "monotone|nan"),
        (([1.2, 0.2], None), "t_max"),
        (([0.9, 1e-4], None), "t_min"),
        (([0.9, 0.0], None), "t_min"),
        (([0.9, -0.1], None), "t_min"),
        (([math.inf, 0.1], None), "t_max|monotone"),
        (([[0.9, 0.5], [0.4, 0.3]], None), "1-D"),
        ((torch.ones(2, 2), None), "1-D"),
        ((3.0, None), "1-D"),
        ((UniformTime(t_start=0.5, t_end=0.5), 3), "starts and ends"),
        ((UniformTime(t_start=1.5), 3), "t_max"),
        ((Geometric(t_end=1e-5), 3), "t_min"),
        ((UniformTime(t_start=math.nan), 3), "t_start|nan|monotone"),
    ],
)
def test_bad_grids(arguments, says):
    """Each refused in words that say what is accepted."""
    with pytest.raises(ValueError, match=says):
        make_knots(VPSDE(), *arguments)


def test_bad_rules():
    """Options of the rules; ends that a chain or an upward run do not have."""
    for bad in (0.0, -7.0, math.nan):
        with pytest.raises(ValueError, match="rho"):
            Karras(rho=bad)
        with pytest.raises(ValueError, match="sigma_data"):
            UniformAngle(sigma_data=bad)
        with pytest.raises(ValueError, match="sigma_data"):
            Blended(sigma_data=bad)
        with pytest.raises(ValueError, match="shift"):
            Shifted(shift=bad)
        with pytest.raises(ValueError, match="rho"):
            Polyexponential(rho=bad)
        with pytest.raises(ValueError, match="offset"):
            Cosine(offset=bad)
        with pytest.raises(ValueError, match="`a`"):
            Beta(a=bad)
        with pytest.raises(ValueError, match="c_2"):
            IDDPM(c_2=bad)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="mix"):
            Blended(mix=bad)
    with pytest.raises(ValueError, match="levels"):
        IDDPM(levels=1)
    with pytest.raises(ValueError, match="Did you mean"):
        AlignYourSteps(table="sdx")
    with pytest.raises(ValueError, match="end"):
        make_knots(VPSDE(), None, 3, "denoised")
    with pytest.raises(ValueError, match="stop"):
        make_knots(VPSDE(), UniformTime(t_start=0.1, t_end=0.9), 3, "denoise")
    chain = VPSDE().discretize(30)
    for grid in (UniformTime(), "karras", [0.9, 0.5]):
        with pytest.raises(ValueError, match="chain"):
            make_knots(chain, grid, None if isinstance(grid, list) else 3)
    with pytest.raises(ValueError, match="30 levels"):
        make_knots(chain, VPSDE().discretize(40), None)


def test_singular_starts():
    """On the flow SDE, lambda- and ratio-spaced grids start where lambda is finite; the others start at t = 1."""
    sde = make_sde("flow")
    for grid in (UniformHalfLogSNR(), Karras(), Polyexponential(), IDDPM(), AlignYourSteps()):
        assert make_knots(sde, grid, 5)[0].t == sde.drift_t_max
    for grid in (UniformTime(), UniformAngle(), Quadratic(), Geometric(), Cosine(), Beta(), Shifted(), Blended()):
        assert make_knots(sde, grid, 5)[0].t == 1.0
        assert make_knots(sde, grid, 5, needs_drift=True)[0].t == sde.drift_t_max


def test_given_times_from_no_signal():
    """At alpha = 0 solvers that need f, g or a finite lambda are refused; those that do not are not."""
    sde = make_sde("flow")
    for grid in ([1.0, 0.4], [sde.knot(1.0), sde.knot(0.4)]):
        assert len(make_knots(sde, grid, None)) == 2
        with pytest.raises(ValueError, match=r"start at t = 0\.999"):
            make_knots(sde, grid, None, needs_drift=True)
