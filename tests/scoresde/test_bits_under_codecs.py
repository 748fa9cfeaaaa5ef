"""Bits/dim in data units, whatever the codec and the conditions: against closed forms and sums over bins."""

import math

import pytest
import torch

from scoresde import DataSpec, GaussianMixture, ScoreModel, bits_per_dim, elbo, elbo_of_data
from scoresde.codecs import CODECS, Affine, Codec
from scoresde.data.conditions import ConditionSpec
from scoresde.likelihood.bins import Bins
from scoresde.likelihood.bound import Run
from scoresde.likelihood.bound_chain import log_decoder
from scoresde.likelihood.bound_sde import log_softmax
from scoresde.likelihood.dequantization import as_dequantization, name_of
from sde_lib import VPSDE

SHAPE = (1, 4, 4)
D = 16
SPEC = DataSpec(SHAPE, levels=16)
LAW = VPSDE()


class Exact(torch.nn.Module):
    def __init__(self, states):
        super().__init__()
        self.states, self.dummy = states, torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, noise_level):
        return self.states.reverse(LAW)(x, LAW.knot(noise_level, ndim=x.ndim)).v


def exact(states, spec, codec, law=LAW):
    return ScoreModel(Exact(states), law, "v", "time", spec, 1.0, "none", codec=codec)


class Turned(Codec):
    """Orthogonal times a scale, saying nothing of its noise: the least that a bijection does."""

    name = "turned"

    def __init__(self, shape, scale):
        super().__init__(shape, shape)
        g = torch.Generator().manual_seed(5)
        self.turn = torch.linalg.qr(torch.randn(math.prod(shape), math.prod(shape), generator=g).double())[0]
        self.scale = scale

    @property
    def log_volume(self):
        return -math.prod(self.data_shape) * math.log(self.scale)

    def encode(self, z, draw=None):
        return (z.flatten(1) @ self.turn.T / self.scale).reshape(z.shape)

    def decode(self, x):
        return (x.flatten(1) @ self.turn * self.scale).reshape(x.shape)

    def config(self):
        return {"shape": list(self.data_shape), "scale": self.scale}


class Squeezed(Turned):
    """No bijection."""

    log_volume = None


def data_law():
    """A mixture in data units that fills some of the bins' range, correlated between neighbours."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(D, D, generator=g, dtype=torch.float64) + 2.0
    cov = 4.0 * a @ a.T / (a @ a.T).diagonal().mean() + 0.3 * torch.eye(D)
    means = 8.0 + 1.5 * torch.randn(2, *SHAPE, generator=g, dtype=torch.float64)
    return means, torch.stack([cov, 0.5 * cov])


def matrix_of(codec):
    """dx / dz of a linear codec by its own answers, and x of z = 0."""
    zero = codec.encode(torch.zeros(1, *SHAPE, dtype=torch.float64)).flatten(1)
    units = torch.eye(D, dtype=torch.float64).reshape(D, *SHAPE)
    return (codec.encode(units).flatten(1) - zero).T, zero


def states_of(codec, means, covariances):
    """The mixture that a linear codec makes of one in data units."""
    matrix, _ = matrix_of(codec)
    return GaussianMixture(codec.encode(means), covariances=matrix @ covariances @ matrix.T, weights=[0.3, 0.7])


def known_end(states):
    return lambda z: states.log_prob(z, LAW.knot(LAW.t_max))


CODES = torch.randint(4, 13, (3, *SHAPE), generator=torch.Generator().manual_seed(2))


def middle(data, noise):
    """A dequantization without randomness: what is scored is known."""
    return torch.full(noise.shape, 0.25, dtype=torch.float64), torch.zeros(len(data), dtype=torch.float64)


def codecs():
    many = torch.randint(0, 16, (64, *SHAPE), generator=torch.Generator().manual_seed(3))
    fitted = {name: cls.fit(SPEC, many) for name, cls in CODECS.items()}
    fitted["pca, whitened"] = CODECS["pca"].fit(SPEC, many, whiten=True)
    fitted["haar, two levels and bands"] = CODECS["haar"].fit(SPEC, many, levels=2, per_band=True)
    shifts, scales = (v.reshape(SHAPE).tolist() for v in (torch.linspace(6, 9, D), torch.logspace(0.5, 1, D)))
    return {**fitted, "each element": Affine(SHAPE, shifts, scales), "turned": Turned(SHAPE, 4.0)}


OTHERS = ("each element", "haar, two levels and bands", "pca, whitened", "turned")


@pytest.mark.parametrize("name", [*sorted(CODECS), *OTHERS])
def test_bits_per_dim_are_exact_under_every_linear_codec(name):
    """log p(z) = log p(x) + log |det dx/dz|, with the determinant of the codec's own answers, at t_min."""
    codec = codecs()[name]
    if codec.log_volume is None:
        with pytest.raises(ValueError, match=f"bijection, and '{name}' is none"):
            bits_per_dim(exact(None, SPEC, codec), CODES)
        return
    states = states_of(codec, *data_law())
    options = {"dequantization": middle, "tol": 1e-6, "doubling": False, "prior": known_end(states)}
    result = bits_per_dim(exact(states, SPEC, codec), CODES, **options)
    knot = LAW.knot(LAW.t_min)
    log_p = states.log_prob(knot.alpha * codec.encode(CODES.double() + 0.25), knot) + D * math.log(knot.alpha)
    log_p = log_p + torch.linalg.slogdet(matrix_of(codec)[0]).logabsdet
    # steps of 1e-6 nats each, some dozens of them, shared by 16 dimensions
    torch.testing.assert_close(result.per_sample, -log_p / (D * math.log(2.0)), rtol=0, atol=5e-6)


