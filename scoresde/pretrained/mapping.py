"""State dicts in other names: which published tensors make each of ours, and what to say where they do not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scoresde.networks.blocks import Attention, Outlet, ResidualBlock
from scoresde.networks.conditioning import ConditionEmbedding


def stacked(*parts: Tensor) -> Tensor:
    """The parts, one below the other."""
    return torch.cat(parts)


class Entry(NamedTuple):
    """One tensor of ours.

    Attributes:
        target: its name here.
        parts: names of the published tensors that make it.
        change: how.
    """

    target: str
    parts: tuple[str, ...]
    change: Callable[..., Tensor] = stacked


class MismatchError(ValueError):
    """A checkpoint that does not fit the network: the message says which tensors."""


def convert(
    network: nn.Module, state: Mapping[str, Tensor], entries: Iterable[Entry], ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The state dict of `network` from a published one.

    Args:
        network: of the same architecture.
        state: published name -> tensor.
        entries: one for every tensor of `network`.
        ignored: published names, or endings of them, that are no weights.

    Raises:
        MismatchError: naming the tensors that are missing, unexpected or of another shape.
    """
    own = network.state_dict()
    used: set[str] = set()
    result: dict[str, Tensor] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for entry in entries:
        absent = [name for name in entry.parts if name not in state]
        missing += absent
        if absent:
            continue
        used.update(entry.parts)
        shapes = ", ".join(f"{name} {tuple(state[name].shape)}" for name in entry.parts)
        wanted = own[entry.target].shape
        value: Tensor | None = None
        with contextlib.suppress(RuntimeError, IndexError):  # of a change made for other shapes
            value = entry.change(*(state[name] for name in entry.parts))
        if value is None or value.shape != wanted:
            misshapen.append(f"{shapes} for {tuple(wanted)} here")
        else:
            result[entry.target] = value.clone()
    endings = tuple(ignored)
    left = [name for name in state if name not in used and not (endings and name.endswith(endings))]
    found = (("missing", missing), ("unexpected", left), ("of another shape", misshapen))
    problems = [f"{what}: {_shown(names)}" for what, names in found if names]
    if problems:
        raise MismatchError(f"The checkpoint does not fit this network. {'; '.join(problems)}.")
    return result


def _shown(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


class Names:
    """Names of the modules of a network, and entries for their weights."""

    def __init__(self, network: nn.Module) -> None:
        self._names = {id(module): name for name, module in network.named_modules()}

    def __call__(self, module: nn.Module) -> str:
        return self._names[id(module)]

    def pair(
        self, module: nn.Module, published: str, change: Callable[..., Tensor] = stacked
    ) -> Iterator[Entry]:
        """Entries of a module with a weight and, if it has one, a bias; `change` is of the weight."""
        yield Entry(f"{self(module)}.weight", (f"{published}.weight",), change)
        if getattr(module, "bias", None) is not None:
            yield Entry(f"{self(module)}.bias", (f"{published}.bias",))

    def classes(self, condition: ConditionEmbedding, published: str) -> Iterator[Entry]:
        """Entry of the class table, if there is one, of a published one that has no row for none."""
        for name in condition.names("class"):
            yield Entry(f"{self(condition.branches[name])}.weight", (f"{published}.weight",), with_null)

    def residual(self, block: ResidualBlock, published: str, parts: Sequence[str]) -> Iterator[Entry]:
        """Entries of a block; `parts`: published names of norm, convolution, condition, norm, convolution, skip."""
        modules = (block.norm1, block.conv1, block.condition, block.norm2, block.conv2, block.skip)
        for module, part in zip(modules, parts, strict=True):
            if not isinstance(module, nn.Identity):
                yield from self.pair(module, f"{published}.{part}")

    def attention(
        self,
        attention: Attention,
        norm: str,
        qkv: tuple[str, ...],
        out: str,
        change: Callable[..., Tensor] = stacked,
    ) -> Iterator[Entry]:
        """Entries of attention: `qkv` is one name or three; `change` reorders the rows of weight and bias."""
        yield from self.pair(attention.norm, norm)
        qkv_weight = tuple(f"{name}.weight" for name in qkv)
        yield Entry(f"{self(attention.qkv)}.weight", qkv_weight, lambda *parts: pointwise(change(*parts)))
        yield Entry(f"{self(attention.qkv)}.bias", tuple(f"{name}.bias" for name in qkv), change)
        yield from self.pair(attention.out, out, pointwise)


def one_class(n: int) -> dict[str, dict[str, Any]]:
    """`conditions` of a published model of n classes, as a configuration has them; none if n is 0."""
    return {"class_label": {"kind": "class", "classes": n}} if n else {}


def pointwise(t: Tensor) -> Tensor:
    """The weight of a linear map, or of a convolution of size 1 in any dimension, as that of a 1 x 1 convolution."""
    return t.reshape(*t.shape[:2], 1, 1)


def with_null(table: Tensor) -> Tensor:
    """A table of classes with a row for none: zeros, for the published model has no such class."""
    return torch.cat([table, table.new_zeros(1, table.shape[1])])


def swapped(t: Tensor, dim: int = 1) -> Tensor:
    """Halves exchanged along `dim`: features in the order (cos, sin) instead of (sin, cos)."""
    return torch.cat(t.chunk(2, dim)[::-1], dim)


def scaled_output(state: Mapping[str, Tensor], network: nn.Module, factor: float) -> dict[str, Tensor]:
    """`state` of a network whose output is multiplied by `factor`, in its last layers."""
    network_: Any = network
    outlets = [network_.outlet] if network_.outlet is not None else [level.outlet for level in network_.up]
    names = Names(network)
    last = [names(o.conv if isinstance(o, Outlet) else o) for o in outlets]
    return {name: factor * value if name.rsplit(".", 1)[0] in last else value for name, value in state.items()}
