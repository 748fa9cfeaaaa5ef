"""What both sides of a comparison measure with: this process and the peers' (so nothing of the project is imported)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique")


def errors(end: Tensor, solution: Tensor) -> tuple[float, float]:
    """Median over samples, and root mean square, of the root mean square distance over dimensions."""
    e = (end.double() - solution).flatten(1).square().mean(1).sqrt()
    return float(e.median()), float(e.square().mean().sqrt())


def microseconds(run: Callable[[], object], steps: int, runs: int) -> float:
    """Thread CPU time per step: the fastest of `runs` runs after a warm-up."""
    run()
    times = []
    for _ in range(runs):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times) / steps * 1e6


class Operations(TorchDispatchMode):
    """Counts ATen operations: those on whole states, those on small tensors, and those the host waits for."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.full = self.small = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name in SYNCS:
            self.syncs += 1
        elif not func.is_view:
            sizes = [v.numel() for v in (*args, out) if isinstance(v, Tensor)]
            if max(sizes, default=0) >= self.elements:
                self.full += 1
            else:
                self.small += 1
        return out


def operations(run: Callable[[], object], steps: int, elements: int, own: float = 0.0) -> tuple[float, float, float]:
    """(on whole states, on small tensors, host syncs) per step; `own` whole-state operations are the network's."""
    with Operations(elements) as count:
        run()
    return count.full / steps - own, count.small / steps, count.syncs / steps
