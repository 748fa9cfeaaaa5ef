"""Predictors with correctors: every combination on every SDE, both orders, and what Langevin dynamics leaves behind."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import SDE_NAMES, Spy, gaussian, lambda_knots, make_sde, mixture, mp_free_moments, quantiles

from sde_lib import VPSDE, GaussianMixture
from solvers import (
    CORRECTORS,
    DDIM,
    SOLVERS,
    AdaptiveRungeKutta,
    AnnealedLangevin,
    Heun,
    Langevin,
    PredictorCorrector,
    Recorded,
    Solver,
    as_draw,
    sample,
    solve,
)
from solvers.predictors import PREDICTORS

every_sde = pytest.mark.parametrize("name", SDE_NAMES)
PAIRS = [p for p in itertools.product([*PREDICTORS, None], [*CORRECTORS, None]) if p != (None, None)]


def test_every_solver_with_a_fixed_step_of_its_own_predicts():
    own = {name: cls for name, cls in SOLVERS.items() if not cls.adaptive and cls.step is not Solver.step}
    assert own == {**PREDICTORS, "predictor_corrector": PredictorCorrector}


@every_sde
@pytest.mark.parametrize("first", [False, True], ids=["predictor first", "corrector first"])
@pytest.mark.parametrize(("predictor", "corrector"), PAIRS)
def test_every_combination_on_every_sde(predictor, corrector, first, name):
    """Finite, with the declared calls, from the prior to the posterior mean; on a chain too, if no drift is needed."""
    sde = make_sde(name)
    solver = PredictorCorrector(predictor, corrector, corrector_first=first)
    spy = Spy(mixture((2,)).reverse(sde))
    out = sample(spy, (3, 2), solver, steps=8, grid="karras", rng=0, dtype=torch.float64, strict=True)
    assert len(spy.log) == solver.nfe(8, "denoise") == int(out.nfe[0]) and torch.isfinite(out.x).all()
    if not solver.needs_drift:
        chain = mixture((2,)).reverse(sde.discretize(40))
        try:
            out = sample(chain, (3, 2), solver, steps=8, rng=0, dtype=torch.float64, strict=True)
        except ValueError as error:  # a method with stages between the knots
            assert "no times between its levels" in str(error) and PREDICTORS[predictor]().nfe_per_step > 2
        else:
            assert torch.isfinite(out.x).all()


def test_order_of_calls():
    """Predictor first: predict at t, correct at s (Song et al. 2021, Algorithm 1); corrector first: both at t."""
    sde = make_sde("vp")
    a, b, c = lambda_knots(sde, 2)
    x = quantiles(mixture(), a, 3)
    corrector = AnnealedLangevin(steps=2)
    for first, want in ((False, [a, b, b, b, c, c]), (True, [a, a, a, b, b, b])):
        spy = Spy(mixture().reverse(sde))
        solve(spy, x, PredictorCorrector("ddim", corrector, corrector_first=first), grid=[a, b, c], rng=0)
        assert [k for k, _ in spy.log] == want


def langevin_inputs(shape: tuple[int, ...] = (2, 3)) -> tuple:
    sde = make_sde("vp")
    t, s = lambda_knots(sde, 5)[2:4]
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(4, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return mixture(shape).reverse(sde), x, z, t, s


def test_published_langevin_step():
    """norm="batch": x + e score + sqrt(2e) z with e = 2 a (r mean|z| / mean|score|)^2, as score_sde averages norms."""
    rev, x, z, t, s = langevin_inputs()
    got = solve(rev, x, PredictorCorrector(None, Langevin(0.2, norm="batch")), grid=[t, s], rng=Recorded([z])).x
    score = rev(x, s).score
    z_norm, score_norm = (v.flatten(1).norm(dim=1).mean() for v in (z, score))
    e = 2.0 * (t.alpha / s.alpha) ** 2 * (0.2 * z_norm / score_norm) ** 2
    torch.testing.assert_close(got, x + e * score + (2.0 * e).sqrt() * z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3), (500,)], ids=str)
def test_langevin_step_per_sample(shape):
    """norm="sample": x + e score + sqrt(2e) z with one e per row, at most the published size of a batch of one.

    e and the move are read off from the noise z and its mirror image: their mean is e score, half their difference
    sqrt(2e) z. In many dimensions, where |z|^2 = d up to sqrt(2 / d), e is the published size.
    """
    rev, x, z, t, s = langevin_inputs(shape)
    solver = PredictorCorrector(None, Langevin(snr=0.2))
    plus, minus = (solve(rev, x, solver, grid=[t, s], rng=Recorded([sign * z])).x - x for sign in (1.0, -1.0))
    score = rev(x, s).score
    dims = tuple(range(1, x.ndim))
    e = ((plus + minus) / 2 * score).sum(dims, keepdim=True) / score.square().sum(dims, keepdim=True)
    torch.testing.assert_close((plus + minus) / 2, e * score, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close((plus - minus) / 2, (2.0 * e).sqrt() * z, rtol=1e-9, atol=1e-11)
    z2 = z.square().sum(dims, keepdim=True).clamp(min=math.prod(shape))
    published = 2.0 * (t.alpha / s.alpha) ** 2 * 0.2**2 * z2 / score.square().sum(dims, keepdim=True)
    assert bool((e > 0).all()) and bool((e <= published * (1 + 1e-9)).all())
    if math.prod(shape) > 100:
        assert bool((e >= published * (1.0 - 5.0 * math.sqrt(2.0 / math.prod(shape)))).all())


def test_the_published_rule_couples_the_batch_and_says_so():
    """norm="batch" is flagged, and does depend on mates; the default is not and does not (tested bitwise elsewhere)."""
    coupled = PredictorCorrector(corrector=Langevin(norm="batch"))
    assert coupled.batch_coupled
    assert not PredictorCorrector().batch_coupled and not PredictorCorrector(corrector="langevin").batch_coupled
    sde = make_sde("vp")
    knots = lambda_knots(sde, 3)
    x = quantiles(mixture(), knots[0], 4)[:, None].expand(4, 2).contiguous()
    rev = mixture((2,)).reverse(sde)
    whole = solve(rev, x, coupled, grid=knots, rng=[1, 2, 3, 4]).x
    assert not torch.allclose(solve(rev, x[:1], coupled, grid=knots, rng=[1]).x, whole[:1])


def test_shrink_is_one_minus_beta_on_the_ddpm_chain():
    """a = (alpha_t / alpha_s)^2 of the step is the published 1 - beta_i between neighbouring levels, and 1 on VE."""
    for law, want in ((VPSDE().discretize(50), None), (make_sde("ve").discretize(50), 1.0)):
        seen = []

        class Probe(Langevin):
            def size(self, score, z, at, shrink, seen=seen):
                seen.append(shrink)
                return super().size(score, z, at, shrink)

        solve(mixture().reverse(law), torch.ones(2).double(), PredictorCorrector("ddim", Probe()), rng=0)
        betas = law.betas.flip(0)[: len(seen)]
        expected = 1.0 - betas if want is None else torch.ones_like(betas)
        torch.testing.assert_close(torch.tensor(seen, dtype=torch.float64), expected, rtol=1e-11, atol=0)


@every_sde
def test_langevin_settles_where_its_step_size_says(name):
    """On N(m, v I) in many dimensions the stationary variance V solves V = v / (1 - e / 2v), e = 2 a r^2 v^2 / V.

    The score's squared norm is d V / v^2 there and the noise's is d. Seen in one image of d = 40 000 independent
    elements after enough moves to forget the start; the standard error of a variance is V sqrt(2 / d).
    """
    sde, d, snr = make_sde(name), 40_000, 0.3
    t, s = lambda_knots(sde, 6)[2:4]
    m, v = mp_free_moments(gaussian(), s)
    a = (t.alpha / s.alpha) ** 2
    # V (1 - e / 2v) = v with e = 2 a snr^2 v^2 / V gives V = v + a snr^2 v
    variance = v * (1.0 + a * snr**2)
    e = 2.0 * a * snr**2 * v * v / variance
    moves = math.ceil(math.log(1e4) / -math.log(abs(1.0 - e / v)))
    z = torch.randn(1, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = m + 1.3 * math.sqrt(v) * z
    solver = PredictorCorrector(None, Langevin(snr=snr, steps=moves))
    out = solve(gaussian((d,)).reverse(sde), x, solver, grid=[t, s], rng=0).x
    assert abs(float(out.mean()) - m) < 5.0 * math.sqrt(variance / d)
    # |z|^2 fluctuates by sqrt(2 / d) from move to move as well
    assert abs(float((out - m).square().mean()) / variance - 1.0) < 10.0 * math.sqrt(2.0 / d)


@pytest.mark.parametrize("d", [2, 16, 64])
@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_langevin_bias_of_the_step_rule(norm, d):
    """As r -> 0 a corrector should leave p_t alone. Exact start, 250 moves of r = 0.1 on 2000 Gaussian samples.

    Norms averaged over the batch give one step size for all, whose bias is that of Langevin dynamics, e / 2v = a r^2.
    A size c(x) = 1 / |score|^2 that depends on the state makes p_t / c its stationary law: variance v (1 + 2 / d). That
    is the price of samples that do not see each other; a size that also follows |z|^2 would double it.
    """
    sde, n, r = make_sde("vp"), 2000, 0.1
    t, s = lambda_knots(sde, 8)[3:5]
    m, v = mp_free_moments(gaussian(), s)
    x = m + math.sqrt(v) * torch.randn(n, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    solver = PredictorCorrector(None, Langevin(snr=r, steps=250, norm=norm))
    out = solve(gaussian((d,)).reverse(sde), x, solver, grid=[t, s], rng=0).x
    ratio = float((out - m).square().mean()) / v
    error = 5.0 * math.sqrt(2.0 / (n * d))
    assert 1.0 - error < ratio < 1.0 + 1.1 * r**2 + (2.0 / d if norm == "sample" else 0.0) + error
    # no heavy tail either: the largest of n d Gaussian numbers
    assert float((out - m).abs().max()) < 1.5 * math.sqrt(v * (1.0 + 2.0 / d)) * math.sqrt(2.0 * math.log(n * d))


@pytest.mark.parametrize("first", [False, True], ids=["predictor first", "corrector first"])
@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("corrector", CORRECTORS)
def test_pairs_in_many_dimensions(name, first, corrector):
    """4000 samples of a mixture in R^16 whose components lie along one direction: the law of the projection onto it.

    Empirical distribution function within its 1e-9 band (Dvoretzky-Kiefer-Wolfowitz) plus 0.02 for 100 first-order
    steps and a variance that Langevin's step size may inflate by 2 / d. Components of equal spread: a 10 % error of
    |x|^2, which these steps leave, would move samples between components that only their spread tells apart.
    """
    n, d = 4000, 16
    sde, direction = make_sde(name), torch.full((d,), d**-0.5, dtype=torch.float64)
    centres, std, weights = torch.tensor([-1.5, 0.5, 2.0]), 0.5, torch.tensor([0.3, 0.5, 0.2])
    data = GaussianMixture(centres[:, None] * direction, std=std, weights=weights)
    solver = PredictorCorrector(corrector=corrector, corrector_first=first)
    x = sample(data.reverse(sde), (n, d), solver, steps=100, grid="karras", rng=5, dtype=torch.float64, strict=True).x
    ordered = (x @ direction).sort().values
    exact = (weights * torch.special.ndtr((ordered[:, None] - centres) / std)).sum(1)
    empirical = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert float((exact - empirical).abs().max()) < math.sqrt(math.log(2e9) / (2 * n)) + 0.02


@pytest.mark.parametrize("d", [1, 2, 8])
@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_langevin_in_few_dimensions(name, d):
    """Langevin's per-sample step in low dimensions: spread within the inflation it is known for, sqrt(1 + 2/d)."""
    data = mixture((d,))
    solver = PredictorCorrector(corrector="langevin")
    x = sample(data.reverse(make_sde(name)), (5000, d), solver, steps=100, grid="karras", rng=5).x
    true = torch.sqrt(data.covariance.diagonal().mean() + (data.mean - data.mean.mean()).square().mean())
    assert float(x.std()) < math.sqrt(1.0 + 2.0 / d) * float(true)


