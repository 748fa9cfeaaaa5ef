"""Two-dimensional toys whose density is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.data.dataset import Dataset, Source, Split, check_held_out
from scoresde.data.spec import DataSpec
from sde_lib import GaussianMixture


@dataclass(frozen=True)
class Toy(Source):
    """Common part of the toys: `n` samples drawn from a known density, split into training and held-out.

    The shipped configurations leave them as they are (shift 0, scale 1), so that the exact score is the model's.

    Args:
        n: number of samples in both splits together.
        held_out: fraction kept from training, in (0, 1).
        seed: of the samples.
    """

    n: int = 20000
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_held_out(self.held_out)
        if self.n < 2 or not 0 < round(self.n * self.held_out) < self.n:
            raise ValueError(f"`n`={self.n} samples with `held_out`={self.held_out} leave a split empty.")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n exact samples, (n, 2) float32."""
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log density in nats, (B, 2) -> (B,)."""
        raise NotImplementedError

    def load(self) -> Dataset:
        """Draw and split."""
        data = self.sample(self.n, torch.Generator().manual_seed(self.seed))
        m = round(self.n * self.held_out)
        name = type(self).__name__.lower()
        return Dataset(name, Split(data[m:]), Split(data[:m]), DataSpec((2,), range=(-3.0, 3.0)), self.log_prob)


@dataclass(frozen=True)
class _MixtureToy(Toy):
    """A toy that is a Gaussian mixture: its score is known at every time of every SDE."""

    @property
    def mixture(self) -> GaussianMixture:
        """The density itself; ``mixture.reverse(sde)`` is the exact reverse SDE."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.mixture.sample(n, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.mixture.log_prob(x)


def _check_width(name: str, value: float) -> None:
    if not value > 0.0 or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}.")


@dataclass(frozen=True)
class Ring(_MixtureToy):
    """Equal round Gaussians on the unit circle.

    Args:
        modes: number of Gaussians.
        std: standard deviation of each.
    """

    modes: int = 8
    std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width("std", self.std)
        if self.modes < 1:
            raise ValueError(f"`modes` must be >= 1, got {self.modes}.")

    @property
    def mixture(self) -> GaussianMixture:
        angle = torch.arange(self.modes, dtype=torch.float64) * (2.0 * math.pi / self.modes)
        return GaussianMixture(torch.stack([angle.cos(), angle.sin()], 1), std=self.std)


@dataclass(frozen=True)
class Moons(_MixtureToy):
    """Two interleaved half circles, each a chain of Gaussians close enough to look continuous.

    Args:
        std: width of the arcs.
        points: Gaussians per arc.
    """

    std: float = 0.1
    points: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width("std", self.std)
        if self.points < 2:
            raise ValueError(f"`points` must be >= 2, got {self.points}.")

    @property
    def mixture(self) -> GaussianMixture:
        angle = torch.linspace(0.0, math.pi, self.points, dtype=torch.float64)
        upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
        return GaussianMixture(torch.cat([upper, -upper]), std=self.std)


@dataclass(frozen=True)
class Spiral(_MixtureToy):
    """An Archimedean spiral, a chain of Gaussians of equal spacing along the arc.

    Args:
        std: width of the line.
        turns: number of revolutions.
        points: Gaussians along the spiral.
    """

    std: float = 0.06
    turns: float = 2.0
    points: int = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width("std", self.std)
        _check_width("turns", self.turns)
        if self.points < 2:
            raise ValueError(f"`points` must be >= 2, got {self.points}.")

    @property
    def mixture(self) -> GaussianMixture:
        # the arc length of r = c theta grows like theta^2, so equal spacing is even in the square root
        u = torch.linspace(0.02, 1.0, self.points, dtype=torch.float64).sqrt()
        angle = u * (2.0 * math.pi * self.turns)
        return GaussianMixture(1.5 * torch.stack([u * angle.cos(), u * angle.sin()], 1), std=self.std)


@dataclass(frozen=True)
class Checkerboard(Toy):
    """Uniform on the dark squares of a board on [-half_width, half_width]^2: a density with edges.

    Args:
        squares: squares per side, even.
        half_width: half the side of the board.
    """

    squares: int = 4
    half_width: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width("half_width", self.half_width)
        if self.squares < 2 or self.squares % 2:
            raise ValueError(f"`squares` must be an even number >= 2, got {self.squares}.")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        row = torch.randint(self.squares, (n,), generator=generator)
        # in each row every second column is dark, starting at the row's parity
        column = 2 * torch.randint(self.squares // 2, (n,), generator=generator) + row % 2
        corner = torch.stack([column, row], 1)
        unit = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        side = 2.0 * self.half_width / self.squares
        return ((corner + unit) * side - self.half_width).float()

    def log_prob(self, x: Tensor) -> Tensor:
        side = 2.0 * self.half_width / self.squares
        cell = torch.floor((x + self.half_width) / side)
        inside = ((cell >= 0) & (cell < self.squares)).all(1)
        dark = inside & ((cell.sum(1) % 2) == 0)
        area = 0.5 * (2.0 * self.half_width) ** 2
        return torch.where(dark, -math.log(area), -math.inf).to(x.dtype)
