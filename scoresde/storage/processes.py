"""Several processes that share files: the first one reads and writes, and tells the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def process() -> tuple[int, int]:
    """This process's number, and how many there are in the process group (0 and 1 without one)."""
    d = torch.distributed
    return (d.get_rank(), d.get_world_size()) if d.is_available() and d.is_initialized() else (0, 1)


def first_tells(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in every process. What it raises there, all raise.

    Every process of the group has to call this.
    """
    rank, world = process()
    if world == 1:
        return make()
    told: list[Any] = [None, None]
    if rank == 0:
        try:
            told[0] = make()
        except Exception as error:  # the others would wait for ever
            told[1] = error
    torch.distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found
