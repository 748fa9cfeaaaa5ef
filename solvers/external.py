"""torchdiffeq, torchsde and SciPy as solvers of their own: real alternatives, and cross-checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sde_lib import Knot, ReverseSDE, lookup
from sde_lib._checks import check_positive
from solvers.coordinates import Coordinate
from solvers.noise import Draw
from solvers.runge_kutta import as_coordinate, rescale
from solvers.solver import Counted, Hooks, Outcome, Solver, SolverError, Status, check_finite


class LibraryError(SolverError):
    """The library's own word for a run it could not finish."""


@dataclass(frozen=True)
class External(Solver):
    """Base: the library walks from the first knot to the last; the others say where the solution is reported."""

    order: ClassVar[int] = 0
    adaptive: ClassVar[bool] = True
    needs_time: ClassVar[bool] = True

    def nfe(self, steps: int, end: str = "stop") -> int:
        raise ValueError(f"{type(self).__name__} counts its own steps: read the calls from Solution.nfe.")

    def steps_for(self, nfe: int, end: str = "stop") -> int:
        raise ValueError(f"{type(self).__name__} counts its own steps: pass `steps` or tolerances instead of `nfe`.")

    def solve_between(self, rev: Counted, x: Tensor, knots: Sequence[Knot], draw: Draw) -> list[Tensor]:
        """States at the knots after the first."""
        raise NotImplementedError

    def run(self, rev: ReverseSDE, x: Tensor, knots: Sequence[Knot], draw: Draw, hooks: Hooks) -> Outcome:
        hooks.refuse(self)
        counted = Counted(rev, check=True)  # the libraries wait for the host anyway, and answer NaN each in its own way
        noisy = [k for k in knots if not k.is_data]
        try:
            check_finite(x, "the starting state", knots[0])
            states = [x, *self.solve_between(counted, x, noisy, draw)] if len(noisy) > 1 else [x]
            if knots[-1].is_data:
                states.append(counted(states[-1], noisy[-1]).data)
        except LibraryError as error:
            return self._failed(x, counted.calls, knots, hooks, Status.STEP_TOO_SMALL, str(error))
        except SolverError as error:
            return self._failed(x, counted.calls, knots, hooks, Status.NON_FINITE, str(error))
        return Outcome(states[-1], counted.calls, states if hooks.trajectory else [])

    def _failed(
        self, x: Tensor, calls: int, knots: Sequence[Knot], hooks: Hooks, code: Status, message: str
    ) -> Outcome:
        """The library gave up on the whole batch."""
        nothing = torch.full_like(x, torch.nan)
        status = torch.full((len(x),), int(code), dtype=torch.int64)
        return Outcome(nothing, calls, [nothing] * len(knots) if hooks.trajectory else [], status, {}, message)


def _flow(rev: Counted, coordinate: Coordinate, low: float, high: float) -> Callable[[float, Tensor], Tensor]:
    """Slope of the probability-flow ODE at a float u, held inside the interval of the run."""

    def slope(u: float, y: Tensor) -> Tensor:
        knot = coordinate.knot(rev.law, min(max(u, low), high))
        return rev(rescale(y, coordinate.scale(knot)), knot).mix(*coordinate.slope(knot))

    return slope


@dataclass(frozen=True)
class FlowLibrary(External):
    """Base of the ODE wrappers.

    Args:
        method: the library's name of the method.
        rtol: relative tolerance of adaptive methods.
        atol: absolute tolerance of adaptive methods.
        coordinate: where the ODE is integrated.
    """

    method: str = ""
    rtol: float = 1e-5
    atol: float = 1e-5
    coordinate: Coordinate | str = "time"
    methods: ClassVar[tuple[str, ...]] = ()
    _coordinate: Coordinate = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(self.methods), self.method, f"{type(self).__name__} method")
        check_positive("rtol", self.rtol)
        check_positive("atol", self.atol)
        object.__setattr__(self, "_coordinate", as_coordinate(self.coordinate))

    @property
    def needs_drift(self) -> bool:  # type: ignore[override]
        return self._coordinate.needs_drift

    def solve_between(self, rev: Counted, x: Tensor, knots: Sequence[Knot], draw: Draw) -> list[Tensor]:
        us = [float(self._coordinate.of(k)) for k in knots]
        y = rescale(x, 1.0 / self._coordinate.scale(knots[0]))
        states = self.integrate(_flow(rev, self._coordinate, min(us), max(us)), y, us)
        return [rescale(v, self._coordinate.scale(k)) for v, k in zip(states, knots[1:], strict=True)]

    def integrate(self, slope: Callable[[float, Tensor], Tensor], y: Tensor, us: list[float]) -> list[Tensor]:
        """States at us[1:]."""
        raise NotImplementedError


