"""Tables of numbers that computations on a device read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Constants:
    """Columns of numbers, copied to a device the first time they are wanted there.

    A copy from the host waits for the device and is refused while a CUDA graph is captured; what was there before, in
    a warm-up run, is only read.

    Args:
        *columns: numbers, float64.
    """

    def __init__(self, *columns: Iterable[float]) -> None:
        # on the host, under `torch.device("meta")` too
        host: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        self.columns = tuple(torch.tensor([float(v) for v in column], **host) for column in columns)
        self._there: dict[torch.device, tuple[Tensor, ...]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The columns on a device."""
        if device not in self._there:
            there = tuple(column.to(device) for column in self.columns)
            if any(type(column) is not Tensor for column in there):  # of a tracer: not to be kept
                return there
            self._there[device] = there
        return self._there[device]

    def __getstate__(self) -> dict[str, Any]:
        return {"columns": self.columns, "_there": {}}
