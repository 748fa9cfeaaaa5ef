"""What a likelihood was asked for: options checked at the door, once, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.likelihood.divergence import check_trace_options, is_exact
from scoresde.likelihood.doors import check_density
from scoresde.likelihood.probes import Probes, as_probes
from scoresde.likelihood.words import density
from sde_lib import SDE, ReverseSDE
from sde_lib._checks import check_count, check_positive, check_state
from solvers import Blended, Grid, Multistep, Solver, as_solver
from solvers.noise import Draw

CORRECTIONS = ("truncation", "prior")
STEPS = 32
"""Steps of the fixed grid by default."""
TOLERANCE = 1e-3
"""Tolerance of the adaptive integration by default, in nats: on log p, not per step (see `log_likelihood`)."""
PILOT = 4
"""Estimates per knot that decide how many a target takes: their variance has 3 degrees of freedom or more at every knot
that matters, so that with three such knots the number is at most 1.3 times what it need be."""
KEPT = 6
"""Estimates by probes kept along the path that tell their noise: where one coupling of two elements rules, an estimate
takes one of two values, and K of them agree, at a standard error of 0, in 2^(1 - K) of the cases: 3 % for 6."""


@dataclass(frozen=True)
class FixedSteps:
    """Integration along a grid: the options of `log_likelihood` of these names, decided.

    Attributes:
        solver: as it runs on the law.
        joint: whether the divergence is taken in the calls that the solver makes.
    """

    steps: int
    solver: Solver
    grid: Grid | str
    joint: bool
    batch_rows: int
    target_se: float | None
    differentiable: bool
    check: bool
    keep: bool


@dataclass(frozen=True)
class Adaptive:
    """Integration with steps of each sample's own: the options of `log_likelihood` of these names."""

    tol: float
    max_steps: int


@dataclass(frozen=True)
class Settings:
    """What both integrations share: the options of `log_likelihood` of these names, decided.

    Attributes:
        law: of the reverse SDE.
        exact: whether the trace is.
        way: how the ODE is integrated.
    """

    law: SDE
    way: FixedSteps | Adaptive
    probes: Probes
    num_probes: int
    exact: bool
    doubling: bool
    correct: tuple[str, ...]
    prior: Callable[[Tensor], Tensor] | None
    sigma_data: float
    chunk: int
    tf32: bool

    @classmethod
    def of(cls, rev: Any, x: Any, given: Mapping[str, Any]) -> Settings:
        """The settings for states x, (B, *D), or an error that says what to change.

        Args:
            rev, x: as they were handed to `log_likelihood`.
            given: its options by their names.
        """
        law = _law(rev, x, given["check"])
        asked = given["num_probes"]
        check_trace_options(given["divergence"], 1 if asked is None else asked, given["chunk"])
        _check_correct(given["correct"])
        for name in ("batch_rows", "max_steps"):
            check_count(name, given[name])
        if given["prior"] is not None and not callable(given["prior"]):
            raise TypeError(
                f"`prior` must be a function, latents (B, *D) -> log density (B,), or None, got {given['prior']!r}."
            )
        check_positive("sigma_data", given["sigma_data"])
        exact = is_exact(given["divergence"], x.shape[1:])
        way = _way(law, exact, given)
        usual = KEPT if isinstance(way, Adaptive) else 2 if way.target_se is None else PILOT
        kept = {name: given[name] for name in ("doubling", "prior", "sigma_data", "chunk", "tf32")}
        probes = as_probes(given["probes"], x.shape[1:])
        num_probes = usual if asked is None else asked
        correct = tuple(given["correct"])
        return cls(law, way, probes=probes, num_probes=num_probes, exact=exact, correct=correct, **kept)

    @property
    def splits(self) -> tuple[int, ...]:
        """Of the estimates at a knot: the pilot, and those after it."""
        if self.exact:
            return ()
        pilot = min(self.num_probes, PILOT)
        return (pilot, self.num_probes - pilot) if self.num_probes > pilot else (pilot,)

    @property
    def what(self) -> str:
        """What log p is the logarithm of."""
        return density(self.law.t_min, "truncation" in self.correct, "prior" in self.correct or self.prior is not None)

    def group(self, draw: Draw, *key: Any) -> Sequence[Tensor]:
        """The vectors of one estimate."""
        return self.probes.group(draw.normal(*key))

    def products(self, shape: Sequence[int], estimates: int) -> int:
        """Vector-Jacobian products of one evaluation with so many estimates."""
        return math.prod(shape) if self.exact else estimates * self.probes.size(shape)

    def log_prior(self, latent: Tensor) -> Tensor:
        """Log density of latents under the prior, (B,), float64."""
        if self.prior is None:
            return self.law.prior_logp(latent.double()).double()
        found = self.prior(latent.double())
        if not isinstance(found, Tensor) or found.shape != latent.shape[:1]:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"`prior` must return log densities, a tensor of shape ({len(latent)},), got {got}.")
        return found.double()


