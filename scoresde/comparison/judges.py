"""How samples are judged: two-sample distances to reference samples, and the noise floor of each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresde.comparison.bench import digest
from scoresde.comparison.result import COLUMNS
from scoresde.comparison.store import finite
from scoresde.metrics import METRICS, Features, frechet_distance
from sde_lib import lookup

_FLOORS = 8
"""Pairs of samples for each noise floor, at least: a standard deviation of fewer values is too uncertain."""

Metric = Callable[[Tensor, Tensor], float]
Draw = Callable[[int, int], Tensor]


class Judges:
    """Metrics of samples against reference samples.

    Args:
        samples: reference samples in data units, or a function (count, seed) -> samples; None for no metrics.
        floor: more samples of the same law.
        metrics: names in `METRICS`, or name -> function (x, y) -> float.
        features: of the Fréchet distance.
        n: samples of a run.
        shape: of one, in data units.
        repetitions: of the runs.

    Attributes:
        floors: metric -> mean and standard deviation between samples of one law.
    """

    def __init__(
        self,
        samples: Tensor | Draw | None,
        floor: Tensor | None,
        metrics: Sequence[str] | Mapping[str, Metric] | None,
        features: Features | None,
        n: int,
        shape: tuple[int, ...],
        repetitions: int,
    ) -> None:
        self.floors: dict[str, dict[str, float | None]] = {}
        self.metrics: dict[str, Metric] = {}
        self.features, self.target = features, torch.empty(0)
        if samples is None:
            if metrics or features is not None:
                raise ValueError("`metrics` and `features` judge samples against reference samples: give `samples`.")
            return
        self.metrics = _metrics(metrics, features)
        draw = samples if callable(samples) else None
        target = draw(n, 0) if draw is not None else samples
        for name, value in (("samples", target), ("floor", floor)):
            if value is not None and not (isinstance(value, Tensor) and tuple(value.shape[1:]) == shape):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"`{name}` must have shape (M, {', '.join(map(str, shape))}), got {got}.")
        assert isinstance(target, Tensor)
        self.target = target
        pairs = [_two_of_one_law(draw, target, floor, n, k) for k in range(max(_FLOORS, repetitions))]
        for name, metric in self.metrics.items():
            found = []
            for one, other in pairs:
                try:
                    found.append(float(metric(one, other)))
                except ValueError:  # halves may be too small where the whole is not
                    continue
            if found:
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                self.floors[name] = {"mean": finite(statistics.fmean(found)), "std": finite(spread)}

    def figures(self, decoded: Tensor) -> dict[str, float | None]:
        """The distances of samples in data units."""
        return {name: finite(float(metric(decoded, self.target))) for name, metric in self.metrics.items()}

    def settings(self) -> dict[str, Any]:
        """What identifies the reference samples and the metrics, for JSON."""
        features = self.features
        if features is not None and not isinstance(features, str):
            features = getattr(features, "__qualname__", type(features).__qualname__)
        return {
            "samples": digest(self.target) if len(self.target) else None,
            "metrics": list(self.metrics),
            "features": features,
        }


def _metrics(metrics: Sequence[str] | Mapping[str, Metric] | None, features: Features | None) -> dict[str, Metric]:
    if metrics is None:
        metrics = [m for m in METRICS if m != "frechet_distance" or features is not None]
    if isinstance(metrics, str):
        metrics = [metrics]
    if not isinstance(metrics, Mapping):
        metrics = {name: lookup(METRICS, name, "metric") for name in metrics}
        if features is not None and "frechet_distance" not in metrics:
            raise ValueError(f"`features` are for frechet_distance, which is not in {list(metrics)}.")
    for name, metric in metrics.items():
        if name in COLUMNS or not callable(metric):
            raise ValueError(f"A metric is a name of its own and a function (x, y) -> float, got {name!r}, {metric!r}.")
    on_features = partial(frechet_distance, features="identity" if features is None else features)
    return {name: on_features if metric is frechet_distance else metric for name, metric in metrics.items()}


def _two_of_one_law(draw: Draw | None, target: Tensor, floor: Tensor | None, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Two independent samples of the reference law."""
    if draw is not None:
        return draw(n, 1 + k), target
    generator = torch.Generator().manual_seed(k)
    if floor is not None:
        return floor[torch.randperm(len(floor), generator=generator)[:n]], target
    order = torch.randperm(len(target), generator=generator)
    size = min(n, len(target) // 2)
    return target[order[:size]], target[order[size:]]
