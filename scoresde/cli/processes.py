"""The processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def processes() -> int:
    """How many processes torchrun started, 1 without it."""
    count = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return int(count) if count.isdigit() else 1


@contextmanager
def process_group() -> Iterator[bool]:
    """The processes that torchrun started, if it did, as one group; gives whether this is the first of them."""
    import torch

    d = torch.distributed
    if processes() == 1 or d.is_initialized():
        yield not d.is_initialized() or d.get_rank() == 0
        return
    d.init_process_group("gloo")  # rows of figures are exchanged: they lie on the CPU
    try:
        yield d.get_rank() == 0
    finally:
        d.destroy_process_group()
