"""Error against network calls of the deterministic solvers, on scores known in closed form, beside other libraries.

    python benchmarks/accuracy.py                      # ours
    python benchmarks/accuracy.py --peers=PYTHON       # and diffusers, k-diffusion, azula, run by that interpreter
    python benchmarks/accuracy.py --golden=DIR         # the 16-d mixture and start of DIR/mixture16.npz

Everything is float64, with the same start, end and noise levels for all; calls are counted where the score is computed.
A sample's error is the root mean square over dimensions of its distance to a solution at tolerance 1e-12, in units of
the data. Every method is shown on the best of three grids by its median at each budget: uniform in lambda, Karras and
uniform in time. `recommend` alone does not choose: it is one solver and one grid for each budget.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measure
import numpy as np
import torch
from torch import Tensor

import solvers
from sde_lib import EDMSDE, SDE, VPSDE, FlowSDE, GaussianMixture, Knot, ReverseSDE
from solvers import AdaptiveRungeKutta, Multistep, Solver, UniPC, make_knots, solve

BUDGETS = (8, 12, 20, 30, 60, 120)
GRIDS = {"uniform_half_log_snr": "", "karras": "K", "uniform_time": "T"}
BLENDED = "blended"
CATALOGUE = {12: 6e-3, 20: 1.3e-3, 30: 3.2e-4, 60: 1.4e-5, 120: 3.3e-6}
"""The peers' best medians on the 16-d mixture as they were measured once before, with other code."""


# --- problems ---------------------------------------------------------------------------------------------------------
class Problem(NamedTuple):
    """Data, a law, states at the first knot and where the probability-flow ODE carries them, divided by alpha."""

    means: Tensor
    std: Tensor  # (K, d)
    weights: Tensor
    sde: SDE
    start: Tensor
    solution: Tensor

    @property
    def data(self) -> GaussianMixture:
        return GaussianMixture(self.means, std=self.std, weights=self.weights)

    @property
    def ends(self) -> tuple[Knot, Knot]:
        return self.sde.knot(self.sde.drift_t_max), self.sde.knot(self.sde.t_min)


class Counted:
    """The score model of a problem; counts the rows it is asked for."""

    def __init__(self, problem: Problem) -> None:
        exact = problem.data.reverse(problem.sde)
        self.rows = 0

        def network(x: Tensor, knot: Knot) -> Tensor:
            self.rows += len(x)
            return exact.network(x, knot)

        self.rev = ReverseSDE(problem.sde, network, exact.parameterization)


def make_problem(
    means: Tensor, std: Tensor, weights: Tensor, sde: SDE, samples: int = 128, start: Tensor | None = None
) -> Problem:
    """Starts are exact samples at the first knot, unless given."""
    std = std.expand_as(means) if std.ndim == 2 else std[:, None].expand_as(means)
    p = Problem(means, std, weights / weights.sum(), sde, torch.empty(0), torch.empty(0))
    first, last = p.ends
    if start is None:
        g = torch.Generator().manual_seed(1)
        x = p.data.sample(samples, g, torch.float64)
        start = first.alpha * x + first.sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)
    tight = AdaptiveRungeKutta(rtol=1e-12, atol=1e-12)
    end = solve(p.data.reverse(sde), start, tight, grid=[first, last], strict=True).x
    return p._replace(start=start, solution=end / last.alpha)


def random_mixture(seed: int, k: int, d: int, low: float, high: float, spread: float = 1.0) -> tuple[Tensor, ...]:
    """k isotropic components: means N(0, spread^2), standard deviations uniform in [low, high], uneven weights."""
    g = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(k, d, generator=g, dtype=torch.float64)
    std = low + (high - low) * torch.rand(k, generator=g, dtype=torch.float64)
    return means, std, 0.3 + torch.rand(k, generator=g, dtype=torch.float64)


def mixture_16(golden: Path | None) -> Problem:
    """The recorded mixture, or one made by the same recipe."""
    if golden is None:
        return make_problem(*random_mixture(0, 10, 16, 0.1, 0.3), VPSDE(), 512)
    with np.load(golden / "mixture16.npz") as f:
        means, std, log_weights, start = (torch.from_numpy(f[k]) for k in ("means", "stds", "log_weights", "x_T"))
        problem = make_problem(means, std, log_weights.exp(), VPSDE(), start=start)
        apart = measure.errors(problem.solution * problem.ends[1].alpha, torch.from_numpy(f["x_end"]))
    print(f"Recorded solution of the 16-d mixture: ours is {apart[1]:.1e} from it (root mean square).")
    return problem


