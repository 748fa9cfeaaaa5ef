"""Denoising score matching against closed forms on Gaussian data, and against numbers of the reference code."""

import itertools
import math

import numpy as np
import pytest
import torch

from scoresde.losses import chain_loss, continuous_loss
from sde_lib import (
    SDES,
    VESDE,
    VPSDE,
    GaussianMixture,
    NoisePrediction,
    Prediction,
    ScorePrediction,
    SubVPSDE,
    TabulatedSDE,
)

STD = 0.7  # of the data, one-dimensional and centred
LAWS = {name: cls for name, cls in SDES.items() if cls is not TabulatedSDE}
each_law = pytest.mark.parametrize("name", sorted(LAWS))


class Model:
    """What the losses need of a score model: its law, and a prediction made by a function of (x, knot)."""

    def __init__(self, law, predict):
        self.law, self._predict = law, predict

    def predict(self, x, knot, **condition):
        return self._predict(x, knot, **condition)


def exact(law, factor=1.0):
    """The exact noise prediction on the Gaussian data, times a factor."""

    def predict(x, knot):
        best = knot.sigma / (knot.alpha**2 * STD**2 + knot.sigma**2) * x
        return Prediction(x, knot, factor * best, NoisePrediction())

    return Model(law, predict)


def corners(n):
    """n times four points (x_0, noise) with the exact moments of independent N(0, STD^2) and N(0, 1)."""
    x_0 = STD * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(n)[:, None]
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat(n)[:, None]
    return x_0, noise


def least(knot):
    """Smallest possible E|eps_hat - eps|^2: the variance of eps given x."""
    signal = (knot.alpha * STD) ** 2
    return signal / (signal + knot.sigma**2)


@each_law
def test_minimiser_on_gaussian_data_is_the_exact_score(name):
    """With exact moments the loss of eps_hat = f eps* is a parabola in f with its minimum at 1, to rounding."""
    law = LAWS[name]()
    t = torch.linspace(law.t_min, law.drift_t_max, 9, dtype=torch.float64).repeat_interleave(4)
    x_0, noise = corners(9)
    knot = law.knot(t[::4], ndim=1)
    power = knot.sigma**2 / (knot.alpha**2 * STD**2 + knot.sigma**2)  # E|eps*|^2
    for factor in (1.0, 0.9, 1.2, 0.0):
        loss = continuous_loss(exact(law, factor), x_0, t=t, noise=noise)
        per_time = loss.per_sample.reshape(9, 4).mean(1)
        torch.testing.assert_close(per_time, least(knot) + (factor - 1.0) ** 2 * power, rtol=1e-9, atol=1e-12)


@each_law
@pytest.mark.parametrize("weighting", ["uniform", "likelihood"])
def test_gradient_vanishes_at_the_exact_score(name, weighting):
    """d/df of the loss of eps_hat = f eps* at f = 1, where the fit of a linear model ends."""
    law = LAWS[name]()
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    t = torch.linspace(law.t_min, law.drift_t_max, 9, dtype=torch.float64).repeat_interleave(4)
    x_0, noise = corners(9)
    loss = continuous_loss(exact(law, factor), x_0, t=t, noise=noise, weighting=weighting)
    loss.value.backward()
    assert abs(float(factor.grad)) < 1e-10 * float(loss.value.detach())


@each_law
@pytest.mark.parametrize("weighting", ["uniform", "likelihood"])
def test_importance_and_uniform_times_have_one_expectation(name, weighting):
    """Both against quadrature in lambda of the closed form, to the rounding of a fine grid of times."""
    law = LAWS[name]()
    low, high = law.t_min, law.drift_t_max if weighting == "likelihood" else law.t_max
    model, n = exact(law), 4000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    first, last = law.knot(low), law.knot(law.drift_t_max)
    lam = first.half_log_snr + (last.half_log_snr - first.half_log_snr) * u
    x_0, noise = corners(n)

    def mean(t, times):
        options = {"weighting": weighting, "times": times, "t": t.repeat_interleave(4), "noise": noise}
        return float(continuous_loss(model, x_0, **options).value)

    importance = mean(law.time_at(lam), "importance")
    # the integrand in uniform time is steep where g^2 / sigma^2 is: a grid that is fine there, and its own weights
    ends = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
    edges = law.time_at(first.half_log_snr + (last.half_log_snr - first.half_log_snr) * ends)
    middle, width = 0.5 * (edges[1:] + edges[:-1]), edges.diff()
    options = {"weighting": weighting, "t": middle.repeat_interleave(4), "noise": noise}
    per_time = continuous_loss(model, x_0, **options).per_sample.reshape(n, 4).mean(1)
    uniform = float((per_time * width).sum() / (high - low))
    # the midpoint rule's error is O(1 / n^2); flow loses (1 - drift_t_max) of its time under uniform weighting
    lost = (law.t_max - law.drift_t_max) / law.t_max
    assert abs(importance - uniform) < (1e-4 + 2.0 * lost) * uniform
    if weighting == "likelihood":
        # in nats: the integral of g^2 / sigma^2 least(t) dt is -2 times that of least over lambda
        signal = (torch.exp(2.0 * lam) * STD**2) / (torch.exp(2.0 * lam) * STD**2 + 1.0)
        expected = 2.0 * float(signal.mean()) * (first.half_log_snr - last.half_log_snr) / (high - low)
        assert abs(importance - expected) < 1e-6 * expected


