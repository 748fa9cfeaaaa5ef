"""Error in law of the stochastic solvers, beside other libraries.

    python benchmarks/weak_error.py                    # ours
    python benchmarks/weak_error.py --peers=PYTHON     # and diffusers, k-diffusion, azula, run by that interpreter
    python benchmarks/weak_error.py --golden=DIR       # the 16-d mixture of DIR/mixture16.npz

First the relative error of the variance on Gaussian data N(0.7, 0.5^2), without Monte Carlo: there a run is an affine
map of the start and of every draw, which impulses measure (a batch of zero state and noise, a unit state, and a unit
draw for each), and so its law is known. Then, by Monte Carlo, samples of a 16-d mixture: how often each component is
hit, and with which variance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import GRIDS, Problem, ask_peers, levels, mixture_arrays, number, random_mixture
from torch import Tensor

import solvers
from sde_lib import VPSDE, GaussianMixture, Knot
from solvers import Draw, Noise, Solver, make_knots, solve

STEPS = (10, 20, 40, 80, 160)
BUDGETS = (10, 20, 40, 80)
GAUSSIAN_GRIDS = ("uniform_half_log_snr", "uniform_time")
SAMPLES = 10_000

SOLVERS: dict[str, Solver] = {
    "Euler-Maruyama": solvers.EulerMaruyama(),
    "reverse diffusion": solvers.ReverseDiffusion(),
    "ancestral": solvers.Ancestral(),
    "ancestral, large variance": solvers.Ancestral(variance="large"),
    "ER-SDE-1": solvers.ERSDE(),
    "Heun, churn 40": solvers.Heun(s_churn=40.0),
    "DPM++ SDE": solvers.DPMppSDE(),
    "SEEDS-2": solvers.SEEDS2(),
    "SDE-DPM++ 2M": solvers.SDEDPMpp2M(),
    "SDE-DPM++ 2M, midpoint": solvers.SDEDPMpp2M(midpoint=True),
    "SDE-DPM++ 3M": solvers.SDEDPMpp3M(),
    "SDE-DPM++ 3M, as published": solvers.SDEDPMpp3M(half_d2=True),
    "SA-Solver p2c2": solvers.SASolver(predictor=2, corrector=2),
    "SA-Solver p3c3": solvers.SASolver(),
    "SA-Solver p3c3, noise_ratio": solvers.SASolver(variable="noise_ratio"),
}


# --- the Gaussian, exactly --------------------------------------------------------------------------------------------
class Impulses(Noise):
    """The k-th draw of a run is one unit, in row k + 2. Without rows it is nothing, and draws are counted."""

    def __init__(self, rows: int = 0) -> None:
        self.rows, self.count = rows, 0

    def bind(self, x: Tensor) -> Draw:
        return _Impulse(self, x)


class _Impulse(Draw):
    def __init__(self, source: Impulses, x: Tensor) -> None:
        self.source, self.like = source, x

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        return self.normal()

    def normal(self, *key: Any) -> Tensor:
        z = torch.zeros_like(self.like)
        if self.source.rows:
            z[self.source.count + 2] = 1.0
        self.source.count += 1
        return z

    def integer(self) -> int:
        return 0

    def restart(self) -> Draw:
        return self


def variance_error(data: GaussianMixture, sde: VPSDE, solver: Solver, grid: str, steps: int) -> float:
    """Relative error of the variance at t_min, from the exact law at the first knot."""
    knots = make_knots(sde, grid, steps, needs_drift=True)
    rev = data.reverse(sde)
    counting = Impulses()
    solve(rev, torch.zeros(2, 1, dtype=torch.float64), solver, grid=knots, rng=counting)
    x = torch.zeros(counting.count + 2, 1, dtype=torch.float64)
    x[1] = 1.0
    end = solve(rev, x, solver, grid=knots, rng=Impulses(len(x))).x[:, 0]
    responses = end[1:] - end[0]

    def variance(k: Knot) -> float:
        return float(k.alpha) ** 2 * float(data.covariance) + float(k.sigma) ** 2

    got = float(responses[0]) ** 2 * variance(knots[0]) + float(responses[1:].square().sum())
    return got / variance(knots[-1]) - 1.0


def show_gaussian(mine: Mapping[str, float], theirs: Mapping[str, float]) -> None:
    print("\n### Relative error of the variance, exact\n")
    print("| method | " + " | ".join(f"{n} steps" for n in STEPS) + " | order | uniform in time: 10 | 40 | 160 |")
    print("|---" * (len(STEPS) + 5) + "|")
    for title, found in (("peers", theirs), ("ours", mine)):
        if found:
            print(f"| *{title}* |" + " |" * (len(STEPS) + 4))
        for name in dict.fromkeys(key.split("/")[0] for key in found):
            row = [found[f"{name}/{GAUSSIAN_GRIDS[0]}/{n}"] for n in STEPS]
            time = [found[f"{name}/{GAUSSIAN_GRIDS[1]}/{n}"] for n in (10, 40, 160)]
            order = math.log2(abs(row[-2] / row[-1])) if row[-1] else math.nan
            shown = [signed(v) for v in row] + [f"{order:.1f}"] + [signed(v) for v in time]
            print(f"| {name} | " + " | ".join(shown) + " |")
    print("\nUniform in lambda, and three columns uniform in time; VP, t from 1 to 1e-3, no denoising step.")


def signed(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return number(value) if value >= 10 else ("+" if value > 0 else "-") + number(abs(value))


# --- the mixture, by samples ------------------------------------------------------------------------------------------
Measures = tuple[float, float]
"""Error of the components' variances with the sign of its mean, and total variation of their weights."""


