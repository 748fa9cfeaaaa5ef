"""What every data source yields: a training split, a held-out split, and what the data are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde.data.conditions import mapped
from scoresde.data.spec import DataSpec


@dataclass(frozen=True, eq=False)
class Split:
    """Part of a data set.

    Attributes:
        data: (N, *D) in data units: the integers 0 … levels - 1, or real numbers.
        condition: what each sample comes with, by the names of the specification's conditions; N first at every depth.
    """

    data: Tensor
    condition: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.data.shape[0]

    def rows(self, rows: Tensor | slice) -> Split:
        """Some of the samples."""

        def pick(value: Tensor) -> Tensor:
            return value[rows if isinstance(rows, slice) else rows.to(value.device)]

        return Split(pick(self.data), mapped(pick, self.condition))

    def to(self, device: torch.device | str) -> Split:
        """The split on a device."""
        return Split(self.data.to(device), mapped(lambda value: value.to(device), self.condition))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two disjoint splits of one source.

    Attributes:
        name: what the source calls itself.
        train: the samples to fit.
        held_out: the samples to judge by; never trained on.
        spec: shape, levels and conditions.
        log_prob: exact log density in nats of real-valued data, (B, *D) -> (B,); None where it is unknown.
    """

    name: str
    train: Split
    held_out: Split
    spec: DataSpec
    log_prob: Callable[[Tensor], Tensor] | None = None


class Source:
    """Where data come from: base class of the data sets, whose options are those of their constructor."""

    def load(self) -> Dataset:
        """The data, read and split."""
        raise NotImplementedError


def check_held_out(fraction: float) -> None:
    """Raise unless 0 < `fraction` < 1."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"`held_out` is the fraction of samples kept from training, in (0, 1), got {fraction!r}.")


def split(everything: Split, held_out: float, seed: int) -> tuple[Split, Split]:
    """Random disjoint (train, held-out) splits: a function of the number of samples, the fraction and the seed.

    Raises:
        ValueError: if the fraction leaves one of the splits empty.
    """
    check_held_out(held_out)
    n = len(everything)
    m = round(n * held_out)
    if not 0 < m < n:
        raise ValueError(f"`held_out`={held_out} of {n} samples leaves {n - m} to train on and {m} held out.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    out, train = order[:m].sort().values, order[m:].sort().values
    return everything.rows(train), everything.rows(out)
