"""Noise as a value: what each source promises, and the statistics of the counter-based one."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from oracles import make_sde
from scipy import stats
from torch import Tensor

from sde_lib import EDMSDE, GaussianMixture, Knot, transition
from solvers import (
    DDIM,
    BrownianPath,
    Independent,
    PerSample,
    Recorded,
    Solver,
    Step,
    as_draw,
    make_knots,
    solve,
)

SDE = make_sde("vp")
T, U, S = SDE.knot(0.8), SDE.knot(0.5), SDE.knot(0.2)


def bound(level: float, tests: int) -> float:
    """The normal quantile that `tests` independent standard normals all stay within, but for a chance of `level`."""
    return NormalDist().inv_cdf(1.0 - level / (2.0 * tests))


def standardized_correlations(rows: Tensor) -> Tensor:
    """sqrt(n) times the correlation of every pair of rows (m, n): standard normal under independence."""
    z = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
    matrix = z @ z.T / rows.shape[1] * math.sqrt(rows.shape[1])
    m = len(rows)
    return matrix[torch.triu(torch.ones(m, m, dtype=torch.bool), 1)]


# --- the counter-based normals --------------------------------------------------------------------------------------


def test_per_sample_normals_are_normal():
    """Kolmogorov-Smirnov and the first four moments over 2^18 numbers of neighbouring seeds, fixed for good."""
    x = torch.zeros(64, 4096, dtype=torch.float64)
    z = PerSample(list(range(64))).bind(x)(T, S).flatten()
    n = len(z)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    # standard errors of the sample moments of a standard normal: 1, 2, 15, 96 over n
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((z**power).mean()) - mean) < 5.0 * math.sqrt(variance / n)
    # the tail: numbers beyond 4 are 6.3e-5 of them, a Poisson count
    expected = n * 2.0 * NormalDist().cdf(-4.0)
    assert abs(int((z.abs() > 4).sum()) - expected) < 5.0 * math.sqrt(expected)


def test_each_sample_and_each_draw_is_normal():
    """Kolmogorov-Smirnov per seed and per interval; the p-values are themselves uniform."""
    x = torch.zeros(40, 2000, dtype=torch.float64)
    knots = [SDE.knot(t) for t in (0.9, 0.7, 0.5, 0.3, 0.1)]
    draw = PerSample(list(range(1000, 1040))).bind(x)
    values = torch.stack([draw(t, s) for t, s in itertools.pairwise(knots)])
    p = [stats.kstest(values[i, j].numpy(), "norm").pvalue for i in range(4) for j in range(40)]
    assert min(p) > 1e-3 / len(p)
    assert stats.kstest(p, "uniform").pvalue > 1e-4


@pytest.mark.parametrize(
    "seeds",
    [list(range(48)), [2**k for k in range(48)], [-k for k in range(1, 49)], [17 + 2**32 * k for k in range(48)]],
    ids=["neighbours", "one bit", "negative", "high words"],
)  # fmt: skip
def test_samples_are_independent(seeds):
    """Correlations between any two seeds of structured families, and of their squares, are those of chance."""
    x = torch.zeros(len(seeds), 4096, dtype=torch.float64)
    z = PerSample(seeds).bind(x)(T, S)
    for rows in (z, z.square()):
        pairs = standardized_correlations(rows)
        assert float(pairs.abs().max()) < bound(1e-4, len(pairs))
        # the covariance as a whole: a sum of squares of nearly independent standard normals
        assert abs(float(pairs.square().sum()) - len(pairs)) < 5.0 * math.sqrt(2.0 * len(pairs))


def test_draws_are_independent():
    """Different intervals, the reversed interval, intervals a rounding apart, and named keys share nothing."""
    x = torch.zeros(1, 8192, dtype=torch.float64)
    draw = PerSample([3]).bind(x)
    near = SDE.knot(math.nextafter(0.5, 1.0))
    rows = [draw(T, S), draw(S, T), draw(T, U), draw(U, S), draw(near, S), draw(T, near)]
    rows += [draw.normal("prior"), draw.normal("churn", 1.0), draw.normal("churn", math.nextafter(1.0, 2.0))]
    rows += [draw.normal("corrector", U.half_log_snr, i) for i in range(6)]
    rows += [PerSample([4]).bind(x)(T, S)]
    pairs = standardized_correlations(torch.cat(rows))
    assert float(pairs.abs().max()) < bound(1e-4, len(pairs))


def test_long_keys_are_read_to_their_end():
    """Two names that agree in their first eight letters are two noises."""
    draw = PerSample([3]).bind(torch.zeros(1, 16))
    assert not torch.equal(draw.normal("projection_a"), draw.normal("projection_b"))


def test_elements_are_independent():
    """Across 20 000 seeds, any two elements of a sample are uncorrelated: Box-Muller pairs and neighbours included."""
    x = torch.zeros(20_000, 2, 3, 4, dtype=torch.float64)
    z = PerSample(list(range(20_000))).bind(x)(T, S).reshape(20_000, 24)
    for rows in (z.T, z.T.square()):
        pairs = standardized_correlations(rows.contiguous())
        assert float(pairs.abs().max()) < bound(1e-4, len(pairs))
    p = [stats.kstest(z[:, j].numpy(), "norm").pvalue for j in range(24)]
    assert min(p) > 1e-3 / 24


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_sample_is_a_function_of_its_seed(shape, dtype):
    """Bitwise: whatever the batch and the order, at odd numbers of elements too; an interval again is fresh noise."""
    seeds = [5, 5, 9, 2**70, -3]
    x = torch.zeros(5, *shape, dtype=dtype)
    draw = PerSample(seeds).bind(x)
    calls = (lambda d: d(T, S), lambda d: d.normal("prior"), lambda d: d.normal("k", 3, 0.5), lambda d: d.uniform("k"))
    for call in calls:
        whole = call(draw)
        assert whole.shape == x.shape and whole.dtype == dtype and torch.isfinite(whole).all()
        again, replay = call(draw), draw.restart()
        assert torch.equal(again, whole) == (call is not calls[0])
        assert torch.equal(call(replay), whole) and torch.equal(call(replay), again)
        assert torch.equal(whole[0], whole[1]) and not torch.equal(whole[0], whole[2])
        for i in (4, 2):
            alone = PerSample([seeds[i]]).bind(x[:1])
            assert torch.equal(call(alone)[0], whole[i]) and torch.equal(call(alone)[0], again[i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_noise_of_half_precision_stays_below_one(dtype):
    """A float32 uniform is rounded up to 1 with chance 2^-12 in float16, 2^-9 in bfloat16: some of 100 000 would be.

    The mean lacks half a unit of the last place, 2^-12 or 2^-9; its own standard deviation is 0.29 / sqrt(100 000).
    """
    u = PerSample([1, 2]).bind(torch.zeros(2, 50_000, dtype=dtype)).uniform("u")
    unit = torch.finfo(dtype).eps / 2
    assert u.dtype == dtype and float(u.max()) == 1.0 - unit and float(u.min()) == 0.0
    assert abs(float(u.double().mean()) - 0.5 + unit / 2) < 5 * 12**-0.5 / 100_000**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uniform_noise(dtype):
    """On [0, 1), uniform, uncorrelated with the normals of the same key; the same below any batch."""
    draw = PerSample([1, 2]).bind(torch.zeros(2, 50_001, dtype=dtype))
    u, z = draw.uniform("u", 3), PerSample([1, 2]).bind(torch.zeros(2, 50_001, dtype=dtype)).normal("u", 3)
    assert u.dtype == dtype and 0.0 <= float(u.min()) and float(u.max()) < 1.0
    assert stats.kstest(u[0].numpy(), "uniform").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([u[0], u[1]]))[0, 1])) < 4 / 50_001**0.5
    tokens = PerSample([1, 2]).bind(torch.zeros(2, 5, dtype=torch.int64)).uniform("u", 3)
    assert tokens.dtype == torch.float32 and float(tokens.max()) < 1.0
    assert z.shape == u.shape


def test_forks_are_other_noise():
    """A fork is named by its key: the same key the same noise, another key, or the order of two, another one."""
    x = torch.zeros(2, 1000, dtype=torch.float64)
    for noise in (PerSample([3, 4]), BrownianPath([3, 4])):
        draw = noise.bind(x)
        base = draw(T, S)
        one, other = draw.fork("again", 1), draw.fork("x")
        forks = [one, draw.fork("again", 2), one.fork("x"), other.fork("again", 1)]
        values = [base, *(fork(T, S) for fork in forks)]
        assert torch.equal(draw.fork("again", 1)(T, S), values[1])
        for i, a in enumerate(values):
            for b in values[:i]:
                assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 5 / 2000**0.5


class Resampled(Solver):
    """RePaint's move with nothing known: every step is taken, undone by the forward process, and taken again."""

    passes = 4

    def __init__(self, fork: bool) -> None:
        object.__setattr__(self, "fork", fork)

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, rev, x, t, s, past, draw):
        for k in range(self.passes):
            noise = draw.fork("again", k) if self.fork else draw
            if k:
                kernel = transition(s, t)
                x = kernel.scale * x + kernel.std * draw.normal("back", t.half_log_snr, k)
            x = DDIM(eta=1.0).step(rev, x, t, s, (), noise).x
        return Step(x)


