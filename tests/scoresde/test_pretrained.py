"""Published checkpoints: EDM, guided-diffusion, diffusers, DiT, our own; conversion, the Hub, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch

from scoresde import (
    VPSDE,
    DataSpec,
    DenoisingScoreMatching,
    ScoreModel,
    elbo,
    from_pretrained,
    load_pretrained,
    push_to_hub,
    save_model,
    save_pretrained,
)
from scoresde import config as configs
from scoresde.cli import main
from scoresde.codecs import Affine
from scoresde.data.conditions import classes as kinds
from scoresde.networks import ADM, NETWORKS, DiT, UNet
from scoresde.pretrained import MismatchError, edm, edm_pickle, guided_diffusion, load, score_sde
from scoresde.pretrained import diffusers as diffusers_format
from scoresde.pretrained.diffusers import architecture, chain, convert_state
from scoresde.pretrained.dit import published_names
from scoresde.pretrained.mapping import one_class
from scoresde.storage import CheckpointError
from sde_lib import SDES, NoisePrediction, build
from solvers import Heun, Karras, solve

EDM = {
    "vp_song": "vp", "ve_ncsn": "ve", "ve_skip": "ve", "iddpm_dhariwal": "iddpm", "edm_dhariwal": "edm",
    "edm_song_cond": "edm",
}  # fmt: skip


def edm_case(golden, name):
    with np.load(golden / "edm.npz") as file:
        prefix = f"net/{name}/"
        names = [k for k in file.files if k.startswith(prefix) and "meta" not in k]
        z = {k.removeprefix(prefix): torch.from_numpy(file[k]) for k in names}
    return torch.load(golden / f"edm_{name}.pt", weights_only=True), z


def conditions(z):
    if "class_labels" not in z:
        return {}
    return {"class_label": z["class_labels"].argmax(1), "augment_label": z["augment_labels"]}


# --- EDM --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", EDM)
def test_edm_networks(golden, name):
    """The architecture is read from the state dict; outputs in float32 and, but for the peer's softmax, float64."""
    state, z = edm_case(golden, name)
    kind, options = edm.architecture(state)
    net = NETWORKS[kind](**options).eval()
    net.load_state_dict(edm.convert_state(net, state))
    for dtype, key, tolerance in ((torch.float32, "F_out", 2e-5), (torch.float64, "F_out_f64in", 1e-5)):
        with torch.no_grad():
            out = net.to(dtype)(z["F_in"].to(dtype), z["c_noise"].flatten().to(dtype), **conditions(z))
        want = z[key].to(dtype)
        assert float((out - want).abs().max() / want.abs().max()) < tolerance


@pytest.mark.parametrize("name", EDM)
def test_edm_denoisers(golden, name):
    """D(x; sigma) and its gradient from one call of `load_pretrained`, in EDM's coordinates.

    x / sqrt(1 + sigma^2) is the state of the VP laws; iDDPM's preconditioner rounds sigma to its table, our chain.
    """
    _, z = edm_case(golden, name)
    model = load_pretrained(golden / f"edm_{name}.pt", preconditioning=EDM[name])
    x, sigma = z["x"].requires_grad_(), z["sigma"].flatten().double()
    if EDM[name] == "iddpm":
        ratio = model.law.sigma / model.law.alpha
        for value, rounded in zip(z["round_sigma_in"].tolist(), z["round_sigma_out"].tolist(), strict=True):
            nearest = float(ratio[(ratio - value).abs().argmin()])
            assert abs(nearest - rounded) < 1e-6 * rounded or rounded == 0.0  # the table's last entry is no level
        index = (ratio[None] - sigma[:, None]).abs().argmin(1)
        s = z["sigma"].reshape(-1, 1, 1, 1)
        denoised = x - s * model.raw(x / (1.0 + s**2).sqrt(), model.law.knot(index, ndim=4))
        assert model.learned_variance and model.law.n == 1000
        assert float((denoised - z["D"]).detach().abs().max() / z["D"].abs().max()) < 2e-5
        return
    law = model.law
    knot = law.knot_at(-sigma.log().reshape(-1, 1, 1, 1))
    x_in = x * knot.alpha.float()
    denoised = model.predict(x_in, knot, **conditions(z)).data
    want = z["D"]
    assert float((denoised - want).detach().abs().max() / want.abs().max()) < 2e-5
    (got,) = torch.autograd.grad((denoised * z["vjp_v"]).sum(), x)
    assert float((got - z["vjp"]).abs().max() / z["vjp"].abs().max()) < 5e-5
    if name == "edm_song_cond":
        plain = model.predict(x_in, knot).data
        assert float((plain - z["D_nolabels"]).detach().abs().max() / want.abs().max()) < 2e-5


