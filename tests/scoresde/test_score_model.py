"""Data specifications, noise levels, input scaling and the wrappers of a reverse SDE."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

from scoresde import (
    DDIM,
    NOISE_LEVELS,
    PARAMETERIZATIONS,
    VESDE,
    VPSDE,
    CheckpointError,
    ClassifierFreeGuidance,
    ClipData,
    DataSpec,
    EulerMaruyama,
    GaussianMixture,
    Heun,
    ScoreModel,
    inpaint,
    load_model,
    log_likelihood,
    sample,
    save_model,
)
from scoresde.codecs import Affine
from scoresde.storage.tensors import write_tensors
from solvers import make_knots


class Spy(nn.Module):
    """Records what the network is called with; answers zero."""

    def forward(self, x, noise_level, **condition):
        self.x, self.noise_level, self.condition = x, noise_level, condition
        return torch.zeros_like(x)


# --- data specification ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_every_integer_owns_its_bin(levels):
    """decode(encode(k + u)) = k for u from 0 to just below 1, and model units span [-1, 1)."""
    spec = DataSpec((1,), levels)
    codec = Affine.fit(spec)
    k = torch.arange(levels)[:, None]
    for u in (0.0, 0.25, None, 1.0 - 2.0**-20):
        x = codec.encode(spec.dequantize(k, u, torch.float64))
        assert x.min() >= -1.0 and x.max() < 1.0
        assert torch.equal(spec.quantize(codec.decode(x)), k)
    assert spec.quantize(codec.decode(torch.tensor([[-3.0], [3.0]]))).flatten().tolist() == [0, levels - 1]


def test_continuous_data_go_there_and_back():
    model = ScoreModel(Spy(), VPSDE(), data_spec=DataSpec((2,)), codec=Affine((2,), shift=3.0, scale=0.5))
    z = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.decode(model.encode(z, dtype=torch.float64)), z)


@pytest.mark.parametrize("options", [{"range": (1.0, 0.0)}, {"layout": "CC"}, {"levels": 1}, {"shape": (0,)}])
def test_bad_specifications(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DataSpec(**{"shape": (2, 2), **options})


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": math.nan}, {"shift": math.inf}, {"scale": (1, 2, 3)}])
def test_bad_codecs(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Affine((2,), **options)


@pytest.mark.parametrize("per", ["all", "channel", "element"])
def test_an_affine_codec_is_fitted_per_column(per):
    """Mean 0 and deviation 1 of what is taken together; the volume is the Jacobian's; tables move with the data."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 2, 3, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [4.0]]) + 3.0
    codec = Affine.fit(DataSpec((2, 3)), z, per=per)
    x = codec.encode(z)
    over = {"all": (0, 1, 2), "channel": (0, 2), "element": (0,)}[per]
    std, mean = torch.std_mean(x, over, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(std, torch.ones_like(std))
    torch.testing.assert_close(codec.decode(x), z)
    jacobian = torch.autograd.functional.jacobian(lambda v: codec.encode(v.reshape(1, 2, 3)).flatten(), z[0].flatten())
    assert codec.log_volume == pytest.approx(float(torch.linalg.slogdet(jacobian).logabsdet), abs=1e-9)
    again = Affine(**codec.config())
    x = again.encode(z.float())
    assert torch.equal(x, codec.encode(z.float())) and x.dtype == torch.float32


# --- the model -------------------------------------------------------------------------------------------------------


def test_labels_are_what_they_say():
    sde = VPSDE()
    knot = sde.knot(0.3)
    expected = {
        "time": 0.3,
        "t999": 999 * 0.3,
        "half_log_snr": math.log(knot.alpha / knot.sigma),
        "log_sigma": math.log(knot.sigma / knot.alpha),
        "quarter_log_sigma": math.log(knot.sigma / knot.alpha) / 4,
        "log_half_sigma": math.log(knot.sigma / knot.alpha / 2),
        "index_down": 92,
    }
    for name in NOISE_LEVELS:
        law = sde.discretize(100) if name.startswith("index") else sde
        spy = Spy()
        model = ScoreModel(spy, law, "noise", name)
        model(torch.zeros(4, 2), 7 if name.startswith("index") else 0.3)
        torch.testing.assert_close(spy.noise_level, torch.full((4,), float(expected.get(name, 7))))
        model(torch.zeros(2, 2), torch.tensor([7, 7]) if name.startswith("index") else torch.tensor([0.3, 0.3]))
        torch.testing.assert_close(spy.noise_level, torch.full((2,), float(expected.get(name, 7))))


def test_unit_scaling_gives_unit_variance_at_every_noise_level():
    """Gaussian data of standard deviation sigma_data: the input's variance is one, exactly, on VE from 0.01 to 50."""
    for t in (1e-5, 0.3, 1.0):
        spy, sde = Spy(), VESDE()
        model = ScoreModel(spy, sde, "edm", "quarter_log_sigma", sigma_data=0.7)
        std = math.hypot(0.7, sde.sigma(t))
        model(torch.full((1, 1), std), t)
        torch.testing.assert_close(spy.x, torch.ones(1, 1))
    model = ScoreModel(spy, sde, input_scaling="none")
    model(torch.full((1, 1), 3.0), 0.5)
    assert spy.x.item() == 3.0


@pytest.mark.parametrize("kind", sorted(PARAMETERIZATIONS))
def test_the_parameterization_reads_the_output(kind):
    """A network that answers F = p x_0 + q eps for given x_0 and eps makes the model return both."""
    sde = VPSDE()
    x_0, eps, knot = torch.tensor([[0.4]]), torch.tensor([[-1.1]]), sde.knot(0.3)
    kwargs = (0.5,) if kind == "edm" else ()
    p, q = PARAMETERIZATIONS[kind](*kwargs).coefficients(knot)

    class Known(nn.Module):
        def forward(self, x, noise_level):
            return p * x_0 + q * eps

    prediction = ScoreModel(Known(), sde, kind, sigma_data=0.5)(knot.alpha * x_0 + knot.sigma * eps, 0.3)
    torch.testing.assert_close(prediction.data, x_0, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prediction.noise, eps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prediction.score, -eps / knot.sigma, rtol=1e-5, atol=1e-6)


def test_a_float64_state_meets_a_float32_network():
    """The state keeps its dtype; the network gets its own."""
    network = nn.Linear(2, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x, noise_level):
            assert x.dtype == torch.float32 and noise_level.dtype == torch.float32
            return self.inner(x)

    model = ScoreModel(Net(), VPSDE(), "noise")
    assert model(torch.zeros(3, 2, dtype=torch.float64), 0.5).noise.dtype == torch.float64


def test_config_round_trip():
    config = {
        "network": {"name": "mlp", "mlp": {"shape": [2], "width": 16, "depth": 1}},
        "sde": {"name": "ve", "ve": {"sigma_max": 5.0}},
        "parameterization": "edm",
        "data_spec": {"shape": [2]},
        "codec": {"name": "affine", "affine": {"data_shape": [2], "shift": 0.0, "scale": 2.0}},
    }
    model = ScoreModel.from_config(config)
    again = ScoreModel.from_config(json.loads(json.dumps(model.config())))
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 2)
    torch.testing.assert_close(again(x, 0.5).score, model(x, 0.5).score)
    assert again.law == VESDE(sigma_max=5.0) and again.data_spec == model.data_spec
    with pytest.raises(ValueError, match="built from objects"):
        ScoreModel(Spy(), VPSDE()).config()


