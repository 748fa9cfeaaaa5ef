"""Weightings and metrics: published formulas, minimisers. Entries of `WEIGHTINGS` and `METRICS` enrol themselves."""

import math

import pytest
import torch
from gaussian_scores import LAWS, Answers

from scoresde.likelihood import elbo
from scoresde.objectives import (
    METRICS,
    WEIGHTINGS,
    DenoisingScoreMatching,
    EDMWeighting,
    HalfSquareSum,
    LikelihoodWeighting,
    MinSNRWeighting,
    P2Weighting,
    PseudoHuber,
    SigmoidWeighting,
    SoftMinSNRWeighting,
)
from sde_lib import PARAMETERIZATIONS, VESDE, VPSDE, FlowSDE, GaussianMixture, Prediction

SIGMA_DATA = 0.6


def answering(law, parameterization, data):
    """A model that finds `data` in every state, whatever its output stands for."""
    made = PARAMETERIZATIONS[parameterization](**({"sigma_data": SIGMA_DATA} if parameterization == "edm" else {}))

    def predict(x, knot):
        found_noise = (x - knot.alpha * data) / knot.sigma
        p, q = made.coefficients(knot)
        return Prediction(x, knot, p * data + q * found_noise, made)

    return Answers(law, predict, SIGMA_DATA)