def problems(golden: Path | None) -> dict[str, Problem]:
    """The 16-d mixture, and six that differ in kind."""
    axis = torch.linspace(-1.4, 1.4, 5, dtype=torch.float64)
    spots = torch.cartesian_prod(axis, axis)
    even = torch.ones(25, dtype=torch.float64)
    spectrum = torch.logspace(-2, math.log10(2), 64, dtype=torch.float64)[None]
    g = torch.Generator().manual_seed(5)
    sheets = torch.full((12, 192), 0.02, dtype=torch.float64)
    for row in sheets:  # each component is thick along eight axes of its own
        row[torch.randperm(192, generator=g)[:8]] = 0.8
    return {
        "16-d mixture, VP": mixture_16(golden),
        "2-d, 25 spots of 0.05, VP": make_problem(spots, 0.05 * even, even, VPSDE()),
        "3-d, std 0.01 to 0.1, VP": make_problem(*random_mixture(2, 8, 3, 0.01, 0.1, 0.8), VPSDE()),
        "64-d Gaussian, std 0.01 to 2, VP": make_problem(torch.zeros_like(spectrum), spectrum, even[:1], VPSDE()),
        "192-d, near 8-d planes, VP": make_problem(
            0.4 * torch.randn(12, 192, generator=g, dtype=torch.float64), sheets, even[:12], VPSDE(), 64
        ),
        "16-d mixture, EDM": make_problem(*random_mixture(3, 10, 16, 0.1, 0.3), EDMSDE()),
        "16-d mixture, flow": make_problem(*random_mixture(4, 10, 16, 0.1, 0.3), FlowSDE()),
    }


# --- ours -------------------------------------------------------------------------------------------------------------
FIXED: dict[str, Solver] = {
    "DDIM": solvers.DDIM(),
    "Heun": solvers.Heun(),
    "RK4": solvers.RK4(),
    "RK4, angle": solvers.RK4(coordinate="angle"),
    "Dormand-Prince": solvers.DormandPrince(),
    "DPM-Solver-2": solvers.DPMSolver2(),
    "DPM-Solver-3 fast": solvers.DPMSolver3(fast=True),
    "DPM++ 2S": solvers.DPMpp2S(),
    "DPM++ 3S": solvers.DPMpp3S(),
    "DPM++ 2M": solvers.DPMpp2M(),
    "DPM++ 2M, midpoint": solvers.DPMpp2M(midpoint=True),
    "DPM-Solver 2M, midpoint": solvers.DPMpp2M(prediction="noise", midpoint=True),
    "DPM++ 3M": solvers.DPMpp3M(),
    "DPM++ 3M, ramp": solvers.DPMpp3M(starter="ramp"),
    "DPM++ 3M, as published": solvers.DPMpp3M(half_d2=True, starter="ramp"),
    "DPM++ 4M, ramp": Multistep(predictor=4, starter="ramp"),
    "DEIS-3": solvers.DEIS(),
    "DEIS-3, ramp": solvers.DEIS(starter="ramp"),
    "DEIS-4, ramp": solvers.DEIS(predictor=4, starter="ramp"),
    "LMS-4": solvers.LinearMultistep(),
    "LMS-4, ramp": solvers.LinearMultistep(starter="ramp"),
    "UniPC-2": UniPC(predictor=2, corrector=3),
    "UniPC-3": UniPC(),
    "UniPC-3, ramp": UniPC(starter="ramp"),
    "UniPC-3 noise": UniPC(prediction="noise"),
    "UniPC-3 noise, ramp": UniPC(prediction="noise", starter="ramp"),
    "UniPC-3 noise, as published": UniPC(prediction="noise", midpoint=True, lower_final=True),
    "UniPC-3 v, angle": UniPC(prediction="v", variable="angle"),
    "UniPC-2 flow": UniPC(predictor=2, corrector=3, prediction="flow"),
    "UniPC-3 flow": UniPC(prediction="flow"),
    "UniPC-3 flow, ramp": UniPC(prediction="flow", starter="ramp"),
    "UniPC-5 flow, ramp": UniPC(predictor=5, corrector=6, prediction="flow", starter="ramp"),
    "flow 3M, noise share": Multistep(prediction="flow", variable="noise_share"),
    "flow 3M, noise share, ramp": Multistep(prediction="flow", variable="noise_share", starter="ramp"),
    "flow 4M, noise share, ramp": Multistep(4, prediction="flow", variable="noise_share", starter="ramp"),
}
ADAPTIVE: dict[str, Solver] = {
    f"{name}, rtol = atol = {tol:g}": AdaptiveRungeKutta(tableau=tableau, rtol=tol, atol=tol)
    for name, tableau in (
        ("Dormand-Prince", "dormand_prince"),
        ("Tsitouras", "tsitouras"),
        ("Bogacki-Shampine", "bogacki_shampine"),
    )
    for tol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
} | {
    f"DPM-Solver-23, rtol {rtol:g}": solvers.AdaptiveDPMSolver(rtol=rtol, atol=0.156 * rtol)
    for rtol in (5e-2, 5e-3, 5e-4, 5e-5)
}

