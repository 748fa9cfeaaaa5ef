"""Buffers: what a module remembers beside its weights, such as batch statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scoresde.codecs import Codec
from scoresde.storage.processes import process


def moving(module: nn.Module) -> Iterator[Tensor]:
    """Buffers that training may change: all but those of codecs, which are large, and fitted once."""
    if not isinstance(module, Codec):
        yield from module.buffers(recurse=False)
        for child in module.children():
            yield from moving(child)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """After a `with` block those buffers are what they were before, the ones that were assigned anew, too."""
    owners = [owner for owner in module.modules() if not isinstance(owner, Codec)]
    kept = [(owner, name, value) for owner in owners for name, value in owner._buffers.items() if value is not None]
    values = [value.clone() for _, _, value in kept]
    try:
        yield
    finally:
        with torch.no_grad():
            for (owner, name, tensor), value in zip(kept, values, strict=True):
                owner._buffers[name] = tensor.copy_(value)


def same(tensors: Iterable[Tensor]) -> None:
    """The values of process 0 in all processes."""
    if process()[1] > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)
