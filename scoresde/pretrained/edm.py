"""State dicts of EDM's preconditioned networks: "SongUNet" and "DhariwalUNet" (Karras et al. 2022)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.networks import ADM
from scoresde.networks.blocks import Outlet, Stage
from scoresde.networks.embeddings import FourierEmbedding
from scoresde.networks.levels import Down
from scoresde.networks.unet import UNet
from scoresde.pretrained.mapping import Entry, MismatchError, Names, convert, one_class, stacked, swapped, with_null

# buffers: resampling filters, and the level table of the iDDPM preconditioner
_IGNORED = ("resample_filter", "u", "sigma_min", "sigma_max")


def is_edm(state: Mapping[str, Any]) -> bool:
    """Whether these are names of one of its networks."""
    return any(re.search(r"enc\.\d+x\d+_conv\.weight$", name) for name in state)


def architecture(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """("ncsnpp" or "adm", constructor's options), read from the names and shapes: all but dropout follows from them.

    Raises:
        MismatchError: for a first convolution that is none.
    """
    state = _bare(state)
    sides = sorted({int(m[1]) for n in state if (m := re.match(r"enc\.(\d+)x\d+_", n))}, reverse=True)
    first = state[f"enc.{sides[0]}x{sides[0]}_conv.weight"]
    if first.ndim != 4:
        raise MismatchError(f"The first convolution must have a weight of four dimensions, got {tuple(first.shape)}.")
    channels, data = first.shape[:2]
    blocks = len({n.split(".")[1] for n in state if n.startswith(f"enc.{sides[0]}x{sides[0]}_block")})
    width = [state[f"enc.{s}x{s}_block0.conv1.weight"].shape[0] for s in sides]
    options: dict[str, Any] = {
        "shape": (data, sides[0], sides[0]),
        "conditions": one_class(state["map_label.weight"].shape[1] if "map_label.weight" in state else 0),
        "channels": channels,
        "multipliers": tuple(w // channels for w in width),
        "blocks": blocks,
        "attention": tuple(s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in state),
        "augmentations": state["map_augment.weight"].shape[1] if "map_augment.weight" in state else 0,
        "dropout": 0.0,
    }
    if "out_conv.weight" in state:
        # 64 channels per head, and no attention at all where there are fewer
        middle = any(n.endswith("in0.qkv.weight") for n in state)
        return "adm", {
            **options, "middle_attention": middle, "learned_variance": state["out_conv.weight"].shape[0] == 2 * data
        }  # fmt: skip
    aux = {n.split("_", 1)[1].split(".")[0] for n in state if n.startswith("enc.")}
    filters = [v for n, v in state.items() if n.endswith("resample_filter")]
    return "ncsnpp", {
        **options,
        "embedding": "fourier" if "map_noise.freqs" in state else "sinusoidal",
        "wide_embedding": "map_noise.freqs" not in state and state["map_layer0.weight"].shape[1] == 2 * channels,
        "fir": any(f.shape[-1] == 4 for f in filters),
        "input_pyramid": "residual" if "aux_residual" in aux else "skip" if "aux_skip" in aux else "none",
        "output_pyramid": "skip" if any(f"dec.{s}x{s}_aux_conv.weight" in state for s in sides[1:]) else "none",
    }


def convert_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `network` from a published one, with or without the preconditioner's prefix "model.".

    Raises:
        MismatchError: naming tensors that are missing, unexpected, or of another shape.
    """
    assert isinstance(network, UNet)
    return convert(network, _bare(state), entries(network), _IGNORED)


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in state.items()}


