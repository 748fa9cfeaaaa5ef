"""The diffusion transformer against its equations written as loops; names and shapes of its published weights."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.data.conditions import classes as of_classes
from scoresde.networks.dit import DiT, position_table
from scoresde.pretrained.dit import published_names

TINY = {"shape": (2, 4, 6), "patch": 2, "width": 12, "depth": 2, "heads": 3, "mlp_ratio": 1.5}
TINY["conditions"] = of_classes(3)
SIZES = {"S": (12, 384, 6, 33), "B": (12, 768, 12, 130), "L": (24, 1024, 16, 458), "XL": (28, 1152, 16, 675)}


def published_shapes(shape, num_classes, patch, width, depth, hidden, outputs):
    """Every trained tensor of facebookresearch/DiT with its shape."""
    shapes = {"x_embedder.proj.weight": (width, shape[0], patch, patch), "x_embedder.proj.bias": (width,)}
    linear = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for i in range(depth):
        linear[f"blocks.{i}.attn.qkv"], linear[f"blocks.{i}.attn.proj"] = (3 * width, width), (width, width)
        linear[f"blocks.{i}.mlp.fc1"], linear[f"blocks.{i}.mlp.fc2"] = (hidden, width), (width, hidden)
        linear[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
    linear["final_layer.linear"] = (patch * patch * outputs, width)
    linear["final_layer.adaLN_modulation.1"] = (2 * width, width)
    for name, size in linear.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    if num_classes:
        shapes["y_embedder.embedding_table.weight"] = (num_classes + 1, width)
    return shapes


def num_classes(net):
    return net.condition.specs["class_label"].classes if net.condition.specs else 0


def network(seed=0, **options):
    """A small float64 network with random weights, none of them zero, and these weights under their published names."""
    options = {**TINY, **options}
    net = DiT(**options).double().eval()
    hidden, outputs = int(options["mlp_ratio"] * net.width), net.shape[0] * (1 + net.learned_variance)
    g = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(size, generator=g, dtype=torch.float64) / math.sqrt(math.prod(size[1:]))
        for name, size in published_shapes(
            net.shape, num_classes(net), net.patch, net.width, options["depth"], hidden, outputs
        ).items()
    }
    net.load_state_dict({ours: state[theirs] for ours, theirs in published_names(net)})
    return net, state


def inputs(net, batch=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *net.shape, generator=g, dtype=torch.float64)
    return x, torch.linspace(0.5, 999.0, batch, dtype=torch.float64), torch.arange(batch) % 3


def place(row, column, width):
    """Position embedding of one place, from its formula."""
    quarter = width // 4
    angles = [[at * 10000.0 ** (-k / quarter) for k in range(quarter)] for at in (column, row)]
    return [fn(a) for axis in angles for fn in (math.sin, math.cos) for a in axis]


def reference(state, x, level, classes, heads, max_period=10000.0):
    """Peebles & Xie, sec. 3.2, one row, one token, one head at a time, from weights under their published names."""

    def affine(name, h):
        return state[f"{name}.weight"] @ h + state[f"{name}.bias"]

    def silu(h):
        return h / (1.0 + torch.exp(-h))

    def modulated(h, shift, scale):
        centered = h - h.mean()
        return centered / torch.sqrt((centered**2).mean() + 1e-6) * (1.0 + scale) + shift

    def gelu(h):
        return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * h**3)))

    def attention(block, tokens):
        qkv = [affine(f"{block}.attn.qkv", h) for h in tokens]
        parts, size = [[] for _ in tokens], width // heads
        for head in range(heads):
            q, k, v = ([h[p * width + head * size :][:size] for h in qkv] for p in range(3))
            for i in range(len(tokens)):
                weights = [math.exp(float(q[i] @ k[j]) / math.sqrt(size)) for j in range(len(tokens))]
                parts[i].append(sum(w * vj for w, vj in zip(weights, v, strict=True)) / sum(weights))
        return [affine(f"{block}.attn.proj", torch.cat(part)) for part in parts]

    width, data, p, _ = state["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    outputs = len(state["final_layer.linear.bias"]) // p**2
    _, _, high, wide = x.shape
    out = torch.zeros(len(x), outputs, high, wide, dtype=x.dtype)
    for b in range(len(x)):
        angles = [float(level[b]) * math.exp(-math.log(max_period) * i / 128) for i in range(128)]
        features = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=x.dtype)
        c = affine("t_embedder.mlp.2", silu(affine("t_embedder.mlp.0", features)))
        if classes is not None:
            c = c + state["y_embedder.embedding_table.weight"][classes[b]]
        tokens, places = [], [(i, j) for i in range(high // p) for j in range(wide // p)]
        for i, j in places:
            h = state["x_embedder.proj.bias"] + torch.tensor(place(i, j, width), dtype=x.dtype)
            for channel in range(data):
                for u in range(p):
                    for v in range(p):
                        weight = state["x_embedder.proj.weight"][:, channel, u, v]
                        h = h + weight * x[b, channel, i * p + u, j * p + v]
            tokens.append(h)
        for n in range(depth):
            block = f"blocks.{n}"
            shift1, scale1, gate1, shift2, scale2, gate2 = affine(f"{block}.adaLN_modulation.1", silu(c)).split(width)
            attended = attention(block, [modulated(h, shift1, scale1) for h in tokens])
            tokens = [h + gate1 * a for h, a in zip(tokens, attended, strict=True)]
            inner = [gelu(affine(f"{block}.mlp.fc1", modulated(h, shift2, scale2))) for h in tokens]
            tokens = [h + gate2 * affine(f"{block}.mlp.fc2", m) for h, m in zip(tokens, inner, strict=True)]
        shift, scale = affine("final_layer.adaLN_modulation.1", silu(c)).split(width)
        for (i, j), h in zip(places, tokens, strict=True):
            pixels = affine("final_layer.linear", modulated(h, shift, scale))
            for u in range(p):
                for v in range(p):
                    for channel in range(outputs):
                        out[b, channel, i * p + u, j * p + v] = pixels[(u * p + v) * outputs + channel]
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learned_variance": True, "heads": 1, "max_period": 50.0},
        {"shape": (3, 6, 3), "patch": 3, "width": 16, "heads": 4, "depth": 1, "learned_variance": True},
        {"shape": (1, 2, 3), "patch": 1, "width": 4, "heads": 2, "depth": 3, "conditions": {}},
    ],
)
@torch.no_grad()
def test_agrees_with_the_equations(options):
    """Loops over rows, tokens, heads and pixels, reading weights by their published names and layouts."""
    net, state = network(**options)
    x, level, classes = inputs(net)
    classes = classes if num_classes(net) else None
    given = {} if classes is None else {"class_label": classes}
    got = net(x, level, **given)
    want = reference(state, x, level, classes, net.blocks[0].heads, options.get("max_period", 10000.0))
    assert got.dtype == torch.float64 and got.shape == want.shape and float(want.abs().min()) > 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    low = net.float()(x.float(), level.float(), **given)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_position_table_against_its_formula():
    want = torch.tensor([place(r, c, 24) for r in range(3) for c in range(64)], dtype=torch.float64)
    torch.testing.assert_close(position_table(3, 64, 24, torch.float64), want, rtol=0, atol=1e-13)
    low = position_table(3, 64, 24)
    assert low.dtype == torch.float32 and low.shape == (192, 24)
    # angles up to 63 in float32: their rounding, 63 * 2^-24, a few times
    torch.testing.assert_close(low.double(), want, rtol=0, atol=2e-5)
    assert position_table(1, 1, 4).tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert position_table(2, 3, 8, device=torch.device("meta")).device.type == "meta"


@torch.no_grad()
def test_the_position_table_is_no_state_and_follows_the_dtype():
    net, _ = network()
    assert sum(v.numel() for v in net.state_dict().values()) == sum(p.numel() for p in net.parameters())
    assert not list(net.buffers())
    x, level, classes = inputs(net)
    want = net(x, level, class_label=classes)
    low = net.bfloat16()(x.bfloat16(), level.float(), class_label=classes)
    assert low.dtype == torch.bfloat16
    # eight bits of mantissa; inputs, weights and every layer are rounded
    assert float((low.double() - want).abs().max()) < 0.1 * float(want.abs().max())
    net, _ = network()
    net = net.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x.float(), level.float(), class_label=classes)
    assert float((low.double() - want).abs().max()) < 0.05 * float(want.abs().max())


@pytest.mark.parametrize("options", [{}, {"learned_variance": True}, {"conditions": {}}])
def test_published_names_and_shapes(options):
    net = DiT(**{**TINY, **options})
    names = dict(published_names(net))
    assert list(names) == list(net.state_dict()) and {k for k, _ in net.named_parameters()} == set(names)
    got = {names[key]: tuple(value.shape) for key, value in net.state_dict().items()}
    outputs = 4 if net.learned_variance else 2
    assert got == published_shapes((2, 4, 6), num_classes(net), 2, 12, 2, 18, outputs)


@pytest.mark.parametrize("name", list(SIZES))
def test_parameter_counts_are_the_published_ones(name):
    """Of /2 networks for ImageNet's latents, without the position table; with it, DiT-B would round to 131."""
    depth, width, heads, millions = SIZES[name]
    with torch.device("meta"):
        net = DiT((4, 32, 32), of_classes(1000), patch=2, width=width, depth=depth, heads=heads, learned_variance=True)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    shapes = published_shapes((4, 32, 32), 1000, 2, width, depth, 4 * width, 8)
    assert sum(math.prod(s) for s in shapes.values()) == sum(p.numel() for p in net.parameters())


