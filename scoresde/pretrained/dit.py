"""State dicts of facebookresearch/DiT (Peebles & Xie 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from scoresde.networks.dit import DiT
from scoresde.pretrained.mapping import Entry, MismatchError, convert, one_class

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Width -> heads of attention, in the published models."""

PUBLISHED = {
    "inlet": "x_embedder.proj",
    "condition.first": "t_embedder.mlp.0",
    "condition.second": "t_embedder.mlp.2",
    "condition.branches.class_label": "y_embedder.embedding_table",
    "outlet.linear": "final_layer.linear",
    "outlet.modulation": "final_layer.adaLN_modulation.1",
}
PUBLISHED_BLOCK = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "first": "mlp.fc1",
    "second": "mlp.fc2",
}
"""Our module -> theirs; of a block, the part after ``blocks.N.``."""


def is_dit(state: Mapping[str, Any]) -> bool:
    """Whether these are names of its network."""
    return "x_embedder.proj.weight" in state and "final_layer.linear.weight" in state


def architecture(state: Mapping[str, Tensor], size: int | None = None) -> dict[str, Any]:
    """Options of `DiT`, read from names and shapes.

    Args:
        state: published name -> tensor.
        size: side of the (latent) images; by default from the stored table of positions.

    Raises:
        MismatchError: for a width that no published model has, whose heads are therefore unknown.
    """
    width, data, patch, _ = state["x_embedder.proj.weight"].shape
    if width not in HEADS:
        known = ", ".join(map(str, HEADS))
        raise MismatchError(f"A DiT of width {width} is not a published one ({known}): build DiT and load it yourself.")
    if size is None:
        if "pos_embed" not in state:
            raise MismatchError("The file has no table of positions: pass size=… (the side of the latent images).")
        size = patch * math.isqrt(state["pos_embed"].shape[1])
    rows = state["y_embedder.embedding_table.weight"].shape[0] if "y_embedder.embedding_table.weight" in state else 1
    return {
        "shape": (data, size, size),
        "conditions": one_class(rows - 1),  # the last row is the null class
        "patch": patch,
        "width": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "heads": HEADS[width],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "learned_variance": state["final_layer.linear.weight"].shape[0] == 2 * data * patch**2,
    }


def convert_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `network` from a published one; its fixed table of positions is computed here.

    Raises:
        MismatchError: naming tensors that are missing, unexpected, or of another shape.
    """
    assert isinstance(network, DiT)
    entries = (Entry(target, (name,)) for target, name in published_names(network))
    return convert(network, state, entries, ["pos_embed"])


def published_names(network: DiT) -> Iterator[tuple[str, str]]:
    """(name in our state dict, name in that of facebookresearch/DiT) of every parameter; the layouts are equal.

    Theirs has one entry more, ``pos_embed`` (1, N, width), which is our `position_table`.
    """
    for name in network.state_dict():
        module, kind = name.rsplit(".", 1)
        if module.startswith("blocks."):
            _, index, part = module.split(".")
            yield name, f"blocks.{index}.{PUBLISHED_BLOCK[part]}.{kind}"
        else:
            yield name, f"{PUBLISHED[module]}.{kind}"
