"""Laws of all codecs, by the table: a new entry of `CODECS` is enrolled with the default options of its `fit`."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from devices import META, waits
from torch import Tensor

from scoresde.codecs import CODECS, PCA, Affine, Codec, Haar
from scoresde.data.spec import DataSpec

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "affine": [{"per": "channel"}, {"per": "element"}],
    "pca": [{"whiten": True}],
    "haar": [{"per_band": True}, {"levels": 2, "per": "channel"}, {"levels": 2, "per_band": True}],
}
"""What is tried beside the default options."""
SPECS = {
    "vector": DataSpec((4,)),
    "series": DataSpec((2, 8)),
    "pixels": DataSpec((2, 4, 8), levels=256),
    "volume": DataSpec((1, 4, 4, 4), levels=4),
}
CASES = [(name, options) for name in CODECS for options in ({}, *OPTIONS.get(name, []))]


def ids(value: Any) -> str:
    return value if isinstance(value, str) else "+".join(f"{k}={v}" for k, v in value.items()) or "defaults"


cases = pytest.mark.parametrize(("name", "options"), CASES, ids=ids)
layouts = pytest.mark.parametrize("layout", SPECS)


def correlated(spec: DataSpec, n: int = 150) -> Tensor:
    """Data whose elements have different means and variances and hang together."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(spec.dims, spec.dims, generator=g) * torch.linspace(0.4, 1.0, spec.dims)
    real = (torch.randn(n, spec.dims, generator=g) @ mix + torch.randn(spec.dims, generator=g)).reshape(n, *spec.shape)
    if spec.levels is None:
        return real
    return ((real / real.std() / 6.0 + 0.5) * spec.levels).floor().clamp(0, spec.levels - 1).long()


def fitted(name: str, options: dict[str, Any], layout: str) -> tuple[Codec, DataSpec, Tensor]:
    """Codec, specification, and the real numbers of the data in float64."""
    spec = SPECS[layout]
    data = correlated(spec)
    codec = CODECS[name].fit(spec, data, **options)
    return codec, spec, spec.dequantize(data, dtype=torch.float64)


def jacobian(codec: Codec, z: Tensor) -> Tensor:
    """dx / dz, (D, D), at one sample of data."""
    flat = torch.autograd.functional.jacobian(lambda v: codec.encode(v[None]).flatten(), z)
    return flat.reshape(-1, z.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@layouts
@cases
def test_decoding_undoes_encoding(name, options, layout, dtype):
    codec, _, z = fitted(name, options, layout)
    z = z.to(dtype)
    x = codec.encode(z)
    assert x.dtype == dtype and x.shape == (len(z), *codec.state_shape)
    # two sums of D products are rounded, each relative to the norm of a sample: sqrt(D) eps, and room for divisions
    room = 4.0 * math.sqrt(z[0].numel()) * torch.finfo(dtype).eps * float(z.flatten(1).norm(dim=1).max())
    torch.testing.assert_close(codec.decode(x), z, rtol=0.0, atol=room)


@layouts
@cases
def test_volume_is_the_jacobians(name, options, layout):
    codec, spec, z = fitted(name, options, layout)
    sign, log_volume = torch.linalg.slogdet(jacobian(codec, z[0]))
    assert abs(float(sign)) == 1.0
    assert codec.log_volume == pytest.approx(float(log_volume), abs=1e-11 * spec.dims)
    torch.testing.assert_close(jacobian(codec, z[1]), jacobian(codec, z[0]))  # the same everywhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [k for k, spec in SPECS.items() if spec.levels])
@cases
def test_every_integer_comes_back(name, options, layout, dtype):
    codec, spec, _ = fitted(name, options, layout)
    levels = torch.arange(spec.levels)
    flat = torch.stack([levels.roll(i * 7)[: spec.levels] for i in range(spec.dims)], 1)  # every element, every level
    data = flat.reshape(spec.levels, *spec.shape)
    for u in (None, 0.01, 0.99):
        x = codec.encode(spec.dequantize(data, u, dtype))
        assert torch.equal(spec.quantize(codec.decode(x)), data)


@layouts
@cases
def test_scales_are_those_of_noise_that_stays_independent(name, options, layout):
    """J^-1 J^-T, the covariance of z under unit noise of x, is diag(scales^2), or not diagonal where there are none."""
    codec, _, z = fitted(name, options, layout)
    back = torch.linalg.inv(jacobian(codec, z[0]))
    covariance, scales = back @ back.T, codec.scales(z)
    if scales is not None:
        assert scales.shape == codec.data_shape
        torch.testing.assert_close(covariance, torch.diag(scales.flatten().square()), rtol=1e-10, atol=1e-10)
    else:
        assert options or name not in OPTIONS  # the defaults have them


@layouts
@cases
def test_configuration_and_tensors_rebuild_it_without_data(name, options, layout):
    codec, _, z = fitted(name, options, layout)
    config = json.loads(json.dumps(codec.config()))
    again = CODECS[name](**config)
    again.load_state_dict(codec.state_dict())
    with torch.device("meta"):
        empty = CODECS[name](**config)
    empty.load_state_dict(codec.state_dict(), assign=True)
    x = codec.encode(z)
    back = codec.decode(x)
    for other in (again, empty, copy.deepcopy(codec)):
        assert other.config() == codec.config() and other.log_volume == codec.log_volume
        assert str(other.scales(z)) == str(codec.scales(z))
        assert (other.data_shape, other.state_shape) == (codec.data_shape, codec.state_shape)
        assert torch.equal(other.encode(z), x) and torch.equal(other.decode(x), back)


@layouts
@cases
def test_a_row_sees_neither_the_others_nor_the_precision_of_the_network(name, options, layout):
    codec, _, z = fitted(name, options, layout)
    x = codec.encode(z)
    torch.testing.assert_close(codec.encode(z[3:4]), x[3:4], rtol=1e-12, atol=1e-12)
    halved = copy.deepcopy(codec).to(torch.bfloat16)
    assert torch.equal(halved.encode(z), x)  # its numbers stay as wide as they were
    single = z.float()
    expected = codec.encode(single)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(single), expected)
        back = codec.decode(expected)
    assert torch.equal(back, codec.decode(expected))


