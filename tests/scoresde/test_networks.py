"""Laws that every network in the table obeys, and the U-Net's and the embeddings' own."""

import inspect
import math

import pytest
import torch

from scoresde.networks import MLP, NETWORKS, FourierEmbedding, SinusoidalEmbedding, UNet

SMALL = {
    "mlp": {"shape": (6,), "num_classes": 3, "width": 32, "depth": 2},
    "unet": {"shape": (1, 8, 8), "num_classes": 3, "channels": 8, "multipliers": (1, 2), "attention": (4,)},
    "ncsnpp": {
        **{"shape": (1, 8, 8), "num_classes": 3, "channels": 8, "multipliers": (1, 2), "attention": (4,)},
        **{"blocks": 1, "embedding": "sinusoidal"},
    },
    "ddpm": {
        **{"shape": (1, 8, 8), "num_classes": 3, "channels": 32, "multipliers": (1, 2), "attention": (4,)},
        "blocks": 1,
    },
    "ncsn": {"shape": (1, 8, 8), "channels": 8, "levels": 1000},
    "ncsnv2": {"shape": (1, 8, 8), "channels": 8},
    "dit": {"shape": (1, 8, 8), "num_classes": 3, "width": 32, "depth": 2, "heads": 4},
    "adm": {
        **{"shape": (1, 8, 8), "num_classes": 3, "channels": 16, "multipliers": (1, 2), "attention": (4,)},
        **{"blocks": 1, "head_channels": 8},
    },
}


WITHOUT_CLASSES = ("ncsn", "ncsnv2")
WITHOUT_TIME = ("ncsnv2",)
"""Networks that know neither classes nor, as NCSNv2, the noise level other than by what they are divided by."""


def network(name, **options):
    """A small network of the table, every parameter random: nothing hides behind a zero initialisation."""
    torch.manual_seed(0)
    net = NETWORKS[name](**{**SMALL.get(name, {"shape": (1, 8, 8), "num_classes": 3}), **options})
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape) / max(1.0, math.sqrt(p[0].numel() if p.ndim > 1 else 1)) + (p.ndim == 1))
    return net.eval()


def inputs(net, batch=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *net.shape, generator=g, dtype=torch.float64).to(dtype)
    label = torch.linspace(0.0, 999.0, batch, dtype=dtype).round()
    return x, label, torch.arange(batch) % 3 if getattr(net, "num_classes", 0) else None


each_network = pytest.mark.parametrize("name", sorted(NETWORKS))


@each_network
@torch.no_grad()
def test_float64_agrees_with_float32(name):
    net = network(name)
    x, label, classes = inputs(net)
    low = net(x, label, class_label=classes)
    high = net.double()(x.double(), label.double(), class_label=classes)
    assert low.dtype == torch.float32 and high.dtype == torch.float64 and high.shape == x.shape
    # float32 rounding through a dozen layers: some tens of ulp of the largest value
    torch.testing.assert_close(low.double(), high, rtol=0, atol=1e-5 * float(high.abs().max()))


@each_network
def test_rows_do_not_see_their_batch_mates(name):
    net = network(name).double()
    x, label, classes = inputs(net, dtype=torch.float64)
    together = net(x, label, class_label=classes)
    kinds = [None] * len(x) if classes is None else classes[:, None]
    alone = torch.cat([net(x[i : i + 1], label[i : i + 1], class_label=kinds[i]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    gradient = torch.autograd.grad(net(x.requires_grad_(), label, class_label=classes)[2].sum(), x)[0]
    assert float(gradient[[0, 1, 3, 4]].abs().max()) == 0.0 and float(gradient[2].abs().min()) > 0.0


@each_network
def test_every_parameter_learns_and_every_input_matters(name):
    net = network(name)
    x, label, classes = inputs(net)
    out = net(x, label, class_label=classes)
    out.square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 0.0, key
    moved = (label + 1.0) % 1000.0
    assert torch.allclose(out, net(x, moved, class_label=classes), rtol=1e-4) == (name in WITHOUT_TIME)
    if classes is not None:
        assert not torch.allclose(out, net(x, label, class_label=(classes + 1) % 3), rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(WITHOUT_CLASSES)))
def test_no_class_is_the_null_class(name):
    net = network(name)
    x, label, _ = inputs(net)
    null = torch.full((len(x),), 3)
    assert torch.equal(net(x, label), net(x, label, class_label=null))
    with pytest.raises(ValueError, match="class_label"):
        net(x, label, class_label=null[:2])
    with pytest.raises(ValueError, match="without classes"):
        network(name, num_classes=0)(x, label, class_label=null)


@each_network
@torch.no_grad()
def test_fresh_network_outputs_zero(name):
    net = NETWORKS[name](**SMALL[name])
    x, label, classes = inputs(net)
    assert float(net(x, label, class_label=classes).detach().abs().max()) == 0.0


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in WITHOUT_CLASSES)) for n in sorted(NETWORKS)]
)
def test_one_graph_under_compile(name):
    """fullgraph fails on any graph break; "aot_eager" traces the backward pass too and needs no compiler."""
    net = network(name)
    x, label, classes = inputs(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    outs = [f(x, label, class_label=classes) for f in (net, compiled)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    vector = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    products = [torch.autograd.grad(out, x, vector)[0] for out in outs]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4 * float(products[0].abs().max()))


@each_network
def test_channels_last_changes_nothing_but_the_layout(name):
    net = network(name).double()
    x, label, classes = inputs(net, dtype=torch.float64)
    if x.ndim != 4:
        pytest.skip("no images")
    plain = net(x, label, class_label=classes)
    net = net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = net(x, label, class_label=classes)
    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-12)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


