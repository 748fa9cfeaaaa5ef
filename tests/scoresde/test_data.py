"""Splits, units and exact densities of the data sources, and what they say to bad files."""

import math

import numpy as np
import pytest
import torch

from scoresde.codecs import Affine
from scoresde.data import DATASETS, Arrays, Checkerboard, Digits, Ring, Toy

TOYS = sorted(name for name, cls in DATASETS.items() if issubclass(cls, Toy))


def labels_of(d):
    return torch.cat([part.condition["class_label"] for part in (d.train, d.held_out)])


def test_digits_are_all_there_once_and_split_by_seed():
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    d = Digits(held_out=0.2, seed=3).load()
    assert len(d.held_out) == 359 and len(d.train) == 1438
    rows = torch.cat([d.train.data, d.held_out.data]).flatten(1).long()
    labelled = torch.cat([rows, labels_of(d)[:, None]], 1)
    whole = torch.tensor(np.concatenate([images, classes[:, None]], 1)).long()

    def ordered(a):
        return sorted(map(tuple, a.tolist()))

    assert ordered(labelled) == ordered(whole)
    again, other = Digits(held_out=0.2, seed=3).load(), Digits(held_out=0.2, seed=4).load()
    assert torch.equal(d.held_out.data, again.held_out.data)
    assert not torch.equal(d.held_out.data, other.held_out.data)
    assert d.spec.num_classes == 10 and not Digits(labels=False).load().train.condition


def test_digits_survive_encoding_for_any_dequantization_noise():
    d = Digits().load()
    codec = Affine.fit(d.spec)
    levels = torch.arange(17).reshape(17, 1, 1, 1).expand(17, 1, 8, 8)
    for u in (None, 0.0, 0.5, 1.0 - 2**-10):
        x = codec.encode(d.spec.dequantize(levels, u))
        assert torch.equal(d.spec.quantize(codec.decode(x)), levels)
        assert float(x.min()) >= -1.0 and float(x.max()) < 1.0
    d.spec.check(d.train.data)


@pytest.mark.parametrize("name", TOYS)
def test_toy_density_integrates_to_one(name):
    toy = DATASETS[name]()
    n, half = 401, 3.0
    # midpoint rule: spectrally accurate for smooth densities that vanish at the border, exact to one cell at edges
    centres = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * half / n) - half
    points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(-1, 2)
    density = torch.cat([toy.log_prob(part).exp() for part in points.split(50_000)])
    mass = float(density.sum()) * (2 * half / n) ** 2
    tolerance = 4 * 8 * (2 * half / n) / 8.0 if name == "checkerboard" else 1e-6
    assert abs(mass - 1.0) < tolerance


