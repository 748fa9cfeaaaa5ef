"""Bits per dimension against laws that are known in full: bounds from enumeration, files, batches, devices."""

import json
import math
import time

import pytest
import torch
from together import in_processes

from scoresde import DataSpec, GaussianMixture, ScoreModel, bits_per_dim
from scoresde.codecs import Affine
from scoresde.likelihood.dequantization import as_dequantization, name_of
from scoresde.likelihood.scores import COLUMNS
from scoresde.storage.processes import process
from sde_lib import VPSDE
from solvers import Status


class Exact(torch.nn.Module):
    """A 'network' that knows the score: what a trained one would be at best."""

    def __init__(self, data, law):
        super().__init__()
        self.data, self.law = data, law
        self.dummy = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, noise_level, class_label=None):
        return self.data.reverse(self.law)(x, self.law.knot(noise_level, ndim=x.ndim)).v


def model_of(data, spec, t_min=1e-4, codec=None):
    law = VPSDE(t_min=t_min)
    return ScoreModel(Exact(data, law), law, "v", "time", spec, 1.0, "none", codec=codec)


LINE = GaussianMixture([[-0.4], [0.5]], std=[0.15, 0.1], weights=[0.6, 0.4])
"""A density on the line, in model units."""
SPEC = DataSpec((1,), 16)


def mass(data, spec, knot, points=4000):
    """log P of every bin under the density of y = x / alpha at a knot, and log p at points within, in data units."""
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    half = spec.levels / 2  # the default codec spreads the levels over [-1, 1)
    z = (torch.arange(spec.levels).double()[:, None] + u - half) / half
    log_p = data.log_prob(knot.alpha * z.reshape(-1, 1), knot).reshape(spec.levels, -1)
    log_p = log_p + math.log(knot.alpha / half)
    return torch.logsumexp(log_p, 1) - math.log(points), log_p


def test_uniform_dequantization_of_a_known_law():
    """All 16 levels: the expectation E_u[-log p(k + u)] by quadrature of the known density, within its own noise; above
    the cross entropy bin by bin (Jensen); the whole within 0.15 bits of the entropy."""
    model = model_of(LINE, SPEC)
    options = {"steps": 32, "doubling": False, "batch_size": 4096}
    result = bits_per_dim(model, torch.arange(16)[:, None], samples=64, dequantization="uniform", **options)
    log_mass, log_p = mass(LINE, SPEC, model.law.knot(model.law.t_min))
    expected = -log_p.mean(1) / math.log(2)
    spread = log_p.std(1) / math.log(2) / math.sqrt(64)
    assert ((result.per_sample - expected).abs() < 4.5 * spread + 1e-4).all()
    assert (result.per_sample > -log_mass / math.log(2) - 4.5 * spread - 1e-4).all()
    p = log_mass.exp() / log_mass.exp().sum()
    entropy = -float((p * p.log2()).sum())
    assert entropy < float((p * result.per_sample).sum()) < entropy + 0.15
    assert "uniform" in result.what and "16 levels" in result.what and result.standard_error > 0


@pytest.mark.parametrize("t_min", [1e-4, 2e-3])
def test_truncated_normal_dequantization_of_a_known_law(t_min):
    """Its law is on the bin, its density integrates to one, and the bound is that of the density at t_min."""
    model = model_of(LINE, SPEC, t_min)
    knot = model.law.knot(t_min)
    k = torch.arange(16)[:, None]
    draw = as_dequantization("truncated_normal", model.codec, knot)
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, log_q = draw(torch.zeros(200_000, 1), noise)
    assert float(u.min()) >= 0 and float(u.max()) <= 1
    # E_q[1 / q] = 1 over the part of the bin that q reaches: all of it for wide noise
    ratio = model.codec.scale * float(knot.sigma / knot.alpha)
    width = float((-log_q).exp().mean())
    assert abs(width - 1) < 0.02 or ratio < 0.15
    assert abs(float(u.mean()) - 0.5) < 4 * float(u.std()) / math.sqrt(200_000)
    options = {"steps": 32, "doubling": False, "batch_size": 4096}
    result = bits_per_dim(model, k, samples=64, dequantization="truncated_normal", **options)
    log_mass, _ = mass(LINE, SPEC, knot)
    slack = 4.5 * result.trace_se + 0.09  # 64 draws
    assert (result.per_sample > -log_mass / math.log(2) - slack).all()
    if ratio > 0.3:
        assert (result.per_sample < -log_mass / math.log(2) + 1.0).all()