def resampled_variance(std, v, knots):
    """Of N(0, v) under the same steps with independent noise, in closed form: every move is affine in the state."""
    for t, s in itertools.pairwise(knots):
        kernel, gain = transition(s, t), t.alpha * std**2 / (t.alpha**2 * std**2 + t.sigma**2)
        data, noise, fresh = DDIM(eta=1.0).coefficients(t, s)
        slope = data * gain + noise * (1.0 - t.alpha * gain) / t.sigma
        for k in range(Resampled.passes):
            if k:
                v = kernel.scale**2 * v + kernel.std**2
            v = slope**2 * v + fresh**2
    return v


@pytest.mark.parametrize("rng", ["one seed", "a seed per sample", "one path per sample"])
def test_a_solver_may_repeat_its_steps(rng):
    """Passes over one interval add variances if each draws noise of its own, and amplitudes if they share it."""
    n, std = 20_000, 0.5
    rev = GaussianMixture([0.0], std=std).reverse(SDE)
    noise = {"one seed": 0, "a seed per sample": list(range(n)), "one path per sample": BrownianPath(0)}[rng]
    x = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    knots = make_knots(SDE, "uniform_half_log_snr", 15)
    found = solve(rev, x, Resampled(rng == "one path per sample"), grid=knots, rng=noise).x.var()
    assert float(found) == pytest.approx(resampled_variance(std, float(x.var()), knots), rel=4 * (2 / n) ** 0.5)