@pytest.mark.parametrize(("kind", "name"), [("vp", "vp_song"), ("ve", "ve_ncsn"), ("edm", "edm_dhariwal")])
def test_edm_losses(golden, kind, name):
    """Their weights on the error of D make VP's and VE's losses that of the noise, EDM's that of the raw output."""
    with np.load(golden / "edm.npz") as file:
        z = {k: torch.from_numpy(file[f"loss/{kind}/{k}"]) for k in ("x0", "n", "sigma", "loss")}
    model = load_pretrained(golden / f"edm_{name}.pt", preconditioning=kind)
    t = model.law.time_at(-z["sigma"].double().flatten().log())
    for weighting in ("raw", "edm") if kind == "edm" else ("uniform",):
        found = DenoisingScoreMatching(model, weighting=weighting).at_times(z["x0"], t, z["n"])
        torch.testing.assert_close(found, z["loss"].flatten(1).mean(1), rtol=2e-6, atol=0)


def test_edm_sampler_on_its_network(golden):
    """Their deterministic sampler (Heun, rho = 7, 6 steps, down to zero) with a preconditioned ADM network."""
    with np.load(golden / "edm.npz") as file:
        x, want = (torch.from_numpy(file[f"sampler/{k}"]) for k in ("latents16", "net_edm/x"))
    model = load_pretrained(golden / "edm_edm_dhariwal.pt", preconditioning="edm").double()
    start = model.law.t_max * x
    got = solve(model.reverse(), start, Heun(), steps=5, grid=Karras(), end="denoise").x
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


def test_edm_state_dicts_need_their_preconditioning(golden):
    with pytest.raises(ValueError, match="preconditioning="):
        load_pretrained(golden / "edm_edm_dhariwal.pt")
    with pytest.raises(ValueError, match="must be one of edm, vp, ve, iddpm"):
        load_pretrained(golden / "edm_edm_dhariwal.pt", preconditioning="ddpm")


# --- EDM pickles ------------------------------------------------------------------------------------------------------
def fake_pickle(path, state, name="EDMPrecond"):
    """A file of the published structure: persistent objects that name a function to rebuild them, and their source."""
    persistence = types.ModuleType("torch_utils.persistence")
    touched = []

    def _reconstruct_persistent_obj(meta):
        touched.append(meta)  # would run meta["module_src"]

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj

    class Persistent:
        def __init__(self, name, state):
            self.meta = {"type": "class", "version": 6, "module_src": "raise SystemExit"}
            self.meta |= {"class_name": name, "state": state}

        def __reduce__(self):
            return _reconstruct_persistent_obj, (self.meta,)

    def tree(tensors):
        modules: dict = {}
        own = {}
        for key, value in tensors.items():
            head, _, rest = key.partition(".")
            if rest:
                modules.setdefault(head, {})[rest] = value
            else:
                own[key] = torch.nn.Parameter(value)
        children = {k: Persistent("Module", tree(v)) for k, v in modules.items()}
        return {"_parameters": own, "_buffers": {}, "_modules": children, "_init_kwargs": {}}

    sys.modules["torch_utils"], sys.modules["torch_utils.persistence"] = types.ModuleType("torch_utils"), persistence
    try:
        with path.open("wb") as file:
            pickle.dump({"ema": Persistent(name, tree(state)), "loss_fn": None, "dataset_kwargs": {}}, file)
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
    return touched


