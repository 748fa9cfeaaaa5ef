"""What is random in training, as functions of (seed, step, process, part): no running stream, so no state to save."""

from __future__ import annotations

import torch
from torch import Tensor

ORDER, NOISE, DROPOUT, CLASSES, EVAL, FLIP = range(6)
"""What a generator is for, mixed into its seed."""


def mix(*parts: int) -> int:
    """A 63-bit seed from integers: neighbouring inputs give unrelated seeds (splitmix64)."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded by `mix`. Its 32 effective bits are the high ones of the mixture."""
    return torch.Generator().manual_seed(mix(*parts) >> 31)


class Order:
    """Rows of batch after batch: a stream of permutations of all rows, one per epoch, as a function of the seed.

    Args:
        n: number of rows.
        batch_size: rows per batch; batches run on across epochs, so none is short.
        seed: of the permutations.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._rows = -1, torch.empty(0, dtype=torch.int64)

    def rows(self, step: int) -> Tensor:
        """Rows of the batch of step 0, 1, …, int64 (batch_size,)."""
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while position < end:
            epoch, offset = divmod(position, self.n)
            if epoch != self._epoch:
                self._rows = torch.randperm(self.n, generator=generator(self.seed, ORDER, epoch))
                self._epoch = epoch
            parts.append(self._rows[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)
