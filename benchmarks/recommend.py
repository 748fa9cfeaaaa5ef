"""The measurement behind `recommend`: solvers and grids for a budget, on closed-form scores and trained networks.

    python benchmarks/recommend.py --models=runs/recommend             # the recommended ones beside well-known methods
    python benchmarks/recommend.py --models=runs/recommend --search    # what they were chosen from

Six small networks are trained first (about eight minutes on one core) unless --models holds them. Errors are the
root mean square over dimensions of the distance to a tight solution at t_min, in units of the data; shown are decimal
logarithms of the median over samples, averaged over problems.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import solvers
from scoresde import load_model
from sde_lib import EDMSDE, SDE, VESDE, VPSDE, CosineVPSDE, FlowSDE, GaussianMixture, ReverseSDE, SubVPSDE
from solvers import AdaptiveRungeKutta, Blended, Multistep, Solver, recommend, solve

torch.set_num_threads(1)
BUDGETS = (3, 5, 8, 12, 16, 20, 30, 45, 60, 90, 120)
STOCHASTIC = (10, 15, 20, 30, 50)


class Problem(NamedTuple):
    """A start at the law's first usable time and where its trajectories end."""

    rev: ReverseSDE
    start: Tensor
    solution: Tensor
    alpha: float

    def errors(self, solver: Solver, grid: object, nfe: int) -> tuple[float, float]:
        """Median and root mean square over samples."""
        got = solve(self.rev, self.start, solver, nfe=nfe, grid=grid)  # type: ignore[arg-type]
        assert int(got.nfe[0]) <= nfe
        e = (got.x / self.alpha - self.solution).flatten(1).norm(dim=1) / self.solution[0].numel() ** 0.5
        return float(e.median()), float(e.square().mean().sqrt())


# --- problems ---------------------------------------------------------------------------------------------------------
def blobs(seed: int, d: int, k: int, low: float, high: float, spread: float) -> GaussianMixture:
    """k isotropic components with standard deviations in [low, high]."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(k, d, generator=g, dtype=torch.float64) * spread
    std = low + (high - low) * torch.rand(k, generator=g, dtype=torch.float64)
    weights = torch.rand(k, generator=g, dtype=torch.float64) + 0.2
    return GaussianMixture(means, std=std, weights=weights / weights.sum())


def sheets(seed: int, d: int, r: int, k: int, thin: float) -> GaussianMixture:
    """k components near r-dimensional planes."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(k, d, generator=g, dtype=torch.float64) * 0.4
    covariances = []
    for _ in range(k):
        q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
        std = torch.full((d,), thin, dtype=torch.float64)
        std[:r] = torch.rand(r, generator=g, dtype=torch.float64) * 0.8 + 0.2
        covariances.append(q @ torch.diag(std.square()) @ q.T)
    return GaussianMixture(means, covariances=torch.stack(covariances))


def squares() -> GaussianMixture:
    """A 5 x 5 grid in the plane."""
    axis = torch.linspace(-1.4, 1.4, 5, dtype=torch.float64)
    return GaussianMixture(torch.cartesian_prod(axis, axis), std=0.08)


def spiral() -> GaussianMixture:
    """200 points of a spiral in the plane."""
    a = torch.arange(200, dtype=torch.float64) / 200 * 3 * math.pi
    r = 0.4 + a / a.max()
    return GaussianMixture(torch.stack([r * a.cos(), r * a.sin()], 1), std=0.03)


def peaks() -> GaussianMixture:
    """Three components of different width on the line."""
    return GaussianMixture([[-1.1], [0.2], [0.9]], std=torch.tensor([0.05, 0.3, 0.1]), weights=[0.3, 0.4, 0.3])


EXACT: dict[str, tuple[GaussianMixture, SDE]] = {
    "5 x 5 grid, VP": (squares(), VPSDE()),
    "spiral, VP": (spiral(), VPSDE()),
    "8-d tight, VP": (blobs(1, 8, 6, 0.02, 0.1, 0.8), VPSDE()),
    "32-d, VP": (blobs(2, 32, 20, 0.2, 0.5, 0.6), VPSDE()),
    "3-d, VP": (blobs(6, 3, 3, 0.2, 0.5, 1.0), VPSDE()),
    "24-d sheets, VP": (sheets(7, 24, 4, 4, 0.03), VPSDE()),
    "64-d, EDM": (blobs(3, 64, 12, 0.1, 0.4, 0.5), EDMSDE()),
    "16-d sheets, EDM": (sheets(8, 16, 3, 5, 0.02), EDMSDE()),
    "24-d, flow": (blobs(4, 24, 8, 0.1, 0.3, 0.7), FlowSDE()),
    "spiral, flow": (spiral(), FlowSDE()),
    "4-d, cosine VP": (blobs(5, 4, 5, 0.1, 0.6, 0.8), CosineVPSDE()),
    "12-d, sub-VP": (blobs(9, 12, 6, 0.05, 0.3, 0.7), SubVPSDE()),
    "6-d, VE": (blobs(10, 6, 5, 0.05, 0.3, 0.7), VESDE()),
}
WEAK: dict[str, tuple[GaussianMixture, SDE]] = {
    "line, VP": (peaks(), VPSDE()),
    "5 x 5 grid, VP": EXACT["5 x 5 grid, VP"],
    "8-d tight, VP": EXACT["8-d tight, VP"],
    "24-d, flow": EXACT["24-d, flow"],
    "6-d, VE": EXACT["6-d, VE"],
    "line, EDM": (peaks(), EDMSDE()),
}
LEARNED: dict[str, tuple[str, ...]] = {
    "digits, VP, v": ("digits_vp", "--config.training.steps=1300"),
    "digits, flow": (
        "digits_vp",
        "--config.sde.name=flow",
        "--config.model.parameterization=flow",
        "--config.training.steps=700",
    ),
    "digits, VP, noise": ("digits_vp", "--config.model.parameterization=noise", "--config.training.steps=700"),
    "digits, VE, edm": ("digits_ve", "--config.training.steps=700"),
    "spiral, VP, v": ("toy_spiral", "--config.training.steps=3000"),
    "checkerboard, VP, noise": (
        "toy_checkerboard",
        "--config.sde.name=vp",
        "--config.model.parameterization=noise",
        "--config.training.steps=3000",
    ),
}