def test_langevin_at_a_mode():
    """A row whose score is exactly zero stays finite: the ratio |z| / |score| must not become inf or NaN."""
    sde = make_sde("flow")
    x = torch.zeros(2, 3, dtype=torch.float64)
    rev = sde.reverse(score=lambda x, t: -x)
    for knots in ([sde.knot(0.8), sde.knot(0.6)], [sde.knot(0.6), sde.knot(0.4)]):
        for first in (False, True):
            solver = PredictorCorrector("ddim", "langevin", corrector_first=first)
            assert torch.isfinite(solve(rev, x, solver, grid=knots, rng=0).x).all()


def test_corrector_only_ends_clean():
    """No predictor: the state is carried over; end="denoise" is the posterior mean (published: the noisy state)."""
    sde, data = make_sde("ve"), mixture()
    knots = lambda_knots(sde, 4)
    x = quantiles(data, knots[0], 5)
    solver = PredictorCorrector(None, AnnealedLangevin(steps=2))
    stop = solve(data.reverse(sde), x, solver, grid=knots, rng=0)
    clean = solve(data.reverse(sde), x, solver, grid=knots, rng=0, end="denoise")
    torch.testing.assert_close(clean.x, data.reverse(sde)(stop.x, knots[-1]).data)
    assert solver.nfe(4, "denoise") == 9 == int(clean.nfe[0])