def test_float32_is_the_rounded_float64():
    """One stream of bits for every dtype: equal up to the rounding of a uniform to 24 bits.

    The radius sqrt(-2 log u) moves by du / (u radius): 3e-8 of it in the bulk, up to about sqrt(2 * 1.2e-7) where it
    vanishes, and more in the tail, where u itself is a few steps of 2^-25.
    """
    x = torch.zeros(50, 4000)
    single, double = (PerSample(list(range(50))).bind(x.to(d))(T, S).double() for d in (torch.float32, torch.float64))
    gap = (single - double).abs()
    assert float(gap.max()) < 0.5 and float(gap[double.abs() < 3].max()) < 1e-3 and float(gap.median()) < 2e-7


def test_per_sample_knots_give_the_row_noise():
    """Knots of (B, 1) times: row i draws what a float knot of its time draws."""
    at = torch.tensor([0.9, 0.6], dtype=torch.float64)
    to = torch.tensor([0.5, 0.1], dtype=torch.float64)
    x = torch.zeros(2, 6, dtype=torch.float64)
    rows = PerSample([4, 7]).bind(x)(SDE.knot(at, ndim=2), SDE.knot(to, ndim=2))
    for i, seed in enumerate((4, 7)):
        knots = SDE.knot(at, ndim=2).select(torch.tensor([i])), SDE.knot(to, ndim=2).select(torch.tensor([i]))
        assert torch.equal(PerSample([seed]).bind(x[:1])(*knots)[0], rows[i])


# --- the Brownian path ----------------------------------------------------------------------------------------------
LAMBDAS = [-4.6, -3.0, -2.5, -2.4, -1.0, 0.0, 0.013, 0.5, 1.7, 2.0, 4.0]


def at(lam: float) -> Knot:
    return SDE.knot_at(lam)


def path(seeds, n: int, dtype=torch.float64):
    count = len(seeds) if isinstance(seeds, list) else 1
    return as_draw(BrownianPath(seeds), torch.zeros(count, n, dtype=dtype))


