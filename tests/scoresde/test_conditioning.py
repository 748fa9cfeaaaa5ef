"""Conditions of every kind in every network that takes them: what they may change, and what they cannot."""

import copy
import json
import math
from dataclasses import asdict

import pytest
import torch
from test_networks import WITHOUT_CONDITIONS, everything, inputs, network
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.data.conditions import ConditionSpec, classes, mapped
from scoresde.data.spec import DataSpec
from scoresde.networks import MLP, NETWORKS, ConditionEmbedding, UNet
from scoresde.networks.attention import CrossAttention, Tokens

each_network = pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(WITHOUT_CONDITIONS)))
TOKENS = ("text", "words")


def fresh(name):
    """A network whose parameters are random but for those that start at zero in the branches of its conditions."""
    net = network(name)
    for key, module in net.named_modules():
        if getattr(module, "starts_at_zero", False) and (key.startswith("condition.") or ".reading" in key):
            for p in module.parameters(recurse=False):
                torch.nn.init.zeros_(p)
    return net


@each_network
@torch.no_grad()
def test_new_conditions_leave_a_trained_network_as_it_is(name):
    """Bitwise, from the weights of the network without them; it goes on as soon as their branches are trained."""
    plain = {key: spec for key, spec in everything(name)["conditions"].items() if spec.kind == "class"}
    base = network(name, conditions=plain, target_noise_level=False)
    net = NETWORKS[name](**everything(name)).eval()
    found = net.load_state_dict(base.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith("condition.") or ".reading." in key for key in found.missing_keys)
    x, level, given = inputs(net)
    want = base(x, level, **{key: given[key] for key in plain})
    assert torch.equal(net(x, level, **given), want) and float(want.abs().min()) > 0.0


@each_network
@torch.no_grad()
def test_masked_tokens_change_nothing(name):
    """Not even by being infinite, undefined or no words; neither does what is computed from them."""
    net = network(name)
    x, level, given = inputs(net)
    want = net(x, level, **given)
    for value in (1e30, math.inf, math.nan):
        text = given["text"]["tokens"].masked_fill(~given["text"]["mask"][..., None], value)
        words = given["words"]["tokens"].masked_fill(~given["words"]["mask"], -5 if value < 1e31 else 10**6)
        other = {"text": {**given["text"], "tokens": text}, "words": {**given["words"], "tokens": words}}
        assert torch.equal(net(x, level, **given | other), want)
    shown = {**given["text"], "tokens": given["text"]["tokens"] + given["text"]["mask"][..., None]}
    assert not torch.equal(net(x, level, **given | {"text": shown}), want)


@each_network
@torch.no_grad()
def test_what_is_left_out_is_none(name):
    """Each condition by itself, and all of them: left out, None, and its null value are one, and finite."""
    net = network(name)
    x, level, given = inputs(net)
    nulls = {key: spec.null(len(x)) for key, spec in net.condition.specs.items()}
    for key, null in nulls.items():
        out = net(x, level, **given | {key: null})
        assert torch.equal(out, net(x, level, **given | {key: None})) and bool(out.isfinite().all())
        assert torch.equal(out, net(x, level, **{k: v for k, v in given.items() if k != key}))
        changed = (out - net(x, level, **given)).flatten(1).abs().amax(1) > 0.0
        # row 3 has no token anyway
        assert changed.tolist() == [key not in TOKENS or row != 3 for row in range(len(x))]
    without = net(x, level, **nulls)
    assert torch.equal(without, net(x, level)) and bool(without.isfinite().all())
    # the second time that is left out is the first one
    assert torch.equal(without, net(x, level, target_noise_level=level))
    assert not torch.equal(without, net(x, level, target_noise_level=0.5 * level))