@pytest.mark.parametrize("name", ["edm", "vp", "ve"])
def test_lognormal_times(name):
    """log(sigma / alpha) is normal, cut off at the ends of the SDE; stratified, its quantiles are a lattice's."""
    law = LAWS[name]()
    n = 4000
    x_0, noise = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64)
    options = {"times": "lognormal", "log_sigma_mean": -0.4, "log_sigma_std": 1.5, "noise": noise}
    t = continuous_loss(exact(law), x_0, rng=torch.Generator().manual_seed(0), **options).t
    knot = law.knot(t.sort().values, ndim=1)
    low, high = -law.knot(law.t_min).half_log_snr, -law.knot(law.t_max).half_log_snr
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    wanted = (-0.4 + 1.5 * torch.special.ndtri(u)).clamp(low, high)
    middle = slice(n // 50, -n // 50)
    torch.testing.assert_close(-knot.half_log_snr[middle], wanted[middle], rtol=0, atol=0.02)
    assert low - 1e-9 <= float(-knot.half_log_snr[0]) and float(-knot.half_log_snr[-1]) <= high + 1e-9
    for bad in ({"weighting": "likelihood"}, {"log_sigma_std": 0.0}):
        with pytest.raises(ValueError, match="lognormal"):
            continuous_loss(exact(law), x_0, **{**options, **bad})


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("times", ["uniform", "importance"])
def test_drawn_times_estimate_the_objective(name, times):
    """Independent draws, within 4.5 standard errors of the closed form."""
    law = LAWS[name]()
    n = 200_000
    rng = torch.Generator().manual_seed(0)
    x_0 = STD * torch.randn(n, 1, generator=rng)
    options = {"weighting": "likelihood", "times": times, "stratified": False, "rng": rng}
    loss = continuous_loss(exact(law), x_0, **options)
    first, last = law.knot(law.t_min), law.knot(law.t_max)

    def integral(lam):  # of 2 least over lambda
        return math.log1p(math.exp(2.0 * lam) * STD**2)

    expected = (integral(first.half_log_snr) - integral(last.half_log_snr)) / (law.t_max - law.t_min)
    error = float(loss.per_sample.double().std()) / math.sqrt(n)
    assert abs(float(loss.per_sample.double().mean()) - expected) < 4.5 * error
    assert float(loss.t.min()) >= law.t_min and float(loss.t.max()) <= law.t_max


def test_stratified_times_are_uniform_and_steady():
    law = VPSDE()
    model = exact(law)
    x_0, noise = corners(16)
    means = {True: [], False: []}
    drawn = []
    for seed in range(200):
        for stratified in means:
            rng = torch.Generator().manual_seed(seed)
            loss = continuous_loss(model, x_0, noise=noise, rng=rng, stratified=stratified)
            means[stratified].append(float(loss.value))
            if stratified:
                drawn.append(loss.t)
    spread, steady = np.std(means[False]), np.std(means[True])
    assert steady < spread / 4  # a lattice of 64 points against 64 independent ones
    assert abs(np.mean(means[True]) - np.mean(means[False])) < 4.5 * spread / math.sqrt(200)
    # each position of the batch, taken alone, has uniform times: mean 1/2, standard deviation 1/sqrt(12 * 200)
    t = (torch.stack(drawn) - law.t_min) / (law.t_max - law.t_min)
    assert float((t.mean(0) - 0.5).abs().max()) < 4.5 / math.sqrt(12 * 200)
    gaps = t[0].sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((63,), 1 / 64, dtype=torch.float64))