FIXED = ("euler", "midpoint", "rk4", "heun2", "heun3", "explicit_adams", "implicit_adams", "fixed_adams")


@dataclass(frozen=True)
class TorchDiffEq(FlowLibrary):
    """`torchdiffeq.odeint` on the probability-flow ODE.

    Adaptive methods share one step size, so a sample depends on its batch mates; they are told to step exactly onto
    the end (left alone they pass it and interpolate back, outside the domain of the model). Fixed-step methods walk
    the grid.

    Args:
        method: "dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2", or a fixed-step one ("euler", "midpoint",
            "rk4", "heun2", "heun3", …).
        rtol: relative tolerance of adaptive methods.
        atol: absolute tolerance of adaptive methods.
        coordinate: where the ODE is integrated.
    """

    method: str = "dopri5"
    methods: ClassVar[tuple[str, ...]] = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", *FIXED)

    @property
    def needs_steps(self) -> bool:
        """A fixed-step method walks the grid it is given."""
        return self.method in FIXED

    @property
    def batch_coupled(self) -> bool:
        return self.method not in FIXED

    def integrate(self, slope: Callable[[float, Tensor], Tensor], y: Tensor, us: list[float]) -> list[Tensor]:
        from torchdiffeq import odeint

        u = torch.tensor(us, dtype=torch.float64, device=y.device)
        options: dict[str, Any] = {} if self.method in FIXED else {"step_t": u[1:]}
        try:
            states = odeint(
                lambda at, state: slope(float(at), state),
                y,
                u,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options=options or None,
            )
        except AssertionError as error:  # "underflow in dt": its way to say that no step is small enough
            raise LibraryError(f"torchdiffeq failed: {error}; loosen rtol and atol") from error
        return list(states[1:])


@dataclass(frozen=True)
class SciPyODE(FlowLibrary):
    """`scipy.integrate.solve_ivp` on the probability-flow ODE, the whole batch as one float64 vector on the host.

    What the published likelihood and ODE samplers of Song et al. 2021 use (RK45, 1e-5). One error norm for the batch,
    so a sample depends on its batch mates.

    Args:
        method: "RK45", "RK23", "DOP853", "LSODA", "Radau" or "BDF".
        rtol: relative tolerance.
        atol: absolute tolerance.
        coordinate: where the ODE is integrated.
    """

    method: str = "RK45"
    methods: ClassVar[tuple[str, ...]] = ("RK45", "RK23", "DOP853", "LSODA", "Radau", "BDF")

    @property
    def batch_coupled(self) -> bool:
        return True

    def integrate(self, slope: Callable[[float, Tensor], Tensor], y: Tensor, us: list[float]) -> list[Tensor]:
        from scipy.integrate import solve_ivp

        def flat(u: float, state: np.ndarray) -> np.ndarray:
            tensor = torch.from_numpy(state).to(y).reshape(y.shape)
            return slope(float(u), tensor).double().cpu().numpy().reshape(-1)

        start = y.double().cpu().numpy().reshape(-1)
        result = solve_ivp(flat, (us[0], us[-1]), start, method=self.method, t_eval=us, rtol=self.rtol, atol=self.atol)
        if not result.success:
            raise LibraryError(f"scipy.integrate.solve_ivp failed: {result.message}")
        return [torch.from_numpy(column.copy()).to(y).reshape(y.shape) for column in result.y.T[1:]]


_ITO = ("euler", "milstein", "srk")
_STRATONOVICH = ("midpoint", "heun", "euler_heun", "log_ode", "reversible_heun")


