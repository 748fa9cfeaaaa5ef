"""State dicts of guided-diffusion's and improved-diffusion's U-Net (Dhariwal & Nichol 2021, Nichol & Dhariwal 2021)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from scoresde.networks.blocks import Attention, ResidualBlock, Stage
from scoresde.networks.levels import Down
from scoresde.networks.resampling import DownConv, UpConv
from scoresde.networks.unet import UNet
from scoresde.pretrained.mapping import Entry, MismatchError, Names, convert, one_class, stacked

SIZES = {4: 64, 5: 128, 6: 256, 7: 512}
"""Number of resolutions -> side of the images, in the published models."""


PUBLISHED: Mapping[int, Mapping[str, Any]] = {
    64: {"schedule": "cosine", "new_order": True},
    128: {"heads": 4},
}
"""Side -> what the published models of that size have different from linear betas and heads of 64 channels."""


def is_guided_diffusion(state: Mapping[str, Any]) -> bool:
    """Whether these are names of its U-Net."""
    return "input_blocks.0.0.weight" in state and "time_embed.0.weight" in state and "out.2.weight" in state


def architecture(state: Mapping[str, Tensor], size: int | None = None, heads: int | None = None) -> dict[str, Any]:
    """Options of `ADM`, read from names and shapes.

    The side of the images and the heads of attention leave no trace: by default the side is that of the published model
    with as many resolutions, and the heads are those of the published model of that side.

    Args:
        state: published name -> tensor.
        size: side of the images.
        heads: number of heads of attention; 0: 64 channels each.
    """
    channels, data = state["input_blocks.0.0.weight"].shape[:2]
    outputs = 1 + max(int(m[1]) for n in state if (m := re.match(r"output_blocks\.(\d+)\.", n)))
    # what enlarges stands after the last block of every level but the last one
    enlarging = [
        int(m[1]) for n in state if (m := re.match(r"output_blocks\.(\d+)\.[12]\.(in_layers\.0|conv)\.weight$", n))
    ]
    per_level = min(enlarging) + 1 if enlarging else outputs
    levels = outputs // per_level
    if size is None:
        if levels not in SIZES:
            raise MismatchError(f"{levels} resolutions: no published model has as many. Say the image side: size=…")
        size = SIZES[levels]
    first = [1 + level * per_level for level in range(levels)]  # index of each level's first block
    widths = [state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in first]
    features = state["time_embed.0.weight"].shape[1]
    return {
        "shape": (data, size, size),
        "conditions": one_class(state["label_emb.weight"].shape[0] if "label_emb.weight" in state else 0),
        "channels": channels,
        "multipliers": tuple(w // channels for w in widths),
        "blocks": per_level - 1,
        "attention": tuple(size >> k for k, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in state),
        "head_channels": 64,
        "heads": PUBLISHED.get(size, {}).get("heads", 0) if heads is None else heads,
        "dropout": 0.0,
        "resampling": "convolution" if any(n.endswith(".op.weight") for n in state) else "block",
        "conditioning": "scale_shift"
        if state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
        else "add",
        "embedding_channels": features,
        "learned_variance": state["out.2.weight"].shape[0] == 2 * data,
    }


def convert_state(network: nn.Module, state: Mapping[str, Tensor], new_order: bool = False) -> dict[str, Tensor]:
    """The state dict of `network` from a published one.

    Args:
        network: of the same architecture.
        state: published name -> tensor.
        new_order: whether the rows of q, k and v are in the "new attention order": (q, k, v) before heads.

    Raises:
        MismatchError: naming tensors that are missing, unexpected, or of another shape.
    """
    assert isinstance(network, UNet)
    return convert(network, state, entries(network, new_order))


def entries(network: UNet, new_order: bool = False) -> Iterator[Entry]:
    """Every published tensor of a network of this architecture."""
    names = Names(network)
    yield from names.pair(network.condition.first, "time_embed.0")
    yield from names.pair(network.condition.second, "time_embed.2")
    yield from names.classes(network.condition, "label_emb")
    yield from names.pair(network.inlet, "input_blocks.0.0")
    stage: Any
    for i, stage in enumerate(network.down, 1):
        part = stage.features if isinstance(stage, Down) else stage
        yield from _part(names, part, f"input_blocks.{i}", 0, "op", new_order)
    first: Any = network.middle[0]
    yield from _part(names, first, "middle_block", 0, "", new_order)
    yield from _part(names, network.middle[1], "middle_block", 1 if first.attention is None else 2, "", new_order)
    i = 0
    level: Any
    for level in network.up:
        for stage in level.stages:
            yield from _part(names, stage, f"output_blocks.{i}", 0, "", new_order)
            i += 1
        if level.up is not None:
            place = 1 if level.stages[-1].attention is None else 2
            yield from _part(names, level.up, f"output_blocks.{i - 1}", place, "conv", new_order)
    assert network.outlet is not None
    yield from names.pair(network.outlet.norm, "out.0")
    yield from names.pair(network.outlet.conv, "out.2")


def _part(names: Names, part: nn.Module, before: str, place: int, convolution: str, new_order: bool) -> Iterator[Entry]:
    here = f"{before}.{place}"
    if isinstance(part, DownConv | UpConv):
        yield from names.pair(part.conv, f"{here}.{convolution}")
        return
    block: Any = part.block if isinstance(part, Stage) else part
    assert isinstance(block, ResidualBlock)
    inner = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
    yield from names.residual(block, here, inner)
    attention: Any = part.attention if isinstance(part, Stage) else None
    if attention is not None:
        after = f"{before}.{place + 1}"
        change = stacked if new_order else _by_heads(attention)
        yield from names.attention(attention, f"{after}.norm", (f"{after}.qkv",), f"{after}.proj_out", change)


def _by_heads(attention: Attention) -> Any:
    def change(t: Tensor) -> Tensor:
        """Rows in the order (q, k, v), heads, channels; published: heads, (q, k, v), channels."""
        return t.reshape(attention.heads, 3, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape)

    return change
