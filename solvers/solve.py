"""The driver: one entry for every solver, grid, noise and law."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sde_lib import Chain, Knot, Reverse, lookup
from solvers.grids import Grid, GridLike, default_grid, make_knots
from solvers.noise import Draw, Rng, as_draw
from solvers.progress import Bar, Ticking
from solvers.solver import Callback, Hooks, Outcome, Project, Solution, Solver, SolverError, Status
from solvers.table import SOLVERS


def solve(
    rev: Reverse,
    x_T: Tensor,
    solver: Solver | str,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: GridLike = None,
    end: str = "stop",
    rng: Rng = None,
    condition: Mapping[str, Any] | None = None,
    project: Project | None = None,
    callback: Callback | None = None,
    trajectory: bool = False,
    strict: bool = False,
    differentiable: bool = False,
    check: bool = True,
    progress: bool = False,
) -> Solution:
    """Carry a state along a grid: from the prior down to the data, or upward (inversion) with a deterministic solver.

    Args:
        rev: the reverse SDE: ``sde.reverse(score=fn)``, ``model.reverse()`` or a wrapper of one.
        x_T: state at the first knot, (B, *D), floating point.
        solver: what steps: a `Solver`, or a name in `SOLVERS`.
        steps: number of intervals.
        nfe: budget of network calls per sample, guidance included, instead of `steps`.
        grid: a `Grid`, its name, a `Chain`, given times or knots; `Blended` by default (the chain itself for a model on
            a chain). See `make_knots`.
        end: "stop" at the last time, or "denoise": one more call, for the posterior mean there.
        rng: noise: an int, a list of ints (one per sample), a `torch.Generator`, a `Noise`, or None (torch's global
            generator).
        condition: keyword arguments for the network, batch first.
        project: (x, knot, draw) -> x, applied at every knot: inpainting and other constraints.
        callback: called with a `StepInfo` after each step.
        trajectory: keep the states at all knots.
        strict: raise `SolverError` if any sample fails, instead of warning and reporting its `status`.
        differentiable: record the run for autograd; by default nothing is.
        check: look whether the result is finite, the one time the host waits for the device. Without it a fixed-step
            run can be captured as a CUDA graph or compiled whole, and `status` does not know of samples that are not
            finite.
        progress: show a bar that counts network calls.

    Returns:
        The `Solution`. A failed run is replayed on the same noise to name the step and the quantity in its message.

    Raises:
        TypeError, ValueError: for arguments that do not fit together, before any step is taken.
        SolverError: under `strict`.
    """
    solver = _check(rev, solver)
    rev.law.check_state(x_T)
    solver, knots = _plan(rev, solver, steps, nfe, grid, end)
    draw = as_draw(rng, x_T)
    if strict and not check:
        raise ValueError("`strict` needs `check`: without a look at the result there is nothing to be strict about.")
    return _run(
        rev, x_T, solver, knots, grid, draw, condition, project, callback, trajectory, strict, differentiable, check,
        progress,
    )  # fmt: skip


def sample(
    rev: Reverse,
    shape: Sequence[int],
    solver: Solver | str,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: GridLike = None,
    end: str = "denoise",
    rng: Rng = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Solution:
    """Draw from the prior, then `solve`. Ends with the posterior mean unless told to stop.

    Args:
        rev: the reverse SDE.
        shape: (B, *D) of the samples.
        solver: what steps: a `Solver`, or a name in `SOLVERS`.
        steps: number of intervals.
        nfe: budget of network calls per sample, guidance included, instead of `steps`.
        grid: as in `solve`; must start at the prior.
        end: "denoise" (default) or "stop".
        rng: noise, for the prior too.
        dtype: of the state.
        device: of the state.
        **options: the remaining arguments of `solve`.
    """
    solver = _check(rev, solver)
    if not isinstance(shape, Sequence) or not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"`shape` must be (B, *D) with positive ints, got {shape!r}.")
    shape = tuple(shape)
    solver, knots = _plan(rev, solver, steps, nfe, grid, end)
    law = rev.law
    first = float(knots[0].t)
    if first < law.drift_t_max * (1 - 1e-6):
        raise ValueError(
            f"sample() starts from the prior, at t = {law.t_max}, but this grid starts at t = {first}; "
            "use solve() with a state of your own."
        )
    like = _empty(shape, dtype, device)
    law.check_state(like)
    draw = as_draw(rng, like)
    found = solve(rev, law.prior(draw, like), solver, grid=knots, rng=draw, **options)
    found.grid = default_grid(law) if grid is None else grid
    return found


def _empty(shape: tuple[int, ...], dtype: Any, device: Any) -> Tensor:
    """Room for a state; torch's words for a dtype or a device that is not there come with ours."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` must be a torch.dtype such as torch.float64, got {dtype!r}.")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (AssertionError, RuntimeError, TypeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"Cannot use `device` {device!r}: {told}") from error
    return torch.empty(shape, dtype=dtype, device=place)


def _check(rev: Any, solver: Any) -> Solver:
    if not isinstance(rev, Reverse):
        raise TypeError(
            f"`rev` must be a ReverseSDE (sde.reverse(score=fn) or model.reverse()), got {type(rev).__name__}."
        )
    return as_solver(solver)