PAIR = DataSpec((2,), levels=8)
FLAT = GaussianMixture([[-0.4, 0.3], [0.5, -0.2]], std=[0.35, 0.25], weights=[0.6, 0.4])


@pytest.mark.parametrize("how", ["uniform", "truncated_normal"])
def test_bins_of_several_widths(how):
    """Two elements with scales of their own: the importance-weighted bound of 64 draws is log P of the bin, the
    integral of the density at t_min over it, which a 200 x 200 midpoint rule knows."""
    codec = Affine((2,), [4.0, 3.0], [4.0, 2.0])
    law = VPSDE(t_min=6e-3)  # noise of 0.16 and 0.08 bins: cut off by one, and hardly by the other
    model = exact(FLAT, PAIR, codec, law)
    knot, codes = law.knot(law.t_min), torch.tensor([[1, 4], [5, 2], [3, 3]])
    if how == "truncated_normal":
        law = VPSDE(t_min=0.06)  # noise of 1.1 and 0.5 bins: it fills them
        model, knot = exact(FLAT, PAIR, codec, law), law.knot(law.t_min)
    u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    within = torch.cartesian_prod(u, u)
    x = codec.encode((codes[:, None] + within).reshape(-1, 2))
    log_p = FLAT.log_prob(knot.alpha * x, knot).reshape(3, -1) + 2 * math.log(knot.alpha) - math.log(8.0)
    bits = -(torch.logsumexp(log_p, 1) - math.log(40_000)) / (2 * math.log(2.0))
    options = {"samples": 64, "bound": "iw", "steps": 16, "doubling": False, "divergence": "exact"}
    found = bits_per_dim(model, codes, dequantization=how, **options).per_sample
    # a mean over 64 draws of weights that scatter by some 30 %: 0.04 nats, and half the variance of that as a bias
    assert float((found - bits).abs().max()) < 0.1, (found, bits)
    assert abs(float((found - bits).mean())) < 0.05


def test_truncated_normals_of_every_element():
    """u fills the bin, and 1 / q integrates to its width, one, for each element by itself."""
    codec, knot = Affine((2,), [4.0, 3.0], [4.0, 2.0]), VPSDE(t_min=0.06).knot(0.06)
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, log_q = as_dequantization("truncated_normal", codec, knot)(torch.zeros(100_000, 2), noise)
    weights = (-log_q).exp()
    assert float(u.min()) >= 0.0 and float(u.max()) <= 1.0
    assert abs(float(weights.mean()) - 1.0) < 4 * float(weights.std()) / math.sqrt(100_000)
    # less spread than uniform numbers, and less for the element whose noise is narrower
    assert float(u[:, 1].var()) < 0.95 * float(u[:, 0].var()) < 0.95 / 12
    assert name_of("auto", codec, knot) == "truncated_normal"
    assert name_of("auto", Affine((2,), 0.0, [4.0, 0.2]), knot) == "uniform"  # one element is narrow