def test_the_defaults_are_the_small_network():
    with torch.device("meta"):
        shapes = [p.shape for p in DiT((3, 32, 32)).parameters()]
        explicit = DiT((3, 32, 32), None, 2, 384, 12, 6, 4.0, 10000.0, 0.0, False)
    assert shapes == [p.shape for p in explicit.parameters()]


@pytest.mark.parametrize("learned_variance", [False, True])
@torch.no_grad()
def test_a_fresh_network_outputs_zero(learned_variance):
    net = DiT(**TINY, learned_variance=learned_variance)
    x, level, classes = inputs(net)
    out = net(x.float(), level.float(), class_label=classes)
    assert out.shape == (3, 4 if learned_variance else 2, 4, 6) and float(out.abs().max()) == 0.0


@torch.no_grad()
def test_initial_values():
    torch.manual_seed(0)
    net = DiT((4, 16, 16), of_classes(100), width=96, depth=2, heads=3)
    zero = {k for k, v in net.named_parameters() if float(v.abs().max()) == 0.0}
    weights = {"outlet.linear.weight", *(k for k in net.state_dict() if k.endswith("modulation.weight"))}
    assert zero == weights | {k for k in net.state_dict() if k.endswith(".bias")}
    for table in (net.condition.first, net.condition.second, net.condition.branches["class_label"]):
        assert math.isclose(float(table.weight.std()), 0.02, rel_tol=0.05)
    block = net.blocks[0]
    for weight in (net.inlet.weight.flatten(1), block.qkv.weight, block.out.weight, block.first.weight):
        bound = math.sqrt(6.0 / sum(weight.shape))
        largest, std = float(weight.abs().max()), float(weight.std())
        assert 0.98 * bound < largest <= bound and math.isclose(std, bound / math.sqrt(3.0), rel_tol=0.05)


