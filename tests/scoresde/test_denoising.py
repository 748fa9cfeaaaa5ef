"""Denoising score matching: against closed forms on Gaussian data, and against numbers of the reference code. Every
entry of `OBJECTIVES` enrols itself."""

import itertools
import math

import numpy as np
import pytest
import torch
from gaussian_scores import LAWS, Answers, corners, exact, least

from scoresde import ScoreModel
from scoresde.data.batch import Batch
from scoresde.data.conditions import classes
from scoresde.data.spec import DataSpec
from scoresde.objectives import (
    EDM,
    OBJECTIVES,
    At,
    DenoisingScoreMatching,
    LogNormalTimes,
    MinSNRWeighting,
    Uncertainty,
)
from scoresde.streams import Streams
from sde_lib import (
    VESDE,
    VPSDE,
    GaussianMixture,
    NoisePrediction,
    Prediction,
    ScorePrediction,
    SubVPSDE,
)

each_law = pytest.mark.parametrize("name", sorted(LAWS))


def at(rows, of, seed=0):
    return At(0, 1, Streams(seed, rows, of))


@each_law
def test_minimiser_on_gaussian_data_is_the_exact_score(name):
    """With exact moments the loss of eps_hat = f eps* is a parabola in f with its minimum at 1, to rounding."""
    law = LAWS[name]()
    t = torch.linspace(law.t_min, law.drift_t_max, 9, dtype=torch.float64).repeat_interleave(4)
    x_0, noise = corners(9)
    knot = law.knot(t[::4], ndim=1)
    power = knot.sigma**2 / (knot.alpha**2 * 0.49 + knot.sigma**2)  # E|eps*|^2
    for factor in (1.0, 0.9, 1.2, 0.0):
        losses = DenoisingScoreMatching(exact(law, factor)).at_times(x_0, t, noise)
        per_time = losses.reshape(9, 4).mean(1)
        torch.testing.assert_close(per_time, least(knot) + (factor - 1.0) ** 2 * power, rtol=1e-9, atol=1e-12)


def test_a_lattice_of_times_is_uniform_and_steady():
    """A lattice of 64 times against 64 independent ones: the same mean loss, and a quarter of the scatter at most."""
    law = VPSDE()
    x_0, noise = corners(16)
    means = {True: [], False: []}
    for stratified, found in means.items():
        objective = DenoisingScoreMatching(exact(law), stratified=stratified)
        for seed in range(200):
            streams = Streams(seed, range(64), 64)
            u = streams.lattice("times") if stratified else streams.uniform("times", dtype=torch.float64)
            found.append(float(objective.at_times(x_0, objective.drawer.draw(u), noise).mean()))
    spread, steady = np.std(means[False]), np.std(means[True])
    assert steady < spread / 4
    assert abs(np.mean(means[True]) - np.mean(means[False])) < 4.5 * spread / math.sqrt(200)


@pytest.mark.parametrize(("name", "n"), [("vp", 200), ("ve", 50)])
def test_on_a_chain_it_is_the_noise_error_at_every_level(name, n):
    """For SMLD it is published as sigma_i^2 |s + noise / sigma_i|^2: written out here from the score."""
    chain = LAWS[name]().discretize(n)
    x_0, noise = corners(n)
    index = torch.arange(n).repeat_interleave(4)
    losses = DenoisingScoreMatching(exact(chain)).at_times(x_0, index, noise)
    knot = chain.knot(torch.arange(n), ndim=1)
    torch.testing.assert_close(losses.reshape(n, 4).mean(1), least(knot), rtol=1e-9, atol=1e-12)
    here = chain.knot(index, ndim=2)
    x = here.alpha * x_0 + here.sigma * noise
    score = GaussianMixture([[0.0]], std=0.7).score(x, here)
    published = (here.sigma**2 * (score + noise / here.sigma) ** 2)[:, 0]
    torch.testing.assert_close(losses, published, rtol=1e-8, atol=1e-12)