def as_solver(solver: Any) -> Solver:
    """A solver from itself or from its name in `SOLVERS`, with default options.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else, a class among it.
    """
    if isinstance(solver, str):
        solver = lookup(SOLVERS, solver, "solver")()
    if not isinstance(solver, Solver):
        raise TypeError(
            f'`solver` must be a Solver instance such as DDIM(), or the name of one such as "ddim", got {solver!r}.'
        )
    return solver


def _plan(
    rev: Reverse, solver: Solver, steps: int | None, nfe: int | None, grid: GridLike, end: str
) -> tuple[Solver, tuple[Knot, ...]]:
    """The solver as it runs on this law and budget, and its knots."""
    solver = solver.on(rev.law)
    if nfe is not None:
        if steps is not None:
            raise ValueError(f"Give `steps` or `nfe`, not both (got steps={steps}, nfe={nfe}).")
        nfe = _calls(nfe, rev.nfe_per_call)
        chain = grid if isinstance(grid, Chain) else rev.law if grid is None and isinstance(rev.law, Chain) else None
        if chain is None:
            solver, steps = solver.within(nfe, end)
        elif nfe == 1:  # the last step of a chain, to the data, is one call
            steps = 1
        else:
            solver, steps = solver.within(nfe, "denoise")
            steps = min(chain.n, 1 + steps)
    elif steps is None and not solver.needs_steps:
        steps = 1 if grid is None or isinstance(grid, Grid | str) else None
    knots = make_knots(rev.law, grid, steps, end, solver.needs_drift)
    downward = knots[0].half_log_snr < knots[-1].half_log_snr
    if not downward and solver.stochastic:
        raise ValueError(
            f"{type(solver).__name__} adds noise and runs downward only; invert with a deterministic solver."
        )
    return solver, knots


def _calls(nfe: Any, per_call: int) -> int:
    """Calls of the reverse within a budget of network evaluations, of which one call may cost several."""
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise ValueError(f"`nfe`, the budget of network calls per sample, must be an int >= 1, got {nfe!r}.")
    if nfe < per_call:
        raise ValueError(f"One call costs {per_call} network evaluations here (guidance), so nfe={nfe} buys none.")
    return nfe // per_call


def _run(
    rev: Any,
    x: Tensor,
    solver: Solver,
    knots: tuple[Knot, ...],
    grid: GridLike,
    draw: Draw,
    condition: Mapping[str, Any] | None,
    project: Project | None,
    callback: Callback | None,
    trajectory: bool,
    strict: bool,
    differentiable: bool,
    check: bool,
    progress: bool,
) -> Solution:
    if condition is not None and not isinstance(condition, Mapping):
        raise TypeError(f"`condition` must be a mapping of the network's arguments, got {type(condition).__name__}.")
    for name, hook in (("project", project), ("callback", callback)):
        if hook is not None and not callable(hook):
            raise TypeError(f"`{name}` must be a function, got {type(hook).__name__}.")
    if condition:
        rev = rev.given(**condition)
    hooks = Hooks(project, callback, trajectory)
    if check:  # a replay starts where this run does, after the prior
        draw.begin()
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        if progress:
            with Bar(_expected(rev, solver, knots)) as bar:
                outcome = solver.run(Ticking(rev, bar), x, knots, draw, hooks)
        else:
            outcome = solver.run(rev, x, knots, draw, hooks)
        status = _status(outcome, check)
        message = outcome.message
        if check and not message and bool((status != Status.OK).any()):
            message = _explain(rev, x, solver, knots, draw, project)
    if message:
        if strict:
            raise SolverError(message)
        warnings.warn(f"{type(solver).__name__}: {message}", RuntimeWarning, stacklevel=3)
    calls = outcome.calls
    nfe = calls if isinstance(calls, Tensor) else torch.full((len(x),), calls, dtype=torch.int64)
    return Solution(
        x=outcome.x,
        nfe=nfe * rev.nfe_per_call,
        times=torch.tensor([float(k.t) for k in knots], dtype=torch.float64),
        trajectory=torch.stack(outcome.trajectory) if trajectory else None,
        status=status,
        solver=solver,
        grid=default_grid(rev.law) if grid is None else grid,
        stats=outcome.stats,
        message=message,
    )


def _expected(rev: Reverse, solver: Solver, knots: tuple[Knot, ...]) -> int | None:
    """Network calls of a run, where the solver can tell."""
    if solver.adaptive:
        return None
    steps = len(knots) - 1 - knots[-1].is_data
    return rev.nfe_per_call * (solver.nfe(steps, "denoise" if knots[-1].is_data else "stop") if steps else 1)


def _status(outcome: Outcome, check: bool) -> Tensor:
    """The one check of a run: a single look at the final state."""
    status = torch.zeros(len(outcome.x), dtype=torch.int64) if outcome.status is None else outcome.status
    if not check:
        return status
    finite = torch.isfinite(outcome.x.detach()).reshape(len(outcome.x), -1).all(1).cpu()
    return torch.where(finite, status, int(Status.NON_FINITE))


def _explain(
    rev: Any, x: Tensor, solver: Solver, knots: tuple[Knot, ...], draw: Draw, project: Project | None
) -> str:
    """Replay the run on the same noise, checking every quantity, to name the first that is not finite."""
    try:
        solver.run(rev, x, knots, draw.restart(), Hooks(project=project, check=True))
    except SolverError as error:
        return str(error)
    return "the final state is not finite, and a replay on the same noise did not reproduce it"
