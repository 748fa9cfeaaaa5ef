"""What the section `sampling` stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_collections

from scoresde.config.doors import build

if TYPE_CHECKING:
    from solvers import Grid, Solver


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        n: number of samples.
        batch_size: samples at a time.
        seed: of the noise: sample i has a stream of its own.
        solver: which steps.
        grid: where it stops; None: the law's own.
        steps: number of steps; solvers of adaptive steps have none.
        nfe: budget of network calls per sample, instead of `steps`.
        end: "denoise" or "stop".
        guidance: scale of classifier-free guidance, 1 for none.
    """

    n: int
    batch_size: int
    seed: int
    solver: Solver
    grid: Grid | None
    steps: int
    nfe: int | None
    end: str
    guidance: float


def make_sampling(config: ml_collections.ConfigDict) -> Sampling:
    """The section `sampling` as objects.

    Raises:
        ConfigError: for unknown names or options that do not work.
    """
    s = config.sampling
    numbers = {name: s[name] for name in ("n", "batch_size", "seed", "steps", "nfe", "end", "guidance")}
    return Sampling(solver=make_solver(config), grid=make_grid(config), **numbers)


def make_solver(config: ml_collections.ConfigDict) -> Solver:
    """The solver of `sampling.solver`."""
    from solvers import SOLVERS

    return build(SOLVERS, config.sampling.solver, "solver")


def make_grid(config: ml_collections.ConfigDict) -> Grid | None:
    """The grid of `sampling.grid`, or None for the law's own."""
    from solvers import GRIDS

    return build(GRIDS, config.sampling.grid, "grid") if config.sampling.grid.name else None