def tiny_adm(**options):
    torch.manual_seed(0)
    base = {"shape": (3, 8, 8), "channels": 64, "multipliers": (1, 1), "blocks": 1, "attention": (4,), "dropout": 0.0}
    net = ADM(**{**base, **options}).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn_like(p))
    return net


def published(network, entries):
    """A state dict in published names that our converter maps onto this network (for maps without permutations)."""
    own = network.state_dict()
    found = {}
    for entry in entries:
        assert len(entry.parts) == 1
        # invert the change by its action on numbered elements
        like = own[entry.target]
        shapes = [like.shape, like.shape[:2], (*like.shape[:2], 1)]
        if like.ndim == 2:  # a class table, with a row for none
            shapes.append((like.shape[1], like.shape[0] - 1))
        for shape in shapes:
            try:
                numbers = entry.change(torch.arange(float(np.prod(shape)), dtype=torch.float64).reshape(shape))
            except (RuntimeError, IndexError):
                continue
            if numbers.shape == like.shape:
                break
        flat = torch.zeros(int(np.prod(shape)), dtype=like.dtype)
        count = flat.numel()
        flat[numbers.flatten()[:count].long()] = like.flatten()[:count]
        found[entry.parts[0]] = flat.reshape(shape)
    return found


def test_edm_pickles_are_converted_without_running_them(tmp_path, capsys):
    """The normal load path refuses the file and says what to do; conversion builds tensors only."""
    net = tiny_adm()
    state = {f"model.{k}": v for k, v in published(net, edm.entries(net)).items()}
    touched = fake_pickle(tmp_path / "network.pkl", state)
    with pytest.raises(CheckpointError, match=r"scoresde convert network\.pkl"):
        load_pretrained(tmp_path / "network.pkl")
    assert main(["convert", str(tmp_path / "network.pkl"), str(tmp_path / "out.safetensors")]) == 0
    assert not touched and "adm" in capsys.readouterr().out
    model = load_pretrained(tmp_path / "out.safetensors")
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([0.1, -0.7])
    torch.testing.assert_close(model.network(x, label), net(x, label), rtol=1e-6, atol=1e-6)
    assert type(model.law).__name__ == "EDMSDE" and model.input_scaling == "unit"


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"ema": 3}), pickle.dumps([1, 2])])
def test_other_pickles_are_no_networks(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(CheckpointError):
        edm_pickle.read(tmp_path / "x.pkl")


def test_a_pickle_runs_nothing(tmp_path):
    """A file that would call os.system when loaded: neither reader calls it."""

    class Bomb:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path / 'boom'}",)

    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": Bomb(), "model": Bomb()}, protocol=2))
    for read in (edm_pickle.read, load_pretrained):
        with pytest.raises(CheckpointError):
            read(tmp_path / "x.pkl")
    assert not (tmp_path / "boom").exists()