def test_the_loss_on_a_chain_tends_to_the_continuous_one():
    """DDPM's levels are the ends of n intervals: the mean over them differs from the integral by O(1 / n)."""
    law = VPSDE(t_min=1e-6)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    t = law.t_min + (law.t_max - law.t_min) * u
    x_0, noise = corners(20_000)
    limit = float(DenoisingScoreMatching(exact(law)).at_times(x_0, t.repeat_interleave(4), noise).mean())
    errors = []
    for n in (250, 500, 1000):
        chain = law.discretize(n)
        x_0, noise = corners(n)
        losses = DenoisingScoreMatching(exact(chain)).at_times(x_0, torch.arange(n).repeat_interleave(4), noise)
        errors.append(abs(float(losses.mean()) - limit))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 2e-3 and all(abs(order - 1.0) < 0.15 for order in orders), (errors, orders)


def test_conditions_and_half_sums():
    law = VPSDE()
    x_0 = torch.randn(6, 3, 4, dtype=torch.float64)
    noise, t = torch.randn_like(x_0), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    seen = []

    def predict(x, knot, class_label):
        seen.append(class_label)
        return Prediction(x, knot, torch.zeros_like(x), NoisePrediction())

    model, condition = Answers(law, predict), {"class_label": torch.arange(6)}
    mean = DenoisingScoreMatching(model).at_times(x_0, t, noise, condition)
    half = DenoisingScoreMatching(model, metric="half_sum").at_times(x_0, t, noise, condition)
    torch.testing.assert_close(mean, noise.square().mean((1, 2)))
    torch.testing.assert_close(half, 0.5 * noise.square().sum((1, 2)))
    assert all(torch.equal(label, torch.arange(6)) for label in seen)


def test_a_perturbed_input_keeps_its_target():
    """The state is alpha x_0 + sigma (eps + gamma xi), xi of a stream of its own; held-out losses are plain."""
    states = []

    def predict(x, knot):
        states.append((x, knot))
        return Prediction(x, knot, torch.zeros_like(x), NoisePrediction())

    objective = DenoisingScoreMatching(Answers(VPSDE(), predict), input_perturbation=0.3)
    batch, here = Batch(torch.randn(5, 2, dtype=torch.float64)), at(range(5), 5)
    eps, xi = (here.streams.normal(name, (2,), torch.float64) for name in ("noise", "input_perturbation"))
    assert float((eps - xi).abs().min()) > 1e-3
    for call, moved in ((objective("train", batch, here), eps + 0.3 * xi), (objective.held_out(batch, here), eps)):
        (x, knot) = states.pop(0)
        torch.testing.assert_close(x, knot.alpha * batch.data + knot.sigma * moved)
        torch.testing.assert_close(call, eps.square().mean(1))