def test_decoders_are_laws_of_the_levels_of_every_element():
    """Each element's decoder sums to one over its own bins, in continuous time and on a chain."""
    codec = Affine((2,), [4.0, 3.0], [4.0, 2.0])
    bins, chain = Bins.of(PAIR, codec), VPSDE().discretize(50)
    middles = codec.encode(torch.arange(8.0, dtype=torch.float64)[:, None].expand(8, 2) + 0.5)
    rev, one = FLAT.reverse(chain), torch.ones(2, dtype=torch.float64)
    for state in (-3.0, 0.1, 0.9):
        y = torch.full_like(middles, state)
        torch.testing.assert_close(log_softmax(bins, y, middles, 0.3).exp().sum(0), one)
        run = Run(rev, middles, None, bins, 0.0, 8)
        prediction = rev(y, chain.knot(torch.zeros(8, dtype=torch.int64), 2))
        for variance in ("small", lambda v, k: torch.full_like(v, -3.0)):
            torch.testing.assert_close(log_decoder(run, chain, prediction, 0 * y, variance).exp().sum(0), one)


def test_decoders_do_not_know_a_turn():
    """Round noise is round under a rotation: the decoders of the same data, from states that decode to the same point,
    are the same, element by element, and one of the elements' own variances is refused."""
    haar, straight = CODECS["haar"](SHAPE, 1, 8.0, 4.0), Affine(SHAPE, 8.0, 4.0)
    chain = VPSDE().discretize(50)
    g = torch.Generator().manual_seed(1)
    point = 16.0 * torch.rand(3, *SHAPE, generator=g, dtype=torch.float64)
    found = []
    for codec in (straight, haar):
        bins, x, y = Bins(16, codec), codec.encode(CODES.double() + 0.5), codec.encode(point)
        rev = chain.reverse(data=lambda state, level, y=y: y)
        prediction = rev(y, chain.knot(torch.zeros(3, dtype=torch.int64), y.ndim))
        run = Run(rev, x, None, bins, 0.0, 8)
        found.append((log_softmax(bins, y, x, 0.3), log_decoder(run, chain, prediction, 0 * y, "large")))
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape == CODES.shape
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"learned variance needs every element.*'haar' mixes them"):
        elbo(rev, x, data_spec=SPEC, codec=haar, variance=lambda v, k: 0 * v)


@pytest.mark.parametrize("how", ["uniform", "none"])
def test_bounds_of_data_under_codecs(how):
    """In distribution a bound does not know a turn either: of densities, with another scale, too, whose volume differs
    by one bit per dimension; of integers, whose decoder goes by the noise at t_min in bins, with the same."""
    codes = CODES[:1].expand(64, *SHAPE)
    law = LAW if how == "uniform" else VPSDE(t_min=0.01)  # noise of 0.2 bins
    turned = Turned(SHAPE, 8.0) if how == "uniform" else CODECS["haar"](SHAPE, 2, 8.0, 4.0)
    bounds = [
        elbo_of_data(
            exact(states_of(codec, *data_law()), SPEC, codec, law), codes, dequantization=how, times=64, draws=4
        )
        for codec in (Affine(SHAPE, 0.0, 4.0), turned)
    ]
    gap = bounds[0].mean - bounds[1].mean
    assert abs(gap) < 4 * math.hypot(bounds[0].standard_error, bounds[1].standard_error)
    assert max(b.standard_error for b in bounds) < 0.15
    # the decoder of integers asks the network nothing
    assert {int(n) for b in bounds for n in b.nfe} == {64 + 4 * (how == "uniform")}


def test_what_a_codec_cannot_do_is_said():
    turned, squeezed = exact(None, SPEC, Turned(SHAPE, 4.0)), exact(None, SPEC, Squeezed(SHAPE, 4.0))
    for function in (bits_per_dim, elbo_of_data):
        with pytest.raises(ValueError, match=f"{function.__name__} needs a codec that is a bijection.*score states"):
            function(squeezed, CODES)
    with pytest.raises(ValueError, match=r"Truncated-normal dequantization needs independent.*'turned' mixes it"):
        bits_per_dim(turned, CODES, dequantization="truncated_normal")
    with pytest.raises(ValueError, match=r"decoder of integers needs independent noise.*'turned' mixes it"):
        elbo_of_data(turned, CODES, dequantization="none")
    assert name_of("auto", turned.codec, LAW.knot(LAW.t_max)) == "uniform"