def test_path_increments_are_normal_and_independent():
    """Unit increments between dyadic and other places: Kolmogorov-Smirnov each, covariance matrix the identity."""
    seeds = list(range(32))
    draw = path(seeds, 512)
    rows = torch.stack([draw(at(a), at(b)).flatten() for a, b in itertools.pairwise(LAMBDAS)])
    p = [stats.kstest(row.numpy(), "norm").pvalue for row in rows]
    assert min(p) > 1e-3 / len(p)
    pairs = standardized_correlations(rows)
    assert float(pairs.abs().max()) < bound(1e-3, len(pairs))
    pairs = standardized_correlations(draw(at(-1.0), at(1.0)))  # across samples of neighbouring seeds
    assert float(pairs.abs().max()) < bound(1e-3, len(pairs))
    n = rows.shape[1]
    assert float((rows.square().mean(1) - 1).abs().max()) < 5 * math.sqrt(2 / n)


def test_path_covariance():
    """Over many seeds: Cov(W(a), W(b)) is the smaller clock, for overlapping intervals from one start."""
    draw = path(list(range(200)), 200)
    clock = [math.exp(2 * lam) - math.exp(2 * LAMBDAS[0]) for lam in LAMBDAS[1:]]
    values = [draw(at(LAMBDAS[0]), at(lam)).flatten() * math.sqrt(c) for lam, c in zip(LAMBDAS[1:], clock, strict=True)]
    n = len(values[0])
    for i, j in itertools.combinations_with_replacement(range(len(clock)), 2):
        want = min(clock[i], clock[j])
        spread = math.sqrt((clock[i] * clock[j] + want**2) / n)  # of a product of two correlated normals
        assert abs(float((values[i] * values[j]).mean()) - want) < 5 * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_path_refines(dtype):
    """Scaled increments over a refinement add up to the increment over the whole."""
    draw = path([1, 2, 3], 6, dtype)
    whole = draw(at(LAMBDAS[0]), at(LAMBDAS[-1]))
    clock = math.exp(2 * LAMBDAS[-1]) - math.exp(2 * LAMBDAS[0])
    total = torch.zeros_like(whole, dtype=torch.float64)
    for a, b in itertools.pairwise(LAMBDAS):
        total += draw(at(a), at(b)).double() * math.sqrt(math.exp(2 * b) - math.exp(2 * a))
    torch.testing.assert_close(
        total / math.sqrt(clock), whole.double(), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-9
    )


def test_path_is_a_function_of_its_seed_and_place():
    """Whatever was asked before, in whatever batch, for the whole batch or per row: the same value."""
    draw = path([7, 8], 5)
    order = [3, 9, 0, 4, 9, 1, 6, 2, 8, 5, 7]
    for i in order:
        a, b = at(-5.0), at(LAMBDAS[i])
        value = draw(a, b)
        assert torch.equal(value, path([7, 8], 5)(a, b)) and torch.equal(value, draw(a, b))
        assert torch.equal(value[1:], path([8], 5)(a, b))
    to = torch.tensor([0.3, 1.4], dtype=torch.float64)
    rows = path([7, 8], 5)(SDE.knot_at(torch.full((2, 1), -2.0, dtype=torch.float64)), SDE.knot_at(to[:, None]))
    for i in range(2):
        torch.testing.assert_close(rows[i], draw(at(-2.0), at(float(to[i])))[i], rtol=1e-9, atol=1e-9)


def test_path_ends():
    """From alpha = 0 (where the clock starts), to low noise; one int for a batch; what is refused."""
    flow = make_sde("flow")
    draw = as_draw(BrownianPath(3), torch.zeros(4000, 2, dtype=torch.float64))
    z = draw(flow.knot(1.0), flow.knot(0.5)).flatten()
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert not torch.equal(z[:2], z[2:4]) and torch.isfinite(draw(at(4.0), at(4.5))).all()
    with pytest.raises(ValueError, match="resolves steps"):
        draw(at(0.5), at(0.50005))
    with pytest.raises(ValueError, match="reaches up to"):
        draw(at(0.0), EDMSDE(t_min=1e-8).knot(1e-8))
    with pytest.raises(ValueError, match="2 seeds for a batch of 3"):
        BrownianPath([1, 2]).bind(torch.zeros(3, 1))


# --- the other sources ----------------------------------------------------------------------------------------------