FORGETFUL = [n for n in sorted(NETWORKS) if "checkpointing" in inspect.signature(NETWORKS[n]).parameters]


@pytest.mark.parametrize("name", FORGETFUL)
def test_checkpointing_gives_the_same_gradients_from_less_memory(name):
    """Activations inside blocks are forgotten: fewer bytes are kept for the backward pass."""
    results, kept = [], []
    for flag in (False, True):
        net = network(name, checkpointing=flag, dropout=0.0)
        x, label, classes = inputs(net)
        x.requires_grad_()
        total = 0

        def count(t):
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            out = net(x, label, class_label=classes)
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
    x, label, classes = inputs(net)
    full = net(x, label, class_label=classes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x, label, class_label=classes)
    # eight bits of mantissa, errors of a dozen layers adding up at random
    assert float((low.float() - full).abs().max()) < 0.05 * float(full.abs().max())


@each_network
def test_wrong_shape_is_refused(name):
    net = network(name)
    with pytest.raises(ValueError, match="x must have shape"):
        net(torch.zeros(2, 3, 7, 5), torch.zeros(2))


@pytest.mark.parametrize("conditioning", ["scale_shift", "add"])
@pytest.mark.parametrize("shape", [(3, 8, 12), (2, 4, 4), (1, 16, 8)])
def test_unet_takes_any_channels_and_sides(shape, conditioning):
    options = {"shape": shape, "channels": 20, "multipliers": (1, 2, 1), "blocks": 2, "attention": (shape[1] // 2,)}
    net = network("unet", **options, conditioning=conditioning, dropout=0.2, embedding="fourier")
    x, label, classes = inputs(net, 2)
    out = net(x, label / 999.0, class_label=classes)
    assert out.shape == x.shape and bool(out.isfinite().all())


def test_unet_attention_reaches_every_pixel():
    """A corner influences the opposite corner through attention, and not without it in so shallow a network."""
    reach = []
    for attention in ((), (16,)):
        options = {"shape": (1, 16, 16), "multipliers": (1,), "channels": 8, "num_classes": 0}
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
        ({"num_classes": -1}, "num_classes"),
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
    label = torch.tensor([0.0, 0.5, 999.0], dtype=torch.float64)
    angle = label[:, None] * torch.tensor([1000.0 ** (-i / 3) for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(embedding(label), torch.cat([angle.cos(), angle.sin()], 1), rtol=1e-12, atol=1e-12)
    # frequencies are not stored, so that casting the module does not round them
    assert embedding.bfloat16()(label.float()).dtype == torch.float32
    for bad in ({"dim": 7}, {"dim": 2}, {"dim": 8, "max_period": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            SinusoidalEmbedding(**bad)


def test_fourier_embedding_keeps_its_frequencies_in_the_state():
    a, b = FourierEmbedding(16, scale=2.0), FourierEmbedding(16, scale=2.0)
    label = torch.randn(4)
    assert not torch.allclose(a(label), b(label))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(label), b(label))
    torch.testing.assert_close(a(label).square().sum(1), torch.full((4,), 8.0))
