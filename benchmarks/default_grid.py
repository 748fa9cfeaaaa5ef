"""The default grid beside the best named one, for common solvers at common budgets, on every SDE.

    python benchmarks/default_grid.py

Root mean square and median distance to the solution, in units of the data, of 400 samples of a mixture of three
Gaussians in two dimensions (standard deviations 0.1 to 0.3), whose score is exact. For each solver and SDE: the error
on the default grid (`Blended`), on the best of all named grids, and on equal steps in time, with the ratios.
"""

from __future__ import annotations

import argparse

import torch

from sde_lib import SDES, VPSDE, GaussianMixture, TabulatedSDE
from solvers import DDIM, GRIDS, AdaptiveRungeKutta, Blended, DPMpp2M, Heun, Multistep, Solver, make_knots, solve

SPOTS = GaussianMixture([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.0]], std=[0.1, 0.2, 0.3])
BUDGETS: tuple[tuple[Solver, int], ...] = ((Heun(), 35), (DPMpp2M(), 20), (DDIM(), 37))


def truth(rev, x: torch.Tensor, start: float) -> torch.Tensor:
    """The solution from a start, to about 1e-8, and the posterior mean at its end."""
    law = rev.law
    if start <= law.drift_t_max:
        fine = Multistep(5, 6, prediction="flow", starter="ramp")
        return solve(rev, x, fine, steps=300, grid=Blended(t_start=start), end="denoise").x
    fine = AdaptiveRungeKutta(rtol=1e-9, atol=1e-9, coordinate="angle")
    return solve(rev, x, fine, grid=[start, law.t_min], end="denoise").x


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("SDE        solver   calls  default   best of all grids            uniform_time      median: default, best")
    for name in SDES:
        sde = TabulatedSDE(VPSDE().discretize(1000).alphas_cumprod) if name == "tabulated" else SDES[name]()
        rev = SPOTS.reverse(sde)
        x = sde.prior_std * torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        known: dict[float, torch.Tensor] = {}
        for solver, nfe in BUDGETS:
            rms, median = {}, {}
            for grid in (None, *GRIDS):
                steps = solver.steps_for(nfe, "denoise")
                knots = make_knots(sde, grid, steps, "denoise", solver.needs_drift)
                start = float(knots[0].t)
                known.setdefault(start, truth(rev, x, start))
                gap = (solve(rev, x, solver, grid=knots).x - known[start]).norm(dim=1)
                rms[grid], median[grid] = float(gap.square().mean().sqrt()), float(gap.median())
            best = min(rms, key=lambda g: rms[g] if g else float("inf"))
            nearest = min(median, key=lambda g: median[g] if g else float("inf"))
            print(
                f"{name:10s} {type(solver).__name__:8s} {nfe:4d}  {rms[None]:.2e}  "
                f"{rms[best]:.2e} {best:12s} (x {rms[None] / rms[best]:.2f})  "
                f"{rms['uniform_time']:.2e} (x {rms['uniform_time'] / rms[None]:5.1f})  "
                f"{median[None]:.2e} {median[nearest]:.2e} {nearest} (x {median[None] / median[nearest]:.2f})"
            )


if __name__ == "__main__":
    main()
