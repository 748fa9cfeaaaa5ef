"""NCSN++, DDPM++ and DDPM against score_sde_pytorch: outputs and input gradients with its weights."""

import json

import numpy as np
import pytest
import torch

from scoresde.networks import DDPM, NCSNpp
from scoresde.networks.embeddings import FourierEmbedding
from scoresde.networks.resampling import Filter, Resample
from scoresde.pretrained.score_sde import convert_state, entries, read_checkpoint

NAMES = [
    *(f"{sde}_ddpm_cont" for sde in ("vp", "subvp")),
    *("vp_ddpm_disc", "ve_ddpm_disc", "vp_ddpmpp_cont", "vp_ddpmpp_disc", "subvp_ddpmpp_cont", "vp_ncsnpp_cont"),
    *("vp_ncsnpp_disc", "subvp_ncsnpp_cont", "ve_ncsnpp_cont", "ve_ncsnpp_disc", "ve_ncsnpp_residual_fir"),
    *("ve_ncsnpp_residual_nofir", "ve_ncsnpp_skip_sum", "ve_ncsnpp_skip_cat"),
    *("vp_ncsnpp_ddpmblock", "vp_ncsnpp_ddpmblock_fir"),
]


def network(model):
    """Our network for the `model` section of a published configuration."""
    options = {
        "shape": (3, 16, 16), "channels": model["nf"], "multipliers": model["ch_mult"], "dropout": 0.0,
        "blocks": model["num_res_blocks"], "attention": model["attn_resolutions"],
    }  # fmt: skip
    if model["name"] == "ddpm":
        return DDPM(**options, up_attention="last")
    pyramid = {"none": "none", "input_skip": "skip", "output_skip": "skip", "residual": "residual"}
    return NCSNpp(
        **options,
        embedding={"fourier": "fourier", "positional": "sinusoidal"}[model["embedding_type"]],
        fir=model["fir"],
        resampling={"biggan": "block", "ddpm": "convolution"}[model["resblock_type"]],
        rescale=model["skip_rescale"],
        input_pyramid=pyramid[model["progressive_input"]],
        output_pyramid=pyramid[model["progressive"]],
        combine=model["progressive_combine"],
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("f64", 1e-10), ("f32", 2e-5)])
@pytest.mark.parametrize("name", NAMES)
def test_golden_outputs_and_input_gradients(golden, name, dtype, tolerance):
    """Their network computes 2x - 1 where data are not centered, and divides by sigma on VE: here the caller does."""
    z = np.load(golden / "nets.npz")
    meta = json.loads(str(z[f"{name}/meta"]))
    model = meta["model"]
    precision = {"f64": torch.float64, "f32": torch.float32}[dtype]
    state = read_checkpoint(golden / meta["checkpoint"], ema=False)
    net = network(model).eval()
    net.load_state_dict(convert_state(net, state))
    net = net.to(precision)
    x = torch.from_numpy(z[f"{name}/x"]).to(precision).requires_grad_()
    level = torch.from_numpy(np.asarray(z[f"{name}/{dtype}/labels"]))
    fourier = isinstance(net.condition.noise_level, FourierEmbedding)
    out = net(x if meta["centered"] else 2 * x - 1, (level.log() if fourier else level).to(precision))
    if model["scale_by_sigma"]:
        sigma = level if fourier else state["sigmas"][level.long()]
        out = out / sigma.to(precision)[:, None, None, None]
    want = torch.from_numpy(z[f"{name}/{dtype}/net_out"]).to(precision)
    assert float((out - want).detach().abs().max() / want.abs().max()) < tolerance
    vector = torch.from_numpy(z[f"{name}/vjp_v"]).to(precision)
    (got,) = torch.autograd.grad((out * vector).sum(), x)
    wanted = torch.from_numpy(z[f"{name}/{dtype}/vjp"]).to(precision)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < tolerance


def test_averaged_weights_have_no_names(golden):
    """The list of averages is matched to the parameters by their order; it differs from the raw weights."""
    raw, ema = (read_checkpoint(golden / "ckpt_trained_step4.pth", ema=flag) for flag in (False, True))
    assert list(raw) == list(ema)
    changed = [k for k in raw if not torch.equal(raw[k], ema[k])]
    assert "all_modules.0.W" not in changed and "sigmas" not in changed and len(changed) > 0.9 * (len(raw) - 2)
    stored = torch.load(golden / "ckpt_ddpm.pth", weights_only=False)  # a file of our own making
    assert len(stored["ema"]["shadow_params"]) == len(read_checkpoint(golden / "ckpt_ddpm.pth")) - 1


