"""The adaptive SDE solver: one Brownian path per sample whatever is refused, and what comes of drawing anew."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import Spy, gaussian, lambda_knots, make_sde, mixture, mixture_expectation, mp_free_moments
from torch import Tensor

from solvers import (
    BrownianPath,
    DPMppSDE,
    EulerMaruyama,
    GottaGoFast,
    Recorded,
    SolverError,
    Status,
    as_draw,
    gotta_go_fast,
    solve,
)
from solvers.gotta_go_fast import Remembered

SAMPLES = 20_000
TOLERANCES = (0.05, 0.02, 0.01, 0.005)


class Redrawn(Remembered):
    """The published rule: a refused step asks for new noise, and no step knows of another."""

    def aim(self, u: Tensor, s: Tensor) -> Tensor:
        return s

    def over(self, u: Tensor, s: Tensor) -> Tensor:
        self.tries += 1
        return self.draw.normal("increment", self.tries)[self.index]

    def settle(self, accept: Tensor) -> None:
        pass


def exact_start(name: str, n: int = SAMPLES) -> tuple[Any, Tensor]:
    """The SDE and draws of Gaussian data's exact law at its start, (n, 1)."""
    sde = make_sde(name)
    mean, variance = mp_free_moments(gaussian(), sde.knot(sde.drift_t_max))
    z = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sde, mean + math.sqrt(variance) * z


# --- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", TOLERANCES)
def test_gaussian_data_keep_their_moments(tol):
    """N(0.7, 0.5^2) under VP: mean and variance within 4.5 standard errors plus the tolerance."""
    sde, x = exact_start("vp")
    out = solve(gaussian((1,)).reverse(sde), x, GottaGoFast(rtol=tol, atol=tol), rng=1, strict=True)
    mean, variance = mp_free_moments(gaussian(), sde.knot(sde.t_min))
    assert int(out.stats["rejected"].sum()) > SAMPLES  # more than one refusal per path: the law does not rest on luck
    assert abs(float(out.x.mean()) - mean) < 4.5 * math.sqrt(variance / SAMPLES) + tol
    assert abs(float(out.x.var()) / variance - 1) < 4.5 * math.sqrt(2 / SAMPLES) + tol


@pytest.mark.parametrize("tol", TOLERANCES[:3])
def test_drawing_anew_favours_what_is_accepted(tol, monkeypatch):
    """The same run with the published rule: the variance is off by a fifth and more, whatever the tolerance."""
    monkeypatch.setattr(gotta_go_fast, "Remembered", Redrawn)
    sde, x = exact_start("vp")
    out = solve(gaussian((1,)).reverse(sde), x, GottaGoFast(rtol=tol, atol=tol, exponent=0.9), rng=1, strict=True)
    _, variance = mp_free_moments(gaussian(), sde.knot(sde.t_min))
    assert abs(float(out.x.var()) / variance - 1) > 0.2


@pytest.mark.parametrize("name", ["ve", "edm", "flow", "sub_vp"])
def test_moments_on_other_laws(name):
    """The same in the other laws, sigma up to 80 and drifts up to 1000 included."""
    tol, n = 0.02, 5000
    sde, x = exact_start(name, n)
    out = solve(gaussian((1,)).reverse(sde), x, GottaGoFast(rtol=tol, atol=tol), rng=2, strict=True)
    mean, variance = mp_free_moments(gaussian(), sde.knot(sde.t_min))
    assert abs(float(out.x.mean()) - mean) < 4.5 * math.sqrt(variance / n) + tol
    assert abs(float(out.x.var()) / variance - 1) < 4.5 * math.sqrt(2 / n) + tol