@each_network
@torch.no_grad()
def test_tokens_are_a_set(name):
    """Reordered with their mask, they change nothing beyond rounding; without it they do."""
    net = network(name).double()
    x, level, given = inputs(net, dtype=torch.float64)
    want = net(x, level, **given)
    for key in TOKENS:
        order = torch.randperm(given[key]["mask"].shape[1], generator=torch.Generator().manual_seed(3))
        both = mapped(lambda t, order=order: t[:, order], given[key])
        # some hundreds of ulp of the largest value, through a dozen layers
        atol = 1e-13 * float(want.abs().max())
        torch.testing.assert_close(net(x, level, **given | {key: both}), want, rtol=0, atol=atol)
        one = {**given[key], "tokens": both["tokens"]}
        assert float((net(x, level, **given | {key: one}) - want).abs().max()) > 1e-6 * float(want.abs().max())


@each_network
def test_branches_learn_from_zero(name):
    """After one step every parameter of every branch has a gradient, and every condition changes the output."""
    net = fresh(name).double()
    x, level, given = inputs(net, dtype=torch.float64)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        want = net(x, level)
        for key in (*TOKENS, "pose", "low", "edges", "target_noise_level"):
            assert torch.equal(net(x, level, **{key: given[key]}), want), key
    for _ in range(2):
        net.zero_grad()
        (net(x, level, **given) - target).square().mean().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.01 * p.grad / (p.grad.norm() + 1e-12)
    silent = [key for key, p in net.named_parameters() if float(p.grad.abs().max()) == 0.0]
    assert not silent
    with torch.no_grad():
        want = net(x, level)
        for key, value in given.items():
            assert float((net(x, level, **{key: value}) - want).abs().max()) > 1e-9, key


@each_network
@torch.no_grad()
def test_copies_configurations_and_state_dicts(name):
    """Built again from JSON, with the weights of a state dict, and copied: the same network."""
    net = network(name)
    x, level, given = inputs(net)
    options = everything(name)
    plain = {key: asdict(spec) for key, spec in options["conditions"].items()}
    again = NETWORKS[name](**json.loads(json.dumps({**options, "conditions": plain}))).eval()
    again.load_state_dict(net.state_dict())
    assert again.condition.specs == net.condition.specs
    want = net(x, level, **given)
    assert torch.equal(again(x, level, **given), want) and torch.equal(copy.deepcopy(net)(x, level, **given), want)
    low = net.bfloat16()(x.bfloat16(), level, **given)  # values of a condition in whatever precision they come
    assert low.dtype == torch.bfloat16 and float((low.float() - want).abs().max()) < 0.1 * float(want.abs().max())


@each_network
def test_what_does_not_fit_is_refused(name):
    net = network(name, target_noise_level=False)
    x, level, given = inputs(net)
    mask, text = given["text"]["mask"], given["text"]["tokens"]
    for condition, error, words in (
        ({"klass": given["type"]}, TypeError, "no condition `klass`: it has class_label, type, pose"),
        ({"target_noise_level": level}, TypeError, "target_noise_level=True"),
        ({"type": 1}, TypeError, "`type` must be a tensor, got int"),
        ({"type": given["type"][:2]}, ValueError, r"`type` must have shape \(5,\)"),
        ({"pose": given["pose"][:, :3]}, ValueError, r"`pose` must have shape \(5, 4\)"),
        ({"low": given["edges"]}, ValueError, "`low` must have shape"),
        ({"text": text}, TypeError, "mapping"),
        ({"text": {"tokens": text}}, TypeError, "mapping"),
        ({"text": {"tokens": text[:, :2], "mask": mask[:, :2]}}, ValueError, r"`text.tokens` must have .*\(5, 5, 6\)"),
        ({"text": {"tokens": text, "mask": mask[:2]}}, ValueError, r"`text.mask` must have shape \(5, 5\)"),
        ({"text": {"tokens": text, "mask": mask.float()}}, TypeError, "`text.mask` must be a tensor of bool, got"),
        ({"type": given["type"].byte()}, TypeError, "`type` must be a tensor of int64, got torch.uint8"),
        ({"words": {**given["words"], "tokens": mask}}, TypeError, "`words.tokens` must be a tensor of int64"),
    ):
        with pytest.raises(error, match=words):
            net(x, level, **given | condition)
    with pytest.raises(ValueError, match=r"`target_noise_level` must have shape \(5,\)"):
        network(name)(x, level, target_noise_level=level[0])
    with pytest.raises(TypeError, match="built without conditions"):
        network(name, conditions={}, target_noise_level=False)(x, level, class_label=given["class_label"])