def test_an_int_is_a_torch_generator():
    """rng=7 is torch's own stream of that seed, from its beginning at every bind."""
    x = torch.zeros(3, 4)
    generator = torch.Generator().manual_seed(7)
    want = [torch.randn(3, 4, generator=generator) for _ in range(2)]
    for source in (7, Independent(7)):
        draw = as_draw(source, x)
        assert torch.equal(draw(T, U), want[0]) and torch.equal(draw.normal("any"), want[1])
        again = draw.restart()
        assert torch.equal(again(T, U), want[0])
    noise = Independent(7)
    assert torch.equal(noise.bind(x)(T, S), noise.bind(x)(T, S))


def test_restart_does_not_disturb_the_run():
    """Replaying from the start leaves the original generator where it was."""
    generator = torch.Generator().manual_seed(1)
    draw = as_draw(generator, torch.zeros(4))
    first = draw(T, U)
    replay = draw.restart()
    assert torch.equal(replay(T, U), first)
    reference = torch.Generator().manual_seed(1)
    torch.randn(4, generator=reference)
    assert torch.equal(draw(U, S), torch.randn(4, generator=reference))


@pytest.mark.parametrize(
    "source",
    [3, "generator", range(8), BrownianPath(3), "recorded"],
    ids=["seed", "generator", "seeds", "path", "recorded"],
)
@pytest.mark.parametrize("before", [False, True])
def test_a_failed_run_is_replayed_on_its_own_noise(source, before):
    """Bitwise: what was drawn before the run, the prior or another run on the same noise, is no part of it."""
    x, states = torch.zeros(8, 2), []
    x[:, 0] = torch.arange(8.0)
    if source == "recorded":
        source = Recorded(torch.randn(40, 8, 2, generator=torch.Generator().manual_seed(1)))
    draw = as_draw(torch.Generator().manual_seed(1) if source == "generator" else source, x)

    def score(x, t):
        states.append(x)
        return torch.where(t[:, None] < 0.5, torch.nan, -x)

    rev = SDE.reverse(score=score)
    if before:
        draw.normal("prior")
        solve(SDE.reverse(score=lambda x, t: -x), x, DDIM(eta=1.0), steps=10, rng=draw)
    with pytest.warns(RuntimeWarning, match="not finite at t"):
        solve(rev, x, DDIM(eta=1.0), steps=10, grid="uniform_time", rng=draw)
    run, replay = states[:10], states[10:]
    assert len(replay) > 3 and all(torch.equal(a, b) for a, b in zip(run, replay, strict=False))


def test_what_draws_nothing_touches_no_generator():
    """A deterministic run leaves torch's global stream, and a generator it is given, where they were."""
    x = torch.ones(2, 3)
    torch.manual_seed(3)
    before, generator = torch.get_rng_state(), torch.Generator().manual_seed(4)
    for rng in (None, generator, 5):
        solve(SDE.reverse(score=lambda x, t: -x), x, DDIM(), steps=3, rng=rng)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(4).get_state())
    noisy = [solve(SDE.reverse(score=lambda x, t: -x), x, DDIM(eta=1.0), steps=3, rng=None).x for _ in range(2)]
    assert not torch.equal(*noisy)


def test_recorded_noise():
    """Handed out in order, cast to the state; a missing draw or a wrong shape is named."""
    x = torch.zeros(2, 3)
    given = torch.arange(12, dtype=torch.float64).reshape(2, 2, 3)
    draw = Recorded(given).bind(x)
    assert torch.equal(draw(T, S), given[0].float()) and torch.equal(draw.normal("prior"), given[1].float())
    with pytest.raises(ValueError, match="draw 3 but only 2"):
        draw(T, S)
    assert torch.equal(draw.restart()(T, S), given[0].float())
    with pytest.raises(ValueError, match="shape"):
        Recorded([torch.zeros(3, 2)]).bind(x)(T, S)
    assert torch.equal(Recorded([x + 0.7]).bind(x.long()).uniform("token"), x + 0.7)


def test_bad_seeds():
    """Lists of ints, one per sample."""
    for bad in ([], [1.0], [True], ["a"], [None]):
        with pytest.raises(ValueError, match="ints"):
            PerSample(bad)
    with pytest.raises(ValueError, match="3 seeds for a batch of 2"):
        PerSample([1, 2, 3]).bind(torch.zeros(2, 1))
    for bad in (1.5, True, {"seed": 1}, torch.tensor(3)):
        with pytest.raises(TypeError, match="rng"):
            as_draw(bad, torch.zeros(2))
