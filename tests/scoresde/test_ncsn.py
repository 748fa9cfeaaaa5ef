"""NCSN and NCSNv2: the published numbers with the published weights, and the laws of a network."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scoresde.data.conditions import classes
from scoresde.networks.ncsn import NCSN, NCSNv2
from scoresde.networks.refinenet import DilatedBlock, NoNorm, instance_norm_plus
from scoresde.pretrained.ncsn import published_names
from scoresde.pretrained.score_sde import read_checkpoint

GOLDEN = {"ve_ncsnv1_disc": NCSN, "ve_ncsnv2_disc": NCSNv2}
SIZES = {"64": (1, 2, 2, 2), "128": (1, 2, 2, 4, 4), "256": (1, 2, 2, 2, 4, 4)}
LEVELS = 10

each_class = pytest.mark.parametrize("kind", [NCSN, NCSNv2])


def network(kind, shape=(3, 16, 16), channels=4, **options):
    """A small network, every parameter random: nothing hides behind a zero initialisation."""
    net = kind(shape, channels=channels, **options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            fan = p[0].numel() if p.ndim == 4 else 1
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(fan))
    return net


def inputs(net, batch=3, dtype=torch.float64):
    x = torch.randn(batch, *net.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype), torch.tensor([0, 4, 9, 2])[:batch]


def published(kind, state):
    """Our network with the weights of a published state dict; every tensor of it must be used."""
    channels = len(state["begin_conv.bias"])
    options = {"levels": len(state["normalizer.embed.weight"])} if kind is NCSN else {}
    net = kind((3, 16, 16), channels=channels, **options)
    names = dict(published_names(net))
    assert sorted(names.values()) == sorted(set(state) - {"sigmas"})
    net.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
    return net


@pytest.mark.parametrize(("dtype", "tolerance"), [("f64", 1e-10), ("f32", 2e-5)])
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_outputs_and_input_gradients(golden, name, dtype, tolerance):
    """Their networks compute 2x - 1, and NCSNv2 divides by sigma: here the caller does."""
    z = np.load(golden / "nets.npz")
    meta = json.loads(str(z[f"{name}/meta"]))
    precision = {"f64": torch.float64, "f32": torch.float32}[dtype]
    state = read_checkpoint(golden / meta["checkpoint"], ema=False)
    net = published(GOLDEN[name], state).to(precision)
    x = torch.from_numpy(z[f"{name}/x"]).to(precision).requires_grad_()
    level = torch.from_numpy(np.asarray(z[f"{name}/{dtype}/labels"]))
    out = net(x if meta["centered"] else 2 * x - 1, level)
    assert out.dtype == precision
    if meta["model"]["scale_by_sigma"]:
        out = out / state["sigmas"][level].to(precision)[:, None, None, None]
    want = torch.from_numpy(z[f"{name}/{dtype}/net_out"]).to(precision)
    assert float((out - want).detach().abs().max() / want.abs().max()) < tolerance
    vector = torch.from_numpy(z[f"{name}/vjp_v"]).to(precision)
    (got,) = torch.autograd.grad((out * vector).sum(), x)
    wanted = torch.from_numpy(z[f"{name}/{dtype}/vjp"]).to(precision)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < tolerance


def straight(state, x, level, stages, refine):
    """The published networks written out for ELU; `state` has published names, and a norm without entries is none."""

    def conv(name, h, dilation=1):
        weight = state[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(h, weight, state.get(f"{name}.bias"), padding=padding, dilation=dilation)

    def norm(name, h):
        if f"{name}.embed.weight" in state:
            gamma, alpha, beta = state[f"{name}.embed.weight"][level][..., None, None].chunk(3, 1)
        elif f"{name}.alpha" in state:
            gamma, alpha, beta = (state[f"{name}.{part}"][:, None, None] for part in ("gamma", "alpha", "beta"))
        else:
            return h
        mean = h.mean((2, 3), keepdim=True)
        plus = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, keepdim=True) + 1e-5).sqrt()
        plain = (h - mean) / (h.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        return gamma * (plain + alpha * plus) + beta

    def halved(h):
        return (h[..., ::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, ::2] + h[..., 1::2, 1::2]) / 4

    def residual(name, h, dilation, first):
        y = conv(f"{name}.conv1", F.elu(norm(f"{name}.normalize1", h)), dilation)
        y = F.elu(norm(f"{name}.normalize2", y))
        if first and dilation == 1:
            return halved(conv(f"{name}.conv2.conv", y)) + halved(conv(f"{name}.shortcut.conv", h))
        return conv(f"{name}.conv2", y, dilation) + (conv(f"{name}.shortcut", h, dilation) if first else h)

    def units(name, h, count):
        for i in range(1, count + 1):
            y = conv(f"{name}.{i}_1_conv", F.elu(norm(f"{name}.{i}_1_norm", h)))
            h = h + conv(f"{name}.{i}_2_conv", F.elu(norm(f"{name}.{i}_2_norm", y)))
        return h

    def refined(name, features, last):
        features = [units(f"{name}.adapt_convs.{i}", h, 2) for i, h in enumerate(features)]
        h = features[0]
        if len(features) == 2:
            features = [conv(f"{name}.msf.convs.{i}", norm(f"{name}.msf.norms.{i}", y)) for i, y in enumerate(features)]
            h = features[0] + F.interpolate(features[1], features[0].shape[2:], mode="bilinear", align_corners=True)
        conditional = f"{name}.crp.norms.0.embed.weight" in state
        h = path = F.elu(h)
        for i in range(2):
            path = norm(f"{name}.crp.norms.{i}", path)
            path = F.avg_pool2d(path, 5, 1, 2) if conditional else F.max_pool2d(path, 5, 1, 2)
            path = conv(f"{name}.crp.convs.{i}", path)
            h = h + path
        return units(f"{name}.output_convs", h, 3 if last else 1)

    h, layers = conv("begin_conv", x), []
    for i, number in enumerate(stages):
        dilation = {len(stages) - 2: 2, len(stages) - 1: 4}.get(i, 1)
        for j in range(2):
            h = residual(f"res{number}.{j}", h, dilation, first=i > 0 and j == 0)
        layers.append(h)
    for i, (number, layer) in enumerate(zip(refine, reversed(layers), strict=True)):
        h = refined(f"refine{number}", [layer] if i == 0 else [layer, h], last=i == len(refine) - 1)
    return conv("end_conv", F.elu(norm("normalizer", h)))


@pytest.mark.parametrize(
    ("kind", "size", "stages", "refine"),
    [
        (NCSN, "64", "1 2 3 4", "1 2 3 4"),
        (NCSNv2, "64", "1 2 3 4", "1 2 3 4"),
        (NCSNv2, "128", "1 2 3 4 5", "1 2 3 4 5"),
        (NCSNv2, "256", "1 2 3 31 4 5", "1 2 31 3 4 5"),
    ],
)
@torch.no_grad()
def test_all_sizes_against_the_network_written_out(kind, size, stages, refine):
    net = network(kind, (3, 16, 24), multipliers=SIZES[size]).double()
    x, level = inputs(net)
    own = net.state_dict()
    state = {theirs: own[ours] for ours, theirs in published_names(net)}
    want = straight(state, x, level, stages.split(), refine.split())
    torch.testing.assert_close(net(x, level), want, rtol=0, atol=1e-11 * float(want.abs().max()))


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_shapes_at_full_width(golden, name):
    """The published tensors of a narrow network, widened, are those of ours with 128 channels."""
    meta = json.loads(str(np.load(golden / "nets.npz")[f"{name}/meta"]))
    state = read_checkpoint(golden / meta["checkpoint"], ema=False)
    narrow = meta["model"]["nf"]

    def widened(key, shape):
        """Dimensions that count features, as opposed to pixels of kernels, colors and noise levels."""
        colors = {"begin_conv.weight": 1, "end_conv.weight": 0, "end_conv.bias": 0}.get(key)
        kept = {colors, 2, 3, *([0] if "embed" in key else [])}
        return tuple(n if i in kept else n * 128 // narrow for i, n in enumerate(shape))

    with torch.device("meta"):
        net = GOLDEN[name]((3, 32, 32))
    own = net.state_dict()
    for ours, theirs in published_names(net):
        assert tuple(own[ours].shape) == widened(theirs, state[theirs].shape), theirs


@pytest.mark.parametrize(
    ("kind", "size", "count"),
    [(NCSN, "64", 30_117_635), (NCSNv2, "64", 29_694_083), (NCSNv2, "128", 83_445_379), (NCSNv2, "256", 94_132_611)],
)
def test_parameter_counts(kind, size, count):
    """Counted by hand from the published layers; the papers state no counts."""
    with torch.device("meta"):
        net = kind((3, 32, 32), multipliers=SIZES[size])
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize(("kind", "size"), [(NCSN, "64"), (NCSNv2, "64"), (NCSNv2, "128"), (NCSNv2, "256")])
def test_every_parameter_has_one_published_name(kind, size):
    with torch.device("meta"):
        net = kind((3, 32, 32), multipliers=SIZES[size])
    names = list(published_names(net))
    assert sorted(ours for ours, _ in names) == sorted(net.state_dict())
    assert len({theirs for _, theirs in names}) == len(names)


def test_stage_31_is_the_published_place_of_the_extra_stage():
    """The largest network has a fourth stage, and the third refine block, under a number of their own."""
    with torch.device("meta"):
        names = dict(published_names(NCSNv2((3, 32, 32), multipliers=SIZES["256"])))
    assert names["stages.3.0.conv2.weight"] == "res31.0.conv2.conv.weight"
    assert names["stages.4.0.conv2.weight"] == "res4.0.conv2.weight"
    assert names["refine.2.adapt.1.0.conv2.weight"] == "refine31.adapt_convs.1.1_2_conv.weight"
    assert names["refine.3.fusion.convs.1.bias"] == "refine3.msf.convs.1.bias"
    with pytest.raises(ValueError, match="4, 5 or 6 stages"), torch.device("meta"):
        list(published_names(NCSNv2((3, 32, 32), multipliers=(1, 2, 2))))


@each_class
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 32, 32), (1, 8, 12), (2, 6, 4)])
@torch.no_grad()
def test_any_channels_and_sides(kind, shape):
    net = network(kind, shape)
    x, level = inputs(net, 2, torch.float32)
    out = net(x, level)
    assert out.shape == x.shape and bool(out.isfinite().all())


@pytest.mark.parametrize(("size", "shape"), [("128", (3, 16, 12)), ("256", (3, 16, 24))])
@torch.no_grad()
def test_deeper_networks_halve_more_often(size, shape):
    net = network(NCSNv2, shape, multipliers=SIZES[size])
    x, level = inputs(net, 2, torch.float32)
    seen = []
    for stage in net.stages:
        stage.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:])))
    assert net(x, level).shape == x.shape
    halvings = [0, *range(1, len(SIZES[size]) - 2), *[len(SIZES[size]) - 3] * 2]
    _, h, w = shape
    assert seen == [(4 * m, h >> n, w >> n) for m, n in zip(SIZES[size], halvings, strict=True)]


@each_class
@pytest.mark.parametrize(
    "options", [{"activation": "silu"}, {"activation": "leaky_relu"}, {"interpolation": "nearest"}]
)
@torch.no_grad()
def test_options_matter(kind, options):
    """The same weights with another option make another network."""
    default, other = network(kind).double(), network(kind, **options).double()
    x, level = inputs(default)
    assert float((default(x, level) - other(x, level)).abs().max()) > 1e-3 * float(default(x, level).abs().max())


@each_class
def test_vector_jacobian_product_is_the_directional_derivative(kind):
    """<v, J u> from the gradient equals central differences along u."""
    net = network(kind, (2, 8, 8), activation="silu").double()  # twice differentiable, so that differences converge
    x, level = inputs(net)
    g = torch.Generator().manual_seed(2)
    u, v = (torch.randn(x.shape, generator=g, dtype=x.dtype) for _ in range(2))
    point = x.clone().requires_grad_()
    (vjp,) = torch.autograd.grad((net(point, level) * v).sum(), point)
    with torch.no_grad():
        step = 1e-6
        difference = (net(x + step * u, level) - net(x - step * u, level)) / (2 * step)
    torch.testing.assert_close((vjp * u).sum(), (difference * v).sum(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_label_is_a_noise_level_of_ncsn_and_nothing_to_ncsnv2():
    first, second = network(NCSN).double(), network(NCSNv2).double()
    x, level = inputs(first)
    assert not torch.allclose(first(x, level), first(x, (level + 1) % LEVELS), rtol=1e-3)
    assert torch.equal(second(x, level), second(x, level + 1000.5))
    # an index that arrives in floating point, slightly off or not, is the same index
    assert torch.equal(first(x, level), first(x, level.double() - 1e-3))
    with pytest.raises(IndexError):
        first(x, level + LEVELS)


@each_class
def test_one_graph_under_compile(kind):
    """fullgraph fails on any graph break; the eager backend needs no compiler."""
    net = network(kind)
    x, level = inputs(net, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, level), net(x, level))
    torch.testing.assert_close(compiled(x, level.float()), net(x, level))


def test_instance_norm_plus_is_its_formula():
    g = torch.Generator().manual_seed(0)
    x, table = torch.randn(2, 3, 4, 5, generator=g).double(), torch.randn(3, 2, 3, generator=g).double()
    got = instance_norm_plus(x, *table)
    for b in range(2):
        means = [x[b, k].mean() for k in range(3)]
        m = sum(means) / 3
        v = math.sqrt(sum((mu - m) ** 2 for mu in means) / 2 + 1e-5)
        for k, mu in enumerate(means):
            gamma, alpha, beta = table[:, b, k]
            s = math.sqrt((x[b, k] - mu).square().mean() + 1e-5)
            torch.testing.assert_close(got[b, k], gamma * ((x[b, k] - mu) / s + alpha * (mu - m) / v) + beta)


def test_dilated_convolutions_see_every_other_pixel():
    """Influence of a pixel through one dilated block: the offsets of two 3 x 3 convolutions with the dilation."""
    for dilation in (1, 2, 4):
        block = DilatedBlock(2, 2, NoNorm, F.elu, dilation)
        x = torch.randn(1, 2, 25, 25, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = block(x, torch.zeros(1))
        assert out.shape == x.shape
        gradient = torch.autograd.grad(out[0, 0, 12, 12], x)[0][0].abs().sum(0)
        offsets = [12 + dilation * k for k in (-2, -1, 0, 1, 2)]
        reached = torch.zeros(25, 25, dtype=torch.bool)
        reached[torch.tensor(offsets)[:, None], torch.tensor(offsets)] = True
        assert torch.equal(gradient > 0, reached)


@each_class
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": classes(3)}, "takes no conditions, got class_label"),
        ({"shape": (3, 8)}, r"\(C, H, W\)"),
        ({"shape": (3, 0, 8)}, r"\(C, H, W\)"),
        ({"shape": (3, 7, 8)}, "multiples of 2, got 7 x 8"),
        ({"shape": (3, 10, 10), "multipliers": (1, 2, 2, 4, 4)}, "multiples of 4"),
        ({"shape": (3, 2, 2)}, "single pixel"),
        ({"channels": 1}, "`channels`"),
        ({"channels": 4.0}, "`channels`"),
        ({"multipliers": (1, 1)}, "at least 3 stages"),
        ({"multipliers": (1, 2, 2, 4)}, "two equal numbers"),
        ({"multipliers": (1, 0, 2, 2)}, "`multipliers`"),
        ({"activation": "gelu"}, "`activation` must be one of elu"),
        ({"interpolation": "area"}, "`interpolation` must be one of bilinear"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"shape": (3, 8, 8), "channels": 4, **options})


def test_bad_numbers_of_levels_are_refused():
    for levels in (0, 2.0, True):
        with pytest.raises(ValueError, match="`levels`"):
            NCSN((3, 8, 8), channels=4, levels=levels)


@each_class
def test_conditions_are_refused(kind):
    net = network(kind, (3, 8, 8))
    x, level = inputs(net, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"no conditions.*without class_label"):
        net(x, level, class_label=level)


@each_class
def test_options_are_jsonable(kind):
    """A configuration that went through JSON builds the same network."""
    options = {"shape": [3, 8, 8], "conditions": {}, "channels": 4, "multipliers": [1, 2, 2, 2], "activation": "elu"}
    one, other = kind(**options), kind(**json.loads(json.dumps(options)))
    other.load_state_dict(one.state_dict())