@pytest.mark.parametrize(
    ("conditions", "error", "message"),
    [
        (3, TypeError, "must map names"),
        ({"class_label": 3}, TypeError, "`class_label` must be a ConditionSpec"),
        ({"class_label": {"kind": "class"}}, ValueError, "number of classes"),
        ({"class_label": {"kind": "class", "number": 3}}, ValueError, "no entry 'number'; its entries: kind, shape"),
        ({"class_label": {"classes": 3}}, ValueError, "has to have a `kind`"),
        ({"x": {"kind": "class", "classes": 2}}, ValueError, "got 'x'"),
        ({"noise_level": {"kind": "class", "classes": 2}}, ValueError, "got 'noise_level'"),
        ({"t": {"kind": "class", "classes": 2}}, ValueError, "got 't'"),
        ({"knot": {"kind": "class", "classes": 2}}, ValueError, "got 'knot'"),
        ({"a.b": {"kind": "class", "classes": 2}}, ValueError, "got 'a.b'"),
        ({"class": {"kind": "class", "classes": 2}}, ValueError, "got 'class'"),
    ],
)
def test_conditions_that_are_none_are_refused(conditions, error, message):
    """By networks and by specifications of data, which would have to do with them."""
    for kind in (MLP, lambda shape, conditions: DataSpec(shape, conditions=conditions)):
        with pytest.raises(error, match=message):
            kind((2,), conditions)


