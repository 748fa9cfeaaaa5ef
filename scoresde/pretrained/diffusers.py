"""Folders of diffusers' `UNet2DModel`: ``config.json`` and safetensors, and its scheduler's configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from scoresde.networks.blocks import Stage
from scoresde.networks.embeddings import FourierEmbedding
from scoresde.networks.levels import Down
from scoresde.networks.resampling import DownConv, UpConv
from scoresde.networks.unet import UNet
from scoresde.pretrained import schedules
from scoresde.pretrained.mapping import Entry, MismatchError, Names, convert, one_class, stacked, swapped

_DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "center_input_sample": False, "time_embedding_type": "positional",
    "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True, "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "downsample_padding": 1, "downsample_type": "conv",
    "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu", "attention_head_dim": 8, "norm_num_groups": 32,
    "attn_norm_num_groups": None, "norm_eps": 1e-5, "resnet_time_scale_shift": "default", "add_attention": True,
    "class_embed_type": None, "num_class_embeds": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
}  # fmt: skip
"""What `UNet2DModel` assumes where its configuration says nothing."""


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `UNet` for a `UNet2DModel` configuration.

    Raises:
        MismatchError: for an option that no such network here has; the message names it.
    """
    c = {**_DEFAULTS, **config}
    size = c.get("sample_size")
    if size is None:
        raise MismatchError("config.json has no `sample_size`: pass size=… (the side of the images).")
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise MismatchError(f"`sample_size` must be an int > 0, or two, got {size!r}.")
    height, width = sides
    kinds = {re.sub(r"^Attn|(Down|Up)Block2D$", "", k) for k in (*c["down_block_types"], *c["up_block_types"])}
    skip = kinds == {"Skip"}
    wanted: dict[str, tuple[Any, ...]] = {
        "mid_block_type": ("UNetMidBlock2D",), "class_embed_type": (None,), "act_fn": ("silu", "swish"),
        "downsample_type": ("conv",), "upsample_type": ("conv",), "time_embedding_type": ("positional", "fourier"),
        "attn_norm_num_groups": (None, c["norm_num_groups"]), "freq_shift": (0, 1), "downsample_padding": (0, 1),
        "resnet_time_scale_shift": ("default", "scale_shift"), "out_channels": (c["in_channels"], 2 * c["in_channels"]),
    }  # fmt: skip
    for name, known in wanted.items():
        if c[name] not in known:
            read = ", ".join(map(repr, known))
            raise MismatchError(f"`{name}` = {c[name]!r} has no counterpart here; read are {read}.")
    if not skip and kinds != {""}:
        raise MismatchError(f"Blocks of the kinds {sorted(kinds)} have no counterpart here.")
    if c["resnet_time_scale_shift"] == "scale_shift" and c["add_attention"] and c["attn_norm_num_groups"] is None:
        raise MismatchError("The middle's attention has no norm (scale_shift without `attn_norm_num_groups`).")
    channels = c["block_out_channels"][0]
    if any(w % channels for w in c["block_out_channels"]):
        raise MismatchError(f"`block_out_channels` {tuple(c['block_out_channels'])} are no multiples of the first.")
    down = [k.startswith("Attn") for k in c["down_block_types"]]
    if down != [k.startswith("Attn") for k in c["up_block_types"]][::-1]:
        raise MismatchError("Attention at different resolutions on the way down and up has no counterpart here.")
    half = channels // 2
    fourier = c["time_embedding_type"] == "fourier"
    return {
        "shape": (c["in_channels"], height, width),
        "conditions": one_class(c["num_class_embeds"] or 0),
        "channels": channels,
        "multipliers": tuple(w // channels for w in c["block_out_channels"]),
        "blocks": c["layers_per_block"],
        "attention": tuple(height >> i for i, found in enumerate(down) if found),
        "middle_attention": c["add_attention"],
        "head_channels": c["attention_head_dim"] or 0,
        "dropout": c["dropout"],
        "conditioning": "add" if c["resnet_time_scale_shift"] == "default" else "scale_shift",
        "embedding": "fourier" if fourier else "sinusoidal",
        # their frequencies are 10000^(-i / (half - freq_shift)), ours max_period^(-i / (half - 1))
        "max_period": 10000.0 if c["freq_shift"] == 1 else 10000.0 ** ((half - 1) / half),
        "features": 2 * channels if fourier else channels,
        "width": c["time_embedding_dim"] or 4 * channels,
        "resampling": "block" if skip else "convolution",
        "fir": skip,
        "end_padding": c["downsample_padding"] == 0,
        "rescale": skip,
        "input_pyramid": "skip" if skip else "none",
        "output_pyramid": "skip" if skip else "none",
        "up_attention": "last" if skip else "every",
        "norm_groups": None if skip else c["norm_num_groups"],
        "norm_eps": c["norm_eps"],
        "learned_variance": c["out_channels"] != c["in_channels"],
    }


def convert_state(network: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of `network` from a published one; names of before diffusers 0.17 are understood.

    Raises:
        MismatchError: naming tensors that are missing, unexpected, or of another shape.
    """
    assert isinstance(network, UNet)
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

    def renamed(name: str) -> str:
        return re.sub(r"\.(query|key|value|proj_attn)\.", lambda m: f".{older[m[1]]}.", name)

    fourier = isinstance(network.condition.noise_level, FourierEmbedding)
    sine_first = not {**_DEFAULTS, **config}["flip_sin_to_cos"] or fourier
    return convert(network, {renamed(n): v for n, v in state.items()}, entries(network, sine_first))


def entries(network: UNet, sine_first: bool) -> Iterator[Entry]:
    """Every published tensor of a network of this architecture."""
    names = Names(network)
    if isinstance(network.condition.noise_level, FourierEmbedding):
        yield Entry(f"{names(network.condition.noise_level)}.frequencies", ("time_proj.weight",))
    yield from names.pair(network.condition.first, "time_embedding.linear_1", swapped if sine_first else stacked)
    yield from names.pair(network.condition.second, "time_embedding.linear_2")
    yield from names.classes(network.condition, "class_embedding")
    yield from names.pair(network.inlet, "conv_in")
    level, block = 0, 0
    stage: Any
    for stage in network.down:
        here = f"down_blocks.{level}"
        if not isinstance(stage, Down):
            yield from _stage(names, stage, here, block)
            block += 1
            continue
        if isinstance(stage.features, DownConv):
            yield from names.pair(stage.features.conv, f"{here}.downsamplers.0.conv")
        else:
            yield from _residual(names, stage.features, f"{here}.resnet_down")
        if stage.pyramid is not None:
            yield from names.pair(stage.pyramid.conv, f"{here}.skip_conv")
        level, block = level + 1, 0
    yield from _stage(names, network.middle[0], "mid_block", 0)
    yield from _stage(names, network.middle[1], "mid_block", 1)
    part: Any
    for i, part in enumerate(network.up):
        here = f"up_blocks.{i}"
        for j, stage in enumerate(part.stages):
            # where only the last block of a level has attention, it is that level's first and only one
            yield from _stage(names, stage, here, j, 0 if network.output_pyramid == "skip" else j)
        if part.outlet is not None:
            last = i == len(network.up) - 1
            yield from names.pair(part.outlet.norm, "conv_norm_out" if last else f"{here}.skip_norm")
            yield from names.pair(part.outlet.conv, "conv_out" if last else f"{here}.skip_conv")
        if isinstance(part.up, UpConv):
            yield from names.pair(part.up.conv, f"{here}.upsamplers.0.conv")
        elif part.up is not None:
            yield from _residual(names, part.up, f"{here}.resnet_up")
    outlet: Any = network.outlet
    if outlet is not None:
        yield from names.pair(outlet.norm, "conv_norm_out")
        yield from names.pair(outlet.conv, "conv_out")


def _residual(names: Names, block: Any, here: str) -> Iterator[Entry]:
    parts = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
    yield from names.residual(block, here, parts)


def _stage(names: Names, stage: Any, here: str, block: int, attention: int | None = None) -> Iterator[Entry]:
    assert isinstance(stage, Stage)
    yield from _residual(names, stage.block, f"{here}.resnets.{block}")
    if stage.attention is not None:
        found = f"{here}.attentions.{block if attention is None else attention}"
        qkv = tuple(f"{found}.to_{k}" for k in "qkv")
        yield from names.attention(stage.attention, f"{found}.group_norm", qkv, f"{found}.to_out.0")


def chain(scheduler: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The SDE whose chain of n levels a DDPM-like scheduler walks: {"name": …, options}.

    Raises:
        MismatchError: for a schedule without counterpart here.
    """
    schedule = scheduler.get("beta_schedule", "linear")
    start, end = scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)
    if scheduler.get("rescale_betas_zero_snr"):
        raise MismatchError("`rescale_betas_zero_snr` has no counterpart here.")
    if scheduler.get("trained_betas"):
        return schedules.of_betas(scheduler["trained_betas"])
    if schedule == "linear":
        return schedules.linear(n, start, end)
    if schedule == "scaled_linear":
        low, high = math.sqrt(start), math.sqrt(end)
        return schedules.of_betas((low + (high - low) * i / (n - 1)) ** 2 for i in range(n))
    if schedule == "squaredcos_cap_v2":
        return schedules.cosine(n)
    raise MismatchError(f"`beta_schedule` = {schedule!r} has no counterpart here.")