def test_importance_weighting_is_tighter_and_keeps_its_k():
    """With uniform noise the bound for K draws has a known limit, log P, and never passes it; without the -log K it
    would, by log2(64) = 6 bits."""
    model = model_of(LINE, SPEC)
    k = torch.arange(16)[:, None]
    log_mass, _ = mass(LINE, SPEC, model.law.knot(model.law.t_min))
    exact = -log_mass / math.log(2)
    options = {"dequantization": "uniform", "samples": 64, "steps": 32, "doubling": False, "batch_size": 4096}
    mean = bits_per_dim(model, k, **options).per_sample
    iw = bits_per_dim(model, k, bound="iw", **options)
    assert (iw.per_sample <= mean + 1e-9).all()
    assert float((iw.per_sample - exact).abs().median()) < 0.05 and float((mean - exact).median()) > 0.05
    assert "importance-weighted bound, 64 draws" in iw.what


def test_the_noise_of_traces_does_not_lift_an_importance_weighted_bound():
    """Eight dimensions, probes: exp() of a noisy log p is larger on average; half the variance is taken off, and the
    mean over many seeds is where the exact trace puts it."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=g, dtype=torch.float64) / 4
    data = GaussianMixture(torch.zeros(1, 8), covariances=(root @ root.T + 0.02 * torch.eye(8))[None])
    model = model_of(data, DataSpec((8,), 16))
    counts = torch.full((1, 8), 8)
    options = {"dequantization": "uniform", "samples": 4, "bound": "iw", "steps": 16, "doubling": False}
    noisy = bits_per_dim(model, counts.expand(300, 8), divergence="hutchinson", num_probes=8, **options)
    exact = bits_per_dim(model, counts.expand(300, 8), divergence="exact", **options)
    gap = noisy.per_sample - exact.per_sample  # same dequantizations
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(300)
    assert float(noisy.trace_se.mean()) > 0.01


def test_a_density_of_ones_own():
    """The optimal one, p(u | k) itself, makes the bound an equality; one that leaves the bin is refused."""
    model = model_of(LINE, SPEC)
    knot = model.law.knot(model.law.t_min)
    log_mass, log_p = mass(LINE, SPEC, knot)
    p = log_p.exp() / log_p.exp().sum(1, keepdim=True)

    def optimal(data, noise):
        row = data[:, 0].long()
        at = torch.searchsorted(p[row].cumsum(1), torch.special.ndtr(noise)).clamp(max=3999)
        return (at + 0.5) / 4000, (p[row].gather(1, at) * 4000).log()[:, 0]

    k = torch.arange(16)[:, None]
    result = bits_per_dim(model, k, dequantization=optimal, tol=1e-4)
    # log p changes by up to 2e-3 bits within one of the 4000 cells
    torch.testing.assert_close(result.per_sample, -log_mass / math.log(2), rtol=0, atol=2e-3)
    assert result.dequantization == "optimal"
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        bits_per_dim(model, k, dequantization=lambda d, z: (z, z[:, 0]))
    with pytest.raises(ValueError, match="log q of shape"):
        bits_per_dim(model, k, dequantization=lambda d, z: (0.5 + 0 * z, z))


def test_auto_takes_the_normal_where_it_fills_the_bin():
    wide, narrow = VPSDE(t_min=1e-3), VPSDE(t_min=1e-5)
    codec = Affine.fit(DataSpec((3, 8, 8), 256))
    assert name_of("auto", codec, wide.knot(1e-3)) == "truncated_normal"
    assert name_of("auto", codec, narrow.knot(1e-5)) == "uniform"


def test_continuous_data_account_for_their_scaling():
    """A Gaussian in data units: its own log density, whatever shift and scale the model works in."""
    model = model_of(GaussianMixture([[0.0, 0.0]], std=0.5), DataSpec((2,)), 1e-5, Affine((2,), 5.0, 4.0))
    z = 5.0 + 2.0 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = bits_per_dim(model, z, tol=1e-5)
    want = -torch.distributions.Normal(5.0, 2.0).log_prob(z).sum(1) / (2 * math.log(2))
    torch.testing.assert_close(result.per_sample, want, rtol=0, atol=2e-3)
    assert result.dequantization is None and "data units" in result.what


def test_results_depend_on_seed_and_sample_alone():
    """Not on batches, nor on devices, nor on the order."""
    spec = DataSpec((2,), 5)
    model = model_of(GaussianMixture([[-0.4, 0.1], [0.5, 0.2]], std=[0.3, 0.2]), spec)
    counts = torch.randint(0, 5, (7, 2), generator=torch.Generator().manual_seed(0))
    options = {"divergence": "hutchinson", "steps": 16, "samples": 2}
    first = bits_per_dim(model, counts, batch_size=7, seed=3, **options)
    for other in ({"batch_size": 2}, {"batch_size": 3, "devices": ["cpu", "cpu"]}, {"devices": ["cpu"]}):
        again = bits_per_dim(model, counts, seed=3, **other, **options)
        torch.testing.assert_close(again.per_sample, first.per_sample, rtol=0, atol=1e-9)
        torch.testing.assert_close(again.trace_se, first.trace_se)
    assert not torch.equal(first.per_sample, bits_per_dim(model, counts, seed=4, **options).per_sample)


def test_a_killed_run_goes_on(tmp_path):
    """Rows are there as they are done; a half-written one is done again; the result is that of one go."""
    spec = DataSpec((2,), 5)
    data = GaussianMixture([[-0.4, 0.1], [0.5, 0.2]], std=[0.3, 0.2])
    model = model_of(data, spec)
    counts = torch.randint(0, 5, (9, 2), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "new" / "scores.csv"
    options = {"batch_size": 2, "steps": 16, "divergence": "hutchinson"}
    want = bits_per_dim(model, counts, **options)

    calls = []
    whole = Exact.forward

    def dies(self, x, noise_level, class_label=None):
        calls.append(len(x))
        if len(calls) > 150:
            raise KeyboardInterrupt
        return whole(self, x, noise_level)

    Exact.forward = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            bits_per_dim(model, counts, path=path, **options)
    finally:
        Exact.forward = whole
    lines = path.read_text().splitlines()
    assert lines[1] == f"index,{','.join(COLUMNS)}" and 2 < len(lines) < 11
    with path.open("a") as file:
        file.write("8,1.5,0.1")
    log, calls[:] = [], []

    def counted(self, x, noise_level, class_label=None):
        log.append(len(x))
        return whole(self, x, noise_level)

    Exact.forward = counted
    try:
        got = bits_per_dim(model, counts, path=path, **options)
        spent = len(log)
        again = bits_per_dim(model, counts, path=path, **options)
    finally:
        Exact.forward = whole
    assert len(log) == spent  # nothing is left to do
    torch.testing.assert_close(got.per_sample, want.per_sample)
    torch.testing.assert_close(again.per_sample, want.per_sample)
    assert len(path.read_text().splitlines()) == 11
    others = {"seed": {"seed": 1}, "options": {"steps": 32}, "deq": {"dequantization": "truncated_normal"}}
    for name, other in others.items():
        with pytest.raises(ValueError, match=name):
            bits_per_dim(model, counts, path=path, **options | other)
    with pytest.raises(ValueError, match="data"):
        bits_per_dim(model, counts[:5], path=path, **options)
    with torch.no_grad():
        model.network.dummy += 1.0
    with pytest.raises(ValueError, match="model"):
        bits_per_dim(model, counts, path=path, **options)
    assert len(bits_per_dim(model, counts[:3], path=path, resume=False, **options).per_sample) == 3
    (tmp_path / "note.csv").write_text("mine\n")
    with pytest.raises(ValueError, match="not a file of scores"):
        bits_per_dim(model, counts, path=tmp_path / "note.csv")


def _scored_by_two(path):
    spec = DataSpec((2,), 5)
    model = model_of(GaussianMixture([[-0.4, 0.1], [0.5, 0.2]], std=[0.3, 0.2]), spec)
    counts = torch.randint(0, 5, (7, 2), generator=torch.Generator().manual_seed(0))
    time.sleep(0.5 * process()[0])  # the first is done with some rows before the other looks
    return bits_per_dim(model, counts, batch_size=2, steps=16, divergence="hutchinson", path=path).per_sample.tolist()


@pytest.mark.slow
def test_processes_share_the_work(tmp_path):
    """Two processes: each scores its half, both get the whole, which is that of one, and every row is written once.

    They start from what a killed run of two left: rows 0 and 1 in its two files, and half a row."""
    spec = DataSpec((2,), 5)
    model = model_of(GaussianMixture([[-0.4, 0.1], [0.5, 0.2]], std=[0.3, 0.2]), spec)
    counts = torch.randint(0, 5, (7, 2), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "scores.csv"
    alone = bits_per_dim(model, counts, steps=16, divergence="hutchinson", path=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[4][:9])
    (tmp_path / "scores.rank1.csv").write_text("".join([*lines[:2], lines[3]]))
    for result in in_processes(2, _scored_by_two, str(path)):
        torch.testing.assert_close(torch.tensor(result, dtype=torch.float64), alone.per_sample)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]
    written = path.read_text().splitlines()
    assert written[:2] == [line.rstrip() for line in lines[:2]]
    assert [int(line.split(",")[0]) for line in written[2:]] == list(range(7))



def test_a_target_for_the_noise_of_the_traces():
    """Options go through to `log_likelihood`: here more probes until every sample is below the target."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(20, 20, generator=g, dtype=torch.float64) / 6
    data = GaussianMixture(torch.zeros(1, 20), covariances=(root @ root.T + 0.02 * torch.eye(20))[None])
    model = model_of(data, DataSpec((20,), 16))
    counts = torch.full((4, 20), 8)
    plain = bits_per_dim(model, counts, steps=16)
    fine = bits_per_dim(model, counts, steps=16, target_se=0.3)
    assert float(plain.trace_se.max()) * 20 * math.log(2) > 0.3 >= float(fine.trace_se.max()) * 20 * math.log(2)
    assert (fine.vjps > plain.vjps).all()