@torch.no_grad()
def test_permuted_rows_give_permuted_outputs():
    net, _ = network()
    x, level, classes = inputs(net)
    order = torch.tensor([2, 1, 0])
    swapped = net(x[order], level[order], class_label=classes[order])
    torch.testing.assert_close(swapped, net(x, level, class_label=classes)[order], rtol=0, atol=1e-13)


def test_every_parameter_learns_and_every_pixel_matters():
    net, _ = network()
    x, level, classes = inputs(net)
    out = net(x.requires_grad_(), level, class_label=classes)
    out.square().sum().backward()
    for key, p in net.named_parameters():
        assert float(p.grad.abs().max()) > 0.0, key
    # attention: the first corner depends on every pixel of its own row, and of no other
    (gradient,) = torch.autograd.grad(net(x, level, class_label=classes)[0, 0, 0, 0], x)
    assert float(gradient[0].abs().min()) > 0.0 and float(gradient[1:].abs().max()) == 0.0


def test_gradients_agree_with_finite_differences():
    tiny = {"shape": (1, 4, 2), "width": 8, "depth": 1, "heads": 2, "learned_variance": True}
    tiny["conditions"] = of_classes(2)
    net, _ = network(**tiny)
    x, _, _ = inputs(net, 2)
    level, classes = torch.tensor([0.3, 7.0], dtype=torch.float64), torch.tensor([1, 2])
    at = (x.requires_grad_(), level.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, level: net(x, level, class_label=classes), at)
    names, values = zip(*net.named_parameters(), strict=True)

    def by_parameters(*values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(net, parameters, (x.detach(), level.detach()), {"class_label": classes})

    # one random direction per parameter: a full Jacobian has thousands of columns
    assert torch.autograd.gradcheck(by_parameters, values, fast_mode=True)


def test_second_derivatives_and_batches_of_gradients_with_unfused_attention():
    """What a differentiable divergence and an exact one ask for; torch's fused attention has neither."""
    net, _ = network(shape=(1, 4, 2), depth=1, learned_variance=False)
    x, level, classes = inputs(net, 2)
    x.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda x: net(x, level, class_label=classes), (x,))
        out = net(x, level, class_label=classes)
    vectors = torch.eye(16, dtype=torch.float64).reshape(16, *x.shape)
    (together,) = torch.autograd.grad(out, x, vectors, retain_graph=True, is_grads_batched=True)
    alone = [torch.autograd.grad(net(x, level, class_label=classes), x, v)[0] for v in vectors]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-12)


