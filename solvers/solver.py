"""What a solver is: a small frozen dataclass with one `step`, and the records that a run leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sde_lib import Knot, Law, Prediction, ReverseSDE, Wrapper
from sde_lib.chain import NO_TIME
from solvers.noise import Draw
from solvers.words import describe, describe_grid

Past = tuple[tuple[Knot, Prediction], ...]
"""Earlier (knot, prediction) pairs, oldest first. A last entry at the step's own knot is a prediction made ahead."""


class Step(NamedTuple):
    """What one step returns.

    Attributes:
        x: state at the new knot, (B, *D).
        prediction: the prediction at the knot the step started from (None where there was none).
        past: what the next step may read. A last entry at the new knot is a prediction already made there, which the
            next step need not ask for again.
    """

    x: Tensor
    prediction: Prediction | None = None
    past: Past = ()


def made_ahead(past: Past, t: Knot) -> Prediction | None:
    """The prediction at the knot `t` if the step before has already made it."""
    return past[-1][1] if past and past[-1][0] is t else None


def without_ahead(past: Past, t: Knot) -> Past:
    """`past` without a prediction at the knot `t`: the state there has been moved since."""
    return past[:-1] if past and past[-1][0] is t else past


class StepInfo(NamedTuple):
    """What a callback sees after each step: step number (from 0) and total, the knots, the new state."""

    step: int
    steps: int
    t: Knot
    s: Knot
    x: Tensor
    prediction: Prediction | None


Project = Callable[[Tensor, Knot, Draw], Tensor]
Callback = Callable[[StepInfo], None]


