"""Batches: which rows of a data set, which of their conditions, mirrored or not, as functions of the place in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scoresde.config import ConfigError
from scoresde.data import Split
from scoresde.data.batch import Batch
from scoresde.data.conditions import ConditionSpec, mapped, replaced
from scoresde.data.spec import DataSpec
from scoresde.streams import Streams, permutation


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

    def rows(self, number: int) -> Tensor:
        """Rows of batch 0, 1, …, int64 (batch_size,)."""
        position, end = number * self.batch_size, (number + 1) * self.batch_size
        parts = []
        while position < end:
            epoch, offset = divmod(position, self.n)
            if epoch != self._epoch:
                self._rows, self._epoch = permutation(self.n, self.seed, epoch), epoch
            parts.append(self._rows[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)


def placed(split: Split, device: torch.device) -> Split:
    """A split on the device if it is small enough to live there for good, its conditions included."""
    sizes = [split.data.nbytes]
    mapped(lambda value: sizes.append(value.nbytes), split.condition)
    return split if sum(sizes) > 2**30 else split.to(device)


def batch_of(
    split: Split,
    spec: DataSpec,
    rows: Tensor,
    streams: Streams,
    device: torch.device,
    dropout: Mapping[str, float] | None = None,
    flip: bool = False,
) -> Batch:
    """Samples of a split and their conditions.

    Args:
        split: where they are.
        spec: what they are.
        rows: which, int64 (B,).
        streams: what is random about them: "drop.NAME" and "flip".
        device: where they go.
        dropout: name of a condition -> fraction of samples that go without it; None: none.
        flip: whether half of the samples, and conditions that are images, are mirrored along their last dimension.
    """

    found = split.rows(rows).to(device)
    data = found.data
    condition: dict[str, Any] = {name: found.condition[name] for name in spec.conditions}
    if flip:
        mirrored = streams.bernoulli("flip", 0.5)
        data = replaced(data, data.flip(-1), mirrored)
        for name, kind in spec.conditions.items():
            if kind.kind == "image":
                condition[name] = replaced(condition[name], condition[name].flip(-1), mirrored)
    for name, share in (dropout or {}).items():
        if share > 0.0:
            null = spec.conditions[name].null(len(rows), device)
            condition[name] = replaced(condition[name], null, streams.bernoulli(f"drop.{name}", share))
    return Batch(data, condition)


def condition_dropout(text: str, specs: Mapping[str, ConditionSpec]) -> dict[str, float]:
    """What ``training.condition_dropout`` says: "" leaves every condition its own `ConditionSpec.dropout`, a number is
    for all of them, and ``"class_label:0.1,text:0.3"`` for those that it names.

    Raises:
        ConfigError: for a name that is no condition of the data, or what is no fraction.
    """
    found = {name: spec.dropout for name, spec in specs.items()}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        name, colon, value = piece.rpartition(":")
        if colon and name not in specs:
            known = ", ".join(specs) or "none"
            raise ConfigError(f"training.condition_dropout={text!r}: the data's conditions are {known}.")
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"training.condition_dropout={text!r}: {value!r} is no fraction in [0, 1].")
        found.update(dict.fromkeys([name] if colon else specs, share))
    return found
