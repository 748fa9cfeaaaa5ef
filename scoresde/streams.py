"""What is random in training: functions of (seed, step, stream, global row), equal on every device and world size."""

from __future__ import annotations

from torch import Tensor


class Streams:
    """Random numbers of the rows of a batch."""

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        raise NotImplementedError