# --- conditions ------------------------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """A standard normal density moved by what it is told: by a class, and by the tokens that are not masked."""

    def __init__(self):
        super().__init__()
        self.dummy = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, noise_level, class_label=None, text=None):
        knot, move = LAW.knot(noise_level, ndim=x.ndim), torch.zeros_like(x)
        if class_label is not None:
            move = move + class_label[:, None]
        if text is not None:
            move = move + (text["tokens"] * text["mask"][..., None]).sum(1)
        # x_t ~ N(alpha move, 1), so that the noise is sigma (x - alpha move); v = alpha eps - sigma x_0
        noise = knot.sigma * (x - knot.alpha * move)
        return knot.alpha * noise - knot.sigma * (x - knot.sigma * noise) / knot.alpha


def told():
    conditions = {"class_label": ConditionSpec("class", classes=3), "text": ConditionSpec("tokens", (4, 1))}
    spec = DataSpec((1,), conditions=conditions)
    g = torch.Generator().manual_seed(0)
    z, n = torch.randn(7, 1, generator=g, dtype=torch.float64), 7
    text = {"tokens": torch.randn(n, 4, 1, generator=g), "mask": torch.rand(n, 4, generator=g) < 0.5}
    condition = {"class_label": torch.arange(n) % 3, "text": text}
    return ScoreModel(Told(), LAW, "v", "time", spec, 1.0, "none"), z, condition


def test_conditions_go_with_their_rows():
    """At every depth, in batches of any size, on several devices: log p of a sample under its own condition, in closed
    form, and the bound on it within its standard error."""
    model, z, condition = told()
    move = condition["class_label"] + (condition["text"]["tokens"] * condition["text"]["mask"][..., None]).sum((1, 2))
    knot = LAW.knot(LAW.t_min)
    log_p = -0.5 * (knot.alpha * (z[:, 0] - move)).square() - 0.5 * math.log(2 * math.pi) + math.log(knot.alpha)
    options = {"condition": condition, "tol": 1e-6, "doubling": False, "correct": ["prior"]}
    for split in ({"batch_size": 3}, {"batch_size": 2, "devices": ["cpu", "cpu"]}):
        found = bits_per_dim(model, z, **options, **split)
        torch.testing.assert_close(found.per_sample, -log_p / math.log(2.0), rtol=0, atol=1e-4)
    assert float((bits_per_dim(model, z, tol=1e-3).per_sample - found.per_sample).abs().max()) > 0.5
    bound = elbo_of_data(model, z, condition=condition, batch_size=3, times=256, draws=32)
    assert bool(((bound.per_sample - found.per_sample).abs() < 5 * bound.sample_error + 1e-3).all())


def test_conditions_are_checked_and_told_apart(tmp_path):
    model, z, condition = told()
    path, options = tmp_path / "scores.csv", {"steps": 8, "doubling": False}
    first = bits_per_dim(model, z, condition=condition, path=path, **options)
    again = bits_per_dim(model, z, condition=condition, path=path, **options)
    assert torch.equal(first.per_sample, again.per_sample)
    other = {**condition, "text": {**condition["text"], "mask": ~condition["text"]["mask"]}}
    for given in (other, {"class_label": condition["class_label"]}, None):
        with pytest.raises(ValueError, match=r"something else .condition: "):
            bits_per_dim(model, z, condition=given, path=path, **options)
    model.codec = Affine((1,), 0.0, 2.0)
    with pytest.raises(ValueError, match=r"something else .model: "):
        bits_per_dim(model, z, condition=condition, path=path, **options)
    for given, error, message in (
        ({"label": z}, ValueError, "no condition 'label'.*class_label, text"),
        ({"class_label": torch.zeros(6, dtype=torch.int64)}, ValueError, r"class_label` must have shape \(7,\)"),
        ({"class_label": [0] * 7}, TypeError, "int64 tensor"),
        (torch.zeros(7), TypeError, "must be a mapping"),
    ):
        for function in (bits_per_dim, elbo_of_data):
            with pytest.raises(error, match=message):
                function(model, z, condition=given)
    bare = ScoreModel(Told(), LAW, "v", "time", DataSpec((1,)), 1.0, "none")  # one's own network, not specified
    for function in (bits_per_dim, elbo_of_data):
        with pytest.raises(ValueError, match="a row per sample at every depth, 7"):
            function(bare, z, condition={"text": {"mask": torch.ones(5, 4)}})