def test_correction_improves_a_coarse_predictor():
    """Ten Euler-Maruyama steps of VP leave a variance error; annealed Langevin moves reduce it (exact, by impulses)."""
    from oracles import gaussian_weak_error

    sde = make_sde("vp")
    knots = lambda_knots(sde, 10)
    alone = abs(gaussian_weak_error(sde, gaussian(), PredictorCorrector("euler_maruyama", None), knots)[1])
    moves = AnnealedLangevin(snr=0.3, steps=20)
    pair = abs(gaussian_weak_error(sde, gaussian(), PredictorCorrector("euler_maruyama", moves), knots)[1])
    assert pair < 0.5 * alone


@pytest.mark.parametrize("first", [False, True])
def test_a_churned_predictor_churns(first):
    """Any fixed-step solver predicts, Heun with churn too: alone in a pair it is itself."""
    sde, data = make_sde("vp"), mixture()
    knots = lambda_knots(sde, 5)
    x = quantiles(data, knots[0], 5)
    alone = solve(data.reverse(sde), x, Heun(s_churn=2.0), grid=knots, rng=3).x
    paired = solve(data.reverse(sde), x, PredictorCorrector(Heun(s_churn=2.0), None, first), grid=knots, rng=3).x
    torch.testing.assert_close(paired, alone, rtol=1e-13, atol=1e-13)