def exact_problems(n: int = 64) -> dict[str, Problem]:
    """Closed-form scores in float64, solved to 1e-11."""
    out = {}
    for name, (data, sde) in EXACT.items():
        first, last = sde.knot(sde.drift_t_max), sde.knot(sde.t_min)
        g = torch.Generator().manual_seed(9)
        x = data.sample(n, g, torch.float64)
        start = first.alpha * x + first.sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)
        out[name] = _problem(data.reverse(sde), start, first, last, 1e-11)
    return out


def learned_problems(folder: Path, n: int = 8) -> dict[str, Problem]:
    """Trained networks in float32, solved to 3e-6."""
    out = {}
    for name, (config, *options) in LEARNED.items():
        workdir = folder / name.replace(", ", "_").replace(" ", "_")
        if not (workdir / "checkpoints").exists():
            command = [sys.executable, "-m", "scoresde", "train", f"--config={config}", f"--workdir={workdir}"]
            quick = ["--config.training.max_seconds=0", "--config.training.tensorboard=False"]
            subprocess.run([*command, *options, *quick], check=True, stdout=subprocess.DEVNULL)
        model = load_model(workdir)
        assert isinstance(model.law, SDE)
        first, last = model.law.knot(model.law.drift_t_max), model.law.knot(model.law.t_min)
        shape = model.data_spec.shape
        count = n if len(shape) > 1 else 8 * n
        start = torch.randn(count, *shape, generator=torch.Generator().manual_seed(3)) * float(first.sigma)
        out[name] = _problem(model.reverse(), start, first, last, 3e-6)
    return out


def _problem(rev: ReverseSDE, start: Tensor, first: object, last: object, tolerance: float) -> Problem:
    tight = solve(rev, start, AdaptiveRungeKutta(rtol=tolerance, atol=tolerance), grid=[first, last], strict=True)
    alpha = float(last.alpha)  # type: ignore[attr-defined]
    return Problem(rev, start, tight.x / alpha, alpha)


def sliced(x: Tensor, y: Tensor) -> float:
    """Sliced 2-Wasserstein distance of equally many samples."""
    d = x.shape[1]
    u = torch.randn(d, 64 if d > 1 else 1, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    u = u / u.norm(dim=0)
    return float(((x @ u).sort(0)[0] - (y @ u).sort(0)[0]).square().mean().sqrt())


def weak_error(data: GaussianMixture, sde: SDE, solver: Solver, grid: object, nfe: int, n: int = 60_000) -> float:
    """Distance of the solver's samples from the law at t_min."""
    g = torch.Generator().manual_seed(3)
    first, last = sde.knot(sde.drift_t_max), sde.knot(sde.t_min)
    x, y = data.sample(n, g, torch.float64), data.sample(n, g, torch.float64)
    start = first.alpha * x + first.sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)
    exact = y + last.sigma / last.alpha * torch.randn(y.shape, generator=g, dtype=torch.float64)
    if solver is None:  # the floor: two samples of the law
        z = data.sample(n, g, torch.float64)
        return sliced(z + last.sigma / last.alpha * torch.randn(z.shape, generator=g, dtype=torch.float64), exact)
    return sliced(solve(data.reverse(sde), start, solver, nfe=nfe, grid=grid, rng=5).x / last.alpha, exact)  # type: ignore


# --- tables -----------------------------------------------------------------------------------------------------------
def logs(problems: dict[str, Problem], solver: Solver, grid: object, nfe: int) -> tuple[float, float]:
    """Means over problems of log10 of the median and of the root mean square error."""
    found = torch.tensor([p.errors(solver, grid, nfe) for p in problems.values()]).clamp(min=1e-12).log10().mean(0)
    return float(found[0]), float(found[1])


