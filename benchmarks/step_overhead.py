"""Overhead of a fixed-step solver per step, beyond the bare network call.

    python benchmarks/step_overhead.py                    # ours
    python benchmarks/step_overhead.py --peers=PYTHON     # and diffusers, k-diffusion, azula, run by that interpreter

One thread, a tiny convolution on a batch of 64 x 3 x 8 x 8, 50 steps, float32. Each time is the best of several runs of
thread CPU time, with as many bare network calls subtracted; the rows of one run are comparable. The grid is given to
all of them (what diffusers takes to build its own is subtracted too). Ours keep the weights of a grid for the next run
on it: "new grid" is a first run. Operations outside of the network are counted as they are dispatched: those on whole
states, those on smaller tensors, and those for which the host waits (all per step).
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accuracy import ask_peers, levels
from measure import microseconds, operations
from torch import Tensor, nn

import sde_lib
import solvers
from solvers import Solver

STEPS, RUNS = 50, 40
SHAPE = (64, 3, 8, 8)
Row = tuple[float, ...]
"""Microseconds on a grid walked before and on a new one; operations on states, on small tensors; host waits."""

SOLVERS: dict[str, Solver] = {
    "DDIM": solvers.DDIM(),
    "Euler-Maruyama, eta 0": solvers.EulerMaruyama(eta=0.0),
    "Heun (2 calls)": solvers.Heun(),
    "DPM-Solver-2 (2 calls)": solvers.DPMSolver2(),
    "DPM++ 2M": solvers.DPMpp2M(),
    "DPM++ 3M": solvers.DPMpp3M(),
    "DEIS-3": solvers.DEIS(),
    "LMS-4": solvers.LinearMultistep(),
    "UniPC-3": solvers.UniPC(),
    "recommend(50)": solvers.recommend(50).solver,
    "DDIM, eta 1": solvers.DDIM(eta=1.0),
    "ancestral": solvers.Ancestral(),
    "Euler-Maruyama": solvers.EulerMaruyama(),
    "SDE-DPM++ 2M": solvers.SDEDPMpp2M(),
    "SEEDS-2 (2 calls)": solvers.SEEDS2(),
    "SA-Solver p3c3": solvers.SASolver(),
    "predictor-corrector (2 calls)": solvers.PredictorCorrector(),
}


def ours(runs: int) -> dict[str, Row]:
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1)
    sde = sde_lib.VPSDE()
    rev = sde.reverse(noise=lambda x, t: network(x))
    x = torch.randn(SHAPE)
    rows: dict[str, Row] = {}
    with torch.no_grad():
        bare = microseconds(lambda: [network(x) for _ in range(STEPS)], STEPS, runs)
        rows["bare"] = (bare,)
        rows["draw"] = (microseconds(lambda: [torch.randn(SHAPE) for _ in range(STEPS)], STEPS, runs),)

        def floor() -> Tensor:
            y = x
            for _ in range(STEPS):
                y = (y * 0.9).add_(network(y), alpha=0.1)
            return y

        took = microseconds(floor, STEPS, runs) - bare
        rows["floor: x.mul(a).add_(F, alpha=b)"] = took, took, *operations(floor, STEPS, x.numel(), 1.0)
        named: list[tuple[str, Solver, Any]] = [(k, v, 0) for k, v in SOLVERS.items()]
        named.append(("DDIM, eta 1, 64 per-sample seeds", solvers.DDIM(eta=1.0), list(range(SHAPE[0]))))
        named.append(("SDE-DPM++ 2M, Brownian path", solvers.SDEDPMpp2M(), solvers.BrownianPath(0)))
        named.append(
            ("SDE-DPM++ 2M, path per sample, 64 seeds", solvers.SDEDPMpp2M(), solvers.BrownianPath(list(range(64))))
        )
        for name, solver, rng in named:
            few = max(3, runs // 10) if "ath" in name else runs
            grids = _grids(sde, few + 2, solver.needs_drift)
            fresh = iter(grids)

            def run(knots: Any, solver: Solver = solver, rng: Any = rng) -> object:
                return solvers.solve(rev, x, solver, grid=knots, rng=rng)

            calls = solver.nfe(STEPS) / STEPS
            first = microseconds(partial(_next, run, fresh), STEPS, few) - calls * bare
            again = microseconds(partial(run, grids[0]), STEPS, few) - calls * bare
            rows[name] = again, first, *operations(partial(run, grids[0]), STEPS, x.numel(), calls)
    return rows


def _grids(sde: sde_lib.SDE, count: int, needs_drift: bool) -> list[Any]:
    """Grids that differ in the last digits of their end."""
    ends = [1e-3 * (1.0 + 1e-9 * i) for i in range(count)]
    return [solvers.make_knots(sde, solvers.UniformTime(t_end=t), STEPS, needs_drift=needs_drift) for t in ends]


def _next(run: Callable[[Any], object], grids: Iterator[Any]) -> object:
    return run(next(grids))


def peers(python: str, runs: int) -> dict[str, Row]:
    options = {"steps": STEPS, "runs": runs, "shape": SHAPE}
    grid = levels(sde_lib.VPSDE(), "karras", STEPS)
    found = ask_peers(python, "overhead", {"options": json.dumps(options), "levels": grid})
    rows = {name: tuple(map(float, row)) for name, row in found.items()}
    return {name: (row[0], *row) for name, row in rows.items()}  # nothing is kept from run to run


def show(title: str, rows: dict[str, Row]) -> None:
    print(f"| *{title}* (a network call took {rows['bare'][0]:.0f} us) | | | | | |")
    for name, row in rows.items():
        if name == "draw":
            print(f"| one torch.randn of the state | {row[0]:.0f} | | | | |")
        elif name != "bare":
            again, first, *counts = row
            print(f"| {name} | {again:,.0f} | {first:,.0f} | " + " | ".join(f"{v:.1f}" for v in counts) + " |")


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has the other libraries")
    parser.add_argument("--runs", type=int, default=RUNS, help="runs to take the best of")
    arguments = parser.parse_args()
    theirs = peers(arguments.peers, arguments.runs) if arguments.peers else {}
    mine = ours(arguments.runs)
    print("\n| solver | us per step beyond the network | new grid | state operations | small ones | host waits |")
    print("|---|---|---|---|---|---|")
    if theirs:
        show("peers", theirs)
    show("ours", mine)
    if not theirs:
        print("\nThe peers are absent: give --peers=PYTHON, an interpreter that has them (README.md).")


if __name__ == "__main__":
    main()
