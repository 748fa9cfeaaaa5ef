"""Likelihood beside the reference procedure: cost, noise, discretisation, overhead, batch mates.

    python benchmarks/likelihood.py --model=runs/photos        # trains the model there first: 15 minutes on one core

The model: a U-Net on 16 x 16 RGB patches of scikit-learn's two photographs, VP SDE. The reference procedure is that of
Song et al. 2021: one Rademacher probe kept along the path, SciPy's RK45 at rtol = atol = 1e-5 on the flattened batch,
the drift and the divergence from separate network calls; written out here from its description.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import integrate
from torch import Tensor

from scoresde import ReverseSDE, ScoreModel, load_model, log_likelihood
from scoresde.likelihood import DilutedProbes
from sde_lib import SDE, VPSDE, GaussianMixture

torch.set_num_threads(1)
TRAIN = (
    "--config=digits_vp",
    "--config.data.name=arrays",
    "--config.data.arrays.levels=256",
    "--config.data.arrays.layout=NHWC",
    "--config.network.unet.channels=32",
    "--config.network.unet.multipliers=(1,2)",
    "--config.network.unet.attention=(8,)",
    "--config.model.sigma_data=0.5",
    "--config.training.batch_size=64",
    "--config.training.learning_rate=2e-3",
    "--config.training.tensorboard=False",
    "--config.training.eval_every=0",
)
BITS = 3 * 16 * 16 * math.log(2.0)


def patches(n: int = 20_000) -> np.ndarray:
    """Random crops of both photographs, half of them mirrored, (n, 16, 16, 3) uint8."""
    from sklearn.datasets import load_sample_images

    images, rng = load_sample_images().images, np.random.default_rng(0)
    out = np.empty((n, 16, 16, 3), np.uint8)
    for i in range(n):
        image = images[i % 2]
        row, column = (int(rng.integers(side - 16)) for side in image.shape[:2])
        patch = image[row : row + 16, column : column + 16]
        out[i] = patch[:, ::-1] if rng.random() < 0.5 else patch
    return out


def trained(folder: Path, seconds: float) -> ScoreModel:
    """The model of the folder, trained there first if need be."""
    if not (folder / "run" / "checkpoints").exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "patches.npz", data=patches())
        data = f"--config.data.arrays.path={folder / 'patches.npz'}"
        budget = f"--config.training.max_seconds={seconds}"
        command = [sys.executable, "-m", "scoresde", "train", f"--workdir={folder / 'run'}", *TRAIN, data, budget]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return load_model(folder / "run")


def reference(rev: ReverseSDE, x: Tensor, probe: Tensor, tol: float) -> tuple[Tensor, int]:
    """log p by the reference procedure, (B,), and how often the drift was evaluated; every time the divergence too."""
    law, b = rev.law, len(x)
    assert isinstance(law, SDE)
    calls = 0

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        state = torch.from_numpy(flat[: x.numel()]).reshape(x.shape).to(x.dtype)
        knot = law.knot(t)
        with torch.no_grad():
            drift = rev(state, knot).velocity
        with torch.enable_grad():
            state.requires_grad_()
            (grad,) = torch.autograd.grad((rev(state, knot).velocity * probe).sum(), state)
        trace = (grad * probe).flatten(1).sum(1)
        return np.concatenate([drift.flatten().double().numpy(), trace.double().numpy()])

    start = np.concatenate([x.flatten().double().numpy(), np.zeros(b)])
    solution = integrate.solve_ivp(slope, (law.t_min, law.t_max), start, "RK45", rtol=tol, atol=tol)
    end = torch.from_numpy(solution.y[:, -1])
    return law.prior_logp(end[: x.numel()].reshape(x.shape)) + end[x.numel() :], calls


def seconds(run: Callable[[], object], repeat: int = 5) -> float:
    """Median of several times."""
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def scatter(rev: ReverseSDE, x: Tensor, repeat: int, **options: object) -> tuple[float, float]:
    """Standard deviation of log p over probes, RMS over the images; and products per image."""
    values = []
    for i in range(repeat):
        found = log_likelihood(rev, x, rng=i, doubling=False, divergence="hutchinson", **options)  # type: ignore[arg-type]
        values.append(found.log_prob)
    return rms(torch.stack(values).std(0)), float(found.vjps.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder of the model; trained there if it is empty")
    parser.add_argument("--train-seconds", type=float, default=900.0)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=24, help="probes for a standard deviation")
    arguments = parser.parse_args()
    model = trained(arguments.model, arguments.train_seconds)
    rev, spec = model.reverse(), model.data_spec
    assert spec is not None and isinstance(model.law, SDE)
    held_out = torch.from_numpy(patches(20_000 + arguments.images)[20_000:]).permute(0, 3, 1, 2)
    u = torch.rand(held_out.shape, generator=torch.Generator().manual_seed(0))
    x = model.encode(held_out, u)
    given = {"sigma_data": model.sigma_data}
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, {len(x)} patches, t_min = {model.law.t_min:g}, one thread\n")

    knot = model.law.knot(0.3)
    with torch.no_grad():
        forward = seconds(lambda: rev(x, knot), 15)
    signs = torch.sign(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))

    def vjp(products: int = 1) -> None:
        state = x.detach().requires_grad_()
        out = rev(state, knot).raw
        for k in range(products):
            torch.autograd.grad(out, state, signs, retain_graph=k < products - 1)

    both = seconds(vjp, 15)
    further = (seconds(lambda: vjp(3), 15) - both) / 2
    print("### Unit costs, in forwards without gradients\n")
    print(f"forward {1e3 * forward:.1f} ms; forward and product {both / forward:.2f}; a further product "
          f"{further / forward:.2f}\n")  # fmt: skip

    print("### Cost and noise\n")
    start = time.perf_counter()
    _, calls = reference(rev, x, signs, 1e-5)
    wall = time.perf_counter() - start
    kept, _ = scatter(rev, x, arguments.repeat, tol=1.0, num_probes=1, probes="rademacher", **given)
    cost_0 = calls * (forward + both) / forward
    rows = [("reference: one pixel probe, RK45 at 1e-5", calls, calls, cost_0, wall, kept)]
    for name, options in (
        ("32 steps, 2 probes, with error bars (default)", {"steps": 32}),
        ("32 steps, 2 probes, without doubling", {"steps": 32, "doubling": False}),
        ("32 steps, 8 probes, with error bars", {"steps": 32, "num_probes": 8}),
        ("32 steps, 48 colours, without doubling", {"steps": 32, "num_probes": 1, "probes": DilutedProbes(4),
                                                     "doubling": False}),
    ):  # fmt: skip
        start = time.perf_counter()
        found = log_likelihood(rev, x, rng=0, **options, **given)  # type: ignore[arg-type]
        wall = time.perf_counter() - start
        nfe, vjps = int(found.nfe[0]), int(found.vjps[0])
        plain = {k: v for k, v in options.items() if k != "doubling"}
        few = 6 if "48" in name else arguments.repeat
        spread, _ = scatter(rev, x, few, **plain, **given)
        cost = (nfe * both + max(0, vjps - nfe) * further) / forward
        rows.append((name, nfe, vjps, cost, wall, spread))
    print("| procedure | calls | products | cost in forwards | seconds | std of log p, nats | cost x variance |")
    print("|---|---|---|---|---|---|---|")
    for name, nfe, vjps, cost, wall, spread in rows:
        gain = cost_0 * kept**2 / (cost * spread**2)
        print(f"| {name} | {nfe} | {vjps} | {cost:.0f} | {wall:.1f} | {spread:.2f} | 1 / {gain:.0f} |")

    print("\n### Noise at equal products (std over that of one kept pixel probe)\n")
    print("| probes | products | std, nats | ratio |\n|---|---|---|---|")
    print(f"| one kept pixel probe | - | {kept:.1f} | 1 |")
    for name, options in (
        ("fresh pixel signs", {"steps": 64, "num_probes": 1, "probes": "rademacher"}),
        ("fresh Haar", {"steps": 64, "num_probes": 1, "probes": "haar"}),
        ("fresh cosine basis", {"steps": 64, "num_probes": 1}),
        ("fresh cosine basis, 32 steps", {"steps": 32, "num_probes": 2}),
    ):
        spread, vjps = scatter(rev, x, arguments.repeat, **options, **given)  # type: ignore[arg-type]
        print(f"| {name} | {vjps:.0f} | {spread:.2f} | {spread / kept:.3f} |")

    print("\n### Discretisation: error of log p on one kept probe, RMS over the patches, bits/dim\n")
    seeds = list(range(len(x)))
    tight = log_likelihood(rev, x, steps=256, num_probes=1, rng=seeds, **given)
    print("| steps | products (one probe) | error | reported (doubling) |\n|---|---|---|---|")
    for steps in (8, 12, 16, 24, 32, 40, 48, 64, 96):
        found = log_likelihood(rev, x, steps=steps, num_probes=1, rng=seeds, **given)
        assert found.kept_log_prob is not None and tight.kept_log_prob is not None
        error = rms(found.kept_log_prob - tight.kept_log_prob) / BITS
        print(f"| {steps} | {steps + 1} | {error:.1e} | {rms(found.discretization) / BITS:.1e} |")
    from solvers import PerSample

    probe = torch.sign(PerSample(seeds).bind(x).normal("kept"))
    basis = log_likelihood(rev, x, steps=256, num_probes=1, rng=seeds, probes="rademacher", **given).kept_log_prob
    assert basis is not None
    print("\n| RK45, tolerance | calls (3 forwards each) | error |\n|---|---|---|")
    for tol in (1e-2, 1e-3, 1e-4, 1e-5):
        value, calls = reference(rev, x, probe, tol)
        print(f"| {tol:g} | {calls} | {rms(value - basis) / BITS:.1e} |")

    print("\n### Overhead: wall-clock / (calls without products x forward + calls with one x (forward and product))\n")
    for steps in (16, 32):
        options = {"steps": steps, "num_probes": 1, "doubling": False, "rng": 0, "keep": False}
        wall = seconds(lambda o=options: log_likelihood(rev, x, **o, **given), 3)  # type: ignore[misc]
        print(f"{steps} steps: {wall / ((steps + 1) * both + forward):.3f}")

    print("\n### Precision: float32 against float64, nats, and what is reported\n")
    wide = model.double().reverse()
    options = {"steps": 16, "num_probes": 1, "doubling": False, "rng": seeds, "probes": "rademacher"}
    double = log_likelihood(wide, x.double(), **options, **given)  # type: ignore[arg-type]
    model.float()
    single = log_likelihood(model.reverse(), x, **options, **given)  # type: ignore[arg-type]
    print(f"{rms(single.log_prob - double.log_prob):.1e}; reported {float(single.precision[0]):.1e}")
    mates()


def mates() -> None:
    """A hard sample among easy ones: its error alone and in a batch of 1024."""
    print("\n### A hard sample among 1023 easy ones: its error in nats (mixture in two dimensions, VP, exact trace)\n")
    data = GaussianMixture([[-1.0, 0.3], [1.0, -0.5]], std=[0.02, 0.5], weights=[0.05, 0.95])
    law = VPSDE()
    rev = data.reverse(law)
    hard = torch.tensor([[-1.03, 0.33]], dtype=torch.float64)
    easy = torch.randn(1023, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5 + torch.tensor(
        [1.0, -0.5]
    )
    exact = data.log_prob(hard, law.knot(law.t_min))[0]
    end = law.knot(law.t_max)

    def flat(x: Tensor) -> Tensor:
        def slope(t: float, y: np.ndarray) -> np.ndarray:
            state = torch.from_numpy(y[: x.numel()]).reshape(x.shape).requires_grad_()
            velocity = rev(state, law.knot(t)).velocity
            trace = sum(
                torch.autograd.grad(velocity[:, i].sum(), state, retain_graph=True)[0][:, i] for i in range(2)
            )
            return np.concatenate([velocity.detach().flatten().numpy(), torch.as_tensor(trace).numpy()])

        start = np.concatenate([x.flatten().numpy(), np.zeros(len(x))])
        solved = integrate.solve_ivp(slope, (law.t_min, law.t_max), start, "RK45", rtol=1e-5, atol=1e-5).y[:, -1]
        return data.log_prob(torch.from_numpy(solved[:2])[None], end)[0] + solved[x.numel()]

    print("| | alone | among 1023 |\n|---|---|---|")
    errors = [float((flat(x) - exact).abs()) for x in (hard, torch.cat([hard, easy]))]
    print(f"| RK45 on the flattened batch, 1e-5 | {errors[0]:.1e} | {errors[1]:.1e} |")
    for tol in (1e-2, 1e-3):
        errors = [
            float((log_likelihood(rev, x, tol=tol, doubling=False, prior=lambda z: data.log_prob(z, end)).log_prob[0]
                   - exact).abs())
            for x in (hard, torch.cat([hard, easy]))
        ]  # fmt: skip
        print(f"| tol = {tol:g} nats | {errors[0]:.1e} | {errors[1]:.1e} |")


if __name__ == "__main__":
    main()