def show_deterministic(exact: dict[str, Problem], learned: dict[str, Problem]) -> None:
    known: dict[str, tuple[Solver, str]] = {
        "DDIM": (solvers.DDIM(), "uniform_half_log_snr"),
        "Heun": (solvers.Heun(), "karras"),
        "DPM++ 2M": (solvers.DPMpp2M(), "uniform_half_log_snr"),
        "DPM++ 3M": (solvers.DPMpp3M(), "uniform_half_log_snr"),
        "DEIS": (solvers.DEIS(), "uniform_half_log_snr"),
        "UniPC-3": (solvers.UniPC(), "uniform_half_log_snr"),
    }
    print("\n| NFE | recommended | " + " | ".join(known) + " |")
    print("|---" * (len(known) + 2) + "|")
    measured = {}
    for nfe in BUDGETS:
        best = recommend(nfe)
        cells = []
        for solver, grid in [(best.solver, best.grid), *known.values()]:
            try:
                pair = [logs(p, solver, grid, nfe) for p in (exact, learned)]
            except ValueError:  # more calls to start than the budget has
                cells.append("")
                continue
            cells.append(f"{pair[0][0]:.2f} / {pair[1][0]:.2f}")
            if solver is best.solver:
                measured[nfe] = tuple(float(f"{10 ** v[0]:.2g}") for v in pair)
        print(f"| {nfe} | " + " | ".join(cells) + " |", flush=True)
    print("\nlog10 of the median error: closed-form scores / trained networks")
    print("_MEASURED =", measured)


def show_stochastic() -> None:
    known: dict[str, tuple[Solver, object]] = {
        "ancestral": (solvers.Ancestral(), Blended()),
        "SDE-DPM++ 2M": (solvers.SDEDPMpp2M(), Blended()),
        "SDE-DPM++ 3M": (solvers.SDEDPMpp3M(), Blended()),
        "SEEDS-2": (solvers.SEEDS2(), Blended()),
        "SA-Solver": (solvers.SASolver(), Blended()),
    }
    floor = _mean_log([weak_error(*p, None, None, 0) for p in WEAK.values()])  # type: ignore[arg-type]
    print("\n| NFE | recommended | " + " | ".join(known) + " | floor |")
    print("|---" * (len(known) + 3) + "|")
    measured = {}
    for nfe in STOCHASTIC:
        best = recommend(nfe, stochastic=True)
        found = [
            _mean_log([weak_error(*p, s, grid, nfe) for p in WEAK.values()])
            for s, grid in [(best.solver, best.grid), *known.values()]
        ]
        measured[nfe] = float(f"{10 ** found[0]:.2g}")
        print(f"| {nfe} | " + " | ".join(f"{v:.2f}" for v in found) + f" | {floor:.2f} |", flush=True)
    print("\nlog10 of the sliced 2-Wasserstein distance to the law, 60000 samples, all on the recommended grid")
    print("_MEASURED_STOCHASTIC =", measured)


def _mean_log(values: list[float]) -> float:
    return sum(map(math.log10, values)) / len(values)


def search(exact: dict[str, Problem], learned: dict[str, Problem]) -> None:
    """Every candidate by its score: half closed forms, half networks; 2/3 median, 1/3 root mean square."""
    forms = [("flow", "half_log_snr"), ("v", "half_log_snr"), ("v", "angle"), ("flow", "noise_share")]
    forms += [("data", "noise_ratio"), ("data", "half_log_snr"), ("noise", "half_log_snr")]
    orders = {8: ((2, 0), (3, 0), (2, 3)), 12: ((2, 3), (3, 4)), 20: ((3, 4), (4, 5)), 30: ((3, 4), (4, 5), (5, 6))}
    orders |= {60: ((4, 5), (5, 6), (6, 7)), 120: ((5, 6), (6, 7))}
    for nfe, pairs in orders.items():
        rows = []
        for prediction, variable in forms:
            for p, c in pairs:
                for mix in (0.0, 0.35, 0.5, 0.65, 0.8):
                    for sigma_data in (0.5, 0.7, 1.0) if mix else (0.7,):
                        solver = Multistep(p, c, prediction, variable, starter="ramp")
                        grid = Blended(mix=mix, sigma_data=sigma_data)
                        score = [2 / 3 * a + b / 3 for a, b in (logs(q, solver, grid, nfe) for q in (exact, learned))]
                        rows.append((sum(score) / 2, *score, prediction, variable, p, c, mix, sigma_data))
        rows.sort()
        print(f"\nNFE {nfe}: score, on closed forms, on networks; prediction, variable, orders, mix, sigma_data")
        for row in rows[:8]:
            print("  {:.2f} {:.2f} {:.2f}  {} {} {}/{} {} {}".format(*row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("runs/recommend"), help="folder of the trained networks")
    parser.add_argument("--search", action="store_true", help="rank all candidates (about 20 minutes)")
    parser.add_argument("--stochastic", action="store_true", help="the stochastic solvers only (about 10 minutes)")
    arguments = parser.parse_args()
    if not arguments.stochastic:
        exact, learned = exact_problems(), learned_problems(arguments.models)
        if arguments.search:
            search(exact, learned)
        show_deterministic(exact, learned)
    if arguments.stochastic or not arguments.search:
        show_stochastic()


if __name__ == "__main__":
    main()
