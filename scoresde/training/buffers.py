"""Buffers: what a module remembers beside its weights, such as batch statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def same(tensors: Iterable[Tensor]) -> None:
    """The values of process 0 in all processes."""
    if process()[1] > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)