class Status(IntEnum):
    """How a sample ended."""

    OK = 0
    NON_FINITE = 1
    MAX_STEPS = 2
    STEP_TOO_SMALL = 3
    NOT_CONVERGED = 4

    @property
    def sentence(self) -> str:
        """What happened and what to do."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.OK: "solved",
    Status.NON_FINITE: "the state or a network output is not finite; check the model at the reported time",
    Status.MAX_STEPS: "max_steps reached; raise it, or loosen the tolerance",
    Status.STEP_TOO_SMALL: "the step size fell below the resolution of time; the model may be discontinuous there",
    Status.NOT_CONVERGED: "the error bar of the discretisation is longer than it may be; take more steps, or the "
    "adaptive integration (tol=…) with a tolerance that can be reached",
}


class SolverError(ArithmeticError):
    """A run failed numerically; raised under ``strict=True``."""


@dataclass(repr=False)
class Solution:
    """The record of a run.

    Attributes:
        x: final state, (B, *D).
        nfe: network calls per sample, guidance included, int64 (B,) on the CPU.
        times: times of the knots, float64 (K + 1,); the data end counts as 0.
        trajectory: states at the knots, (K + 1, B, *D), if asked for.
        status: `Status` per sample, int64 (B,) on the CPU.
        solver: the solver as it ran.
        grid: the grid as it was given, or the default one.
        stats: counters of the method (steps, accepted, rejected …).
        message: what went wrong and where; empty if nothing did.
    """

    x: Tensor
    nfe: Tensor
    times: Tensor
    trajectory: Tensor | None
    status: Tensor
    solver: Solver | None = None
    grid: Any = None
    stats: dict[str, Any] = field(default_factory=dict)
    message: str = ""

    def __repr__(self) -> str:
        low, high = int(self.nfe.min()), int(self.nfe.max())
        calls = f"{low}" if low == high else f"{low} to {high}"
        solved = int((self.status == Status.OK).sum())
        lines = [
            f"{len(self.x)} samples of shape {tuple(self.x.shape[1:])}, {str(self.x.dtype).removeprefix('torch.')} on "
            f"{self.x.device}: {'all' if solved == len(self.x) else solved} solved",
            f"  by {describe(self.solver)} on {describe_grid(self.grid)}, "
            f"t = {float(self.times[0]):.4g} to {float(self.times[-1]):.4g}",
            f"  {calls} network calls per sample",
        ]
        if self.trajectory is not None:
            lines.append(f"  states at {len(self.trajectory)} times in `trajectory`")
        if self.message:
            lines.append(f"  {self.message}")
        return "\n".join(lines)

    @property
    def ok(self) -> bool:
        """Whether every sample was solved."""
        return bool((self.status == Status.OK).all())


@dataclass
class Outcome:
    """What `Solver.run` hands back to the driver."""

    x: Tensor
    calls: int | Tensor
    trajectory: list[Tensor]
    status: Tensor | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    message: str = ""


@dataclass
class Hooks:
    """What a caller may attach to a run."""

    project: Project | None = None
    callback: Callback | None = None
    trajectory: bool = False
    check: bool = False

    def refuse(self, solver: Solver) -> None:
        """Raise if hooks between steps are asked of a solver that hides its steps."""
        if self.project is not None or self.callback is not None:
            raise ValueError(
                f"{type(solver).__name__} does not step between knots of its own: `project` and `callback` need a "
                "fixed-step solver."
            )


class Counted(Wrapper):
    """Counts the calls, of its copies too.

    Args:
        inner: what is called.
        check: raise SolverError at the first output that is not finite.
    """

    def __init__(self, inner: ReverseSDE, check: bool = False) -> None:
        super().__init__(inner)
        self.check, self._tally = check, Tally()

    @property
    def calls(self) -> int:
        """Calls so far."""
        return self._tally.calls

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        self._tally.calls += 1
        prediction = self.inner(x, t)
        if self.check:
            check_finite(prediction.raw, "the network's output", prediction.knot)
        return prediction


@dataclass
class Tally:
    """A count that copies share."""

    calls: int = 0


def check_finite(x: Tensor, what: str, knot: Knot) -> None:
    """Raise SolverError if x is not finite; part of the checked replay, never of a normal run."""
    bad = ~torch.isfinite(x).flatten(1).all(1) if x.ndim > 1 else ~torch.isfinite(x)
    if bool(bad.any()):
        rows = bad.nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:5])) + (" …" if len(rows) > 5 else "")
        where = f"at t = {knot.t:.6g} for {len(rows)} of {len(x)} samples (rows {shown})"
        raise SolverError(f"{what} is not finite {where}")


@dataclass(frozen=True)
class Solver:
    """Base of all solvers. A subclass states its class attributes and `step`; the driver does the rest."""

    order: ClassVar[int] = 1
    """Order of convergence: global for deterministic solvers, weak for stochastic ones. 0: not consistent in steps."""
    nfe_per_step: ClassVar[int] = 1
    """Network calls of one step on its own."""
    nfe_to_start: ClassVar[int] = 0
    """Additional calls of the first step, for methods that read earlier predictions."""
    shares_calls: ClassVar[bool] = False
    """Whether a step ends in a call at its new knot, which the next step, or the end, does not repeat."""
    needs_drift: ClassVar[bool] = False
    """Whether f and g of the SDE are used, so that runs start where they are finite."""
    needs_time: ClassVar[bool] = False
    """Whether the solver goes between the knots, or uses f and g: what a chain, which has levels only, cannot give."""
    adaptive: ClassVar[bool] = False
    """Whether the solver chooses its own steps; the grid then says where the solution is reported."""

    @property
    def needs_steps(self) -> bool:
        """Whether a run must be told its number of steps (or its times)."""
        return not self.adaptive

    @property
    def stochastic(self) -> bool:
        """Whether the solver draws noise."""
        return False

    @property
    def batch_coupled(self) -> bool:
        """Whether a sample's result depends on its batch mates."""
        return False

    def nfe(self, steps: int, end: str = "stop") -> int:
        """Network calls per sample of `steps` intervals; "denoise" adds the posterior mean at the end."""
        if self.shares_calls:
            return self.nfe_to_start + steps * (self.nfe_per_step - 1) + 1
        return self.nfe_to_start + steps * self.nfe_per_step + (end == "denoise")

    def steps_for(self, nfe: int, end: str = "stop") -> int:
        """Largest number of intervals within a budget of network calls.

        Raises:
            ValueError: if not even one step fits.
        """
        first = self.nfe(1, end)
        if nfe < first:
            raise ValueError(f"{type(self).__name__} needs at least {first} network calls, got nfe={nfe}.")
        return 1 + (nfe - first) // (self.nfe(2, end) - first)

    def within(self, nfe: int, end: str = "stop") -> tuple[Solver, int]:
        """The solver and the number of intervals for a budget of network calls; a method may fit its steps to it."""
        return self, self.steps_for(nfe, end)

    def on(self, law: Law) -> Solver:
        """The solver as it runs on a law, itself for most: a chain has no times between its levels.

        Raises:
            ValueError: if it cannot run there.
        """
        if self.needs_time and not law.has_time:
            raise ValueError(f"{type(self).__name__} needs more than the levels of a chain. {NO_TIME}")
        return self

    def bind(self, knots: Sequence[Knot]) -> Solver:
        """The solver for one grid: where per-grid constants are worked out. Itself for most."""
        return self

    def step(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, past: Past, draw: Draw) -> Step:
        """Advance x from knot `t` to knot `s`."""
        raise NotImplementedError

    def finish(self, rev: ReverseSDE, x: Tensor, t: Knot, s: Knot, past: Past, draw: Draw) -> Step:
        """The step to the data end (sigma = 0): the posterior mean E[x_0 | x_t], whatever the method.

        DDIM, DDPM and Heun's last step (Karras et al. 2022, Algorithm 1) all reduce to it there.
        """
        prediction = made_ahead(past, t) or rev(x, t)
        return Step(prediction.data, prediction)

    def run(self, rev: ReverseSDE, x: Tensor, knots: Sequence[Knot], draw: Draw, hooks: Hooks) -> Outcome:
        """Walk the knots. No host synchronisation: every coefficient is a Python float."""
        solver = self.bind(knots)
        counted = Counted(rev, hooks.check)
        project, callback = hooks.project, hooks.callback
        if hooks.check:
            check_finite(x, "the starting state", knots[0])
        if project is not None:
            x = project(x, knots[0], draw)
        trajectory = [x] if hooks.trajectory else []
        past: Past = ()
        steps = len(knots) - 1
        for i in range(steps):
            t, s = knots[i], knots[i + 1]
            try:
                take = solver.finish if s.is_data else solver.step
                x, prediction, past = take(counted, x, t, s, past, draw)
                if project is not None:
                    x, past = project(x, s, draw), without_ahead(past, s)
                if hooks.check:
                    check_finite(x, "the state", s)
            except SolverError as error:
                raise SolverError(f"step {i + 1} of {steps}: {error}") from None
            if hooks.trajectory:
                trajectory.append(x)
            if callback is not None:
                callback(StepInfo(i, steps, t, s, x, prediction))
            prediction = None  # lets go of this step's tensors before the next one allocates
        return Outcome(x, counted.calls, trajectory, stats={"steps": steps})