@pytest.mark.parametrize("name", TOYS)
def test_toy_samples_follow_their_density(name):
    """Mean log density of the samples against the same mean by importance sampling from a wide uniform."""
    toy = DATASETS[name](n=20_000)
    d = toy.load()
    assert torch.equal(toy.load().train.data, d.train.data) and len(d.held_out) == 4000
    assert not torch.equal(DATASETS[name](n=20_000, seed=1).load().train.data, d.train.data)
    log_p = d.log_prob(d.train.data.double())
    assert bool(log_p.isfinite().all())
    u = (torch.rand(100_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * 6.0
    log_q = torch.cat([toy.log_prob(part) for part in u.split(50_000)])
    terms = 36.0 * torch.where(log_q.isfinite(), log_q.exp() * log_q, 0.0)
    error = math.sqrt(float(terms.var()) / len(terms) + float(log_p.var()) / len(log_p))
    assert abs(float(log_p.mean() - terms.mean())) < 4.5 * error + 1e-12
    # moments: both halves of the plane, both coordinates
    target = (36.0 * log_q.exp()[:, None] * u).mean(0)
    spread = (36.0 * log_q.exp()[:, None] * u).std(0) / math.sqrt(len(u)) + d.train.data.double().std(0) / 126.0
    assert bool(((d.train.data.double().mean(0) - target).abs() < 4.5 * spread).all())


def test_ring_mixture_scores_are_the_gradient_of_the_density():
    toy = Ring()
    x = torch.tensor([[0.9, 0.1], [-0.4, 0.5]], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(toy.log_prob(x).sum(), x)[0]
    from sde_lib import VESDE

    knot = VESDE(sigma_min=1e-6).knot(1e-5)  # almost no noise
    torch.testing.assert_close(toy.mixture.score(x.detach(), knot), gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Ring, {"modes": 0}),
        (Ring, {"std": -1.0}),
        (Ring, {"n": 1}),
        (Ring, {"held_out": 0.0}),
        (Checkerboard, {"squares": 3}),
        (Digits, {"held_out": 1.0}),
        (Arrays, {"levels": 1}),
        (Arrays, {"layout": "NCWH"}),
    ],
)
def test_bad_options_are_refused(cls, options):
    with pytest.raises(ValueError, match=r"must|fraction|empty"):
        cls(**options)


# --- arrays -----------------------------------------------------------------------------------------------------------
def test_real_arrays_are_standardized_on_the_training_split(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(5.0, 3.0, (200, 4)).astype(np.float32))
    d = Arrays(path=str(tmp_path / "x.npy"), held_out=0.25).load()
    assert len(d.train) == 150 and d.spec.levels is None and d.name == "x"
    codec = Affine.fit(d.spec, d.train.data)
    x = codec.encode(d.train.data)
    assert abs(float(x.mean())) < 1e-5 and abs(float(x.std()) - 1.0) < 1e-3
    torch.testing.assert_close(codec.decode(x), d.train.data)
    low, high = d.spec.range
    assert float(d.train.data.min()) <= low < high <= float(d.train.data.max())


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [("NHWC", (20, 4, 6, 3), (3, 4, 6)), ("NHW", (20, 4, 6), (1, 4, 6)), ("as_is", (20, 3, 4, 6), (3, 4, 6))],
)
def test_integer_images_in_any_layout(tmp_path, layout, shape, expected):
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    images.flat[:2] = 0, 255
    classes = np.arange(20) % 4
    np.savez(tmp_path / "x.npz", images=images, y=classes)
    options = {"key": "images", "labels_key": "y", "levels": 256, "layout": layout, "held_out": 0.2}
    d = Arrays(path=str(tmp_path / "x.npz"), **options).load()
    assert d.spec.shape == expected and d.spec.num_classes == 4 and d.train.data.dtype == torch.uint8
    assert sorted(labels_of(d).tolist()) == sorted(classes.tolist())
    codec = Affine.fit(d.spec)
    x = codec.encode(d.spec.dequantize(d.train.data))
    assert float(x.abs().max()) < 1.0 and torch.equal(d.spec.quantize(codec.decode(x)), d.train.data.long())


def test_bad_arrays_are_clear_errors(tmp_path):
    def written(array, name="x.npy", **arrays):
        path = tmp_path / name
        if name.endswith(".npy"):
            np.save(path, array, allow_pickle=True)
        else:
            np.savez(path, **arrays)
        return str(path)

    good = np.zeros((10, 2), dtype=np.float32)
    good[0] = 1.0
    bad = good.copy()
    bad[3, 1] = np.nan
    cases = [
        ({"path": ""}, "empty"),
        ({"path": "x.csv"}, "must end in"),
        ({"path": written(bad)}, "1 of 10 samples"),
        ({"path": written(good + 0.5, "f.npy"), "levels": 4}, "fractions"),
        ({"path": written(good * 9, "r.npy"), "levels": 4}, r"0 … 3"),
        ({"path": written(np.array(["a", "b"]), "s.npy")}, "dtype"),
        ({"path": written(good[:, 0], "v.npy")}, r"\(N, \*D\)"),
        ({"path": written(good, "l.npy"), "layout": "NHWC"}, "4 dimensions"),
        ({"path": written(good * 0, "c.npy")}, "constant"),
        ({"path": written(good, "k.npy"), "labels_key": "y"}, "one array"),
        ({"path": written(None, "k.npz", a=good, b=good)}, "holds a, b"),
        ({"path": written(None, "y.npz", data=good, y=good[:, 0]), "labels_key": "y"}, "integers of shape"),
        ({"path": written(None, "n.npz", data=good, y=np.full(10, -1)), "labels_key": "y"}, ">= 0"),
        ({"path": written(good[:2], "two.npy"), "held_out": 0.01}, "leaves"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            Arrays(**options).load()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Arrays(path=str(tmp_path / "nowhere.npy")).load()


class _Bomb:
    def __reduce__(self):
        return (print, ("BOOM",))


def test_pickles_and_damaged_files_are_not_read(tmp_path, capsys):
    np.save(tmp_path / "p.npy", np.array([_Bomb()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "whole.npz", data=np.zeros((100, 50)))
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("p.npy", "half.npz", "empty.npy"):
        with pytest.raises(ValueError, match="Cannot read"):
            Arrays(path=str(tmp_path / name)).load()
    assert "BOOM" not in capsys.readouterr().out