@pytest.mark.parametrize("layout", ["vector", "series"])
@cases
def test_no_codec_waits_for_the_device(name, options, layout):
    """Numbers that are no tensors of the module are copied at its first use there, and read ever after."""
    codec, spec, _ = fitted(name, options, layout)
    codec, z = codec.to(META), torch.empty(3, *spec.shape, device=META)
    codec.decode(codec.encode(z))
    with waits() as seen:
        back = codec.decode(codec.encode(z))
    assert back.device == META and not seen


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", ["vector", "series"])
def test_states_of_real_data_have_size_one(name, layout):
    codec, _, z = fitted(name, {}, layout)
    x = codec.encode(z)
    assert float(x.square().mean()) == pytest.approx(1.0, rel=1e-12)


# --- principal axes ---------------------------------------------------------------------------------------------------


def gaussian(d: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Data whose mean and covariance are exactly those returned: N = 400, a sample whitened and coloured again."""
    g = torch.Generator().manual_seed(1)
    white = torch.randn(400, d, generator=g, dtype=torch.float64)
    white = white - white.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(white.T @ white / 400), white.T, upper=False).T
    mix, mean = torch.randn(d, d, generator=g, dtype=torch.float64), torch.randn(d, generator=g, dtype=torch.float64)
    return white @ mix.T + mean, mean, mix @ mix.T


@pytest.mark.parametrize("whiten", [False, True])
def test_principal_axes_of_a_gaussian_in_closed_form(whiten):
    data, mean, covariance = gaussian()
    codec = PCA.fit(DataSpec((6,)), data, whiten=whiten)
    variances = torch.linalg.eigvalsh(covariance).flip(0)
    expected = torch.ones(6, dtype=torch.float64) if whiten else variances / variances.mean()
    x = codec.encode(data)
    torch.testing.assert_close(x.T @ x / 400, torch.diag(expected), rtol=0.0, atol=1e-12)
    of_z = torch.distributions.MultivariateNormal(mean, covariance).log_prob(data)
    of_x = torch.distributions.Normal(0.0, expected.sqrt()).log_prob(x).sum(1)
    torch.testing.assert_close(of_x + codec.log_volume, of_z, rtol=0.0, atol=1e-11)


def test_axes_have_a_sign_and_an_order():
    data, _, _ = gaussian()
    codec, mirrored = (PCA.fit(DataSpec((6,)), d) for d in (data, -data))
    largest = codec.axes.abs().argmax(0)
    assert bool((codec.axes[largest, range(6)] > 0).all())
    torch.testing.assert_close(mirrored.axes, codec.axes, rtol=0.0, atol=1e-12)  # eigenvectors of one matrix
    assert bool((codec.encode(data).var(0).diff() < 0).all())


def test_noise_of_integers_counts():
    data = torch.tensor([[0, 1], [1, 1]])  # variances 1/4 and 0, to which u adds 1/12
    codec = PCA.fit(DataSpec((2,), levels=2), data, whiten=True)
    torch.testing.assert_close(codec.widths.square(), torch.tensor([1 / 3, 1 / 12], dtype=torch.float64))


def test_null_directions_are_whitened_with_a_floor_only():
    data, _, _ = gaussian()
    flat = torch.cat([data, data[:, :2].sum(1, keepdim=True)], 1).float()
    with pytest.raises(ValueError, match=r"1 of the 7 directions .* null.*`floor`"):
        PCA.fit(DataSpec((7,)), flat, whiten=True)
    codec = PCA.fit(DataSpec((7,)), flat, whiten=True, floor=0.1)
    assert float(codec.widths.min()) == 0.1
    torch.testing.assert_close(codec.decode(codec.encode(flat)), flat, rtol=0.0, atol=1e-5)
    assert PCA.fit(DataSpec((7,)), flat).log_volume < 0.0  # a rotation needs no floor


# --- Haar -------------------------------------------------------------------------------------------------------------


def test_haar_bands_are_where_they_are_said_to_be():
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = Haar((3, 4, 4), levels=2).encode(z)
    assert x.shape == (2, 48, 1, 1)
    sums = z.unflatten(3, (2, 2)).unflatten(2, (2, 2)).sum((3, 5)) / 2.0  # (2, 3, 2, 2)
    torch.testing.assert_close(x[:, :3, 0, 0], sums.sum((2, 3)) / 2.0)
    along_h, along_w = (sums.diff(dim=d).sum((2, 3)) / -2.0 for d in (2, 3))
    both = sums.diff(dim=2).diff(dim=3).sum((2, 3)) / 2.0
    torch.testing.assert_close(x[:, 3:12, 0, 0], torch.cat([along_h, along_w, both], 1))
    fine = (z[:, :, 0::2] - z[:, :, 1::2]).unflatten(3, (2, 2)).sum(4) / 2.0  # along H, the first kind of level one
    torch.testing.assert_close(x[:, 12:24, 0, 0], fine.flatten(1))


def test_haar_of_integers_is_exact():
    spec = DataSpec((3, 8, 8), levels=256)
    data = torch.randint(0, 256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    z = spec.dequantize(data)
    codec = Haar.fit(spec, data, levels=3)
    assert torch.equal(codec.decode(codec.encode(z)), z)


def test_bands_have_size_one():
    spec = SPECS["pixels"]
    data = correlated(spec)
    codec = Haar.fit(spec, data, levels=2, per_band=True)
    x = codec.encode(spec.dequantize(data, dtype=torch.float64))
    bands = x.split([2, 2, 2, 2, 8, 8, 8], 1)
    assert len(codec.bands) == len(bands) == 7
    torch.testing.assert_close(torch.stack([b.square().mean() for b in bands]), torch.ones(7, dtype=torch.float64))


def test_space_without_channels():
    z = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    codec = Haar.fit(DataSpec((4, 4), layout="HW"), z)
    assert codec.state_shape == (4, 2, 2)
    assert Haar.fit(DataSpec((4, 4)), z).state_shape == (8, 2)  # four channels of a series
    torch.testing.assert_close(codec.decode(codec.encode(z)), z)


# --- what is refused --------------------------------------------------------------------------------------------------

ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PCA.fit(DataSpec((4,))), "needs data"),
        (lambda: PCA.fit(DataSpec((4,)), ONES), "constant"),
        (lambda: PCA.fit(DataSpec((4,)), torch.eye(4), floor=-1.0), "`floor`"),
        (lambda: Haar((3, 6, 8), levels=2), "multiples of 4"),
        (lambda: Haar((3, 8, 8), levels=0), "`levels`"),
        (lambda: Haar((3, 8, 8), bands=[1.0]), "must be 4 finite"),
        (lambda: Haar((3, 8, 8), bands=[1.0, 1.0, 0.0, 1.0]), "> 0"),
        (lambda: Haar.fit(DataSpec((8, 8, 3), layout="HWC")), "channels first"),
        (lambda: Haar.fit(DataSpec((4,), levels=3), per_band=True), "needs data"),
        (lambda: Haar.fit(DataSpec((4,), levels=3), ONES, per_band=True), "band of these data is 0"),
        (lambda: Affine((2,), scale=0.0), "`scale`"),
    ],
)
def test_refusals_say_what_to_do(make, says):
    with pytest.raises(ValueError, match=says):
        make()
