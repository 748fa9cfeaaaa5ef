r"""How an error is measured: distances of a sample, (B, \*D) -> (B,)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sde_lib import Table
from sde_lib._checks import check_positive


class Metric:
    """A distance. Base class."""

    square: ClassVar[bool] = True
    """Whether it is a square error, whose minimiser is the mean: then the score is learned, whatever the weighting."""

    def __call__(self, error: Tensor) -> Tensor:
        r"""Distances (B,) of errors (B, \*D)."""
        raise NotImplementedError


@dataclass(frozen=True)
class MeanSquare(Metric):
    """Mean of the squares over the elements."""

    def __call__(self, error: Tensor) -> Tensor:
        return error.square().flatten(1).mean(1)


@dataclass(frozen=True)
class HalfSquareSum(Metric):
    """Half the sum of the squares: in nats with the weighting "likelihood" (Song et al.'s ``reduce_mean=False``)."""

    def __call__(self, error: Tensor) -> Tensor:
        return 0.5 * error.square().flatten(1).sum(1)


@dataclass(frozen=True)
class PseudoHuber(Metric):
    r""":math:`\sqrt{\|e\|^2 + c^2 D} - c \sqrt D`: a square error up to about c per element, a norm beyond, so that
    samples with a large error do not rule the gradient (Song & Dhariwal 2023, arXiv:2310.14189).

    It is no square error: the minimiser is between the mean and the median, and no score.

    Args:
        c: scale per element; theirs is 0.00054.
    """

    c: float = 0.00054
    square: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("c", self.c)

    def __call__(self, error: Tensor) -> Tensor:
        square = error.square().flatten(1)
        root = self.c * math.sqrt(square.shape[1])
        sum_ = square.sum(1)
        # not a difference of nearly equal numbers where the error is small
        return sum_ / (torch.sqrt(sum_ + root * root) + root)


@dataclass(frozen=True)
class MeanAbsolute(Metric):
    """Mean of the absolute values: the minimiser is the median, and no score."""

    square: ClassVar[bool] = False

    def __call__(self, error: Tensor) -> Tensor:
        return error.abs().flatten(1).mean(1)


METRICS: Mapping[str, type[Metric]] = Table(Metric, {
    "mean": MeanSquare,
    "half_sum": HalfSquareSum,
    "pseudo_huber": PseudoHuber,
    "l1": MeanAbsolute,
})
"""Name -> class of the metrics. A new one is a class and a line here."""