# --- guided-diffusion -------------------------------------------------------------------------------------------------
def guided_names(state, levels, blocks):
    """EDM's names of an ADM network as guided-diffusion's, rows of q, k and v reordered (one head)."""
    inner = {"norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "norm1": "out_layers.0"}
    inner |= {"conv1": "out_layers.3", "skip": "skip_connection"}
    attention = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
    sides = sorted({int(k.split(".")[2].split("x")[0]) for k in state if k.startswith("model.enc.")}, reverse=True)
    places, at = {}, 0
    for i, side in enumerate(sides):
        names = [f"{side}x{side}_conv"] if i == 0 else [f"{side}x{side}_down"]
        for name in [*names, *(f"{side}x{side}_block{j}" for j in range(blocks))]:
            places[f"enc.{name}"], at = f"input_blocks.{at}", at + 1
    smallest = f"dec.{sides[-1]}x{sides[-1]}"
    places |= {f"{smallest}_in0": "middle_block.0", f"{smallest}_in1": "middle_block.2"}
    at = 0
    for i, side in enumerate(reversed(sides)):
        for j in range(blocks + 1):
            places[f"dec.{side}x{side}_block{j}"], at = f"output_blocks.{at}", at + 1
        if i < levels - 1:
            larger = sides[::-1][i + 1]
            has = f"model.dec.{side}x{side}_block{blocks}.qkv.weight" in state
            places[f"dec.{larger}x{larger}_up"] = f"output_blocks.{at - 1}.{2 if has else 1}"
    plain = {"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "out_norm": "out.0", "out_conv": "out.2"}
    found = {}
    for key, value in state.items():
        name = key.removeprefix("model.")
        if name.endswith("resample_filter"):
            continue
        if name.split(".")[0] in plain:
            found[f"{plain[name.split('.')[0]]}.{name.split('.')[1]}"] = value
            continue
        half, block, *rest = name.split(".")
        place = places[f"{half}.{block}"]
        if block.endswith("_conv"):
            found[f"{place}.0.{rest[0]}"] = value
        elif rest[0] in attention:
            if rest[0] == "qkv":
                value = value.reshape(-1, 3, *value.shape[1:]).movedim(1, 0).reshape(value.shape)
            if value.ndim == 4:
                value = value[..., 0]
            where = "middle_block.1" if place == "middle_block.0" else f"{place}.1"
            found[f"{where}.{attention[rest[0]]}.{rest[1]}"] = value
        else:
            deep = place.startswith("middle") or "_up" in block
            found[f"{place if deep else place + '.0'}.{inner[rest[0]]}.{rest[1]}"] = value
    return found


def test_guided_diffusion_through_edms_arrays(golden, tmp_path):
    """The same weights under guided-diffusion's names: the recorded outputs."""
    state, z = edm_case(golden, "edm_dhariwal")
    renamed = guided_names(state, 2, 1)
    options = guided_diffusion.architecture(renamed, size=16)
    net = ADM(**options).eval()
    net.load_state_dict(guided_diffusion.convert_state(net, renamed))
    with torch.no_grad():
        out = net(z["F_in"], z["c_noise"].flatten())
    assert float((out - z["F_out"]).abs().max() / z["F_out"].abs().max()) < 2e-5
    torch.save(renamed, tmp_path / "model.pt")
    model = load_pretrained(tmp_path / "model.pt", size=16)
    assert model.law.n == 1000 and isinstance(model.parameterization, NoisePrediction)
    torch.testing.assert_close(model.law.betas[[0, -1]], torch.tensor([1e-4, 0.02], dtype=torch.float64))


@pytest.mark.parametrize(
    ("size", "multipliers", "options", "millions"),
    [
        (64, (1, 2, 3, 4), {"channels": 192, "blocks": 3, "conditions": one_class(1000)}, 296),
        (128, (1, 1, 2, 3, 4), {"channels": 256, "blocks": 2, "conditions": one_class(1000), "heads": 4}, 422),
        (256, (1, 1, 2, 2, 4, 4), {"channels": 256, "blocks": 2, "conditions": one_class(1000)}, 554),
        (
            512, (1, 2, 2, 4, 4, 8, 8),
            {"channels": 128, "blocks": 2, "conditions": one_class(1000), "embedding_channels": 256}, 559,
        ),
    ],
)  # fmt: skip
def test_published_sizes_of_adm(size, multipliers, options, millions):
    """Dhariwal & Nichol 2021, Table 12: parameters in millions; names and shapes read back give the same network."""
    with torch.device("meta"):
        net = ADM((3, size, size), multipliers=multipliers, learned_variance=True, **options)
    null = net.condition.branches["class_label"].weight[-1]  # of ours
    count = sum(p.numel() for p in net.parameters()) - null.numel()
    assert round(count / 1e6) == millions
    names = {e.parts[0]: torch.empty(own.shape, device="meta") for e, own in
             ((e, net.state_dict()[e.target]) for e in guided_diffusion.entries(net))}  # fmt: skip
    names["label_emb.weight"] = names["label_emb.weight"][:-1]
    read = guided_diffusion.architecture(names, heads=options.get("heads", 0))
    with torch.device("meta"):
        again = ADM(**read)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_learned_variances_enter_the_bound():
    """log variance between log beta (output 1) and the posterior's (output -1), and the chain's bound with it."""
    net = tiny_adm(learned_variance=True, channels=16, head_channels=8)
    spec = DataSpec((3, 8, 8), 256)
    model = ScoreModel(net, VPSDE().discretize(50), "noise", "index", spec, input_scaling="none")
    x = torch.randn(2, 3, 8, 8)
    index = torch.tensor([0, 30])
    knot = model.law.knot(index, ndim=4)
    assert model.predict(x, knot).noise.shape == x.shape
    law = model.law
    for value, want in ((1.0, law.betas[index].log()), (-1.0, 2.0 * law.posterior_std[index.clamp(min=1)].log())):
        with torch.no_grad():
            net.outlet.conv.weight.zero_()
            net.outlet.conv.bias.fill_(value)
        got = model.log_variance(x, knot)
        torch.testing.assert_close(got, want.float()[:, None, None, None].expand_as(got), rtol=1e-5, atol=1e-5)
    x = torch.zeros_like(x)
    bounds = {}
    for name, variance in (("small", "small"), ("learned", model.log_variance)):
        bounds[name] = elbo(model.reverse(), x, variance=variance, rng=0, control_variate=False)
    # with output -1 the learned variance is the posterior's
    torch.testing.assert_close(bounds["learned"].nats, bounds["small"].nats, rtol=1e-4, atol=0)
    plain = ScoreModel(tiny_adm(channels=16, head_channels=8), law, "noise", "index", input_scaling="none")
    with pytest.raises(ValueError, match="learned variance"):
        plain.log_variance(x, knot)


# --- DiT --------------------------------------------------------------------------------------------------------------
def test_dit_checkpoints(tmp_path):
    torch.manual_seed(0)
    options = {"shape": (4, 8, 8), "conditions": one_class(10), "width": 384, "depth": 2, "heads": 6}
    options["learned_variance"] = True
    net = DiT(**options).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn_like(p))
    own = net.state_dict()
    state = {theirs: own[ours] for ours, theirs in published_names(net)}
    torch.save({**state, "pos_embed": torch.zeros(1, 16, 384)}, tmp_path / "dit.pt")
    model = load_pretrained(tmp_path / "dit.pt")
    x, i = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    classes = torch.tensor([0, 9, 10])
    with torch.no_grad():
        want = net(x, i.float(), class_label=classes)[:, :4]
        torch.testing.assert_close(model(x, i, class_label=classes).noise, want)
    assert model.data_spec.levels is None and model.data_spec.num_classes == 10


# --- diffusers --------------------------------------------------------------------------------------------------------
FOLDERS = {
    "ddpm": {
        "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": None, "downsample_padding": 0,
        "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
    },
    "classes": {
        "block_out_channels": (32, 64, 96), "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "num_class_embeds": 5,
        "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32,
    },
    "ve": {
        "block_out_channels": (128, 256), "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "layers_per_block": 1,
        "time_embedding_type": "fourier", "attention_head_dim": None, "norm_num_groups": None, "norm_eps": 1e-6,
        "mid_block_scale_factor": 2**0.5, "center_input_sample": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_diffusers_is_its_own_oracle(name, tmp_path):
    """A folder that diffusers wrote: the loaded model predicts what its network does."""
    library = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = library.UNet2DModel(sample_size=16, **FOLDERS[name]).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.3))
    theirs.save_pretrained(tmp_path / "unet")
    if name == "ve":
        scheduler = library.ScoreSdeVeScheduler(num_train_timesteps=50, sigma_min=0.01, sigma_max=300.0)
    else:
        scheduler = library.DDPMScheduler(num_train_timesteps=1000)
    scheduler.save_pretrained(tmp_path / "scheduler")
    model, theirs = load_pretrained(tmp_path).double(), theirs.double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        if name == "ve":
            sigma = torch.tensor([0.3, 20.0, 150.0], dtype=torch.float64)
            want = theirs(x, sigma).sample  # the score of data in [0, 1]
            knot = model.law.knot_at(-(2.0 * sigma).log().reshape(-1, 1, 1, 1))
            got = 2.0 * model.predict(2.0 * x - 1.0, knot).score
        else:
            i = torch.tensor([0, 50, 999])
            classes = torch.tensor([0, 1, 4]) if name == "classes" else None
            more = {} if classes is None else {"class_labels": classes}
            want = theirs(x, i.double(), **more).sample
            got = model(x, i, **({} if classes is None else {"class_label": classes})).noise
    assert float((got - want).abs().max() / want.abs().max()) < 1e-6


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_diffusers_schedules(schedule):
    """Their cumulative products of up to 1000 float32 factors, each off by up to 6e-8 of itself or, for the last betas
    of the cosine, of 1 - beta = 0.001 by more."""
    library = pytest.importorskip("diffusers")
    scheduler = library.DDPMScheduler(beta_schedule=schedule)
    sde = chain(scheduler.config, 1000)
    name = sde.pop("name")
    ours = build(SDES, {"name": name, name: sde}, "sde").discretize(1000).alphas_cumprod
    torch.testing.assert_close(ours, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-6)


def test_names_of_older_diffusers(tmp_path):
    """Attention used to be called query, key, value and proj_attn."""
    config = {**FOLDERS["ddpm"], "sample_size": 16}
    net = UNet(**architecture(config))
    entries = list(diffusers_format.entries(net, True))
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for entry in entries:
        like = net.state_dict()[entry.target]
        for part in entry.parts:
            rows = like.shape[0] // len(entry.parts)
            shape = (rows, *like.shape[1:])
            value = torch.randn(shape)
            for new, old in older.items():
                part = part.replace(f".{new}.", f".{old}.")
            if any(f".{old}." in part for old in older.values()) and value.ndim == 4:
                value = value[..., 0, 0]
            state[part] = value
    assert any(".query." in name for name in state)
    net.load_state_dict(convert_state(net, state, config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "`act_fn` = 'gelu'"),
        ({"down_block_types": ("KDownBlock2D", "AttnDownBlock2D")}, "kinds"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "different resolutions"),
        ({"sample_size": None}, "size="),
        ({"block_out_channels": (32, 48)}, "multiples"),
        ({"resnet_time_scale_shift": "scale_shift"}, "no norm"),
    ],
)
def test_what_diffusers_has_and_we_do_not_is_named(change, message):
    with pytest.raises(MismatchError, match=message):
        architecture({**FOLDERS["ddpm"], "sample_size": 16, **change})