def test_bad_models_and_calls():
    with pytest.raises(ValueError, match=r"Did you mean 'noise'"):
        ScoreModel(Spy(), VPSDE(), "niose")
    with pytest.raises(ValueError, match="chain"):
        ScoreModel(Spy(), VPSDE(), noise_level="index")
    with pytest.raises(ValueError, match="no option"):
        ScoreModel.from_config({"network": {"name": "mlp", "mlp": {"shape": [2], "widht": 3}}, "sde": {"name": "vp"}})
    model = ScoreModel(Spy(), VPSDE())
    with pytest.raises(ValueError, match=r"0\.0.*\[0\.001, 1\.0\]"):
        model(torch.zeros(2, 2), 0.0)
    with pytest.raises(ValueError, match="B = 2"):
        model(torch.zeros(2, 2), torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="data_spec"):
        model.sample(3, DDIM(), steps=2)


def test_samples_come_in_data_units_and_dropout_is_off():
    spec = DataSpec((1, 4, 4), 9)
    network = nn.Sequential()  # the identity

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network

        def forward(self, x, noise_level):
            assert not self.training
            return self.body(x)

    model = ScoreModel(Net().train(), VPSDE(), "noise", data_spec=spec, sigma_data=1.0)
    drawn = model.sample(5, Heun(), steps=4, rng=0)
    assert drawn.shape == (5, 1, 4, 4) and drawn.dtype == torch.int64 and 0 <= drawn.min() <= drawn.max() <= 8


# --- wrappers --------------------------------------------------------------------------------------------------------


def test_clipping_bounds_the_data_and_keeps_the_identity():
    data = GaussianMixture([[0.0]], std=1.5)
    sde = VPSDE()
    clipped = ClipData(data.reverse(sde), -1.0, 1.0)
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    prediction = clipped(x, 0.2)
    assert prediction.data.abs().max() <= 1.0
    knot = prediction.knot
    torch.testing.assert_close(knot.alpha * prediction.data + knot.sigma * prediction.noise, x)
    final = sample(clipped, (64, 1), EulerMaruyama(), steps=50, rng=0).x
    assert final.abs().max() <= 1.0  # the last step is the (clipped) posterior mean
    with pytest.raises(ValueError, match="low"):
        ClipData(data.reverse(sde), 1.0, -1.0)