def _law(rev: Any, x: Any, check: bool) -> SDE:
    if not isinstance(rev, ReverseSDE):
        raise TypeError(f"`rev` must be a ReverseSDE (model.reverse()), got {type(rev).__name__}.")
    check_density("log_likelihood", rev)
    if not isinstance(rev.law, SDE):
        raise ValueError(
            "A likelihood through the ODE needs continuous time; this model lives on a chain. Go on between its"
            " levels with chain.continuous(), or take the chain's own bound: elbo()."
        )
    check_state("x", x)
    if check and not bool(torch.isfinite(x).all()):
        raise ValueError("`x` contains NaN or infinite values.")
    return rev.law


def _check_correct(correct: Any) -> None:
    if isinstance(correct, str) or not isinstance(correct, Collection) or any(c not in CORRECTIONS for c in correct):
        raise ValueError(f"`correct` must be a collection of {', '.join(CORRECTIONS)}, got {correct!r}.")


def _way(law: SDE, exact: bool, given: Mapping[str, Any]) -> FixedSteps | Adaptive:
    """Fixed steps or adaptive ones, as options say or, where they do not, by what the trace is."""
    steps, tol, differentiable, check = (given[name] for name in ("steps", "tol", "differentiable", "check"))
    if steps is not None and tol is not None:
        raise ValueError(f"Give `steps` (a fixed grid) or `tol` (adaptive), not both; got {steps} and {tol}.")
    if tol is not None or (steps is None and exact and not differentiable and check):
        for name in ("target_se", "solver", "grid", "joint"):
            if given[name] is not None:
                raise ValueError(f"`{name}` needs fixed steps: give steps=… instead of tol.")
        if differentiable or not check:
            raise ValueError("`differentiable` and check=False need fixed steps: give steps=… instead of tol.")
        tol = TOLERANCE if tol is None else tol
        check_positive("tol", tol)
        return Adaptive(tol, given["max_steps"])
    return _fixed_steps(law, STEPS if steps is None else steps, given)


def _fixed_steps(law: SDE, steps: Any, given: Mapping[str, Any]) -> FixedSteps:
    kept = {name: given[name] for name in ("batch_rows", "target_se", "differentiable", "check", "keep")}
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 4 or (given["doubling"] and steps % 4):
        raise ValueError(f"`steps` must be a multiple of 4 (an int >= 4 without doubling), got {steps!r}.")
    if kept["target_se"] is not None:
        check_positive("target_se", kept["target_se"])
        if kept["differentiable"] or not kept["check"]:
            raise ValueError("`target_se` looks at the results: it does not go with `differentiable` or check=False.")
    solver = as_solver(given["solver"] or Multistep(4, 5, prediction="flow", starter="ramp")).on(law)
    if solver.stochastic or solver.adaptive:
        raise ValueError(f"The trajectory needs a deterministic solver with fixed steps, got {solver}.")
    grid = Blended(mix=0.15, sigma_data=given["sigma_data"]) if given["grid"] is None else given["grid"]
    calls_at_knots = solver.nfe_per_step - solver.shares_calls == 1
    if given["joint"] and not calls_at_knots:
        raise ValueError(f"{type(solver).__name__} calls the network between the knots too: use joint=False.")
    joint = calls_at_knots if given["joint"] is None else given["joint"]
    return FixedSteps(steps=steps, solver=solver, grid=grid, joint=joint, **kept)
