"""Splits, units and exact densities of the data sources, and what they say to bad files."""

import math

import numpy as np
import pytest
import torch

from scoresde.cli import main
from scoresde.codecs import Affine
from scoresde.data import DATASETS, Arrays, Checkerboard, ConditionSpec, DataSpec, Digits, Ring, Toy

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
        ({"path": written(good, "k.npy"), "conditions": "y:vector"}, "one array"),
        ({"path": written(good[:2], "two.npy"), "held_out": 0.01}, "leaves"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            Arrays(**options).load()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Arrays(path=str(tmp_path / "nowhere.npy")).load()


# --- conditions of arrays ---------------------------------------------------------------------------------------------
def several(n=30):
    """Arrays with a condition of every kind, that all tell the number of their row."""
    row = np.arange(n)
    mask = (row[:, None] + np.arange(3)) % 3 > 0
    return {
        "data": np.stack([row, row % 7], 1) / 10.0,
        "labels": row % 3,
        "style": row % 4,
        "pose": np.stack([row, -row, 0.5 * row], 1),
        "low": row[:, None, None, None] + np.zeros((n, 2, 4, 1)),
        "text.tokens": np.where(mask[..., None], row[:, None, None] + np.arange(2.0), np.nan),
        "text.mask": mask,
        "words": np.where(mask, row[:, None] % 5, -1),
        "words.mask": mask,
    }


WORDS = "style:class:6, pose:vector, low:image, text:tokens,words:tokens:9"


def test_conditions_of_every_kind_stay_with_their_rows(tmp_path):
    arrays = several()
    np.savez(tmp_path / "x.npz", other=np.array([_Bomb()], dtype=object), **arrays)  # what is not named is not read
    d = Arrays(path=str(tmp_path / "x.npz"), labels_key="labels", conditions=WORDS, held_out=0.3).load()
    specs = {
        "class_label": ConditionSpec("class", classes=3),
        "style": ConditionSpec("class", classes=6),
        "pose": ConditionSpec("vector", (3,)),
        "low": ConditionSpec("image", (2, 4, 1)),
        "text": ConditionSpec("tokens", (3, 2)),
        "words": ConditionSpec("tokens", (3,), classes=9),
    }
    assert d.spec.conditions == specs and DataSpec.from_dict(d.spec.to_dict()) == d.spec
    for part in (d.train, d.held_out):
        d.spec.check_condition(part.condition, len(part))
        row, given = (10 * part.data[:, 0]).round().long(), part.condition
        assert torch.equal(given["class_label"], row % 3) and torch.equal(given["style"], row % 4)
        assert torch.equal(given["pose"][:, 1], -row.float()) and torch.equal(given["low"][:, 1, 3, 0], row.float())
        mask = torch.from_numpy(arrays["text.mask"])[row]
        for name, value in (("text", row[:, None].float() + 1.0), ("words", row[:, None] % 5)):
            tokens = given[name]["tokens"] if name == "words" else given[name]["tokens"][..., 1]
            assert torch.equal(given[name]["mask"], mask)
            assert torch.equal(tokens, torch.where(mask, value, torch.zeros_like(value)))  # nothing behind the mask


def test_images_among_the_conditions_are_stored_as_the_data(tmp_path):
    low = np.random.default_rng(0).normal(size=(8, 4, 6, 3))
    np.savez(tmp_path / "x.npz", data=low, low=low)
    d = Arrays(path=str(tmp_path / "x.npz"), conditions="low:image", layout="NHWC").load()
    assert d.spec.conditions["low"].shape == (3, 4, 6) and torch.equal(d.train.condition["low"], d.train.data)
    # tokens without a mask are all there
    np.savez(tmp_path / "y.npz", data=low, text=low[:, :, 0])
    d = Arrays(path=str(tmp_path / "y.npz"), conditions="text:tokens").load()
    assert d.spec.conditions["text"].shape == (4, 3) and bool(d.train.condition["text"]["mask"].all())


def test_from_a_file_to_guided_samples_and_back(tmp_path, capsys):
    """Trained on a file with conditions of every kind, sampled under some, and the samples are such a file again."""
    arrays = several() | {"low": np.zeros((30, 1, 2, 2)) + np.arange(30.0)[:, None, None, None]}
    np.savez(tmp_path / "x.npz", **arrays)
    run = f"--workdir={tmp_path / 'run'}"
    overrides = {
        "data.name": "arrays", "data.arrays.path": tmp_path / "x.npz", "data.arrays.labels_key": "labels",
        "data.arrays.conditions": WORDS, "network.name": "mlp", "network.mlp.width": 8, "network.mlp.depth": 1,
        "training.steps": 2, "training.batch_size": 8, "training.condition_dropout": "text:0.5", "sampling.n": 3,
    }  # fmt: skip
    train = [f"--config.{name}={value}" for name, value in overrides.items()]
    assert main(["train", "--config=toy_ring", run, *train]) == 0
    np.savez(tmp_path / "text.npz", tokens=np.ones((3, 2, 2)), mask=np.array([[True, False]] * 3))
    np.save(tmp_path / "pose.npy", np.arange(9.0).reshape(3, 3))
    given = [f"--condition.text={tmp_path / 'text.npz'}", f"--condition.pose={tmp_path / 'pose.npy'}", "--class=1"]
    assert main(["sample", run, "--guidance=2", "--nfe=8", f"--out={tmp_path / 's.npz'}", *given]) == 0
    d = Arrays(
        path=str(tmp_path / "s.npz"), labels_key="labels", conditions="text:tokens, pose:vector", held_out=0.4
    ).load()
    both = torch.cat([d.train.condition["pose"], d.held_out.condition["pose"]])
    assert sorted(both[:, 0].tolist()) == [0.0, 3.0, 6.0] and labels_of(d).tolist() == [1, 1, 1]
    assert d.train.condition["text"]["mask"].tolist() == [[True, False, False]] * 2
    assert main(["sample", run, "--condition.txt=1"]) == 2
    assert "Did you mean 'text'" in capsys.readouterr().err


BAD = np.where(np.arange(30) == 3, np.nan, 1.0)[:, None]


@pytest.mark.parametrize(
    ("conditions", "changed", "message"),
    [
        ("pose", {}, 'name:kind.*, got \'pose\'|kind among'),
        ("pose:vectr", {}, "kind among .* got 'vectr'. Did you mean 'vector'"),
        ("pose:vector:3", {}, "a number, of classes"),
        ("style:class:0", {}, "positive; got 'style:class:0'"),
        ("style:class:6:7", {}, "name:kind or name:kind:classes"),
        ("a b:class", {}, "name:kind or name:kind:classes"),
        ("style:class, style:class", {}, "name 'style' twice"),
        ("class_label:class", {}, "name 'class_label' twice"),
        ("sty:class", {}, "no array 'sty' in the file; it holds data, labels"),
        ("style:class:3", {}, "'style' must be >= 0 and < 3, got values from 0 to 3"),
        ("pose:class", {}, r"'pose' must be integers of shape \(30,\), got float64"),
        ("labels:vector", {}, r"real numbers of shape \(N, d\) with N = 30.* got int64"),
        ("pose:image", {}, r"shape \(N, C, H, W\)"),
        ("pose:vector", {"pose": BAD}, "'pose' holds NaN or infinite values in 1 of 30"),
        ("pose:vector", {"pose": BAD[4:]}, "with N = 30"),
        ("text:tokens", {"text.mask": np.ones((30, 2), dtype=bool)}, "mask of condition 'text' must be bool of shape"),
        ("words:tokens", {"words.mask": np.ones((30, 3))}, "mask of condition 'words' must be bool.* got float64"),
        ("words:tokens:4", {}, "'words' must be >= 0 and < 4, got values from 0 to 4"),
    ],
)
def test_conditions_that_do_not_match(conditions, changed, message, tmp_path):
    np.savez(tmp_path / "x.npz", **(several() | changed))
    with pytest.raises(ValueError, match=message) as caught:
        Arrays(path=str(tmp_path / "x.npz"), labels_key="labels", conditions=conditions).load()
    assert "\n" not in str(caught.value)


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