def replaced_moments(rho, y, knots, solver):
    """Mean and variance of the second of a normal pair whose first is replaced at every knot: a recursion of numbers,
    for what is drawn anew is independent of the state, and every step is affine in both."""
    cov, one = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    mean, var = 0.0, 1.0
    for t, s in itertools.pairwise(knots):
        gain = t.alpha * cov @ torch.linalg.inv(t.alpha**2 * cov + t.sigma**2 * one)
        a, b, c = (1.0, 0.0, 0.0) if s.is_data else solver.coefficients(t, s)
        step = a * gain + b * (one - t.alpha * gain) / t.sigma
        known, own = float(step[1, 0]), float(step[1, 1])
        mean, var = own * mean + known * t.alpha * y, own**2 * var + known**2 * t.sigma**2 + c**2
    return mean, var


@pytest.mark.parametrize("rho", [0.5, 0.98])
def test_inpainting_is_replacement(rho):
    """The known elements follow their forward process to the end, and the rest is what replacement makes of it: exactly
    the moments of the recursion, whose limit is the bias that the docstring names."""
    law, solver, y, n = VPSDE(), DDIM(eta=1.0), 1.5, 20_000
    cov = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    rev = GaussianMixture(torch.zeros(1, 2), covariances=cov[None]).reverse(law)
    project = inpaint(torch.tensor([[y, float("nan")]], dtype=torch.float64), torch.tensor([True, False]))
    seen = []
    drawn = sample(
        rev, (n, 2), solver, steps=60, rng=0, project=project, dtype=torch.float64,
        callback=lambda info: seen.append((info.s, info.x[:, 0].mean(), info.x[:, 0].std())),
    ).x  # fmt: skip
    assert torch.equal(drawn[:, 0], torch.full((n,), y, dtype=torch.float64))
    for s, mean, std in seen:  # four standard errors
        assert abs(float(mean) - s.alpha * y) <= 4 * s.sigma / n**0.5
        assert abs(float(std) - s.sigma) <= 4 * s.sigma / (2 * n) ** 0.5
    mean, var = replaced_moments(rho, y, make_knots(law, None, 60, "denoise"), solver)
    assert float(drawn[:, 1].mean()) == pytest.approx(mean, abs=4 * (var / n) ** 0.5)
    assert float(drawn[:, 1].var()) == pytest.approx(var, rel=4 * (2 / n) ** 0.5)
    if rho == 0.5:
        limit = replaced_moments(rho, 1.0, make_knots(law, None, 1000, "denoise"), solver)
        assert limit == pytest.approx((0.27, 0.82), abs=0.005)


# --- kinds of models -------------------------------------------------------------------------------------------------


class Consistency(ScoreModel):
    """A map from noise to data: no score of a density."""

    describes = "map"


def test_a_kind_of_ones_own_comes_back_and_says_what_it_is(tmp_path):
    """The class that was saved is built again where it has been imported, and nothing is imported for a file's sake;
    what it describes reaches every wrapper, and likelihoods refuse it."""
    config = {
        "network": {"name": "mlp", "mlp": {"shape": [2], "width": 8, "depth": 1}},
        "sde": {"name": "vp"},
        "data_spec": {"shape": [2]},
    }
    made = Consistency.from_config(config)
    save_model(made, tmp_path / "own.safetensors")
    back = load_model(tmp_path / "own.safetensors")
    assert type(back) is Consistency and back.config() == made.config()
    assert ClassifierFreeGuidance(ClipData(back.reverse()), 1.0).describes == back.reverse().describes == "map"
    with pytest.raises(ValueError, match="map"):
        log_likelihood(back.reverse(), torch.zeros(2, 2))
    named = {**made.config(), "kind": "a_module_that_nobody_imported:Consistency"}
    write_tensors(made.state_dict(), tmp_path / "other.safetensors", named)
    with pytest.raises(CheckpointError, match="import a_module_that_nobody_imported first"):
        load_model(tmp_path / "other.safetensors")
    plain = ScoreModel.from_config(config)
    assert plain.config()["kind"] == "score_model" and plain.reverse().describes == "density"


@pytest.mark.parametrize(
    ("values", "message"),
    [({"levels": 4}, "needs its `shape`"), ({"shape": [2], "range": 3}, "two"), ({"shape": [2], "range": [1]}, "two")],
    ids=["shape", "number", "one"],
)
def test_specifications_that_a_file_cannot_hold_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataSpec.from_dict(values)
