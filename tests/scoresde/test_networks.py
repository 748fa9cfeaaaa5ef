"""Laws that every network in the table obeys, and the U-Net's and the embeddings' own."""

import inspect
import math

import pytest
import torch

from scoresde.data.conditions import ConditionSpec, mapped
from scoresde.networks import MLP, NETWORKS, FourierEmbedding, SinusoidalEmbedding, UNet

IMAGES = {"shape": (1, 8, 8), "multipliers": (1, 2), "attention": (4,)}
SMALL = {
    "mlp": {"shape": (6,), "width": 32, "depth": 2},
    "unet": IMAGES | {"channels": 8, "pool_tokens": True},
    "ncsnpp": IMAGES | {"channels": 8, "blocks": 1, "embedding": "sinusoidal"},
    "ddpm": IMAGES | {"channels": 32, "blocks": 1},
    "ncsn": {"shape": (1, 8, 8), "channels": 8, "levels": 1000},
    "ncsnv2": {"shape": (1, 8, 8), "channels": 8},
    "dit": {"shape": (1, 8, 8), "width": 32, "depth": 2, "heads": 4, "pool_tokens": True},
    "adm": IMAGES | {"channels": 16, "blocks": 1, "head_channels": 8},
}
WITHOUT_CONDITIONS = ("ncsn", "ncsnv2")
WITHOUT_TIME = ("ncsnv2",)
"""Networks that know neither conditions nor, as NCSNv2, the noise level other than by what they are divided by."""


def everything(name, shape=None):
    """Options of a small network with conditions of every kind, two of most, and two times."""
    options = {"shape": (1, 8, 8)} | SMALL.get(name, {}) | ({"shape": shape} if shape else {})
    if name in WITHOUT_CONDITIONS:
        return options
    sides = options["shape"][1:] or (2, 3)
    conditions = {
        "class_label": ConditionSpec("class", classes=3),
        "type": ConditionSpec("class", classes=2),
        "pose": ConditionSpec("vector", (4,)),
        "low": ConditionSpec("image", (2, *sides)),
        "edges": ConditionSpec("image", (1, *sides)),
        "text": ConditionSpec("tokens", (5, 6)),
        "words": ConditionSpec("tokens", (4,), classes=7),
    }
    return options | {"conditions": conditions, "target_noise_level": True}


def network(name, **options):
    """A small network of the table, every parameter random: nothing hides behind a zero initialisation."""
    torch.manual_seed(0)
    net = NETWORKS[name](**everything(name, options.get("shape")) | options)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape) / max(1.0, math.sqrt(p[0].numel() if p.ndim > 1 else 1)) + (p.ndim == 1))
    return net.eval()


def values(spec, n, g, dtype=torch.float32):
    """Random values of a condition, every fourth without any token."""
    if spec.kind == "class":
        return torch.randint(spec.classes, (n,), generator=g)
    if spec.kind != "tokens":
        return torch.randn(n, *spec.shape, generator=g, dtype=torch.float64).to(dtype)
    mask = torch.rand(n, spec.shape[0], generator=g) < 0.6
    mask[3::4] = False
    if spec.classes:
        return {"tokens": torch.randint(spec.classes, (n, *spec.shape), generator=g), "mask": mask}
    return {"tokens": torch.randn(n, *spec.shape, generator=g, dtype=torch.float64).to(dtype), "mask": mask}


