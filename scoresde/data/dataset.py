"""What every data source yields: a training split, a held-out split, and how the numbers map to model units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.data.spec import DataSpec


@dataclass(frozen=True, eq=False)
class Split:
    """Part of a data set.

    Attributes:
        data: (N, *D) in data units: the integers 0 … levels - 1, or real numbers.
        labels: class of each sample, int64 (N,), or None.
    """

    data: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.data.shape[0]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two disjoint splits of one source.

    Attributes:
        name: what the source calls itself.
        train: the samples to fit.
        held_out: the samples to judge by; never trained on.
        spec: shape, units, number of levels and classes.
        log_prob: exact log density in nats of real-valued data, (B, *D) -> (B,); None where it is unknown.
    """

    name: str
    train: Split
    held_out: Split
    spec: DataSpec
    log_prob: Callable[[Tensor], Tensor] | None = None


def check_held_out(fraction: float) -> None:
    """Raise unless 0 < `fraction` < 1."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"`held_out` is the fraction of samples kept from training, in (0, 1), got {fraction!r}.")


def split(data: Tensor, labels: Tensor | None, held_out: float, seed: int) -> tuple[Split, Split]:
    """Random disjoint (train, held-out) splits: a function of the number of samples, the fraction and the seed.

    Raises:
        ValueError: if the fraction leaves one of the splits empty.
    """
    check_held_out(held_out)
    n = data.shape[0]
    m = round(n * held_out)
    if not 0 < m < n:
        raise ValueError(f"`held_out`={held_out} of {n} samples leaves {n - m} to train on and {m} held out.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    out, train = order[:m].sort().values, order[m:].sort().values

    def part(rows: Tensor) -> Split:
        return Split(data[rows], None if labels is None else labels[rows])

    return part(train), part(out)
