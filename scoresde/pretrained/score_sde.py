"""Weights of score_sde_pytorch's NCSN++, DDPM++ and DDPM networks for `NCSNpp`.

Its networks keep all layers in one list, ``all_modules``, in the order in which they are made; the order follows from
the architecture, and here from ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from scoresde.networks.embeddings import FourierEmbedding
from scoresde.networks.ncsnpp import NCSNpp, _Attention, _Block, _Combine, _Down, _Level, _Outlet
from scoresde.networks.resampling import DownConv, UpConv


class Entry(NamedTuple):
    """One published tensor.

    Attributes:
        target: name of the parameter here.
        parts: published names that are stacked to make it.
        change: what else is done to it.
    """

    target: str
    parts: tuple[str, ...]
    change: Callable[[Tensor], Tensor] = torch.Tensor.clone


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
    # the optimizer's learning rate was stored as a NumPy scalar
    scalar: Any = np.float64(0.0).__reduce__()[0]
    with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype("float64"))]):
        stored = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(stored, dict) or not {"model", "ema"} <= set(stored):
        raise ValueError(f"{path} is not a checkpoint of score_sde_pytorch: it has no `model` and `ema`.")
    state = {k.removeprefix("module."): v for k, v in stored["model"].items()}
    if not ema:
        return state
    shadows = stored["ema"]["shadow_params"]
    names = [k for k in state if k != "sigmas" and k != "all_modules.0.W"]
    if len(names) != len(shadows) or any(state[k].shape != v.shape for k, v in zip(names, shadows, strict=False)):
        raise ValueError(f"{path}: {len(shadows)} averaged tensors do not match the {len(names)} parameters.")
    return {**state, **dict(zip(names, shadows, strict=True))}


def convert_state(network: NCSNpp, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `network` from a published one (of the network alone; a ``module.`` prefix is dropped).

    Args:
        network: of the same architecture.
        state: ``all_modules.{i}.{name}`` -> tensor.

    Raises:
        ValueError: naming tensors that are missing, left over, or of another shape.
    """
    state = {k.removeprefix("module."): v for k, v in state.items()}
    own = network.state_dict()
    used: set[str] = set()
    result: dict[str, Tensor] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for entry in entries(network):
        absent = [name for name in entry.parts if name not in state]
        missing += absent
        if absent:
            continue
        used.update(entry.parts)
        parts = [state[name] for name in entry.parts]
        value = entry.change(torch.cat(parts) if len(parts) > 1 else parts[0])
        if value.shape != own[entry.target].shape:
            shapes = f"{tuple(value.shape)}, here {tuple(own[entry.target].shape)}"
            misshapen.append(f"{', '.join(entry.parts)} ({shapes} as {entry.target})")
            continue
        result[entry.target] = value
    left = [name for name in state if name not in used and name != "sigmas"]
    for what, names in (("missing", missing), ("unexpected", left), ("of another shape", misshapen)):
        if names:
            shown = "; ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ValueError(f"The checkpoint does not fit this network: {what}: {shown}.")
    return result


def entries(network: NCSNpp) -> Iterator[Entry]:
    """Every published tensor of a network of this architecture, in the published order of parameters."""
    names = {id(module): name for name, module in network.named_modules()}
    skip = "Conv_2" if network.resampling == "block" else "NIN_0"
    for i, module in enumerate(_layers(network)):
        for suffixes, inner, kind in _parts(module, skip):
            target = f"{names[id(inner)]}.{kind}"
            change: Callable[[Tensor], Tensor] = torch.Tensor.clone
            if inner is network.condition[0] and kind == "weight":
                change = _swapped
            elif any("NIN" in s for s in suffixes) and kind == "weight":
                # q, k and v, or one of them, as (in, out) matrices: 1 x 1 convolutions here
                change = _stacked if len(suffixes) > 1 else _matrix
            yield Entry(target, tuple(f"all_modules.{i}.{s}" for s in suffixes), change)


def _swapped(weight: Tensor) -> Tensor:
    """Columns for (cos, sin) instead of (sin, cos)."""
    return torch.cat(weight.chunk(2, 1)[::-1], 1)


def _matrix(weight: Tensor) -> Tensor:
    return weight.T[:, :, None, None].contiguous()


def _stacked(weights: Tensor) -> Tensor:
    """Three (in, out) matrices, one below the other, as one convolution to 3 x out channels."""
    return torch.cat([_matrix(w) for w in weights.chunk(3)])


def _layers(network: NCSNpp) -> Iterator[nn.Module]:
    """The layers in the order of ``all_modules``."""
    if isinstance(network.embedding, FourierEmbedding):
        yield network.embedding
    yield from network.condition
    yield network.inlet
    for stage in network.down:
        if isinstance(stage, _Down):
            yield stage.features
            if stage.pyramid is not None:
                yield stage.pyramid
        else:
            yield from stage  # type: ignore[misc]
    yield from network.middle
    for level in network.up:
        assert isinstance(level, _Level)
        yield from level.blocks
        if level.attention is not None:
            yield level.attention
        for module in (level.enlarge, level.outlet):
            if isinstance(module, _Outlet):
                yield from (module.norm, module.conv)
            elif module is not None:
                yield module
        if level.up is not None:
            yield level.up
    if network.outlet is not None:
        yield from (network.outlet.norm, network.outlet.conv)


_WEIGHT_BIAS = ("weight", "bias")


def _parts(module: nn.Module, skip: str) -> Iterator[tuple[tuple[str, ...], nn.Module, str]]:
    """(published suffixes, our module, "weight" or "bias" or a buffer) of a layer."""
    if isinstance(module, FourierEmbedding):
        yield ("W",), module, "frequencies"
    elif isinstance(module, _Block):
        inner = [("GroupNorm_0", module.norm1), ("Conv_0", module.conv1), ("Dense_0", module.condition)]
        inner += [("GroupNorm_1", module.norm2), ("Conv_1", module.conv2)]
        for name, part in inner:
            for kind in _WEIGHT_BIAS:
                yield (f"{name}.{kind}",), part, kind
        if not isinstance(module.skip, nn.Identity):
            for kind, letter in zip(_WEIGHT_BIAS, "Wb", strict=True):
                yield (f"{skip}.{letter if skip == 'NIN_0' else kind}",), module.skip, kind
    elif isinstance(module, _Attention):
        for kind in _WEIGHT_BIAS:
            yield (f"GroupNorm_0.{kind}",), module.norm, kind
        for kind, letter in zip(_WEIGHT_BIAS, "Wb", strict=True):
            yield tuple(f"NIN_{k}.{letter}" for k in range(3)), module.qkv, kind
            yield (f"NIN_3.{letter}",), module.out, kind
    elif isinstance(module, DownConv | UpConv | _Combine):
        filtered = not isinstance(module, _Combine) and module.fir
        for kind in _WEIGHT_BIAS:
            yield (f"{'Conv2d_0' if filtered else 'Conv_0'}.{kind}",), module.conv, kind
    else:
        for kind in _WEIGHT_BIAS:
            yield (kind,), module, kind