# --- EDM2's uncertainty -----------------------------------------------------------------------------------------------
def test_the_uncertainty_is_the_log_of_the_expected_loss():
    """At u = log E[loss], fitted by least squares in its features, the gradient of the objective vanishes, and it is
    1 + mean u; at first it changes nothing."""
    law, n = VPSDE(), 400
    objective = DenoisingScoreMatching(exact(law), uncertainty=True).double()
    plain = DenoisingScoreMatching(exact(law))
    x_0, _ = corners(n)
    batch, here = Batch(x_0), at(range(4 * n), 4 * n)
    assert torch.equal(objective("train", batch, here), plain("train", batch, here))
    assert set(objective.state_dict()) == {f"uncertainty.{k}" for k in ("weight", "frequencies", "phases")}
    assert dict(objective.phases) == {"train": ("model", "uncertainty")}

    lam = torch.linspace(-4.0, 4.0, n, dtype=torch.float64)
    wanted = least(law.knot_at(lam)).log()
    u, weight = objective.uncertainty, objective.uncertainty.weight
    features = torch.func.jacrev(lambda w: torch.func.functional_call(u, {"weight": w}, (lam,)))(weight.detach())
    with torch.no_grad():
        weight.copy_(torch.linalg.lstsq(features, wanted[:, None], driver="gelsd").solution[:, 0])
        assert float((u(lam) - wanted).abs().max()) < 1e-5
    x_0, noise = corners(n)
    losses = plain.at_times(x_0, law.time_at(lam).repeat_interleave(4), noise).reshape(n, 4).mean(1)
    trained = (torch.exp(-u(lam)) * losses + u(lam)).mean()
    (gradient,) = torch.autograd.grad(trained, weight)
    scale = features.abs().max()
    assert float(gradient.abs().max()) < 1e-5 * float(scale)
    assert abs(float(trained.detach() - wanted.mean()) - 1.0) < 1e-6
    losses = plain("train", batch, here)
    assert torch.equal(objective.held_out(batch, here), losses)
    here_u = u(law.half_log_snr(objective.drawer.draw(here.streams.lattice("times"))))
    torch.testing.assert_close(objective("train", batch, here), torch.exp(-here_u) * losses + here_u)


def test_the_uncertainty_is_the_same_in_every_run_and_finite_everywhere():
    torch.manual_seed(1)
    first = Uncertainty()
    torch.manual_seed(2)
    again = Uncertainty()
    assert torch.equal(first.frequencies, again.frequencies) and torch.equal(first.phases, again.phases)
    torch.nn.init.normal_(first.weight)
    assert bool(torch.isfinite(first(torch.tensor([-math.inf, -3.0, 80.0]))).all())