@pytest.mark.parametrize(("name", "n"), [("vp", 200), ("ve", 50)])
def test_chain_loss_is_the_noise_error_at_every_level(name, n):
    """For SMLD it is published as sigma_i^2 |s + noise / sigma_i|^2: written out here from the score."""
    chain = LAWS[name]().discretize(n)
    x_0, noise = corners(n)
    index = torch.arange(n).repeat_interleave(4)
    loss = chain_loss(exact(chain), x_0, index=index, noise=noise)
    knot = chain.knot(torch.arange(n), ndim=1)
    torch.testing.assert_close(loss.per_sample.reshape(n, 4).mean(1), least(knot), rtol=1e-9, atol=1e-12)
    at = chain.knot(index, ndim=2)
    x = at.alpha * x_0 + at.sigma * noise
    score = GaussianMixture([[0.0]], std=STD).score(x, at)
    published = (at.sigma**2 * (score + noise / at.sigma) ** 2)[:, 0]
    torch.testing.assert_close(loss.per_sample, published, rtol=1e-8, atol=1e-12)


def test_chain_loss_tends_to_the_continuous_one():
    """DDPM's levels are the ends of n intervals: the mean over them differs from the integral by O(1 / n)."""
    law = VPSDE(t_min=1e-6)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    t = law.t_min + (law.t_max - law.t_min) * u
    x_0, noise = corners(20_000)
    limit = float(continuous_loss(exact(law), x_0, t=t.repeat_interleave(4), noise=noise).value)
    errors = []
    for n in (250, 500, 1000):
        chain = law.discretize(n)
        x_0, noise = corners(n)
        loss = chain_loss(exact(chain), x_0, index=torch.arange(n).repeat_interleave(4), noise=noise)
        errors.append(abs(float(loss.value) - limit))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 2e-3 and all(abs(order - 1.0) < 0.15 for order in orders), (errors, orders)


def test_drawn_levels_cover_the_chain_evenly():
    chain = VPSDE().discretize(50)
    x_0 = torch.zeros(1000, 2)
    index = chain_loss(exact(chain), x_0, rng=torch.Generator().manual_seed(0)).t
    counts = torch.bincount(index, minlength=50)
    assert len(counts) == 50 and int(counts.min()) >= 19 and int(counts.max()) <= 21  # a lattice of 1000 points


def test_raw_weighting_is_the_error_of_the_network_output():
    law = VPSDE()
    x_0, noise = corners(3)
    t = torch.linspace(0.2, 0.9, 12, dtype=torch.float64)

    def predict(x, knot):
        return Prediction(x, knot, 0.3 * x, ScorePrediction())

    loss = continuous_loss(Model(law, predict), x_0, t=t, noise=noise, weighting="raw")
    k = law.knot(t, ndim=2)
    target = -noise / k.sigma
    torch.testing.assert_close(loss.per_sample, (0.3 * (k.alpha * x_0 + k.sigma * noise) - target).square()[:, 0])


def test_reductions_and_conditions():
    law = VPSDE()
    x_0 = torch.randn(6, 3, 4, dtype=torch.float64)
    noise, t = torch.randn_like(x_0), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    seen = []

    def predict(x, knot, class_label):
        seen.append(class_label)
        return Prediction(x, knot, torch.zeros_like(x), NoisePrediction())

    model, condition = Model(law, predict), {"class_label": torch.arange(6)}
    mean = continuous_loss(model, x_0, t=t, noise=noise, condition=condition)
    half = continuous_loss(model, x_0, t=t, noise=noise, condition=condition, reduce="half_sum")
    torch.testing.assert_close(mean.per_sample, noise.square().mean((1, 2)))
    torch.testing.assert_close(half.per_sample, 0.5 * noise.square().sum((1, 2)))
    torch.testing.assert_close(half.value, half.per_sample.mean())
    assert all(torch.equal(label, torch.arange(6)) for label in seen)


