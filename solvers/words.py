"""Solvers and grids in a few words: their names, and the options that differ from the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from sde_lib import Chain, Knot
from sde_lib._checks import name_of


def describe(thing: Any) -> str:
    """A solver, corrector, coordinate or grid as text that `scoresde.comparison.parse_spec` reads: its name, and the
    options that differ from the defaults."""
    name = name_of(type(thing))
    if not is_dataclass(thing):
        return name
    options = [(f.name, getattr(thing, f.name), f.default) for f in fields(thing) if f.init]
    shown = [f"{key}={_shown(value)}" for key, value, default in options if value != default]
    return f"{name}({','.join(shown)})" if shown else name


def _shown(value: Any) -> str:
    if is_dataclass(value):
        return describe(value)
    return str(value) if isinstance(value, str | float) else repr(value)


def describe_grid(grid: Any) -> str:
    """A grid as short text: its own, or what kind of times or knots it was given as."""
    if grid is None:
        return "default"
    if isinstance(grid, str):
        return grid
    if isinstance(grid, Chain):
        return f"chain({grid.n})"
    if isinstance(grid, Tensor) or isinstance(grid, Sequence):
        return f"given({len(grid)} {'knots' if isinstance(grid[0], Knot) else 'times'})"
    return describe(grid)