# --- our own, the Hub, and everything else ----------------------------------------------------------------------------
def small_model(levels=0, classes=0):
    options = {"shape": [1, 8, 8], "channels": 8, "conditions": one_class(classes)}
    return ScoreModel.from_config(
        {
            "network": {"name": "unet", "unet": options}, "sde": {"name": "vp", "vp": {}}, "parameterization": "v",
            "levels": levels,
            "data_spec": DataSpec((1, 8, 8), 16, kinds(classes)).to_dict(),
        }
    )  # fmt: skip


@pytest.mark.parametrize(("levels", "classes"), [(0, 0), (0, 3), (50, 0), (50, 3)])
def test_own_files_and_folders(tmp_path, levels, classes):
    """Read back as they were, and the code on their card runs: of an SDE and of a chain, with classes and without."""
    model = small_model(levels, classes)
    save_model(model, tmp_path / "m.safetensors")
    save_pretrained(model, tmp_path / "folder")
    for path in (tmp_path / "m.safetensors", tmp_path / "folder"):
        for again in (load_pretrained(path), from_pretrained(path)):
            pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert again.config() == model.config()
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "library_name: scoresde" in card and "`unet`" in card
    assert ("told `class_label` (one of 3 classes)" in card) == bool(classes)
    code = card.split("```python\n")[1].split("```")[0].replace("OWNER/NAME", str(tmp_path / "folder"))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["x"].shape == (16, 1, 8, 8) and ("labels" in names) == bool(classes)