def inputs(net, batch=5, dtype=torch.float32):
    """x, noise level and a mapping of whatever else the network takes."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *net.shape, generator=g, dtype=torch.float64).to(dtype)
    level = torch.linspace(0.0, 999.0, batch, dtype=dtype).round()
    if not hasattr(net, "condition"):
        return x, level, {}
    given = {name: values(spec, batch, g, dtype) for name, spec in net.condition.specs.items()}
    return x, level, given | ({} if net.condition.target is None else {"target_noise_level": 0.3 * level})


def rows(given, i):
    return mapped(lambda t: t[i : i + 1], given)


each_network = pytest.mark.parametrize("name", sorted(NETWORKS))


@each_network
@torch.no_grad()
def test_float64_agrees_with_float32(name):
    net = network(name)
    x, level, given = inputs(net)
    low = net(x, level, **given)
    high = net.double()(x.double(), level.double(), **given)
    assert low.dtype == torch.float32 and high.dtype == torch.float64 and high.shape == x.shape
    # float32 rounding through a dozen layers: some tens of ulp of the largest value
    torch.testing.assert_close(low.double(), high, rtol=0, atol=1e-5 * float(high.abs().max()))


@each_network
def test_rows_do_not_see_their_batch_mates(name):
    net = network(name).double()
    x, level, given = inputs(net, dtype=torch.float64)
    together = net(x, level, **given)
    alone = torch.cat([net(x[i : i + 1], level[i : i + 1], **rows(given, i)) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    gradient = torch.autograd.grad(net(x.requires_grad_(), level, **given)[2].sum(), x)[0]
    assert float(gradient[[0, 1, 3, 4]].abs().max()) == 0.0 and float(gradient[2].abs().min()) > 0.0


@each_network
def test_every_parameter_learns_and_every_input_matters(name):
    net = network(name).double()
    x, level, given = inputs(net, dtype=torch.float64)
    out = net(x, level, **given)
    out.square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 0.0, key
    moved = (level + 1.0) % 1000.0
    assert torch.allclose(out, net(x, moved, **given), rtol=1e-4) == (name in WITHOUT_TIME)
    for key, value in given.items():
        other = mapped(lambda t: t.roll(1, 0), value)  # another row's, which for some is no token at all
        changed = (out - net(x, level, **given | {key: other})).abs().flatten(1).amax(1) > 1e-8
        assert torch.equal(changed, other != value if key in ("class_label", "type") else torch.ones_like(changed)), key


@each_network
@torch.no_grad()
def test_fresh_network_outputs_zero(name):
    net = NETWORKS[name](**everything(name))
    x, level, given = inputs(net)
    assert float(net(x, level, **given).detach().abs().max()) == 0.0


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("mlp", "unet", "dit"))) for n in sorted(NETWORKS)]
)
def test_one_graph_under_compile(name):
    """fullgraph fails on any graph break; "aot_eager" traces the backward pass too and needs no compiler."""
    net = network(name)
    x, level, given = inputs(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    outs = [f(x, level, **given) for f in (net, compiled)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    vector = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    products = [torch.autograd.grad(out, x, vector)[0] for out in outs]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4 * float(products[0].abs().max()))


@each_network
def test_channels_last_changes_nothing_but_the_layout(name):
    net = network(name).double()
    x, level, given = inputs(net, dtype=torch.float64)
    if x.ndim != 4:
        pytest.skip("no images")
    plain = net(x, level, **given)
    net = net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = net(x, level, **given)
    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-12)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


FORGETFUL = [n for n in sorted(NETWORKS) if "checkpointing" in inspect.signature(NETWORKS[n]).parameters]


@pytest.mark.parametrize("name", FORGETFUL)
def test_checkpointing_gives_the_same_gradients_from_less_memory(name):
    """Activations inside blocks are forgotten: fewer bytes are kept for the backward pass."""
    results, kept = [], []
    for flag in (False, True):
        net = network(name, checkpointing=flag, dropout=0.0)
        x, level, given = inputs(net)
        x.requires_grad_()
        total = 0

        def count(t):
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            out = net(x, level, **given)
        kept.append(total)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert kept[1] < 0.5 * kept[0]


@each_network
@torch.no_grad()
def test_bfloat16_autocast(name):
    net = network(name)
    x, level, given = inputs(net)
    full = net(x, level, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x, level, **given)
    # eight bits of mantissa, errors of a dozen layers adding up at random
    assert float((low.float() - full).abs().max()) < 0.05 * float(full.abs().max())


@each_network
def test_wrong_shape_is_refused(name):
    net = network(name)
    with pytest.raises(ValueError, match="x must have shape"):
        net(torch.zeros(2, 3, 7, 5), torch.zeros(2))
    for wrong in (torch.zeros(2), torch.tensor(0.0), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match=r"`noise_level` must have shape \(3,\)"):
            net(torch.zeros(3, *net.shape), wrong)


@pytest.mark.parametrize("conditioning", ["scale_shift", "add"])
@pytest.mark.parametrize("shape", [(3, 8, 12), (2, 4, 4), (1, 16, 8)])
def test_unet_takes_any_channels_and_sides(shape, conditioning):
    options = {"shape": shape, "channels": 20, "multipliers": (1, 2, 1), "blocks": 2, "attention": (shape[1] // 2,)}
    net = network("unet", **options, conditioning=conditioning, dropout=0.2, embedding="fourier")
    x, level, given = inputs(net, 2)
    out = net(x, level / 999.0, **given)
    assert out.shape == x.shape and bool(out.isfinite().all())


def test_unet_attention_reaches_every_pixel():
    """A corner influences the opposite corner through attention, and not without it in so shallow a network."""
    reach = []
    for attention in ((), (16,)):
        options = {"shape": (1, 16, 16), "multipliers": (1,), "channels": 8, "conditions": {}}
        options["target_noise_level"] = False
        net = network("unet", **options, attention=attention, middle_attention=bool(attention))
        x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        # group norm shares its statistics over the image; the convolutions' reach is seen with it frozen
        for module in net.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda h: h
        reach.append(float(torch.autograd.grad(net(x, torch.zeros(1))[0, 0, 0, 0], x)[0][0, 0, -1, -1].abs()))
    assert reach[0] == 0.0 and reach[1] > 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (8, 8)}, r"\(C, H, W\)"),
        ({"shape": (1, 6, 8), "multipliers": (1, 1, 1)}, "multiples of 4"),
        ({"attention": (5,)}, "height 5"),
        ({"multipliers": ()}, "at least one level"),
        ({"channels": 2}, "`channels`"),
        ({"dropout": 1.0}, "`dropout`"),
        ({"conditioning": "film"}, "scale_shift"),
        ({"embedding": "rotary"}, "sinusoidal"),
    ],
)
def test_unet_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**SMALL["unet"], **options})


@pytest.mark.parametrize("options", [{"shape": ()}, {"width": 2}, {"depth": 0}, {"depth": True}, {"width": 33}])
def test_mlp_refuses_bad_options(options):
    with pytest.raises(ValueError, match="must"):
        MLP(**{**SMALL["mlp"], **options})


def test_sinusoidal_embedding_is_its_formula():
    embedding = SinusoidalEmbedding(8, max_period=1000.0)
    level = torch.tensor([0.0, 0.5, 999.0], dtype=torch.float64)
    angle = level[:, None] * torch.tensor([1000.0 ** (-i / 3) for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(embedding(level), torch.cat([angle.cos(), angle.sin()], 1), rtol=1e-12, atol=1e-12)
    # frequencies are not stored, so that casting the module does not round them
    assert embedding.bfloat16()(level.float()).dtype == torch.float32
    for bad in ({"dim": 7}, {"dim": 2}, {"dim": 8, "max_period": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            SinusoidalEmbedding(**bad)


def test_fourier_embedding_keeps_its_frequencies_in_the_state():
    a, b = FourierEmbedding(16, scale=2.0), FourierEmbedding(16, scale=2.0)
    level = torch.randn(4)
    assert not torch.allclose(a(level), b(level))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(level), b(level))
    torch.testing.assert_close(a(level).square().sum(1), torch.full((4,), 8.0))
