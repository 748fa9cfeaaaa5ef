"""What is random in training: functions of (seed, step, name, global row), equal on every device and world size."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from solvers import counter


class Streams:
    """Random numbers for some rows of the global batch of a step, by name.

    Row i of what a name gives is a function of (seed, step, key, name, rows[i]) and of its shape and dtype: not of the
    other rows, so a global batch may be split over processes and accumulation as one likes; not of what was asked
    before, so nothing has to be saved, and the same name again gives the same numbers. The numbers of a name as
    `normal`, `uniform`, `integers` and `bernoulli` are independent of each other. Integers and booleans are equal on
    every device, normals and uniforms up to rounding. The bits are `solvers.counter`'s; nothing waits for a device, and
    a compiled function that is given the streams of another step is not compiled again.

    Args:
        seed: of the training; 64 bits count.
        rows: global rows that are asked for, int64 (B,); a range is counted on the device.
        of: rows of the global batch.
        step: which step.
        key: words and integers that name a place within the step (a phase, an update).
        device: where the numbers are made; that of `rows`, or the CPU for a range, if None.
    """

    def __init__(
        self,
        seed: int,
        rows: Tensor | range,
        of: int,
        step: int = 0,
        key: tuple[int | str, ...] = (),
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(rows, range):
            rows = torch.arange(rows.start, rows.stop, rows.step, dtype=torch.int64, device=device)
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"`rows` must be int64 of shape (B,), got {rows.dtype} of shape {tuple(rows.shape)}.")
        if of < 1:
            raise ValueError(f"`of` counts the rows of the global batch and must be >= 1, got {of}.")
        self.seed, self.step, self.of, self.key = seed, step, of, tuple(key)
        self.rows = rows if device is None else rows.to(device)
        base = counter.signed(counter.hashed(seed, step, *self.key))
        self._lanes = counter.mix_tensor(self.rows * counter.signed(counter.WEYL) + base)
        # what all rows share has a lane of its own
        self._shared = counter.mix_tensor(torch.full((), ~base, dtype=torch.int64, device=self.device))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self.rows.device

    def at(self, *, step: int | None = None, key: tuple[int | str, ...] | None = None) -> Self:
        """The same rows at another step, or under another key (None: as here)."""
        step, key = self.step if step is None else step, self.key if key is None else key
        return type(self)(self.seed, self.rows, self.of, step, key)

    def select(self, index: Any) -> Self:
        """Some of the rows: an index, a slice or a mask. (A mask on a device waits for it.)"""
        return type(self)(self.seed, self.rows[index], self.of, self.step, self.key)

    def normal(self, name: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) standard normals; up to 6.0 standard deviations in float32, 6.7 in float64."""
        z = counter.normals(self._lanes_of("normal", name), math.prod(shape), dtype)
        return z.reshape(len(self), *shape)

    def uniform(self, name: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) uniforms on [0, 1), of 24 bits in float32 and 32 in float64."""
        u = counter.uniforms(self._lanes_of("uniform", name), math.prod(shape), dtype)
        return u.reshape(len(self), *shape)

    def integers(self, name: str, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """(B, *shape) integers of 0 … high - 1, int64, equally likely to within a share of high / 2^63."""
        if not 1 <= high < 2**63:
            raise ValueError(f"`high` must be from 1 to 2^63 - 1, got {high}.")
        k = counter.integers(self._lanes_of("integers", name), math.prod(shape), high)
        return k.reshape(len(self), *shape)

    def bernoulli(self, name: str, p: float) -> Tensor:
        """(B,) booleans, True with probability p (to 2^-32)."""
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"`p` must be in [0, 1], got {p}.")
        return counter.uniforms(self._lanes_of("bernoulli", name), 1, torch.float64)[:, 0] < p

    def lattice(self, name: str) -> Tensor:
        r"""(B,) numbers :math:`(u + \text{row} / \text{of}) \bmod 1` in [0, 1), float64, with one uniform u of 53 bits
        for the whole global batch: each is uniform, together they are spread evenly (Kingma et al. 2021, app. I.1)."""
        word = counter.mix_tensor(self._shared + self._hash("lattice", name))
        u = word.bitwise_right_shift_(11).bitwise_and_(2**53 - 1).double() * 2.0**-53
        return (u + self.rows.double() / self.of).remainder_(1.0)

    def _lanes_of(self, kind: str, name: str) -> Tensor:
        return self._lanes + self._hash(kind, name)

    @staticmethod
    def _hash(kind: str, name: str) -> int:
        return counter.signed(counter.hashed(kind, name))


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n rows in an epoch, int64 (n,) on the CPU: a random permutation, a function of (n, seed, epoch)."""
    return counter.permutation(n, counter.hashed(seed, "order", epoch))
