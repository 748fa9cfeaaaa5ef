"""Models with codecs: likelihoods that do not see a rotation, files, training by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scoresde import (
    CODECS,
    Affine,
    Codec,
    DataSpec,
    GaussianMixture,
    Haar,
    ScoreModel,
    bits_per_dim,
    load_model,
    save_model,
)
from scoresde import config as configs
from scoresde.data import DATASETS
from scoresde.training import train
from sde_lib import SDE, VPSDE

STEPS = 20


class Exact(nn.Module):
    """The v of a Gaussian law of states (B, *D), as a network would output it at best."""

    def __init__(self, states: GaussianMixture, law: SDE) -> None:
        super().__init__()
        self.states, self.law = states, law
        self.dummy = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, noise_level):
        flat = self.states.reverse(self.law)(x.flatten(1), self.law.knot(noise_level, ndim=2)).v
        return flat.reshape(x.shape)


def gaussian_model(codec: Codec, spec: DataSpec, mean: torch.Tensor, covariance: torch.Tensor) -> ScoreModel:
    """The exact model of states whose data are N(mean, covariance), for a codec that is affine."""
    middle = codec.encode(mean.reshape(1, *spec.shape)).flatten(1)
    zero = torch.zeros(1, *spec.shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: codec.encode(z).flatten(), zero).reshape(-1, spec.dims)
    law = VPSDE()
    states = GaussianMixture(middle, covariances=(jacobian @ covariance @ jacobian.T)[None])
    return ScoreModel(Exact(states, law), law, "v", "time", spec, 1.0, "none", codec=codec).double()


@pytest.mark.parametrize("codec", [Affine((1, 2, 2)), Haar((1, 2, 2))], ids=["affine", "haar"])
def test_data_and_states_of_another_shape_are_refused(codec):
    """By every codec, those too that could broadcast or reshape them."""
    model = ScoreModel(nn.Identity(), VPSDE(), data_spec=DataSpec((1, 2, 2)), codec=codec)
    with pytest.raises(ValueError, match=r"Data must have shape \(B, 1, 2, 2\), got \(4, 1, 4, 2\)"):
        model.encode(torch.zeros(4, 1, 4, 2))
    with pytest.raises(ValueError, match=r"States must have shape \(B, .*got \(1, 2, 2\)"):
        model.decode(torch.zeros(1, 2, 2))


@pytest.mark.parametrize("dequantization", ["uniform", "truncated_normal"])
def test_bits_per_dim_do_not_see_a_rotation(dequantization):
    """The ODE of a rotated law is the rotated ODE, so that every error is the same, too: equal to rounding, 1e-10."""
    data = DATASETS["digits"](labels=False).load()
    images, spec = data.train.data, data.spec
    z = spec.dequantize(images, dtype=torch.float64).flatten(1)
    mean, covariance = z.mean(0), z.T.cov() + torch.eye(64, dtype=torch.float64) / 12
    pca = CODECS["pca"].fit(spec, images)
    same = {"shift": mean.reshape(spec.shape).tolist(), "scale": float(pca.widths[0])}  # of all three
    codecs = {"affine": Affine(spec.shape, **same), "pca": pca, "haar": Haar(spec.shape, levels=3, **same)}
    options: dict[str, Any] = {"steps": 8, "doubling": False, "divergence": "exact", "dequantization": dequantization}
    found = {}
    for name, codec in codecs.items():
        model = gaussian_model(codec, spec, mean, covariance)
        found[name] = bits_per_dim(model, data.held_out.data[:2], **options).per_sample
    assert 1.0 < float(found["affine"].mean()) < 6.0
    for name in ("pca", "haar"):
        torch.testing.assert_close(found[name], found["affine"], rtol=1e-10, atol=0.0)


MODEL = {
    "network": {"name": "mlp", "mlp": {"width": 8, "depth": 1}},
    "sde": {"name": "vp", "vp": {}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_models_are_saved_with_their_codecs(name, dtype, tmp_path):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(50, 4, generator=g) @ torch.randn(4, 4, generator=g) + 3.0
    spec = DataSpec((4,))
    codec = CODECS[name].fit(spec, data)
    network = {"name": "mlp", "mlp": {"shape": list(codec.state_shape), "width": 8, "depth": 1}}
    entry = {"name": codec.name, codec.name: codec.config()}
    model = ScoreModel.from_config({**MODEL, "network": network, "data_spec": spec.to_dict(), "codec": entry})
    model.codec.load_state_dict(codec.state_dict())
    again = load_model(save_model(model.to(dtype), tmp_path / "model.safetensors"))
    assert type(again.codec) is CODECS[name] and again.dtype == dtype
    assert again.codec.log_volume == codec.log_volume
    assert torch.equal(again.encode(data), codec.encode(data))
    torch.testing.assert_close(again.decode(again.encode(data)), data, rtol=0.0, atol=1e-4)
    assert again.sample(3, "ddim", steps=2, rng=0).shape == (3, 4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", CODECS)
def test_training_by_the_name_of_a_codec_resumes_bitwise(name, tmp_path):
    overrides = [
        f"--config.codec.name={name}",
        "--config.data.name=ring",
        "--config.data.ring.n=400",
        "--config.network.name=mlp",
        "--config.network.mlp.width=16",
        "--config.network.mlp.depth=1",
        "--config.training.batch_size=32",
        f"--config.training.steps={STEPS}",
        "--config.training.checkpoint_every=10",
        "--config.training.eval_every=10",
        "--config.training.log_every=5",
        "--config.training.sample_every=0",
        "--config.training.tensorboard=False",
        "--config.training.cpu=True",
    ]
    config = configs.override(configs.defaults(), overrides)

    def stop(step: int, values: Any) -> None:
        if step > 10:  # after the checkpoint of step 10, in the middle of what follows
            raise Stop

    train(config, tmp_path / "whole", progress=False)
    with pytest.raises(Stop):
        train(config, tmp_path / "parts", progress=False, callback=stop)
    train(config, tmp_path / "parts", progress=False)
    whole, parts = (load_model(tmp_path / which) for which in ("whole", "parts"))
    assert type(whole.codec) is CODECS[name]
    for key, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[key], value), key
    data = DATASETS["ring"](n=400).load().train.data
    score = bits_per_dim(whole, data[:8], steps=8, doubling=False)
    assert bool(torch.isfinite(score.per_sample).all())
