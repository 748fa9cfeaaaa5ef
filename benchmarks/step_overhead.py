"""Overhead of a fixed-step solver per step, beyond the bare network call.

    python benchmarks/step_overhead.py

One thread, a tiny convolution on a batch of 64 x 3 x 8 x 8, 50 steps, float32. Each row is the best of several runs of
thread CPU time, with the time of as many bare network calls subtracted; the rows of one run are comparable.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import sde_lib
import solvers

STEPS, RUNS = 50, 30
SHAPE = (64, 3, 8, 8)


def best(fn: Callable[[], object]) -> float:
    """Microseconds per step: the fastest of RUNS runs after a warm-up."""
    fn()
    times = []
    for _ in range(RUNS):
        start = time.thread_time()
        fn()
        times.append(time.thread_time() - start)
    return min(times) / STEPS * 1e6


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1)
    sde = sde_lib.VPSDE()

    def noise(x: Tensor, t: Tensor) -> Tensor:
        return network(x)

    rev = sde.reverse(noise=noise)
    x = torch.randn(SHAPE)
    t = torch.full((SHAPE[0],), 0.5)
    with torch.no_grad():
        bare = best(lambda: [noise(x, t) for _ in range(STEPS)])
        draw = best(lambda: [torch.randn(SHAPE) for _ in range(STEPS)])
        print(f"{'bare network call':<34}{bare:8.1f} us")
        print(f"{'one torch.randn of the state':<34}{draw:8.1f} us")
        print(f"{'solver':<34}{'us/step beyond the network':>28}")
        rows = {
            "floor: x.mul(a).add_(F, alpha=b)": None,
            "ddim": solvers.DDIM(),
            "euler_maruyama (eta=0)": solvers.EulerMaruyama(eta=0.0),
            "heun (2 calls)": solvers.Heun(),
            "ddim (eta=1)": solvers.DDIM(eta=1.0),
            "ancestral": solvers.Ancestral(),
            "euler_maruyama": solvers.EulerMaruyama(),
            "predictor_corrector (2 calls)": solvers.PredictorCorrector(),
        }
        for name, solver in rows.items():
            if solver is None:

                def floor() -> Tensor:
                    y = x
                    for _ in range(STEPS):
                        y = (y * 0.9).add_(noise(y, t), alpha=0.1)
                    return y

                print(f"{name:<34}{best(floor) - bare:28.1f}")
                continue
            knots = solvers.make_knots(sde, None, STEPS)
            took = best(lambda s=solver, k=knots: solvers.solve(rev, x, s, grid=k, rng=0))  # type: ignore[misc]
            print(f"{name:<34}{took - bare * solver.nfe_per_step:28.1f}")
        per_sample = list(range(SHAPE[0]))
        knots = solvers.make_knots(sde, None, STEPS)
        took = best(lambda: solvers.solve(rev, x, solvers.DDIM(eta=1.0), grid=knots, rng=per_sample))
        print(f"{'ddim (eta=1), 64 per-sample seeds':<34}{took - bare:28.1f}")


if __name__ == "__main__":
    main()