def test_the_summary_says_what_the_figure_is():
    spec = DataSpec((2,), 5)
    data = GaussianMixture([[-0.4, 0.1], [0.5, 0.2]], std=[0.3, 0.2])
    model = model_of(data, spec)
    counts = torch.randint(0, 5, (6, 2), generator=torch.Generator().manual_seed(0))
    result = bits_per_dim(model, counts, tol=1e-3)
    summary = json.loads(json.dumps(result.summary()))
    assert summary["count"] == 6 and summary["failed"] == 0 and summary["levels"] == 5
    assert set(summary["systematic"]) == {"discretization", "truncation", "prior_mismatch", "precision"}
    assert summary["mean"] == result.mean and summary["what"] in str(result) and "at t = 0.0001" in result.what
    both = bits_per_dim(model, counts, tol=1e-3, correct=["truncation", "prior"])
    assert set(both.systematic) == {"discretization", "precision"} and "at t = 0" in both.what.split(", ")[-1]
    gained = result.systematic["truncation"] + result.systematic["prior_mismatch"]
    assert both.mean == pytest.approx(result.mean - gained, abs=1e-9)


def test_failed_samples_are_left_out_and_counted():
    class Broken(Exact):
        def forward(self, x, noise_level, class_label=None):
            v = super().forward(x, noise_level)
            return torch.where((x[:, :1] > 0.9) & (noise_level[:, None] < 0.5), math.nan, v)

    law, spec = VPSDE(), DataSpec((2,), 4)
    data = GaussianMixture([[0.0, 0.0]], std=[0.5])
    model = ScoreModel(Broken(data, law), law, "v", "time", spec, 1.0, "none")
    counts = torch.tensor([[0, 1], [3, 3], [1, 2]])
    result = bits_per_dim(model, counts, tol=1e-3, dequantization=lambda d, z: (0.95 + 0 * z, z[:, 0] * 0))
    assert result.status.tolist() == [Status.OK, Status.NON_FINITE, Status.OK]
    assert "1 of 3 samples failed" in result.what and result.summary()["failed"] == 1
    assert result.mean == pytest.approx(float(result.per_sample[[0, 2]].mean()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.rand(4, 2), "integers"),
        (torch.full((4, 2), 7), "0 … 4"),
        (torch.zeros(4, 3, dtype=torch.int64), "shape"),
        (torch.tensor([[math.nan, 0.0]]), "NaN"),
        (torch.zeros(0, 2, dtype=torch.int64), "empty"),
    ],
)
def test_bad_data_are_refused(data, message):
    model = model_of(GaussianMixture([[0.0, 0.0]], std=1.0), DataSpec((2,), 5))
    with pytest.raises(ValueError, match=message):
        bits_per_dim(model, data)