def test_predictors_without_a_corrector_are_themselves():
    """A pair without corrector has the order, calls and result of its predictor."""
    sde, data = make_sde("vp"), mixture()
    knots = lambda_knots(sde, 5)
    x = quantiles(data, knots[0], 5)
    for name, cls in PREDICTORS.items():
        pair = PredictorCorrector(name, None)
        assert (pair.order, pair.stochastic, pair.needs_drift) == (cls().order, cls().stochastic, cls().needs_drift)
        assert torch.equal(
            solve(data.reverse(sde), x, pair, grid=knots, rng=1).x,
            solve(data.reverse(sde), x, cls(), grid=knots, rng=1).x,
        )
    assert PredictorCorrector("ddim", "langevin").order == 0


def test_corrector_noise_is_its_own():
    """Per-sample seeds: two moves at one knot, the step into it and the same move at another knot share no noise."""
    sde = make_sde("vp")
    a, b, c = lambda_knots(sde, 2)
    draw = as_draw([1], torch.zeros(1, 4096, dtype=torch.float64))
    rows = [draw(a, b), draw(b, c)]
    rows += [draw.normal("corrector", k.half_log_snr, i) for k in (b, c) for i in range(2)]
    correlations = torch.corrcoef(torch.cat(rows)) - torch.eye(len(rows), dtype=torch.float64)
    assert float(correlations.abs().max()) < 5.0 / math.sqrt(4096)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, "0.16"])
def test_bad_snr(bad):
    """snr must be a finite number > 0."""
    for cls in CORRECTORS.values():
        with pytest.raises(ValueError, match="snr"):
            cls(snr=bad)


def test_bad_pairs():
    """Moves, norms, and predictors that are not fixed-step solvers."""
    for steps in (0, -1, 1.5):
        with pytest.raises(ValueError, match="steps"):
            Langevin(steps=steps)
    with pytest.raises(ValueError, match="norm"):
        Langevin(norm="row")
    for predictor in (AdaptiveRungeKutta(), DDIM, 3):
        with pytest.raises(TypeError, match="predictor"):
            PredictorCorrector(predictor=predictor)
    for corrector in (Langevin, 3, DDIM()):
        with pytest.raises(TypeError, match="corrector"):
            PredictorCorrector(corrector=corrector)
