"""What noise costs: one batched draw, a seed per sample, a shared Brownian path, torchsde's Brownian tree; and what a
training step draws from its streams.

    python benchmarks/noise.py

One thread, float32, microseconds per draw (the fastest of many runs); a run of 50 steps down a grid of equal steps in
half log-SNR for the paths.
"""

import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torchsde

from scoresde.streams import Streams
from sde_lib import VPSDE
from solvers import BrownianPath, as_draw, make_knots

STEPS = 50


def best(fn: Callable[[], object], runs: int) -> float:
    """Microseconds: the fastest run after a warm-up."""
    fn()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    sde = VPSDE()
    knots = make_knots(sde, "uniform_half_log_snr", STEPS)
    print("| batch | torch.randn | a seed per sample | ratio | Brownian path | torchsde BrownianTree |")
    print("|---|---|---|---|---|---|")
    for shape in ((64, 3, 8, 8), (64, 3, 32, 32), (4096, 2)):
        x = torch.zeros(shape)
        generator = torch.Generator().manual_seed(0)
        plain = best(lambda x=x, g=generator: torch.randn(x.shape, generator=g), 200)
        draw = as_draw(list(range(len(x))), x)
        seeded = best(lambda d=draw: d(knots[3], knots[4]), 200)

        def walk(x: torch.Tensor = x) -> None:
            path = as_draw(BrownianPath(3), x)
            for t, s in pairwise(knots):
                path(t, s)

        def tree(x: torch.Tensor = x) -> None:
            brownian = torchsde.BrownianTree(0.0, x, 1.0, entropy=3)
            for i in range(STEPS):
                brownian(i / STEPS, (i + 1) / STEPS)

        ours, theirs = best(walk, 4) / STEPS, best(tree, 2) / STEPS
        print(
            f"| {shape} | {plain:.0f} | {seeded:.0f} | {seeded / plain:.1f} | {ours:.0f} | {theirs:.0f} |", flush=True
        )
    shape = (3, 32, 32)
    streams = Streams(0, range(128), of=128)
    draws: dict[str, Callable[[], object]] = {
        "torch.randn": lambda: torch.randn(128, *shape),
        "streams at another step": lambda: streams.at(step=7),
        "normal": lambda: streams.normal("noise", shape),
        "uniform": lambda: streams.uniform("dequantization", shape),
        "lattice": lambda: streams.lattice("times"),
    }
    print(f"\n| 128 x {' x '.join(map(str, shape))} | us |\n|---|---|")
    for name, one in draws.items():
        print(f"| {name} | {best(one, 200):.0f} |", flush=True)


if __name__ == "__main__":
    main()