def test_bad_arguments_are_refused():
    law = VPSDE()
    data = GaussianMixture([[0.0, 0.0]], std=1.0)
    model = model_of(data, DataSpec((2,), 5))
    counts = torch.zeros(3, 2, dtype=torch.int64)
    for options, message in (
        ({"levels": 256}, "5 levels"),
        ({"dequantization": "unifrom"}, "Did you mean 'uniform'"),
        ({"bound": "vlb"}, "elbo, iw"),
        ({"samples": 0}, "samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"condition": {"class_label": torch.zeros(2)}}, "a row per sample at every depth, 3"),
        ({"steps": 7}, "multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            bits_per_dim(model, counts, **options)
    for options, message in (
        ({"dequantization": 3}, "dequantization"),
        ({"condition": [0, 1, 1]}, "must be a mapping"),
        ({"step": 8}, "no option 'step'. Did you mean 'steps'"),
        ({"rng": 0}, "no option 'rng'"),
        ({"seed": "0"}, "`seed` must be an int"),
    ):
        with pytest.raises(TypeError, match=message):
            bits_per_dim(model, counts, **options)
    with pytest.raises(ValueError, match="data_spec"):
        bits_per_dim(ScoreModel(Exact(data, law), law, "v", "time", None, 1.0, "none"), counts)
    chain = ScoreModel(Exact(data, law), law.discretize(50), "v", "index", DataSpec((2,), 5), 1.0, "none")
    with pytest.raises(ValueError, match="chain"):
        bits_per_dim(chain, counts)