def test_the_law_of_a_mixture_in_the_limit():
    """Expectations of nonlinear functions on the mixture, at a tolerance with a bias below the standard error."""
    sde, data, n = make_sde("vp"), mixture((1,)), 10_000
    top, end = lambda_knots(sde, 1)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x = top.alpha * data.sample(n, generator, torch.float64) + top.sigma * noise
    out = solve(data.reverse(sde), x, GottaGoFast(rtol=5e-3, atol=5e-3), grid=[top, end], rng=4, strict=True)
    for fn in (lambda v: v, lambda v: v * v, lambda v: torch.cos(1.7 * v + 0.4), lambda v: torch.tanh(1.5 * v - 0.3)):
        got, want = fn(out.x), mixture_expectation(mixture(), end, fn)
        assert abs(float(got.mean()) - want) < 4.5 * float(got.std()) / math.sqrt(n)


# --- the noise ------------------------------------------------------------------------------------------------------


def accepted_increments(cls: type[Remembered], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Every unit increment over an accepted step, of 4000 runs."""
    kept: list[Tensor] = []

    class Watched(cls):  # type: ignore[valid-type, misc]
        def over(self, u: Tensor, s: Tensor) -> Tensor:
            self.z_tried = super().over(u, s)
            return self.z_tried

        def settle(self, accept: Tensor) -> None:
            kept.append(self.z_tried[accept].flatten())
            super().settle(accept)

    monkeypatch.setattr(gotta_go_fast, "Remembered", Watched)
    sde, x = exact_start("vp", 4000)
    solve(gaussian((1,)).reverse(sde), x, GottaGoFast(rtol=0.05, atol=0.05), rng=5, strict=True)
    return torch.cat(kept)


def ks(z: Tensor) -> float:
    """Kolmogorov-Smirnov distance to the standard normal, times the root of the number of draws."""
    z = z.sort().values
    empirical = torch.arange(len(z), dtype=torch.float64) / len(z)
    return float((torch.special.ndtr(z) - empirical).abs().max() * math.sqrt(len(z)))


def test_accepted_increments_are_standard_normal(monkeypatch):
    """Kolmogorov-Smirnov: 2.8 is exceeded once in 3e6. Accepted increments of redrawn noise fail by an order."""
    z = accepted_increments(Remembered, monkeypatch)
    assert len(z) > 100_000 and ks(z) < 2.8
    assert ks(accepted_increments(Redrawn, monkeypatch)) > 10.0


def test_increments_add_up():
    """Whatever is refused: the parts of an increment add up to it, and level after level the stack comes to its end."""
    x = torch.zeros(64, 2, 3, dtype=torch.float64)
    noise = Remembered(as_draw([100 + i for i in range(64)], x), x)
    generator = torch.Generator().manual_seed(1)
    u = torch.ones(64, dtype=torch.float64)
    first = noise.aim(u, torch.full_like(u, 0.5))
    whole = noise.over(u, first)
    noise.settle(torch.zeros(64, dtype=torch.bool))
    total, depth = torch.zeros_like(x), 0
    for _ in range(2000):
        wish = torch.rand(64, generator=generator, dtype=torch.float64) * 0.3 + 1e-3
        s = noise.aim(u, torch.maximum(u - wish, first))
        z = noise.over(u, torch.where(u > first, s, u - 0.1))  # rows that are through go on with new ones
        accept = torch.rand(64, generator=generator) < 0.6
        noise.settle(accept)
        take = (accept & (u > first)).reshape(-1, 1, 1)
        total = torch.where(take, total + (u - s).clamp(min=0.0).sqrt().reshape(-1, 1, 1) * z, total)
        u = torch.where(accept & (u > first), s, u)
        depth = max(depth, len(noise.z))
        if bool((u == first).all()):
            break
    assert bool((u == first).all()) and depth <= 12  # each level is half of the one below: 0.5 / 2^12 < 1e-3
    torch.testing.assert_close(total, math.sqrt(0.5) * whole, rtol=0, atol=1e-12)


def test_equal_parts():
    """A step ends where the remembered increment ends, or divides it into equal parts not longer than asked for."""
    x = torch.zeros(3, dtype=torch.float64)
    noise = Remembered(as_draw(0, x), x)
    u = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    noise.over(u, u - 0.4)
    noise.settle(torch.tensor([False, False, False]))
    got = noise.aim(u, u - torch.tensor([0.3, 0.4, 0.9], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([0.8, 0.6, 0.6], dtype=torch.float64))


def test_bridge_by_hand():
    """z over 0.4, refused; half of it with fresh z': (z + z') / sqrt 2, and then (z - z') / sqrt 2."""
    x = torch.zeros(1, 2, dtype=torch.float64)
    z, fresh, unused = (torch.tensor([v], dtype=torch.float64) for v in ([0.3, -1.0], [1.1, 0.2], [9.0, 9.0]))
    noise = Remembered(Recorded([z, fresh, unused]).bind(x), x)
    u = torch.tensor([1.0], dtype=torch.float64)
    assert torch.equal(noise.over(u, u - 0.4), z)
    noise.settle(torch.tensor([False]))
    s = noise.aim(u, u - 0.25)
    torch.testing.assert_close(noise.over(u, s), (z + fresh) / math.sqrt(2))
    noise.settle(torch.tensor([True]))
    torch.testing.assert_close(noise.over(s, noise.aim(s, s - 0.3)), (z - fresh) / math.sqrt(2))


# --- the path -------------------------------------------------------------------------------------------------------


def test_pathwise_convergence_on_a_shared_path():
    """Given a BrownianPath, the end tends to that of 1000 steps of another method on the same path, like tol^(2/3).

    A step's error goes like h^(3/2) and theirs add up like h: tol^(2/3). The reference is good to 0.005, which is what
    it and Euler-Maruyama differ by at most.
    """
    sde, data = make_sde("vp"), mixture()
    knots = lambda_knots(sde, 1000)
    x = torch.linspace(-2.0, 2.0, 100, dtype=torch.float64)
    rev, ends = data.reverse(sde), [knots[0], knots[-1]]
    want, other = (solve(rev, x, s, grid=knots, rng=BrownianPath(7)).x for s in (DPMppSDE(), EulerMaruyama()))
    assert float((other - want).square().mean().sqrt()) < 0.005
    errors = []
    for tol in (0.1, 0.01, 1e-3):
        out = solve(rev, x, GottaGoFast(rtol=tol, atol=tol), grid=ends, rng=BrownianPath(7), strict=True)
        errors.append(float((out.x - want).square().mean().sqrt()))
    assert errors[2] < 0.02 and math.log10(errors[0] / errors[2]) / 2 > 2 / 3 - 0.1, errors


def test_independent_runs_are_not_pathwise_close():
    """What the test above would see without the path: another seed is another sample."""
    sde, data = make_sde("vp"), mixture()
    ends = lambda_knots(sde, 1)
    x = torch.linspace(-2.0, 2.0, 400, dtype=torch.float64)
    one, two = (solve(data.reverse(sde), x, GottaGoFast(), grid=ends, rng=BrownianPath(k)).x for k in (7, 8))
    assert float((one - two).square().mean().sqrt()) > 0.3


# --- the run --------------------------------------------------------------------------------------------------------


def test_calls():
    """Two per accepted step, one per refused one: the drift at the start of a step is kept."""
    sde, x = exact_start("vp", 50)
    spy = Spy(gaussian((1,)).reverse(sde))
    out = solve(spy, x, GottaGoFast(rtol=0.05, atol=0.05), rng=3)
    assert torch.equal(out.nfe, 2 * out.stats["accepted"] + out.stats["rejected"])
    assert sum(rows for _, rows in spy.log) == int(out.nfe.sum())


def test_knots_of_a_grid_are_hit():
    """States at the knots have the exact law there; keeping a trajectory changes nothing; no step passes a knot."""
    sde, x = exact_start("vp", 5000)
    times = [sde.t_max, 0.5, 0.2, 0.05]
    rev = gaussian((1,)).reverse(sde)
    spy = Spy(rev)
    out = solve(spy, x, GottaGoFast(rtol=0.02, atol=0.02), grid=times, rng=3, trajectory=True)
    plain = solve(rev, x, GottaGoFast(rtol=0.02, atol=0.02), grid=times, rng=3)
    assert torch.equal(out.x, plain.x) and torch.equal(out.nfe, plain.nfe)
    assert set(times) <= set(spy.times)
    for state, t in zip(out.trajectory, times, strict=True):
        mean, variance = mp_free_moments(gaussian(), sde.knot(t))
        assert abs(float(state.mean()) - mean) < 4.5 * math.sqrt(variance / 5000) + 0.02
        assert abs(float(state.var()) / variance - 1) < 4.5 * math.sqrt(2 / 5000) + 0.02


def test_a_sample_keeps_its_path_in_any_batch():
    """One seed per sample, many refusals: bitwise the same alone, in any order, in any batch; with a path too."""
    sde, data = make_sde("vp"), mixture((3,))
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seeds = [40 + i for i in range(12)]
    solver = GottaGoFast(rtol=0.02, atol=0.02)
    for wrap in (list, BrownianPath):
        whole = solve(data.reverse(sde), x, solver, rng=wrap(seeds), grid=[0.9, 0.1])
        assert len(set(whole.nfe.tolist())) > 1 and int(whole.stats["rejected"].min()) > 0
        for rows in ([5], [11, 0, 3]):
            part = solve(data.reverse(sde), x[rows], solver, rng=wrap([seeds[i] for i in rows]), grid=[0.9, 0.1])
            assert torch.equal(part.x, whole.x[rows]) and torch.equal(part.nfe, whole.nfe[rows])


def test_start_without_data():
    """The flow at alpha = 0 exactly: the state there is forgotten, and the law of the data comes out all the same."""
    sde, n, tol = make_sde("flow"), 5000, 0.02
    x = torch.zeros(n, 1, dtype=torch.float64)  # an unlikely draw, of which nothing must be left
    out = solve(
        gaussian((1,)).reverse(sde), x, GottaGoFast(rtol=tol, atol=tol), grid=[1.0, sde.t_min], rng=3, strict=True
    )
    mean, variance = mp_free_moments(gaussian(), sde.knot(sde.t_min))
    assert abs(float(out.x.mean()) - mean) < 4.5 * math.sqrt(variance / n) + tol
    assert abs(float(out.x.var()) / variance - 1) < 4.5 * math.sqrt(2 / n) + tol


def test_giving_up_and_the_device(device):
    """Statuses, float32 on the device of the state; a model that is not finite stops its sample only."""
    sde, data = make_sde("vp"), mixture((2,))
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).to(device)
    rev = data.reverse(sde)
    out = solve(rev, x, GottaGoFast(rtol=0.1, atol=0.05), rng=[1, 2, 3, 4, 5, 6], strict=True, end="denoise")
    assert out.x.dtype == torch.float32 and out.x.device.type == device.type and bool(torch.isfinite(out.x).all())
    with pytest.raises(SolverError, match="MAX_STEPS"):
        solve(rev, x, GottaGoFast(max_steps=2), rng=0, strict=True)
    x[1, 0] = math.nan
    with pytest.warns(RuntimeWarning, match="sample 1"):
        out = solve(rev, x, GottaGoFast(rtol=0.1, atol=0.05), rng=0)
    assert out.status.tolist() == [0, int(Status.NON_FINITE), 0, 0, 0, 0]


def test_bad_options():
    """Refused at construction; upward runs and chains refused in words."""
    for make in (lambda: GottaGoFast(rtol=0.0), lambda: GottaGoFast(exponent=0.0), lambda: GottaGoFast(max_steps=0)):
        with pytest.raises(ValueError, match=r"rtol|exponent|max_steps"):
            make()
    sde = make_sde("vp")
    with pytest.raises(ValueError, match="deterministic"):
        solve(mixture().reverse(sde), torch.zeros(2), GottaGoFast(), grid=[0.2, 0.8])
    chain = sde.discretize(50)
    with pytest.raises(ValueError, match="chain"):
        solve(mixture().reverse(chain), torch.zeros(2), GottaGoFast())
