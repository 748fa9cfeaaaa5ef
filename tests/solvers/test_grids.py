"""Grids: every rule on every SDE, in both directions, and what is refused."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import pytest
import torch
from oracles import SDE_NAMES, make_sde

from sde_lib import DATA, VPSDE
from solvers import GRIDS, Geometric, Karras, Quadratic, UniformAngle, UniformHalfLogSNR, UniformTime, make_knots

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
@every_grid
def test_grids_space_what_they_say(grid, name):
    """The spaced quantity has equal differences, computed from the times alone."""
    sde = make_sde(name)
    rule = GRIDS[grid]()
    low, high = sde.t_min, sde.drift_t_max
    times = [k.t for k in make_knots(sde, GRIDS[grid](t_start=high, t_end=low), 9)]

    def spaced(t: float) -> float:
        lam = sde.half_log_snr(t)
        return {
            "uniform_time": lambda: t,
            "quadratic": lambda: math.sqrt(t),
            "geometric": lambda: math.log(t),
            "uniform_half_log_snr": lambda: lam,
            "karras": lambda: math.exp(-lam / rule.rho),
            "uniform_angle": lambda: math.atan(math.exp(-lam)),
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
    """No grid: equal steps in time on an SDE, every level on a chain; the end is explicit."""
    sde = VPSDE()
    assert [k.t for k in make_knots(sde, None, 4)] == pytest.approx([1.0, 0.75025, 0.5005, 0.25075, 0.001])
    chain = sde.discretize(30)
    knots = make_knots(chain, None, None)
    assert [k.label for k in knots] == [*range(29, -1, -1), -1] and knots[-1] is DATA
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
    """On the flow SDE, lambda- and ratio-spaced grids start where lambda is finite; angle and time start at t = 1."""
    sde = make_sde("flow")
    for grid in (UniformHalfLogSNR(), Karras()):
        assert make_knots(sde, grid, 5)[0].t == sde.drift_t_max
    for grid in (UniformTime(), UniformAngle(), Quadratic(), Geometric()):
        assert make_knots(sde, grid, 5)[0].t == 1.0
        assert make_knots(sde, grid, 5, needs_drift=True)[0].t == sde.drift_t_max
