r"""How times are drawn: clocks, and what draws by them on a law.

A law of times is uniform in a *clock*, an increasing function of the time: time itself, the log of the noise ratio
sigma / alpha, its normal distribution function, … A point u of [0, 1), of a lattice or by itself, becomes the time at
which a share u of the clock's range has gone by. So the density of the drawn times, relative to uniform ones, is the
rate of the clock over its mean, in closed form.

An average over drawn times is another objective than one over uniform times, unless every loss is divided by that
density (`corrected`): then only the variance differs.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sde_lib import SDE, Chain, Knot
from sde_lib._constants import Constants
from sde_lib._math import Real


class Times(ABC):
    """A law of times, on any SDE and any chain. Base class.

    Attributes:
        corrected: whether losses are divided by the density of the times relative to uniform ones, so that the
            objective is the one of uniform times; if False, the times are a part of the objective.
    """

    corrected: bool = False

    @abstractmethod
    def clock(self, knot: Knot) -> Real:
        """The clock at a knot, increasing in time."""

    @abstractmethod
    def rate(self, knot: Knot) -> Real:
        """d clock / dt at a knot of an SDE."""

    @abstractmethod
    def time_at(self, law: SDE, clock: Tensor) -> Tensor:
        """The time at which the clock shows `clock`: inverse of `clock`."""

    def probabilities(self, chain: Chain) -> list[float]:
        """Of the levels of a chain: each has the clock's range from half way to the level before to half way to the
        one after, the ends half a range."""
        clocks = [float(self.clock(level)) for level in chain.levels]
        if not all(map(math.isfinite, clocks)):
            raise ValueError(
                f"{type(self).__name__} cannot weigh a level with alpha = 0: use other times on this chain."
            )
        edges = [clocks[0], *(0.5 * (a + b) for a, b in itertools.pairwise(clocks)), clocks[-1]]
        return [(b - a) / (edges[-1] - edges[0]) for a, b in itertools.pairwise(edges)]

    def on(self, law: SDE | Chain, corrected: bool | None = None) -> Drawer:
        """These times on a law; `corrected` as the objective needs it, the times' own by default."""
        corrected = self.corrected if corrected is None else corrected
        return LevelDrawer(self, law, corrected) if isinstance(law, Chain) else TimeDrawer(self, law, corrected)


class Drawer(ABC):
    """Times on one law: what an objective draws from."""

    corrected: bool

    @abstractmethod
    def draw(self, u: Tensor) -> Tensor:
        """Times (float64) or levels (int64), (B,), of u in [0, 1), float64 (B,)."""

    @abstractmethod
    def density(self, knot: Knot) -> Real:
        """Density of the drawn times relative to uniform ones, in the form of the knot."""


class TimeDrawer(Drawer):
    """On an SDE, from t_min to t_max; to `drift_t_max` where the clock, or a density that is divided by, ends there."""

    def __init__(self, times: Times, law: SDE, corrected: bool) -> None:
        self.times, self.law, self.corrected = times, law, corrected
        first, last = law.knot(law.t_min), law.knot(law.t_max)
        if corrected or not math.isfinite(float(times.clock(last))):
            last = law.knot(law.drift_t_max)
        self.t_min, self.t_max = float(first.t), float(last.t)
        self.first = float(times.clock(first))
        self.range = float(times.clock(last)) - self.first
        if not self.range > 0.0:
            raise ValueError(f"{times!r} has no probability between the ends of {law!r}.")

    def draw(self, u: Tensor) -> Tensor:
        return self.times.time_at(self.law, self.first + self.range * u).clamp(self.t_min, self.t_max)

    def density(self, knot: Knot) -> Real:
        return self.times.rate(knot) * ((self.t_max - self.t_min) / self.range)


class LevelDrawer(Drawer):
    """On the levels of a chain."""

    def __init__(self, times: Times, chain: Chain, corrected: bool) -> None:
        self.corrected, self.n = corrected, chain.n
        probabilities = times.probabilities(chain)
        self._tables = Constants(itertools.accumulate(probabilities[:-1]), (chain.n * p for p in probabilities))

    def draw(self, u: Tensor) -> Tensor:
        edges, _ = self._tables.on(u.device)
        return torch.searchsorted(edges, u, right=True)

    def density(self, knot: Knot) -> Real:
        index = knot.index
        table = self._tables.on(index.device if isinstance(index, Tensor) else torch.device("cpu"))[1]
        return table[index] if isinstance(index, Tensor) else float(table[index])