def test_from_the_hub_without_a_network(tmp_path, monkeypatch):
    """A model in the Hub's cache is found offline; one that is not there is an error of the Hub's."""
    pytest.importorskip("huggingface_hub")
    model = small_model()
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--digits"
    save_pretrained(model, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    again = from_pretrained("someone/digits", cache_dir=tmp_path, local_files_only=True)
    assert again.config() == model.config()
    with pytest.raises(FileNotFoundError):
        from_pretrained("someone/else", cache_dir=tmp_path, local_files_only=True)


def test_pushing_uploads_a_folder(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            from pathlib import Path

            calls.append(sorted(p.name for p in Path(folder_path).iterdir()))
            assert "from_pretrained(\"me/m\")" in (Path(folder_path) / "README.md").read_text()
            return "https://example.org/commit"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert push_to_hub(small_model(), "me/m", private=True) == "https://example.org/commit"
    assert calls == [("me/m", True, True), ["README.md", "model.safetensors"]]


def test_unknown_things_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_pretrained(tmp_path / "nothing.pt")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no known format"):
        load_pretrained(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_pretrained(tmp_path / "list.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(MismatchError, match="AutoencoderKL"):
        load_pretrained(tmp_path / "empty")


def write_folder(path, text):
    path.mkdir()
    (path / "config.json").write_text(text)
    safetensors.torch.save_file({"conv_in.weight": torch.zeros(1)}, path / "weights.safetensors")
    return path


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"block_out_channels": (2**20, 2**20)}, MismatchError, "does not fit"),  # 40 TB, were they taken
        ({"block_out_channels": "ab"}, CheckpointError, "contents are not those"),
        ({"sample_size": "8"}, MismatchError, "`sample_size` must be an int"),
        (None, CheckpointError, "must hold a mapping"),
    ],
)
def test_folders_of_nonsense(tmp_path, change, error, words):
    content = [] if change is None else {**FOLDERS["ddpm"], "sample_size": 16, **change}
    with pytest.raises(error, match=words):
        load_pretrained(write_folder(tmp_path / "folder", json.dumps(content)))