Cell = tuple[float, float, float]
"""Median, root mean square, calls per sample."""
LOST: Cell = (math.nan, math.nan, 0.0)
Found = dict[str, dict[tuple[str, int], Cell]]
"""Method -> (grid, budget) -> cell; the budget of an adaptive method is 0."""


def run(problem: Problem, solver: Solver, grid: Any, nfe: int) -> Cell:
    counted = Counted(problem)
    first, last = problem.ends
    if solver.adaptive:
        end = solve(counted.rev, problem.start, solver, grid=[first, last], strict=True).x
    else:
        fitted, steps = solver.on(problem.sde).within(nfe)
        knots = make_knots(problem.sde, grid, steps, needs_drift=True)
        end = solve(counted.rev, problem.start, fitted, grid=knots).x
    calls = counted.rows / len(problem.start)
    assert solver.adaptive or calls <= nfe, (solver, nfe, calls)
    return (*measure.errors(end / last.alpha, problem.solution), calls)


def ours(problem: Problem) -> Found:
    found: Found = {}
    for name, solver in FIXED.items():
        found[name] = {}
        for grid in (*GRIDS, BLENDED):
            for nfe in BUDGETS:
                if nfe >= solver.nfe(1):
                    found[name][grid, nfe] = run(problem, solver, grid, nfe)
    for name, solver in ADAPTIVE.items():
        found[name] = {("", 0): run(problem, solver, None, 0)}
    found["recommend(nfe)"] = {}
    for nfe in BUDGETS:
        chosen = solvers.recommend(nfe)
        found["recommend(nfe)"]["", nfe] = run(problem, chosen.solver, chosen.grid, nfe)
    return found


