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
def process_group() -> Iterator[None]:
    """The processes that torchrun started, if it did, as one group, unless they are one already."""
    if processes() == 1:
        yield
        return
    import torch

    from scoresde.storage.processes import PATIENCE

    d = torch.distributed
    if d.is_initialized():
        yield
        return
    d.init_process_group("gloo", timeout=PATIENCE)  # rows and figures are exchanged: they lie on the CPU
    try:
        yield
    finally:
        d.destroy_process_group()