def test_bad_arguments_are_named():
    law = VPSDE()
    x_0 = torch.zeros(4, 2)
    cases = [
        ({"weighting": "snr"}, "weighting"),
        ({"times": "log_normal"}, "times"),
        ({"reduce": "sum"}, "reduce"),
        ({"t": torch.zeros(3)}, r"\(4,\)"),
        ({"noise": torch.zeros(4, 3)}, "noise"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            continuous_loss(exact(law), x_0, **options)
    with pytest.raises(ValueError, match="chain_loss"):
        continuous_loss(exact(law.discretize(100)), x_0)
    with pytest.raises(ValueError, match="continuous_loss"):
        chain_loss(exact(law), x_0)
    with pytest.raises(ValueError, match="index"):
        chain_loss(exact(law.discretize(100)), x_0, index=torch.zeros(4))
    with pytest.raises(TypeError, match="floating"):
        continuous_loss(exact(law), torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="tensor"):
        continuous_loss(exact(law), [[0.0]])
    with pytest.raises(TypeError, match="Generator"):
        continuous_loss(exact(law), x_0, rng=0)
    with pytest.raises(ValueError, match="NoneType"):
        continuous_loss(None, x_0)
    for t in (0.0, 7.0, math.nan):
        with pytest.raises(ValueError, match="must lie in"):
            continuous_loss(exact(law), x_0, t=torch.tensor([0.5, t, 0.5, 0.5]))


# --- against score_sde_pytorch ----------------------------------------------------------------------------------------
def reference_ve(golden):
    with np.load(golden / "sde.npz") as file:
        low, high, _ = file["ve/params"]
    return VESDE(sigma_min=float(low), sigma_max=float(high))


def recorded(golden, net, law, parameterization, sign):
    """The recorded network output at the recorded state, as a model."""
    with np.load(golden / "losses.npz") as file:
        arrays = {k.split("/", 1)[1]: file[k] for k in file.files if k.startswith(f"{net}/")}
    out = torch.from_numpy(arrays["net_out"])

    def predict(x, knot, **condition):
        torch.testing.assert_close(x, torch.from_numpy(arrays["perturbed"]), rtol=2e-4, atol=2e-4)
        return Prediction(x, knot, sign * out, parameterization)

    return arrays, Model(law, predict)


@pytest.mark.parametrize("likelihood", [0, 1])
@pytest.mark.parametrize("mean", [0, 1])
@pytest.mark.parametrize(
    ("net", "law", "parameterization"),
    [
        ("ve_ncsnpp_cont", VESDE(), ScorePrediction()),
        ("vp_ncsnpp_cont", VPSDE(), NoisePrediction()),
        ("subvp_ncsnpp_cont", SubVPSDE(), NoisePrediction()),
    ],
)
def test_continuous_losses_of_the_reference(golden, net, law, parameterization, likelihood, mean):
    law = reference_ve(golden) if net.startswith("ve") else law
    arrays, model = recorded(golden, net, law, parameterization, 1.0)
    loss = continuous_loss(
        model,
        torch.from_numpy(arrays["x0"]),
        t=torch.from_numpy(arrays["t"]),
        noise=torch.from_numpy(arrays["z"]),
        weighting="likelihood" if likelihood else "uniform",
        reduce="mean" if mean else "half_sum",
    )
    expected = float(arrays[f"sde_lw{likelihood}_rm{mean}"])
    assert abs(float(loss.value) - expected) < 2e-4 * abs(expected)  # theirs takes 1 - exp(.) in float32


@pytest.mark.parametrize("mean", [0, 1])
@pytest.mark.parametrize(
    ("net", "kind"),
    [("vp_ddpm_disc", "ddpm"), ("vp_ncsnpp_disc", "ddpm"), ("ve_ncsnpp_disc", "smld"), ("ve_ddpm_disc", "smld")],
)
def test_discrete_losses_of_the_reference(golden, net, kind, mean):
    if kind == "ddpm":
        chain, parameterization = VPSDE().discretize(1000), NoisePrediction()
    else:
        chain, parameterization = reference_ve(golden).discretize(1000), ScorePrediction()
    arrays, model = recorded(golden, net, chain, parameterization, 1.0)
    draw = torch.from_numpy(arrays["draw"])
    loss = chain_loss(
        model,
        torch.from_numpy(arrays["x0"]),
        index=draw if kind == "ddpm" else 999 - draw,  # their SMLD table runs downward
        noise=torch.from_numpy(arrays["z"]),
        reduce="mean" if mean else "half_sum",
    )
    expected = float(arrays[f"{kind}_rm{mean}"])
    assert abs(float(loss.value) - expected) < 2e-4 * abs(expected)