# --- every objective --------------------------------------------------------------------------------------------------
class Small(torch.nn.Module):
    """A network of two layers that is told the noise level and one of three classes, or none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.kinds = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2), torch.nn.Embedding(4, 8)

    def forward(self, x, noise_level, class_label=None):
        kinds = 0.0 if class_label is None else self.kinds(class_label)
        return self.last(torch.tanh(self.first(torch.cat([x, 0.1 * noise_level[:, None]], 1)) + kinds))


def small(law):
    noise_level = "quarter_log_sigma" if law.has_time else "index"
    return ScoreModel(Small(), law, "v", noise_level, data_spec=DataSpec((2,), conditions=classes(3)))


@pytest.mark.parametrize("law", [VPSDE(), VPSDE().discretize(50)], ids=["sde", "chain"])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_losses_are_of_rows(name, law):
    """A loss per row, whose parts of a global batch are the whole's; every part that a phase trains has a gradient."""
    objective = OBJECTIVES[name](small(law)).double()
    data, labels = torch.randn(8, 2, dtype=torch.float64), torch.arange(8) % 4
    for phase, parts in objective.phases.items():
        whole = objective(phase, Batch(data, {"class_label": labels}), at(range(8), 8))
        assert whole.shape == (8,) and bool(torch.isfinite(whole).all())
        for rows in ([0, 1, 2], [5], [7, 3]):
            part = Batch(data[rows], {"class_label": labels[rows]})
            losses = objective(phase, part, at(torch.tensor(rows), 8))
            torch.testing.assert_close(losses, whole[rows], rtol=1e-9, atol=0)
        objective.zero_grad()
        whole.mean().backward()
        for part in parts:
            assert any(p.grad is not None for p in objective.get_submodule(part).parameters())
    held_out = objective.held_out(Batch(data, {"class_label": labels}), at(range(8), 8))
    assert held_out.shape == (8,)
    assert set(objective.averages()) and objective.result() is objective.get_submodule(objective.trains)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_loop_of_your_own(name):
    """`loss` is the mean of the losses; a generator repeats it; what does not fit is named."""
    objective = OBJECTIVES[name](small(VPSDE()))
    data, labels = torch.randn(6, 2), torch.arange(6) % 3
    condition = {"class_label": labels}
    losses = [objective.loss(data, condition, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert losses[0].shape == () and losses[0].requires_grad
    torch.manual_seed(3)
    one = objective.loss(data, condition)
    torch.manual_seed(3)
    assert torch.equal(objective.loss(data, condition), one)
    with pytest.raises(TypeError, match="Generator"):
        objective.loss(data, rng=0)
    with pytest.raises(TypeError, match="tensor"):
        objective.loss([[0.0, 1.0]])
    with pytest.raises(ValueError, match=r"\(B, 2\)"):
        objective.loss(torch.zeros(3, 7))
    with pytest.raises(TypeError, match="int64"):
        objective.loss(data, {"class_label": labels.float()})
    with pytest.raises(ValueError, match="train"):
        objective.loss(data, phase="generator")
    with pytest.raises(ValueError, match=r"\(6,\)"):
        objective.loss(data, {"class_label": labels[:3]})
    with pytest.raises(ValueError, match="class_lable"):
        objective.loss(data, {"class_lable": labels})


class Zero(torch.nn.Module):
    """A network whose answer is 0, with a weight to train."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, level, **condition):
        self.condition = condition
        return 0.0 * self.weight * x


@pytest.mark.parametrize("law", [VPSDE(), VPSDE().discretize(50)], ids=["sde", "chain"])
def test_the_loss_takes_data_units(law):
    """An answer of 0 for x_0 costs the mean square of the encoded data: of integers k = 8 in 0 … 16 with u uniform,
    (u - 1/2)^2 / 8.5^2 = 1 / (12 * 8.5^2). 4096 draws of (u - 1/2)^2 have a relative standard error of
    sqrt(4 / 5) / 64 = 0.014."""
    model = ScoreModel(Zero(), law, "data", data_spec=DataSpec((1, 8, 8), 17))
    objective = DenoisingScoreMatching(model, weighting="raw")
    data = torch.full((64, 1, 8, 8), 8)
    loss = objective.loss(data, {"y": 1}, torch.Generator().manual_seed(0))
    assert abs(loss.item() * 12 * 8.5**2 - 1) < 4 * 0.014 and model.network.condition == {"y": 1}
    with pytest.raises(ValueError, match="already scaled"):
        objective.loss(model.encode(data - 1))
    x = torch.randn(5, 3)  # without a specification: states
    plain = DenoisingScoreMatching(ScoreModel(Zero(), law, "data"), weighting="raw")
    torch.testing.assert_close(plain.loss(x), x.square().mean())
    with pytest.raises(TypeError, match="floating"):
        plain.loss(torch.zeros(5, 3, dtype=torch.int64))


def test_half_precision_stays_in_the_network():
    """Losses of a bfloat16 model, and under autocast, are float32 and near the float32 one."""
    model = small(VPSDE())
    objective = DenoisingScoreMatching(model)
    data, rng = torch.randn(64, 2), torch.Generator
    wide = objective.loss(data, rng=rng().manual_seed(0)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = objective.loss(data, rng=rng().manual_seed(0))
    half = DenoisingScoreMatching(model.bfloat16()).loss(data, rng=rng().manual_seed(0))
    assert narrow.dtype == half.dtype == torch.float32
    for low in (narrow.detach(), half.detach()):
        assert abs(float(low - wide)) < 0.02 * float(wide)  # bfloat16 has 8 bits: 0.004 of an answer's error


def test_presets_are_names_for_options():
    law = VPSDE()
    edm = EDM(exact(law), uncertainty=True)
    assert isinstance(edm, DenoisingScoreMatching) and edm.times == LogNormalTimes() and edm.uncertainty is not None
    same = DenoisingScoreMatching(exact(law), LogNormalTimes(-1.2, 1.2), "edm", uncertainty=True)
    data = torch.randn(6, 1, dtype=torch.float64)
    assert torch.equal(*(o("train", Batch(data), at(range(6), 6)) for o in (edm, same)))


def test_bad_arguments_are_named():
    law = VPSDE()
    x_0, t, noise = torch.zeros(4, 2), torch.full((4,), 0.5), torch.zeros(4, 2)
    for options, message in (
        ({"weighting": "min_snt"}, "min_snr"),
        ({"times": "log_normal"}, "lognormal"),
        ({"metric": "sum"}, "half_sum"),
        ({"input_perturbation": -0.1}, "input_perturbation"),
    ):
        with pytest.raises(ValueError, match=message):
            DenoisingScoreMatching(exact(law), **options)
    for options, message in (({"times": 3}, "times"), ({"weighting": MinSNRWeighting}, "weighting")):
        with pytest.raises(TypeError, match=message):
            DenoisingScoreMatching(exact(law), **options)
    with pytest.raises(TypeError, match="ScoreModel"):
        DenoisingScoreMatching(torch.nn.Linear(2, 2))
    objective, chain = DenoisingScoreMatching(exact(law)), DenoisingScoreMatching(exact(law.discretize(100)))
    for arguments, error, message in (
        ((x_0, torch.zeros(3), noise), ValueError, r"\(4,\)"),
        ((x_0, 0.5, noise), ValueError, "float"),
        ((x_0, t, torch.zeros(4, 3)), ValueError, "noise"),
        ((x_0[:, 0], t, noise[:, 0]), ValueError, r"\(B, \*D\)"),
        ((x_0.long(), t, noise), TypeError, "floating"),
        (([[0.0]], t, noise), TypeError, "tensor"),
        *(((x_0, torch.tensor([0.5, bad, 0.5, 0.5]), noise), ValueError, "lie in") for bad in (0.0, 7.0, math.nan)),
    ):
        with pytest.raises(error, match=message):
            objective.at_times(*arguments)
    with pytest.raises(TypeError, match="level"):
        chain.at_times(x_0, t, noise)
    with pytest.raises(ValueError, match=r"0\.\.99"):
        chain.at_times(x_0, torch.tensor([0, 1, 2, 100]), noise)


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

    return arrays, Answers(law, predict)


@pytest.mark.parametrize("likelihood", [0, 1])
@pytest.mark.parametrize("mean", [0, 1])
@pytest.mark.parametrize(
    ("net", "law", "parameterization"),
    [
        ("ve_ncsnpp_cont", VESDE(), ScorePrediction()),
        ("vp_ncsnpp_cont", VPSDE(), NoisePrediction()),
        ("subvp_ncsnpp_cont", SubVPSDE(), NoisePrediction()),
    ],
    ids=["ve", "vp", "sub_vp"],
)
def test_continuous_losses_of_the_reference(golden, net, law, parameterization, likelihood, mean):
    law = reference_ve(golden) if net.startswith("ve") else law
    arrays, model = recorded(golden, net, law, parameterization, 1.0)
    objective = DenoisingScoreMatching(
        model, "uniform", "likelihood" if likelihood else "uniform", "mean" if mean else "half_sum"
    )
    x_0, t, noise = (torch.from_numpy(arrays[k]) for k in ("x0", "t", "z"))
    loss = float(objective.at_times(x_0, t, noise).mean())
    expected = float(arrays[f"sde_lw{likelihood}_rm{mean}"])
    assert abs(loss - expected) < 2e-4 * abs(expected)  # theirs takes 1 - exp(.) in float32


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
    x_0, draw, noise = (torch.from_numpy(arrays[k]) for k in ("x0", "draw", "z"))
    index = draw if kind == "ddpm" else 999 - draw  # their SMLD table runs downward
    objective = DenoisingScoreMatching(model, metric="mean" if mean else "half_sum")
    loss = float(objective.at_times(x_0, index, noise).mean())
    expected = float(arrays[f"{kind}_rm{mean}"])
    assert abs(loss - expected) < 2e-4 * abs(expected)