# --- theirs -----------------------------------------------------------------------------------------------------------
def ask_peers(python: str, job: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Run benchmarks/peers.py by another interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "given.npz", Path(folder) / "result.npz"
        np.savez(given, **arrays)
        script = Path(__file__).with_name("peers.py")
        subprocess.run([python, str(script), job, str(given), str(result)], check=True)
        with np.load(result) as f:
            found = dict(f)
    versions = json.loads(str(found.pop("versions")))
    print("Peers: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ", k-diffusion as installed.")
    return found


def levels(sde: SDE, grid: Any, steps: int | None) -> np.ndarray:
    """sigma / alpha at the knots."""
    knots = make_knots(sde, grid, steps, needs_drift=True)
    return np.array([math.exp(-float(k.half_log_snr)) for k in knots])


def mixture_arrays(problem: Problem) -> dict[str, np.ndarray]:
    arrays = {"means": problem.means, "variances": problem.std.square(), "log_weights": problem.weights.log()}
    return {k: v.contiguous().numpy() for k, v in arrays.items()}


def peers(python: str, given: Mapping[str, Problem]) -> dict[str, Found]:
    grids = (*GRIDS, BLENDED)
    options = {"problems": list(given), "grids": grids, "budgets": BUDGETS}
    arrays: dict[str, Any] = {"options": json.dumps(options)}
    for name, p in given.items():
        parts = mixture_arrays(p) | {"y": (p.start / p.ends[0].alpha).numpy(), "solution": p.solution.numpy()}
        if p.sde == VPSDE():  # the 1000 times that diffusers knows
            parts["table"] = levels(p.sde, [(i + 1) / 1000 for i in range(1000)], None)
        for grid in grids:
            for steps in {n // k for n in BUDGETS for k in (1, 2)}:
                parts[f"levels/{grid}/{steps}"] = levels(p.sde, grid, steps)
        arrays |= {f"{name}/{k}": v for k, v in parts.items()}
    out: dict[str, Found] = {name: {} for name in given}
    for key, cell in ask_peers(python, "accuracy", arrays).items():
        problem, method, *where = key.split("/")
        at = (where[0], int(where[1])) if where else ("", 0)
        out[problem].setdefault(method, {})[at] = tuple(map(float, cell))
    for name, found in out.items():
        for method, cells in found.items():
            for (_, nfe), cell in cells.items():
                assert nfe == 0 or cell[2] <= nfe, (name, method, nfe, cell)
    return out


# --- tables -----------------------------------------------------------------------------------------------------------
def best(cells: Mapping[tuple[str, int], Cell], nfe: int, among: Sequence[str] = (*GRIDS, "")) -> tuple[Cell, str]:
    """The cell of the grid with the smallest median."""
    return min(
        ((c, g) for (g, n), c in cells.items() if n == nfe and g in among),
        key=lambda pair: pair[0][0] if math.isfinite(pair[0][0]) else math.inf,
        default=(LOST, ""),
    )


def number(value: float) -> str:
    """Two digits, short."""
    if not math.isfinite(value):
        return "-"
    if value >= 10:
        return ">10"
    return f"{value:.2g}" if value >= 0.1 else f"{value:.1e}".replace("e-0", "e-")


def is_fixed(cells: Mapping[tuple[str, int], Cell]) -> bool:
    return ("", 0) not in cells


def show_problem(name: str, tables: Sequence[tuple[str, Found]]) -> None:
    """All methods on one problem: median / root mean square, and the letter of the best grid."""
    print(f"\n### {name}\n\n| method | " + " | ".join(map(str, BUDGETS)) + " |")
    print("|---" * (len(BUDGETS) + 1) + "|")
    for title, found in tables:
        print(f"| *{title}* |" + " |" * len(BUDGETS))
        for method, cells in found.items():
            if is_fixed(cells):
                row = []
                for nfe in BUDGETS:
                    (median, rms, _), grid = best(cells, nfe)
                    row.append(f"{number(median)} / {number(rms)} {GRIDS.get(grid, '')}".strip())
                print(f"| {method} | " + " | ".join("" if c.startswith("-") else c for c in row) + " |")
    print("\nmedian / root mean square; best grid: uniform in lambda unless K (Karras) or T (uniform in time)")
    print("\n| adaptive | calls | median / root mean square |\n|---|---|---|")
    for _, found in tables:
        for method, cells in found.items():
            if not is_fixed(cells):
                median, rms, calls = cells["", 0]
                print(f"| {method} | {calls:.0f} | {number(median)} / {number(rms)} |")


def show_bests(given: Sequence[str], mine: Mapping[str, Found], theirs: Mapping[str, Found]) -> None:
    """Per problem and budget: the best median of either side in hindsight, and the recommendation."""
    print("\n### All problems: medians\n\n| problem | | " + " | ".join(map(str, BUDGETS)) + " |")
    print("|---" * (len(BUDGETS) + 2) + "|")
    sides: list[tuple[str, Mapping[str, Found], Sequence[str]]] = [("best of ours", mine, (*GRIDS,))]
    if theirs:
        sides = [("best of the peers", theirs, (*GRIDS,)), ("the same, on `blended`", theirs, (BLENDED,)), *sides]
    for name in given:
        for i, (title, found, among) in enumerate(sides):
            row = []
            for nfe in BUDGETS:
                cells = [(best(c, nfe, among)[0][0], m) for m, c in contenders(found[name]).items()]
                value, method = min((v, m) for v, m in cells if math.isfinite(v))
                row.append(f"{number(value)} {method}")
            print(f"| {name if i == 0 else ''} | {title} | " + " | ".join(row) + " |")
        row = [number(best(mine[name]["recommend(nfe)"], nfe)[0][0]) for nfe in BUDGETS]
        print("| | **recommend(nfe)** | " + " | ".join(row) + " |")
    for i, (title, found, among) in enumerate(sides):
        row = []
        for nfe in BUDGETS:
            means = {
                (m, g): geometric_mean(found[name][m].get((g, nfe), LOST)[0] for name in given)
                for m in contenders(found[given[0]])
                for g in among
            }
            method, grid = min(means, key=lambda k: means[k])
            row.append(f"{number(means[method, grid])} {method} {GRIDS.get(grid, '')}".strip())
        print(f"| {'all, one method and grid' if i == 0 else ''} | {title} | " + " | ".join(row) + " |")
    row = [number(geometric_mean(mine[name]["recommend(nfe)"]["", nfe][0] for name in given)) for nfe in BUDGETS]
    print("| | **recommend(nfe)** | " + " | ".join(row) + " |")
    print("\nBest in hindsight: for every problem and budget alone, and in the last rows once for all problems.")
    if not theirs:
        print("\nThe peers are absent: give --peers=PYTHON, an interpreter that has them (README.md).")


def contenders(found: Found) -> Found:
    """Fixed-step methods that choose among the three grids."""
    return {k: v for k, v in found.items() if is_fixed(v) and "recommend" not in k and "rounded" not in k}


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(max(v, 1e-16)) if math.isfinite(v) else math.inf for v in values]
    return math.exp(min(sum(logs) / len(logs), 700.0))


def show_means(given: Sequence[str], tables: Sequence[tuple[str, Mapping[str, Found]]]) -> None:
    """Every method that solves all problems, over all but the first: geometric mean of the medians, best grids."""
    print(f"\n### Geometric mean of the medians over the other {len(given) - 1} problems\n")
    print("| method | " + " | ".join(map(str, BUDGETS)) + " |\n" + "|---" * (len(BUDGETS) + 1) + "|")
    for title, found in tables:
        print(f"| *{title}* |" + " |" * len(BUDGETS))
        for method, cells in found[given[0]].items():
            if is_fixed(cells) and all(method in found[name] for name in given):
                row = []
                for nfe in BUDGETS:
                    row.append(geometric_mean(best(found[name][method], nfe)[0][0] for name in given[1:]))
                print(f"| {method} | " + " | ".join("" if v > 1e9 else number(v) for v in row) + " |")


def show_reproduced(theirs: Found) -> None:
    """The peers' best medians beside those measured before."""
    print("\n| | " + " | ".join(map(str, CATALOGUE)) + " |\n" + "|---" * (len(CATALOGUE) + 1) + "|")
    values = {n: min(best(c, n)[0][0] for c in contenders(theirs).values()) for n in CATALOGUE}
    print("| best of the peers, here | " + " | ".join(number(v) for v in values.values()) + " |")
    print("| measured before | " + " | ".join(number(v) for v in CATALOGUE.values()) + " |")
    off = [n for n, v in values.items() if not 0.9 < v / CATALOGUE[n] < 1.1]
    print("\n" + (f"Apart by more than a tenth at {off}." if off else "All within a tenth."))


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has the other libraries")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="folder with mixture16.npz")
    parser.add_argument("--all", action="store_true", help="the full table of every problem")
    arguments = parser.parse_args()
    given = problems(arguments.golden)
    mine = {name: ours(p) for name, p in given.items()}
    theirs = peers(arguments.peers, given) if arguments.peers else {}
    tables = [("peers", theirs)] * bool(theirs) + [("ours", mine)]
    names = list(given)
    for name in names if arguments.all else names[:1]:
        show_problem(name, [(title, found[name]) for title, found in tables])
    if theirs and arguments.golden:
        show_reproduced(theirs[names[0]])
    elif arguments.golden is None:
        print("\nThe 16-d mixture was made here: --golden=DIR takes the recorded one.")
    show_means(names, tables)
    show_bests(names, mine, theirs)


if __name__ == "__main__":
    sys.exit(main())
