"""Latent codes of the probability-flow ODE: encode, decode, interpolate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sde_lib import ReverseSDE
from sde_lib._checks import as_number
from solvers import AdaptiveRungeKutta, Solver, as_solver, make_knots, solve
from solvers.grids import GridLike


def encode(rev: ReverseSDE, x: Tensor, **options: Any) -> Tensor:
    """The latent of x: its end at t_max along the probability-flow ODE, (B, *D).

    The code depends on the scores alone, not on the network that learned them: two models of the same data with the
    same forward SDE give nearly the same codes (Song et al. 2021, arXiv:2011.13456, section 4.3, "uniquely identifiable
    encoding"). `Likelihood.latent` is the same state.

    Args:
        rev: reverse SDE of a continuous law.
        x: states in model units at t_min, (B, *D).
        **options: as for `decode`.

    Raises:
        ValueError: for a chain, or a stochastic solver.
        SolverError: if the ODE cannot be solved.
    """
    return _follow(rev, x, True, **options)


def decode(
    rev: ReverseSDE,
    z: Tensor,
    *,
    tol: float = 1e-5,
    solver: Solver | str | None = None,
    steps: int | None = None,
    grid: GridLike = None,
    condition: Mapping[str, Any] | None = None,
) -> Tensor:
    """The state at t_min of a latent z at t_max, (B, *D): the inverse of `encode`.

    Args:
        rev: reverse SDE of a continuous law.
        z: latents, (B, *D).
        tol: relative and absolute tolerance of the default solver, Dormand-Prince with per-sample steps.
        solver: another deterministic solver, or its name.
        steps: its number of steps.
        grid: its grid, from t_max down to t_min; also used upward.
        condition: keyword arguments for the network, batch first.
    """
    return _follow(rev, z, False, tol=tol, solver=solver, steps=steps, grid=grid, condition=condition)


def _follow(
    rev: ReverseSDE,
    x: Tensor,
    up: bool,
    *,
    tol: float = 1e-5,
    solver: Solver | str | None = None,
    steps: int | None = None,
    grid: GridLike = None,
    condition: Mapping[str, Any] | None = None,
) -> Tensor:
    law = rev.law
    if not law.has_time:
        raise ValueError(
            "Codes of the ODE need continuous time; this model lives on a chain. Go on between its levels with "
            "chain.continuous(), or invert along them with DDIM."
        )
    if solver is None:
        if steps is not None or grid is not None:
            raise ValueError("`steps` and `grid` go with a `solver`; the default one takes steps of its own.")
        solver = AdaptiveRungeKutta(rtol=tol, atol=tol)
    solver = as_solver(solver)
    if solver.stochastic:
        raise ValueError(f"{type(solver).__name__} adds noise: codes need a deterministic solver.")
    knots = [law.knot(law.t_max), law.knot(law.t_min)]
    if solver.needs_steps:
        knots = list(make_knots(law, grid, steps, needs_drift=solver.needs_drift))
    return solve(rev, x, solver, grid=knots[::-1] if up else knots, condition=condition, strict=True).x


def interpolate(z_0: Tensor, z_1: Tensor, weight: float | Tensor) -> Tensor:
    r"""Between two latents along the great circle: :math:`\frac{\sin((1 - w)\phi)}{\sin\phi} z_0 +
    \frac{\sin(w\phi)}{\sin\phi} z_1`, with phi the angle between them (Shoemake 1985).

    In high dimensions the norms of draws from the prior are nearly equal, and so are those on the way; a straight line
    passes through norms that the prior never has.

    Args:
        z_0: (B, *D).
        z_1: (B, *D).
        weight: w in [0, 1]: a number, or (B,).
    """
    if not isinstance(weight, Tensor):
        weight = as_number("weight", weight)
        if not math.isfinite(weight):
            raise ValueError(f"`weight` must be finite, got {weight}.")
    if z_0.shape != z_1.shape:
        raise ValueError(f"`z_0` and `z_1` must have one shape, got {tuple(z_0.shape)} and {tuple(z_1.shape)}.")
    a, b = (z.reshape(len(z), -1).double() for z in (z_0, z_1))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    phi = torch.arccos(cosine.clamp(-1.0, 1.0))
    w = torch.as_tensor(weight, dtype=torch.float64, device=a.device).expand(len(a))
    near = phi.sin() < 1e-6  # parallel: the line is the circle
    scale = torch.where(near, 1.0, phi.sin())
    first = torch.where(near, 1.0 - w, torch.sin((1.0 - w) * phi) / scale)
    second = torch.where(near, w, torch.sin(w * phi) / scale)
    shape = (-1, *[1] * (z_0.ndim - 1))
    return first.to(z_0.dtype).reshape(shape) * z_0 + second.to(z_0.dtype).reshape(shape) * z_1