def batch(law, n=12, drift=True):
    rng = torch.Generator().manual_seed(1)
    t = torch.linspace(law.t_min, law.drift_t_max if drift else law.t_max, n, dtype=torch.float64)
    x_0, noise, data = (torch.randn(n, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    return t, x_0, noise, data


# name, its options -> published weight of the square error of the data, by s = SNR. That of the noise is this over s,
# that of v, where alpha^2 + sigma^2 = 1, over s + 1: for each weighting the papers give one of the three, min-SNR all
PUBLISHED = {
    "uniform": ({}, lambda s: s),
    "data": ({}, lambda s: 1.0),
    "v": ({}, lambda s: s + 1),
    "min_snr": ({"gamma": 5.0}, lambda s: min(s, 5.0)),
    "soft_min_snr": ({"gamma": 4.0}, lambda s: 4 * s / (s + 4)),
    "truncated_snr": ({}, lambda s: max(s, 1.0)),
    "p2": ({"gamma": 0.5, "k": 1.0}, lambda s: s / (1 + s) ** 0.5),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_forms_coincide(name):
    """Weighted errors of the data, of the noise and of v, by models with each output: one loss, to rounding."""
    options, form = PUBLISHED[name]
    law = VPSDE(t_min=1e-3)
    t, x_0, noise, data = batch(law)
    knot = law.knot(t)
    alpha, sigma = knot.alpha[:, None], knot.sigma[:, None]
    snr = (knot.alpha / knot.sigma).square()
    of_data = torch.tensor([form(s) for s in snr.tolist()], dtype=torch.float64)
    error = data - x_0
    forms = {
        "data": (of_data, error),
        "noise": (of_data / snr, -alpha / sigma * error),
        "v": (of_data / (snr + 1.0), -error / sigma),
    }
    for output, (weight, own) in forms.items():
        wanted = weight * own.square().mean(1)
        model = answering(law, output, data)
        objective = DenoisingScoreMatching(model, weighting=WEIGHTINGS[name](**options))
        torch.testing.assert_close(objective.at_times(x_0, t, noise), wanted, rtol=1e-8, atol=0)


def test_numbers_that_are_known_by_heart():
    """At SNR = 20 and 1: min-SNR-5 weighs the noise 1/4 and 1; P2 (1, 1) 1/21 and 1/2; the soft one 1/6 and 4/5."""
    for snr, wanted in ((20.0, (0.25, 1 / 21, 1 / 6)), (1.0, (1.0, 0.5, 0.8))):
        knot = VPSDE().knot_at(0.5 * math.log(snr))
        for weighting, value in zip((MinSNRWeighting(), P2Weighting(), SoftMinSNRWeighting()), wanted, strict=True):
            assert abs(weighting.factor(knot, PARAMETERIZATIONS["v"]()) - value) < 1e-12


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
@pytest.mark.parametrize("output", sorted(PARAMETERIZATIONS))
def test_the_factor_is_what_the_loss_has(name, output):
    """Loss = factor times the loss of the noise, for every output, on laws with and without a constant alpha."""
    weighting = WEIGHTINGS[name]()
    for law in (VPSDE(), VESDE(), FlowSDE()):
        t, x_0, noise, data = batch(law)
        model = answering(law, output, data)
        objective = DenoisingScoreMatching(model, weighting=weighting)
        knot = law.knot(t, ndim=2)
        made = model.predict(x_0, knot).parameterization
        factor = torch.as_tensor(objective.weighting.factor(knot, made)).expand(12, 1)[:, 0]
        wanted = factor * DenoisingScoreMatching(model).at_times(x_0, t, noise)
        torch.testing.assert_close(objective.at_times(x_0, t, noise), wanted, rtol=1e-7, atol=0)


@pytest.mark.parametrize("output", ["data", "v", "flow", "edm"])
@pytest.mark.parametrize("name", ["uniform", "raw", "data", "v", "flow", "edm"])
def test_losses_are_finite_without_signal(name, output):
    """At t = 1 of the flow alpha is 0 and the noise is the state itself: its error is 0, that of the data is not."""
    law = FlowSDE()
    x_0, noise = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    raw = torch.randn(4, 3, dtype=torch.float64)
    made = PARAMETERIZATIONS[output]()
    model = Answers(law, lambda x, knot: Prediction(x, knot, raw, made))
    loss = DenoisingScoreMatching(model, weighting=name).at_times(x_0, torch.ones(4), noise)
    p, q = made.coefficients(law.knot(1.0))
    found = (raw - q * noise) / p  # the data
    scale = {"uniform": 0.0, "raw": p, "data": 1.0, "v": 1.0, "flow": 1.0, "edm": 2.0}[name]
    torch.testing.assert_close(loss, scale**2 * (found - x_0).square().mean(1))


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_the_minimiser_is_the_posterior_mean(name, metric):
    """Three data points and one state: the gradient of the posterior's average of the losses vanishes at the posterior
    mean, to rounding, for every output and weighting; for a metric that is no square error it does not."""
    law = VPSDE()
    points = torch.tensor([[-1.0, 0.2], [0.4, 1.5], [2.0, -0.3]], dtype=torch.float64)
    x, time = torch.tensor([0.5, 0.4], dtype=torch.float64), 0.35
    knot = law.knot(time)
    noise = (x - knot.alpha * points) / knot.sigma  # each point with the noise that makes x of it
    posterior = torch.softmax(-0.5 * noise.square().sum(1), 0)
    for output in PARAMETERIZATIONS:
        made = PARAMETERIZATIONS[output]()
        p, q = made.coefficients(knot)
        best = (posterior[:, None] * (p * points + q * noise)).sum(0)
        answer = best.clone().requires_grad_()
        model = Answers(law, lambda x, knot, answer=answer, made=made: Prediction(x, knot, answer.expand(3, 2), made))
        objective = DenoisingScoreMatching(model, weighting=name, metric=metric)
        losses = objective.at_times(points, torch.full((3,), time, dtype=torch.float64), noise)
        (gradient,) = torch.autograd.grad((posterior * losses).sum(), answer)
        scale = torch.autograd.grad(
            objective.at_times(points, torch.full((3,), time, dtype=torch.float64), noise)[0], answer
        )[0].abs().max()
        vanishes = float(gradient.abs().max()) < 1e-12 * float(scale)
        assert vanishes == METRICS[metric].square


@pytest.mark.parametrize("name", ["vp", "ve", "edm", "flow"])
def test_edm_is_lambda_times_the_error_of_the_denoiser(name):
    """lambda(s) (D - x_0)^2, s = sigma / alpha, lambda = (s^2 + sd^2) / (s sd)^2, for every output of a network."""
    law = LAWS[name]()
    t, x_0, noise, data = batch(law)
    knot = law.knot(t, ndim=2)
    s = knot.sigma / knot.alpha
    wanted = ((s**2 + SIGMA_DATA**2) / (s * SIGMA_DATA) ** 2 * (data - x_0) ** 2).mean(1)
    for output in ("edm", "noise", "flow"):
        model = answering(law, output, data)
        for weighting in (EDMWeighting(), EDMWeighting(SIGMA_DATA), *(["raw"] if output == "edm" else [])):
            found = DenoisingScoreMatching(model, weighting=weighting).at_times(x_0, t, noise)
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)


def test_sigmoid_is_the_published_weight_of_the_data():
    """-dlambda'/dt e^b sigmoid(lambda' - b) on the data, lambda' = 2 lambda the log SNR."""
    law, bias = VPSDE(), -1.0
    t, x_0, noise, data = batch(law)
    objective = DenoisingScoreMatching(answering(law, "v", data), weighting=SigmoidWeighting(bias))
    log_snr, h = 2.0 * law.half_log_snr(t), 1e-6
    slope = (law.half_log_snr(t * (1 - h)) - law.half_log_snr(t * (1 + h))) / (h * t)  # central, of the log SNR
    wanted = slope * math.exp(bias) * torch.sigmoid(log_snr - bias) * (data - x_0).square().mean(1)
    torch.testing.assert_close(objective.at_times(x_0, t, noise), wanted, rtol=1e-6, atol=0)


def test_sigmoid_on_a_chain_tends_to_the_integral():
    """The trapezoid rule over lambda, whatever the levels: of the share alone it is softplus, in closed form."""
    bias, law = 0.5, VPSDE(t_min=1e-3)
    chain = law.discretize(4000)
    weighting = SigmoidWeighting(bias).on(Answers(chain, None))
    total = sum(weighting.weight(level) for level in chain.levels) / chain.n
    low, high = 2.0 * chain.levels[-1].half_log_snr, 2.0 * chain.levels[0].half_log_snr
    wanted = math.log1p(math.exp(bias - low)) - math.log1p(math.exp(bias - high))
    assert abs(total - wanted) < 1e-3 * wanted
    index = torch.tensor([0, 5, 3999])
    table = [weighting.weight(chain.levels[i]) for i in index]
    assert torch.equal(weighting.weight(chain.knot(index)), torch.tensor(table, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name, cls in WEIGHTINGS.items() if cls.integral])
def test_integrals_do_not_depend_on_how_times_are_drawn(name):
    """Losses at lognormal times, which are a part of other objectives, are divided by their density."""
    law = VPSDE()
    t, x_0, noise, data = batch(law)
    model = answering(law, "v", data)
    drawn, uniform = (DenoisingScoreMatching(model, times, name) for times in ("lognormal", "uniform"))
    density = drawn.drawer.density(law.knot(t))
    torch.testing.assert_close(drawn.at_times(x_0, t, noise) * density, uniform.at_times(x_0, t, noise))
    plain = DenoisingScoreMatching(model, "lognormal").at_times(x_0, t, noise)
    assert torch.equal(plain, DenoisingScoreMatching(model).at_times(x_0, t, noise))


# --- the likelihood weighting is the integrand of the bound -----------------------------------------------------------
def test_likelihood_on_an_sde_is_the_integrand_of_the_bound():
    """With importance times and half sums, a loss times the duration is the range of lambda times |eps_hat - eps|^2."""
    law = VPSDE()
    t, x_0, noise, data = batch(law)
    objective = DenoisingScoreMatching(answering(law, "noise", data), "importance", "likelihood", HalfSquareSum())
    losses = objective.at_times(x_0, t, noise) * (law.t_max - law.t_min)
    span = law.knot(law.t_min).half_log_snr - law.knot(law.t_max).half_log_snr
    knot = law.knot(t, ndim=2)
    wanted = span * (knot.alpha / knot.sigma * (data - x_0)).square().sum(1)
    torch.testing.assert_close(losses, wanted, rtol=1e-9, atol=0)


def test_likelihood_on_a_chain_is_its_bound_term_by_term():
    """Level i: the KL of the posterior's step, chain.kl_weights |eps_hat - eps|^2, n times; level 0: the square error
    over twice the decoder's variance, that of level 1."""
    chain = VPSDE().discretize(30)
    rng = torch.Generator().manual_seed(0)
    x_0, noise, data = (torch.randn(30, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    index = torch.arange(30)
    objective = DenoisingScoreMatching(answering(chain, "v", data), weighting="likelihood", metric="half_sum")
    losses = objective.at_times(x_0, index, noise)
    square = (data - x_0).square().sum(1)
    wanted = 30 * chain.kl_weights * (chain.alpha / chain.sigma).square() * square
    wanted[0] = 30 * 0.5 * square[0] / chain.posterior_std[1] ** 2
    torch.testing.assert_close(losses, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["sde", "chain"])
def test_the_mean_likelihood_loss_is_the_bound(kind):
    """Against `elbo` on one data point and an inexact model, within 4.5 of the two standard errors."""
    sde = VPSDE()
    law = sde if kind == "sde" else sde.discretize(30)
    mixture = GaussianMixture([[0.3, -0.2]], std=0.7)  # not the data's
    rev = mixture.reverse(law)
    x = torch.tensor([[0.9, -1.1]], dtype=torch.float64)
    bound = elbo(rev, x.repeat(64, 1), times=256, draws=64, rng=3, control_variate=False)
    wanted = bound.diffusion + (bound.reconstruction if kind == "chain" else 0.0)
    if kind == "chain":  # less the constant of the decoder, a Gaussian of the variance of level 1
        wanted = wanted - x.shape[1] * (math.log(float(law.posterior_std[1])) + 0.5 * math.log(2.0 * math.pi))
    model = Answers(law, rev)
    objective = DenoisingScoreMatching(model, "uniform" if kind == "chain" else "importance", "likelihood", "half_sum")
    losses = objective.loss(x.repeat(2**17, 1), rng=torch.Generator().manual_seed(0))
    span = 1.0 if kind == "chain" else law.t_max - law.t_min
    spread = [float(objective.loss(x.repeat(2**13, 1), rng=torch.Generator().manual_seed(i))) for i in range(1, 9)]
    error = torch.tensor(spread).std() / 4.0  # 16 times as many
    both = math.hypot(float(wanted.std()) / 8.0, span * float(error))
    assert abs(span * float(losses) - float(wanted.mean())) < 4.5 * both


# --- metrics ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(METRICS))
def test_metrics_are_distances_per_sample(name):
    metric = METRICS[name]()
    error = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = metric(error)
    assert found.shape == (5,) and float(metric(0.0 * error).abs().max()) == 0.0
    torch.testing.assert_close(metric(-error), found)
    torch.testing.assert_close(metric(error[2:3]), found[2:3])
    assert bool((metric(2.0 * error) > found).all())


def test_pseudo_huber_is_a_square_then_a_norm():
    """sqrt(|e|^2 + c^2 D) - c sqrt(D), with all digits even where the error is tiny: |e|^2 / (2 c sqrt(D))."""
    metric = PseudoHuber(0.01)
    root = 0.01 * math.sqrt(12)
    large = torch.full((1, 12), 100.0, dtype=torch.float64)
    exact = math.sqrt(12e4 + root**2) - root
    assert abs(float(metric(large)) - exact) < 1e-12 * exact
    tiny = torch.full((1, 12), 1e-9, dtype=torch.float64)
    assert abs(float(metric(tiny)) * 2.0 * root / 12e-18 - 1.0) < 1e-12


def test_bad_options_are_named():
    for make, name in (
        (lambda: MinSNRWeighting(0.0), "gamma"),
        (lambda: P2Weighting(gamma=-1.0), "gamma"),
        (lambda: P2Weighting(k=0.0), "k"),
        (lambda: SigmoidWeighting(math.inf), "bias"),
        (lambda: EDMWeighting(0.0), "sigma_data"),
        (lambda: PseudoHuber(0.0), "c"),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            make()
    chain = FlowSDE().discretize(10)
    with pytest.raises(ValueError, match="alpha = 0"):
        SigmoidWeighting().on(Answers(chain, None))
    # the likelihood weighs errors of the data, which there are without a signal, too
    assert LikelihoodWeighting().on(Answers(chain, None)).weight(chain.levels[9]) > 0.0