def test_a_checkpoint_of_another_architecture_says_what_differs(golden):
    state = read_checkpoint(golden / "ckpt_vp_ddpmpp.pth")
    options = {"shape": (3, 16, 16), "channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (8,)}
    options["fir"] = False
    right = NCSNpp(**options, embedding="sinusoidal", input_pyramid="none")
    right.load_state_dict(convert_state(right, state))
    for change, message in (
        ({"blocks": 2}, "missing: all_modules"),
        ({"attention": ()}, "missing|unexpected|another shape"),
        ({"channels": 32}, "another shape"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_state(NCSNpp(**{**options, **change}, embedding="sinusoidal", input_pyramid="none"), state)
    with pytest.raises(ValueError, match="unexpected: extra"):
        convert_state(right, {**state, "extra": torch.zeros(1)})


def test_every_parameter_has_a_published_name():
    for options in ({}, {"output_pyramid": "residual"}, {"input_pyramid": "skip", "output_pyramid": "skip"}):
        net = NCSNpp((3, 8, 8), channels=8, multipliers=(1, 2), blocks=1, attention=(4,), **options)
        assert sorted(entry.target for entry in entries(net)) == sorted(net.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("ve/cifar10_ncsnpp_continuous", {}, 62.76),
        ("ve/cifar10_ncsnpp_deep_continuous", {"blocks": 8}, 107.59),
        ("vp/cifar10_ncsnpp_continuous", {"embedding": "sinusoidal"}, 62.69),
        ("vp/cifar10_ddpmpp_continuous", {"embedding": "sinusoidal", "fir": False, "input_pyramid": "none"}, 61.80),
        ("vp/ddpm/cifar10", None, 35.22),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, options, millions):
    with torch.device("meta"):
        net = DDPM((3, 32, 32), up_attention="last") if options is None else NCSNpp((3, 32, 32), **options)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


def test_the_filter_keeps_constants_and_is_its_own_adjoint():
    """Away from the border a constant stays; the two filtered maps are adjoint up to the factor four."""
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for fir in (True, False):
        down, up = (Resample(3, way, fir).double() for way in ("down", "up"))
        torch.testing.assert_close(4 * (down(x) * y).sum(), (x * up(y)).sum())
        ones = torch.ones(1, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(down(ones)[..., 1:-1, 1:-1], ones[..., :2, :2])
        torch.testing.assert_close(up(ones)[..., 1:-1, 1:-1], ones.new_ones(1, 3, 14, 14))


def test_the_filter_is_a_constant_that_follows_its_module():
    """In no state dict, exact in every dtype, there after `to_empty`, and not made anew by a forward pass."""
    net = NCSNpp((3, 8, 8), channels=8, multipliers=(1, 2), blocks=1, attention=())
    filters = [m for m in net.modules() if isinstance(m, Filter)]
    assert len(filters) == 3 and not any("kernel" in name for name in net.state_dict())
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8.0
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for f in (m for m in net.to(dtype).modules() if isinstance(m, Filter)):
            assert f.kernel.dtype == dtype and torch.equal(f.kernel[0, 0].double(), f.gain * torch.outer(taps, taps))
    with torch.device("meta"):
        later = NCSNpp((3, 8, 8), channels=8, multipliers=(1, 2), blocks=1, attention=())
    assert all(m.kernel.is_meta for m in later.modules() if isinstance(m, Filter))
    later.to_empty(device="cpu").double().load_state_dict(net.state_dict())
    x, level = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(later.eval()(x, level), net.eval()(x, level), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (3, 8)}, "C, H, W"),
        ({"shape": (3, 6, 6), "multipliers": (1, 1, 1)}, "multiples of 4"),
        ({"attention": (5,)}, "height 5"),
        ({"embedding": "positional"}, "embedding"),
        ({"resampling": "biggan"}, "resampling"),
        ({"input_pyramid": "input_skip"}, "input_pyramid"),
        ({"output_pyramid": "x"}, "output_pyramid"),
        ({"combine": "add"}, "combine"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NCSNpp(**{"shape": (3, 8, 8), "channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), **options})
