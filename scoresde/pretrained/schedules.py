"""Noise schedules of published chains, as sections of a model's configuration: {"name": …, options}."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable
from typing import Any


def linear(n: int = 1000, start: float = 1e-4, end: float = 0.02) -> dict[str, Any]:
    """n betas, equally spaced (Ho et al. 2020): the chain of a VP SDE."""
    return {"name": "vp", "beta_min": n * start, "beta_max": n * end}


def of_betas(betas: Iterable[float]) -> dict[str, Any]:
    """Any betas: the SDE through their cumulative products of 1 - beta."""
    return {"name": "tabulated", "alphas_cumprod": list(itertools.accumulate((1.0 - b for b in betas), operator.mul))}


def cosine(n: int = 1000) -> dict[str, Any]:
    """The cosine schedule of Nichol & Dhariwal 2021 (arXiv:2102.09672, eq. 17), betas at most 0.999."""

    def squared(i: int) -> float:
        return math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2

    return of_betas(min(1.0 - squared(i + 1) / squared(i), 0.999) for i in range(n))
