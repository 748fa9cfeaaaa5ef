"""Checkpoints of score_sde_pytorch: NCSN++, DDPM++, DDPM, NCSN and NCSNv2.

Its U-Nets keep all layers in one list, ``all_modules``, in the order in which they are made; the order follows from
the architecture, and here from ours.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from scoresde.networks.blocks import Attention, Combine, Outlet, ResidualBlock, Stage
from scoresde.networks.embeddings import FourierEmbedding
from scoresde.networks.levels import Down
from scoresde.networks.ncsn import NCSN, NCSNv2
from scoresde.networks.resampling import DownConv, UpConv
from scoresde.networks.unet import UNet
from scoresde.pretrained import ncsn
from scoresde.pretrained.mapping import Entry, Names, convert, scaled_output, swapped


def read_checkpoint(path: str | Path, ema: bool = True) -> dict[str, Tensor]:
    """The network's tensors of a checkpoint file, without running any code that it may hold.

    Averaged weights are stored as a list without names, in the order of the parameters, without the frozen frequencies
    of the Fourier embedding; the names come from the raw weights beside them.

    Args:
        path: ``checkpoint_{k}.pth``: a dict with `model`, `ema`, `optimizer` and `step`.
        ema: the averaged weights, or the raw ones.

    Raises:
        ValueError: if the file is something else, or its lists do not match.
    """
    return network_tensors(load_without_code(path), str(path), ema)


def is_checkpoint(stored: Any) -> bool:
    """Whether a file that holds `stored` is one of its checkpoints."""
    return isinstance(stored, dict) and {"model", "ema"} <= set(stored)


def load_without_code(path: str | Path) -> Any:
    """`torch.load` that builds tensors, containers and NumPy scalars, and nothing else."""
    # the optimizer's learning rate was stored as a NumPy scalar
    scalar: Any = np.float64(0.0).__reduce__()[0]
    with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype("float64"))]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # of files that are refused right afterwards
        return torch.load(path, map_location="cpu", weights_only=True)


def network_tensors(stored: Any, path: str, ema: bool = True) -> dict[str, Tensor]:
    """`read_checkpoint` of what a file holds."""
    if not is_checkpoint(stored):
        raise ValueError(f"{path} is not a checkpoint of score_sde_pytorch: it has no `model` and `ema`.")
    model, ema_state = stored["model"], stored["ema"]
    shadows = ema_state.get("shadow_params") if isinstance(ema_state, dict) else None
    if not isinstance(model, Mapping) or not model or not isinstance(shadows, list):
        raise ValueError(f"{path} has `model` and `ema`, but not the tensors of score_sde_pytorch in them.")
    state = {k.removeprefix("module."): v for k, v in model.items()}
    if not ema:
        return state
    names = [k for k in state if k != "sigmas" and k != "all_modules.0.W"]
    if len(names) != len(shadows) or any(state[k].shape != v.shape for k, v in zip(names, shadows, strict=False)):
        raise ValueError(f"{path}: {len(shadows)} averaged tensors do not match the {len(names)} parameters.")
    return {**state, **dict(zip(names, shadows, strict=True))}


def convert_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `network` from a published one (of the network alone; a ``module.`` prefix is dropped).

    Args:
        network: of the same architecture.
        state: ``all_modules.{i}.{name}`` -> tensor.

    Raises:
        MismatchError: naming tensors that are missing, unexpected, or of another shape.
    """
    state = {k.removeprefix("module."): v for k, v in state.items()}
    return convert(network, state, entries(network), ["sigmas"])


class Signature(NamedTuple):
    """What tells the architectures of checkpoints apart without building them.

    Attributes:
        tensors: how many.
        elements: in all of them.
        digest: of their names and numbers of elements.
    """

    tensors: int
    elements: int
    digest: int


def signature_of(state: Mapping[str, Tensor]) -> Signature:
    """The signature of published tensors."""
    return _signature({name: value.numel() for name, value in state.items() if not name.endswith("sigmas")})