def test_images_of_other_sides_are_refused_where_they_join_the_channels():
    small = {"low": ConditionSpec("image", (3, 4, 4))}
    for name in ("unet", "dit"):
        with pytest.raises(ValueError, match="`low` is of 4 x 4 pixels, the data are of 8 x 8"):
            NETWORKS[name]((1, 8, 8), small)
    assert MLP((6,), small)(torch.zeros(2, 6), torch.zeros(2), low=torch.zeros(2, 3, 4, 4)).shape == (2, 6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_classes_and_words_are_int64(dtype):
    """Tables of torch take no other integers but int32, and nulls are int64."""
    specs = {"y": ConditionSpec("class", classes=3), "text": ConditionSpec("tokens", (2,), classes=3)}
    spec, y = DataSpec((2,), conditions=specs), torch.zeros(4, dtype=dtype)
    text = {"tokens": y[:, None].expand(4, 2), "mask": torch.ones(4, 2, dtype=torch.bool)}
    for name, value in (("y", y), ("text", text)):
        with pytest.raises(TypeError, match=f"Condition `{name}.*must be an int64 tensor.*got {dtype}"):
            spec.check_condition({name: value})


def test_what_is_behind_the_mask_is_not_looked_at():
    """As networks do: padding of any kind is none."""
    specs = {"text": ConditionSpec("tokens", (2, 1)), "words": ConditionSpec("tokens", (2,), classes=3)}
    spec, mask = DataSpec((2,), conditions=specs), torch.tensor([[True, False]])
    spec.check_condition({"text": {"tokens": torch.tensor([[[1.0], [math.nan]]]), "mask": mask}})
    spec.check_condition({"words": {"tokens": torch.tensor([[2, -1]]), "mask": mask}})
    with pytest.raises(ValueError, match="`words` must be in 0 … 2, got values from -1 to 0"):
        spec.check_condition({"words": {"tokens": torch.tensor([[2, -1]]), "mask": ~mask}})


def test_an_image_is_one_that_was_concatenated_to_the_channels():
    """The two convolutions are one of the channels of both."""
    net = UNet((2, 8, 8), {"low": ConditionSpec("image", (3, 8, 8))}, channels=8)
    torch.nn.init.normal_(net.condition.branches["low"].weight)
    g = torch.Generator().manual_seed(0)
    x, low = torch.randn(2, 2, 8, 8, generator=g), torch.randn(2, 3, 8, 8, generator=g)
    weight = torch.cat([net.inlet.weight, net.condition.branches["low"].weight], 1)
    want = torch.nn.functional.conv2d(torch.cat([x, low], 1), weight, net.inlet.bias, padding=1)
    got = net.inlet(x) + net.condition(torch.zeros(2), condition={"low": low}).inlet
    torch.testing.assert_close(got, want)  # default tolerances: float32 sums of 45 terms


def test_attention_reads_unmasked_tokens_only_and_is_its_formula():
    torch.manual_seed(0)
    attention = CrossAttention(6, 5, heads=2).double()
    torch.nn.init.normal_(attention.out.weight)
    x, values = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    want = torch.zeros(2, 3, 6, dtype=torch.float64)
    for b in range(2):
        k, v = attention.kv(values[b][mask[b]]).chunk(2, -1)
        for i in range(3):
            q, parts = attention.q(x[b, i]), []
            for head in (slice(0, 3), slice(3, 6)):
                weights = ((k[:, head] @ q[head]) / math.sqrt(3)).softmax(0)
                parts.append(weights @ v[:, head])
            want[b, i] = attention.out(torch.cat(parts))
    torch.testing.assert_close(attention(x, Tokens(values, mask)), want, rtol=1e-12, atol=1e-12)


def test_the_vector_is_its_formula():
    """Classes where they enter, vectors, the second time and pooled tokens add up before the last silu."""
    torch.manual_seed(0)
    specs = classes(3) | {"pose": ConditionSpec("vector", (2,)), "text": ConditionSpec("tokens", (3, 4))}
    level, target = torch.tensor([3.0, 40.0]), torch.tensor([1.0, 0.0])
    given = {"class_label": torch.tensor([2, 0]), "pose": torch.randn(2, 2)}
    given["text"] = {"tokens": torch.randn(2, 3, 4), "mask": torch.tensor([[True, True, False], [False] * 3])}
    for entry in ("condition", "features"):
        net = ConditionEmbedding(8, specs, class_entry=entry, target_noise_level=True, pool_tokens=True, inlet=None)
        for p in net.parameters():
            torch.nn.init.normal_(p)
        silu, row = torch.nn.functional.silu, net.branches["class_label"].weight[given["class_label"]]
        h = net.noise_level(level)
        h = net.second(silu(net.first(h + row if entry == "features" else h)))
        h = h + row if entry == "condition" else h
        h = h + net.branches["pose"](given["pose"]) + net.target(net.noise_level(target))
        out, tokens, inlet = net(level, target, condition=given)
        # the row without tokens has the one that is always there, whose weight is 1
        alone = net.pool.attention.out(net.pool.attention.kv(net.no_token[0])[8:])
        torch.testing.assert_close(out[1], silu(h + alone)[1])
        torch.testing.assert_close(out[0], silu(h + net.pool(tokens))[0])
        assert inlet is None and tokens.mask.tolist() == [[True, True, True, False], [True, False, False, False]]


@pytest.mark.parametrize("name", ["dit", "mlp", "unet"])
def test_products_forward_and_backward_agree_under_conditions(name):
    """u^T J v one way and the other, and a derivative of it: what likelihoods take of a network."""
    net = network(name).double()
    x, level, given = inputs(net, 4, torch.float64)
    g = torch.Generator().manual_seed(4)
    u, v = (torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(2))
    with sdpa_kernel(SDPBackend.MATH):
        out = net(x.requires_grad_(), level, **given)
        (back,) = torch.autograd.grad((out * u).sum(), x, create_graph=True)
        forward = torch.func.jvp(lambda y: net(y, level, **given), (x.detach(),), (v,))[1]
        torch.testing.assert_close((back * v).sum(), (forward * u).sum(), rtol=1e-10, atol=1e-12)
        (second,) = torch.autograd.grad((back * v).sum(), net.condition.first.weight)
    assert float(second.abs().max()) > 0.0