@dataclass(frozen=True)
class TorchSDE(External):
    """`torchsde.sdeint` on the reverse SDE, along the steps of any grid.

    torchsde takes equal steps, so the SDE is run in a clock u of which every interval of the grid is one unit: drift
    and squared diffusion are those of the reverse SDE times -dt/du. t(u) is linear between the knots for "euler" and
    "milstein", whose steps are then those of `EulerMaruyama` on the same grid, and SciPy's monotone cubic (PCHIP) for
    methods that also look at the end of a step. The noise is a `BrownianInterval` seeded from this run's `rng` (left
    alone, torchsde takes its seed from NumPy), one seed for the whole batch. The diffusion does not depend on x, so
    Ito and Stratonovich methods solve the same SDE.

    Args:
        method: "euler", "milstein", "srk" (Ito); "midpoint", "heun", "euler_heun" (Stratonovich).
        adaptive_steps: let torchsde adapt one step size for the batch, with `rtol` and `atol`.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """

    method: str = "euler"
    adaptive_steps: bool = False
    rtol: float = 1e-3
    atol: float = 1e-3
    needs_drift: ClassVar[bool] = True

    def __post_init__(self) -> None:
        lookup(dict.fromkeys((*_ITO, *_STRATONOVICH)), self.method, "TorchSDE method")
        check_positive("rtol", self.rtol)
        check_positive("atol", self.atol)

    @property
    def needs_steps(self) -> bool:
        """Fixed steps are those of the grid."""
        return not self.adaptive_steps

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def batch_coupled(self) -> bool:
        return True

    def solve_between(self, rev: Counted, x: Tensor, knots: Sequence[Knot], draw: Draw) -> list[Tensor]:
        import torchsde

        steps = len(knots) - 1
        system = _ReverseSystem(rev, x, [float(k.t) for k in knots], self.method)
        path = torchsde.BrownianInterval(
            t0=0.0,
            t1=float(steps),
            size=(x.shape[0], x[0].numel()),
            dtype=x.dtype,
            device=x.device,
            entropy=draw.integer() % 2**31,
            dt=1.0,
            levy_area_approximation="space-time" if self.method in ("srk", "log_ode") else "none",
        )
        states = torchsde.sdeint(
            system,
            x.reshape(len(x), -1),
            torch.arange(steps + 1, dtype=torch.float64, device=x.device),
            bm=path,
            method=self.method,
            dt=1.0 + 1e-9,  # round-off must not leave a sliver of a step; the last one is clipped
            adaptive=self.adaptive_steps,
            rtol=self.rtol,
            atol=self.atol,
        )
        return [state.reshape(x.shape) for state in states[1:]]


class _ReverseSystem(nn.Module):
    """The reverse SDE in the form torchsde reads: flat states, an increasing clock, diagonal noise."""

    noise_type = "diagonal"

    def __init__(self, rev: ReverseSDE, x: Tensor, times: Sequence[float], method: str) -> None:
        from scipy.interpolate import PchipInterpolator, make_interp_spline

        super().__init__()
        self.sde_type = "stratonovich" if method in _STRATONOVICH else "ito"
        self.rev, self.shape = rev, x.shape
        self.first, self.last, self.steps = times[0], times[-1], len(times) - 1
        linear = method in ("euler", "milstein")
        clock = range(len(times))
        self.time = make_interp_spline(clock, times, k=1) if linear else PchipInterpolator(clock, times)
        self.rate = self.time.derivative()

    def _at(self, clock: Any) -> tuple[Knot, float]:
        """The knot at a reading of the clock, and -dt/du there."""
        u = min(max(float(clock), 0.0), float(self.steps))
        t = min(max(float(self.time(u)), self.last), self.first)
        return self.rev.law.knot(t), -float(self.rate(u))

    def f(self, clock: Any, y: Tensor) -> Tensor:
        knot, rate = self._at(clock)
        return -rate * self.rev(y.reshape(-1, *self.shape[1:]), knot).drift.reshape(y.shape)

    def g(self, clock: Any, y: Tensor) -> Tensor:
        knot, rate = self._at(clock)
        return torch.full_like(y, (rate * float(knot.g2)) ** 0.5)