def test_one_graph_under_compile():
    net, _ = network()
    x, level, classes = inputs(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for given in (classes, None):
        torch.testing.assert_close(compiled(x, level, class_label=given), net(x, level, class_label=given))


@torch.no_grad()
def test_dropout_acts_in_training_only():
    net, _ = network(dropout=0.5)
    x, level, classes = inputs(net)
    still = net(x, level, class_label=classes)
    assert torch.equal(still, net(x, level, class_label=classes))
    assert torch.equal(still, network()[0](x, level, class_label=classes))
    for kept, closed in ((2, 5), (5, 2)):  # of the six modulations: the gates of attention and MLP, one of them closed
        net, _ = network(dropout=0.5, depth=1)
        for p in net.blocks[0].modulation.parameters():
            p.unflatten(0, (6, -1))[closed] = 0.0
        still = net(x, level, class_label=classes)
        assert not torch.allclose(still, net.train()(x, level, class_label=classes)), kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (3, 8)}, "C, H, W"),
        ({"shape": (0, 8, 8)}, "C, H, W"),
        ({"patch": 3}, "multiples of `patch` = 3, got 4 x 6"),
        ({"patch": 0}, "patch"),
        ({"heads": 5}, "multiple of `heads` = 5, got 12"),
        ({"heads": 0}, "heads"),
        ({"width": 6, "heads": 3}, "multiple of 4"),
        ({"depth": 0}, "depth"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"max_period": 1.0}, "max_period"),
        ({"dropout": 1.0}, "dropout"),
        ({"conditions": {"x": of_classes(3)["class_label"]}}, "needs a name"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{**TINY, **options})


def test_wrong_inputs_are_refused():
    net = DiT(**TINY)
    with pytest.raises(ValueError, match="x must have shape"):
        net(torch.zeros(2, 2, 6, 4), torch.zeros(2))