def signature(network: nn.Module) -> Signature:
    """The signature that checkpoints of `network` have (it may be on the meta device)."""
    own = network.state_dict()
    return _signature({part: own[e.target].numel() // len(e.parts) for e in entries(network) for part in e.parts})


def _signature(sizes: Mapping[str, int]) -> Signature:
    text = "".join(f"{name} {count}\n" for name, count in sorted(sizes.items()))
    return Signature(len(sizes), sum(sizes.values()), zlib.crc32(text.encode()))


def converted(network: nn.Module, state: Mapping[str, Tensor], ve: bool) -> dict[str, Tensor]:
    """`convert_state` for our use of a network.

    Those of VE predict sigma times the score, here the noise, which is the negative of that. NCSN predicts the score in
    units where data fill [0, 1]; in [-1, 1] it is half of that.
    """
    found = convert_state(network, state)
    if isinstance(network, NCSN):
        return scaled_output(found, network, 0.5)
    return scaled_output(found, network, -1.0) if ve else found


def entries(network: nn.Module) -> Iterator[Entry]:
    """Every published tensor of a network of this architecture; of a U-Net in the published order of parameters."""
    if isinstance(network, NCSN | NCSNv2):
        yield from (Entry(ours, (name,)) for ours, name in ncsn.published_names(network))
        return
    assert isinstance(network, UNet)
    names = Names(network)
    if isinstance(network.condition.noise_level, FourierEmbedding):
        yield Entry(f"{names(network.condition.noise_level)}.frequencies", ("all_modules.0.W",))
    skip = "Conv_2" if network.resampling == "block" else "NIN_0"
    first = 1 if isinstance(network.condition.noise_level, FourierEmbedding) else 0
    for i, module in enumerate(_layers(network), first):
        here = f"all_modules.{i}"
        if isinstance(module, ResidualBlock):
            parts = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", skip)
            for entry in names.residual(module, here, parts):
                yield _network_in_network(entry) if "NIN" in entry.parts[0] else entry
        elif isinstance(module, Attention):
            qkv = tuple(f"{here}.NIN_{k}" for k in range(3))
            for entry in names.attention(module, f"{here}.GroupNorm_0", qkv, f"{here}.NIN_3"):
                yield _network_in_network(entry) if "NIN" in entry.parts[0] else entry
        elif isinstance(module, DownConv | UpConv | Combine):
            filtered = not isinstance(module, Combine) and module.filter is not None
            yield from names.pair(module.conv, f"{here}.{'Conv2d_0' if filtered else 'Conv_0'}")
        elif module is network.condition.first:
            yield from names.pair(module, here, swapped)
        else:
            yield from names.pair(module, here)


def _network_in_network(entry: Entry) -> Entry:
    """Weights W of shape (in, out), one or several, and biases b."""
    kind = entry.target.rsplit(".", 1)[-1]
    parts = tuple(f"{p.rsplit('.', 1)[0]}.{'W' if kind == 'weight' else 'b'}" for p in entry.parts)
    if kind == "bias":
        return Entry(entry.target, parts)
    return Entry(entry.target, parts, lambda *weights: torch.cat([w.T for w in weights])[:, :, None, None])


def _layers(network: UNet) -> Iterator[nn.Module]:
    """The layers in the order of ``all_modules``, without the Fourier embedding."""
    yield network.condition.first
    yield network.condition.second
    yield network.inlet
    for stage in network.down:
        if isinstance(stage, Down):
            yield stage.features
            if stage.pyramid is not None:
                yield stage.pyramid
        else:
            yield from _stage(stage)
    for stage in network.middle:
        yield from _stage(stage)
    level: Any
    for level in network.up:
        for stage in level.stages:
            yield from _stage(stage)
        for module in (level.enlarge, level.outlet):
            if isinstance(module, Outlet):
                yield from (module.norm, module.conv)
            elif module is not None:
                yield module
        if level.up is not None:
            yield level.up
    if network.outlet is not None:
        yield from (network.outlet.norm, network.outlet.conv)


def _stage(stage: nn.Module) -> Iterator[nn.Module]:
    assert isinstance(stage, Stage)
    yield stage.block
    if stage.attention is not None:
        yield stage.attention