@pytest.mark.parametrize(
    "content",
    [{"model": 3, "ema": 4}, {"model": {}, "ema": {}}, {"enc.8x8_conv.weight": torch.zeros(1)}],
)
def test_files_of_nonsense(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"not the tensors|four dimensions"):
        load_pretrained(tmp_path / "x.pth", preconditioning="edm")


def test_options_that_would_change_nothing_are_refused(tmp_path):
    save_model(small_model(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="leave `config` away"):
        load_pretrained(tmp_path / "m.safetensors", config="vp/cifar10_ddpmpp")
    with pytest.raises(ValueError, match="Cannot use device"):
        load_pretrained(tmp_path / "m.safetensors", device="gpu")
    load_pretrained(tmp_path / "m.safetensors", progress=True)


def hollow(name, path):
    """A checkpoint file of an experiment with its full shapes: every tensor is one zero, expanded."""
    config = configs.load(name)
    shape = tuple(config.data.shape)
    plain = configs.model_config(config, DataSpec(shape), Affine(shape))
    with torch.device("meta"):
        net = build(NETWORKS, plain["network"], "network")
    own = net.state_dict()
    state = {}
    for entry in score_sde.entries(net):
        for part in entry.parts:
            like = own[entry.target][: own[entry.target].shape[0] // len(entry.parts)]
            state[part] = torch.zeros(()).expand(like.shape[1::-1] if part.endswith("W") else like.shape)
    write(state, path)
    return state


def write(state, path):
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "ema": {"shadow_params": []}, "step": 1}, path)