def entries(network: UNet) -> Iterator[Entry]:
    """Every published tensor of a network of this architecture."""
    names = Names(network)
    adm = isinstance(network, ADM)
    condition = network.condition
    # features are (cos, sin) here and in DhariwalUNet, (sin, cos) in SongUNet
    columns = stacked if adm else swapped
    if isinstance(condition.noise_level, FourierEmbedding):
        yield Entry(f"{names(condition.noise_level)}.frequencies", ("map_noise.freqs",))
    yield from names.pair(condition.first, "map_layer0", columns)
    yield from names.pair(condition.second, "map_layer1")
    if condition.augment is not None:
        rows = stacked if adm else lambda t: swapped(t, 0)
        yield Entry(f"{names(condition.augment)}.weight", ("map_augment.weight",), rows)
    for name in condition.names("class"):
        target = f"{names(condition.branches[name])}.weight"
        if adm:
            yield Entry(target, ("map_label.weight",), lambda t: with_null(t.T))
        else:
            yield Entry(target, ("map_label.weight", "map_label.bias"), _song_classes)
    yield from _encoder(network, names)
    yield from _decoder(network, names)


def _song_classes(weight: Tensor, bias: Tensor) -> Tensor:
    """Rows for every class and for none, of a linear map of one-hot labels times the root of their number."""
    rows = weight.T * math.sqrt(weight.shape[1]) + bias
    return swapped(torch.cat([rows, bias[None]]))


def _sides(network: UNet) -> list[str]:
    levels = 1 + sum(isinstance(stage, Down) for stage in network.down)
    return [f"{network.shape[1] >> i}x{network.shape[1] >> i}" for i in range(levels)]


def _stage(names: Names, stage: Any, published: str) -> Iterator[Entry]:
    block = stage.block if isinstance(stage, Stage) else stage
    parts = ("norm0", "conv0", "affine", "norm1", "conv1", "skip")
    yield from names.residual(block, published, parts)
    attention = stage.attention if isinstance(stage, Stage) else None
    if attention is not None:
        heads = attention.heads

        def reordered(t: Tensor) -> Tensor:
            """Rows in the order (q, k, v), heads, channels; published: heads, channels, (q, k, v)."""
            return t.reshape(heads, -1, 3, *t.shape[1:]).movedim(2, 0).reshape(t.shape)

        inner = (f"{published}.norm2", (f"{published}.qkv",), f"{published}.proj")
        yield from names.attention(attention, *inner, reordered)


def _encoder(network: UNet, names: Names) -> Iterator[Entry]:
    sides = iter(_sides(network))
    side, block = next(sides), 0
    yield from names.pair(network.inlet, f"enc.{side}_conv")
    stage: Any
    for stage in network.down:
        if isinstance(stage, Down):
            side, block = next(sides), 0
            yield from _stage(names, stage.features, f"enc.{side}_down")
            if stage.pyramid is not None:
                kind = "skip" if network.input_pyramid == "skip" else "residual"
                yield from names.pair(stage.pyramid.conv, f"enc.{side}_aux_{kind}")
        else:
            yield from _stage(names, stage, f"enc.{side}_block{block}")
            block += 1


def _decoder(network: UNet, names: Names) -> Iterator[Entry]:
    sides = _sides(network)[::-1]
    for i, stage in enumerate(network.middle):
        yield from _stage(names, stage, f"dec.{sides[0]}_in{i}")
    level: Any
    for i, level in enumerate(network.up):
        for j, stage in enumerate(level.stages):
            yield from _stage(names, stage, f"dec.{sides[i]}_block{j}")
        if level.outlet is not None:
            yield from _outlet(names, level.outlet, f"dec.{sides[i]}_aux_norm", f"dec.{sides[i]}_aux_conv")
        if level.up is not None:
            yield from _stage(names, level.up, f"dec.{sides[i + 1]}_up")
    if isinstance(network.outlet, Outlet):
        before = "out" if isinstance(network, ADM) else f"dec.{sides[-1]}_aux"
        yield from _outlet(names, network.outlet, f"{before}_norm", f"{before}_conv")


def _outlet(names: Names, outlet: Outlet, norm: str, conv: str) -> Iterator[Entry]:
    yield from names.pair(outlet.norm, norm)
    yield from names.pair(outlet.conv, conv)