class Sampled:
    """The mixture, starts at the first knot, and what samples at the last knot are measured by. float32."""

    def __init__(self, golden: Path | None) -> None:
        sde = VPSDE()
        if golden is None:
            means, std, weights = random_mixture(0, 10, 16, 0.1, 0.3)
        else:
            with np.load(golden / "mixture16.npz") as f:
                means, std, weights = (torch.from_numpy(f[k]) for k in ("means", "stds", "log_weights"))
            weights = weights.exp()
        empty = torch.empty(0)
        std = std[:, None].expand_as(means)
        self.problem = Problem(means, std, weights / weights.sum(), sde, empty, empty)
        self.sde, self.data = sde, self.problem.data
        self.first, self.last = self.problem.ends
        self.start = self.draw(1, self.first)

    def draw(self, seed: int, knot: Knot) -> Tensor:
        """Exact samples at a knot."""
        g = torch.Generator().manual_seed(seed)
        x = self.data.sample(SAMPLES, g, torch.float64)
        return (knot.alpha * x + knot.sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)).float()

    def measures(self, x: Tensor) -> Measures:
        """Every sample belongs to the component of the largest posterior probability.

        The first number is the mean over components of |variance / exact variance - 1|, the variance being the mean
        square distance from the component's exact mean.
        """
        alpha, sigma = float(self.last.alpha), float(self.last.sigma)
        offset = x.double()[:, None] - alpha * self.problem.means
        variance = alpha**2 * self.problem.std.square() + sigma**2
        scaled = (offset.square() / variance).mean(-1)
        d = x.shape[1]
        log_joint = self.problem.weights.log() - 0.5 * d * scaled - 0.5 * variance.log().sum(-1)
        which = log_joint.argmax(1)
        off = torch.stack([scaled[which == k, k].mean() - 1 for k in range(len(variance))]).nan_to_num(-1.0)
        share = torch.bincount(which, minlength=len(variance)) / len(x)
        error = float(off.abs().mean()) if torch.isfinite(x).all() else math.inf
        return math.copysign(error, float(off.mean())), 0.5 * float((share - self.problem.weights).abs().sum())

    def floor(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the measures of exact samples."""
        found = torch.tensor([self.measures(self.draw(seed, self.last)) for seed in range(2, 12)]).abs()
        return found.mean(0), found.std(0)


def samples_of(sampled: Sampled) -> dict[str, Measures]:
    rev = sampled.data.reverse(sampled.sde)
    found = {}

    def put(name: str, solver: Solver, grid: Any, label: str, nfe: int) -> None:
        fitted, steps = solver.within(nfe)
        knots = make_knots(sampled.sde, grid, steps, needs_drift=True)
        end = solve(rev, sampled.start, fitted, grid=knots, rng=nfe)
        assert int(end.nfe[0]) <= nfe
        found[f"{name}/{label}/{nfe}"] = sampled.measures(end.x)

    for nfe in BUDGETS:
        for name, solver in SOLVERS.items():
            for grid in GRIDS:
                put(name, solver, grid, grid, nfe)
    for nfe in BUDGETS:
        chosen = solvers.recommend(nfe, stochastic=True)
        put("recommend(nfe, stochastic=True)", chosen.solver, chosen.grid, "", nfe)
    return found


def show_adaptive(sampled: Sampled) -> None:
    rev = sampled.data.reverse(sampled.sde)
    print("\n| adaptive | calls | variance of the components / their weights |\n|---|---|---|")
    for rtol in (0.1, 0.05, 0.02, 0.01):
        solver = solvers.GottaGoFast(rtol=rtol, atol=0.39 * rtol)
        end = solve(rev, sampled.start, solver, grid=[sampled.first, sampled.last], rng=1, strict=True)
        variance, weights = sampled.measures(end.x)
        calls = float(end.nfe.double().mean())
        print(f"| Gotta Go Fast, rtol {rtol:g} | {calls:.0f} | {signed(variance)} / {number(weights)} |")


def show_mixture(sampled: Sampled, mine: Mapping[str, Measures], theirs: Mapping[str, Measures]) -> None:
    mean, deviation = sampled.floor()
    print(f"\n### 16-d mixture, {SAMPLES} samples: variance of the components / their weights\n")
    print("| method | " + " | ".join(f"{n} calls" for n in BUDGETS) + " |\n" + "|---" * (len(BUDGETS) + 1) + "|")
    for title, found in (("peers", theirs), ("ours", mine)):
        if found:
            print(f"| *{title}* |" + " |" * len(BUDGETS))
        for name in dict.fromkeys(key.split("/")[0] for key in found):
            row = []
            for nfe in BUDGETS:
                cells = [(found[f"{name}/{g}/{nfe}"], g) for g in (*GRIDS, "") if f"{name}/{g}/{nfe}" in found]
                (variance, weights), grid = min(cells, key=lambda c: abs(c[0][0]) + c[0][1])
                row.append(f"{signed(variance)} / {number(weights)} {GRIDS.get(grid, '')}".strip())
            print(f"| {name} | " + " | ".join(row) + " |")
    print(
        "\nMean over components of the relative error of their variance (its mean's sign) / total variation distance\n"
        "of their weights. Best grid by the sum: uniform in lambda unless K (Karras) or T (uniform in time). Exact\n"
        f"samples show {mean[0]:.1e} ± {deviation[0]:.1e} / {mean[1]:.1e} ± {deviation[1]:.1e}."
    )


# --- theirs -----------------------------------------------------------------------------------------------------------
def peers(python: str, sde: VPSDE, sampled: Sampled) -> tuple[dict[str, float], dict[str, Measures]]:
    options = {"gaussian_grids": GAUSSIAN_GRIDS, "mixture_grids": (*GRIDS,), "steps": STEPS, "budgets": BUDGETS}
    gaussian = {"means": [[0.7]], "variances": [[0.25]], "log_weights": [0.0]}
    arrays: dict[str, Any] = {"options": json.dumps(options)}
    arrays |= {f"gaussian/{k}": np.array(v) for k, v in gaussian.items()}
    arrays |= {f"mixture/{k}": v.astype(np.float32) for k, v in mixture_arrays(sampled.problem).items()}
    arrays["mixture/y"] = (sampled.start / sampled.first.alpha).numpy()
    for grid in GRIDS:
        for n in STEPS:
            arrays[f"gaussian/levels/{grid}/{n}"] = levels(sde, grid, n)
        for n in {b // k for b in BUDGETS for k in (1, 2)}:
            arrays[f"mixture/levels/{grid}/{n}"] = levels(sde, grid, n)
    exact: dict[str, float] = {}
    found: dict[str, Measures] = {}
    for key, value in ask_peers(python, "weak", arrays).items():
        kind, rest = key.split("/", 1)
        if kind == "gaussian":
            exact[rest] = float(value[0])
        else:
            found[rest] = sampled.measures(torch.from_numpy(value) * float(sampled.last.alpha))
    return exact, found


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has the other libraries")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="folder with mixture16.npz")
    arguments = parser.parse_args()
    sde, data = VPSDE(), GaussianMixture([[0.7]], std=0.5)
    sampled = Sampled(arguments.golden)
    exact, found = peers(arguments.peers, sde, sampled) if arguments.peers else ({}, {})
    mine = {
        f"{name}/{grid}/{n}": variance_error(data, sde, solver, grid, n)
        for name, solver in SOLVERS.items()
        for grid in GAUSSIAN_GRIDS
        for n in STEPS
    }
    show_gaussian(mine, exact)
    show_mixture(sampled, samples_of(sampled), found)
    show_adaptive(sampled)
    if not arguments.peers:
        print("\nThe peers are absent: give --peers=PYTHON, an interpreter that has them (README.md).")
    if arguments.golden is None:
        print("\nThe 16-d mixture was made here: --golden=DIR takes the recorded one.")


if __name__ == "__main__":
    sys.exit(main())