def test_which_experiment_a_checkpoint_belongs_to(golden, tmp_path, monkeypatch):
    """By `config`, by the path, by its tensors, or asked for where several fit."""
    small = ["--config.data.shape=(3,16,16)", "--config.network.ncsnpp.channels=16", "--config.network.ncsnpp.blocks=1"]
    small += ["--config.network.ncsnpp.multipliers=(1,2)", "--config.network.ncsnpp.attention=(8,)"]
    file = golden / "ckpt_vp_ddpmpp.pth"
    with pytest.raises(ValueError, match="config="):
        load_pretrained(file, overrides=small)
    folder = tmp_path / "subvp" / "cifar10_ddpmpp_continuous"
    folder.mkdir(parents=True)
    (folder / "checkpoint_26.pth").write_bytes(file.read_bytes())
    assert type(load_pretrained(folder / "checkpoint_26.pth", overrides=small).law).__name__ == "SubVPSDE"
    with pytest.raises(MismatchError, match="missing"):
        load_pretrained(file, config="ve/cifar10_ncsnpp_continuous", overrides=small)


def test_experiments_are_known_by_their_tensors(tmp_path, monkeypatch):
    """Those that fit are named without building any; where none does, the nearest and the difference."""
    path = tmp_path / "model.pth"
    state = hollow("vp/ddpm/cifar10", path)
    with monkeypatch.context() as patch:
        patch.setattr(load, "build", None)
        with pytest.raises(ValueError, match="does not say which") as caught:
            load_pretrained(path, ema=False)
        assert {"vp/ddpm/cifar10", "subvp/cifar10_ddpm_continuous"} <= set(re.findall(r"[\w/]+/\w+", str(caught.value)))
    last = list(state)[-1]
    write({k: v for k, v in state.items() if k != last} | {"all_modules.99.W": torch.zeros(2)}, path)
    with pytest.raises(MismatchError, match=rf"missing: {last}; unexpected: all_modules.99.W\.") as caught:
        load_pretrained(path, ema=False)
    assert "cifar10_ddpm" in str(caught.value)


def test_converting_keeps_the_model(golden, tmp_path):
    """A genuine checkpoint, converted by the command line, scores as before; raw and averaged weights differ."""
    small = ["--config.data.shape=(3,16,16)", "--config.network.ncsnpp.channels=16", "--config.network.ncsnpp.blocks=1"]
    small += ["--config.network.ncsnpp.multipliers=(1,2)", "--config.network.ncsnpp.attention=(8,)"]
    source = golden / "ckpt_trained_step4.pth"
    x, t = torch.randn(2, 3, 16, 16), 0.4
    scores = []
    for flag in ([], ["--raw-weights"]):
        out = tmp_path / f"m{len(flag)}.safetensors"
        arguments = ["convert", str(source), str(out), "--config", "ve/cifar10_ncsnpp_continuous", *flag, *small]
        assert main(arguments) == 0
        direct = load_pretrained(source, config="ve/cifar10_ncsnpp_continuous", overrides=small, ema=not flag)
        again = load_pretrained(out)
        with torch.no_grad():
            scores.append(again(x, t).score)
            torch.testing.assert_close(scores[-1], direct(x, t).score)
    assert not torch.allclose(*scores)


def test_a_safe_file_is_not_opened_as_a_pickle(tmp_path):
    buffer = io.BytesIO()
    torch.save({"x_embedder.proj.weight": torch.zeros(1)}, buffer)
    (tmp_path / "x.safetensors").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="pickle"):
        load_pretrained(tmp_path / "x.safetensors")
