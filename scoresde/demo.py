"""The main job on real data: train on handwritten digits, compare solvers, score held-out digits, draw pictures.

    scoresde demo --workdir=runs/demo

Writes into the workdir: `samples.png` (a row of samples per solver), `solvers.csv`, `summary.json`, `forward.png`,
`training.png`, `classes.png`, `inpainting.png`, and the run itself (configuration, metrics, checkpoints).
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from scoresde.guidance import ClassifierFreeGuidance, inpaint
from scoresde.likelihood import bits_per_dim
from scoresde.metrics import energy_distance, gaussian_bits_per_dim, sliced_wasserstein
from scoresde.score_model import DataSpec, ScoreModel
from scoresde.training import train
from sde_lib import Chain
from solvers import (
    DDIM,
    AdaptiveRungeKutta,
    Blended,
    EulerMaruyama,
    Heun,
    Karras,
    Langevin,
    PredictorCorrector,
    Quadratic,
    Recommended,
    ReverseDiffusion,
    Solver,
    UniformHalfLogSNR,
    sample,
)

SHOWN = 16
"""Samples per row of the picture."""

FEW_STEPS = 800
"""Fewer optimizer steps than this within the time budget deserve a word."""

ROWS: Sequence[tuple[str, Solver, dict[str, Any]]] = (
    ("Euler-Maruyama", EulerMaruyama(), {"steps": 100, "grid": Quadratic()}),
    (
        "predictor-corrector",
        PredictorCorrector(ReverseDiffusion(), Langevin(snr=0.1)),
        {"steps": 50, "grid": UniformHalfLogSNR()},
    ),
    ("Heun", Heun(), {"steps": 18, "grid": Karras()}),
    ("DDIM", DDIM(), {"steps": 36, "grid": UniformHalfLogSNR()}),
    ("recommended, 18 calls", Recommended(), {"nfe": 18, "grid": Blended()}),
    ("adaptive ODE", AdaptiveRungeKutta(rtol=1e-3, atol=1e-3), {}),
)
"""What the table compares: name, solver, and how it is run."""


@dataclass(frozen=True)
class Row:
    """One line of the table: calls per sample, seconds for all, distances of the samples to held-out data."""

    solver: str
    nfe: float
    seconds: float
    energy_distance: float
    sliced_wasserstein: float


def main(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """Run the whole demo and return its summary."""
    plt = _pyplot()
    result = train(config, workdir)
    if config.training.max_seconds and result.step < FEW_STEPS:
        print(
            f"Only {result.step} steps fitted into {config.training.max_seconds:.0f} s; two idle cores did 1350: "
            "the figures below are of a half-trained model. Raise --config.training.max_seconds or free the machine."
        )
    model, data = result.model, result.data
    spec = data.spec
    if len(spec.shape) != 3 or spec.levels is None:
        raise ValueError(f"The demo needs images with integer grey levels, got data of shape {spec.shape}.")
    held_out, training = data.held_out.data, data.train.data
    n = len(held_out)

    pictures: dict[str, Tensor] = {}
    rows: list[Row] = []
    for name, solver, options in ROWS:
        start = time.perf_counter()
        solution = sample(model.reverse(), (n, *spec.shape), solver, rng=config.seed, device=model.device, **options)
        seconds = time.perf_counter() - start
        drawn = spec.decode(solution.x).cpu()
        nfe = float(solution.nfe.double().mean())
        rows.append(Row(name, nfe, seconds, *_distances(drawn, held_out)))
        pictures[f"{name}\n{nfe:.0f} calls"] = drawn[:SHOWN]
    generator = torch.Generator().manual_seed(config.seed)
    subset = training[torch.randperm(len(training), generator=generator)[:n]]
    rows.append(Row("training digits (floor)", 0.0, 0.0, *_distances(subset, held_out)))
    pictures["held-out\ndigits"] = held_out[:SHOWN]
    table = _table(rows)
    print(table)

    scores = bits_per_dim(model, held_out)
    gaussian, gaussian_error = gaussian_bits_per_dim(training, held_out, spec)
    print(f"held-out bits/dim: {scores}")
    causes = ", ".join(f"{name.replace('_', ' ')} {value:.1e}" for name, value in scores.systematic.items())
    print(f"of this, what does not average out: {causes}")
    print(f"full-covariance Gaussian: {gaussian:.4f} +- {gaussian_error:.4f} bits/dim")
    print(f"better than the Gaussian by {gaussian - scores.mean:.4f} bits/dim")

    with (workdir / "solvers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    summary = {
        "bits_per_dim": scores.mean,
        "standard_error": scores.standard_error,
        "what": scores.what,
        "systematic": scores.systematic,
        "gaussian_bits_per_dim": gaussian,
        "gaussian_standard_error": gaussian_error,
        "steps": result.step,
        "training_seconds": result.seconds,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "solvers": [asdict(row) for row in rows],
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    high = spec.levels - 1
    _grid(plt, workdir / "samples.png", pictures, high)
    _grid(plt, workdir / "forward.png", _forward(model, spec, held_out[:SHOWN], config.seed), high)
    if spec.num_classes:
        _grid(plt, workdir / "classes.png", _classes(model, spec, config.seed), high)
    _grid(plt, workdir / "inpainting.png", _inpainting(model, spec, held_out[:SHOWN], config.seed), high)
    _curve(plt, workdir / "training.png", workdir / "metrics.jsonl")
    print(f"pictures, table and summary in {workdir}")
    return summary


def _distances(x: Tensor, y: Tensor) -> tuple[float, float]:
    return energy_distance(x, y), sliced_wasserstein(x, y)


def _table(rows: Sequence[Row]) -> str:
    lines = [f"{'solver':<26}{'NFE':>7}{'seconds':>10}{'energy':>10}{'sliced W2':>12}"]
    for r in rows:
        lines.append(
            f"{r.solver:<26}{r.nfe:>7.0f}{r.seconds:>10.1f}{r.energy_distance:>10.4f}{r.sliced_wasserstein:>12.4f}"
        )
    return "\n".join(lines)


def _forward(model: ScoreModel, spec: DataSpec, data: Tensor, seed: int) -> dict[str, Tensor]:
    """Digits on their way to noise, one row per time, the same noise throughout."""
    x_0 = spec.encode(data)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    law = model.law
    if isinstance(law, Chain):
        levels = [round(i * (law.n - 1) / 7) for i in range(8)]
        return {f"level {i}": spec.decode(law.perturb(x_0, i, noise)) for i in levels}
    times = [law.t_min + (law.t_max - law.t_min) * i / 7 for i in range(8)]
    return {f"t = {t:.3g}": spec.decode(law.perturb(x_0, t, noise)) for t in times}


def _classes(model: ScoreModel, spec: DataSpec, seed: int) -> dict[str, Tensor]:
    """Class-conditional samples with guidance, one row per class."""
    per_class = 12
    labels = torch.arange(spec.num_classes, device=model.device).repeat_interleave(per_class)
    rev = ClassifierFreeGuidance(model.reverse({"class_label": labels}), scale=2.0)
    shape = (len(labels), *spec.shape)
    drawn = spec.decode(sample(rev, shape, Heun(), steps=18, grid=Karras(), rng=seed, device=model.device).x).cpu()
    return {str(c): part for c, part in enumerate(drawn.split(per_class))}


def _inpainting(model: ScoreModel, spec: DataSpec, data: Tensor, seed: int) -> dict[str, Tensor]:
    """Held-out digits, their upper halves, and three completions of the lower halves."""
    mask = torch.zeros(spec.shape, dtype=torch.bool)
    mask[:, : spec.shape[1] // 2] = True
    rows = {"held-out": data, "known": torch.where(mask, data, torch.zeros_like(data))}
    known = spec.encode(data).to(model.device)
    solver = PredictorCorrector(ReverseDiffusion(), Langevin(snr=0.1, steps=2))
    for i in range(3):
        solution = sample(
            model.reverse(),
            (len(data), *spec.shape),
            solver,
            steps=60,
            grid=UniformHalfLogSNR(),
            rng=seed + i,
            project=inpaint(known, mask),
            device=model.device,
        )
        rows[f"completion {i + 1}"] = spec.decode(solution.x).cpu()
    return rows


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("The demo draws with matplotlib: pip install 'scoresde[all]'") from error
    return plt


def _grid(plt: Any, path: Path, rows: dict[str, Tensor], high: int) -> None:
    """Rows of images, each with its name."""
    columns = max(len(row) for row in rows.values())
    figure, axes = plt.subplots(len(rows), columns, figsize=(0.55 * columns + 1.6, 0.58 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, images, strict=False):
            picture = image.permute(1, 2, 0).squeeze(-1).numpy()
            axis.imshow(picture, cmap="gray" if picture.ndim == 2 else None, vmin=0, vmax=high)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    left = 1.5 / (0.55 * columns + 1.6)
    figure.subplots_adjust(left=left, right=0.995, top=0.99, bottom=0.01, wspace=0.08, hspace=0.1)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curve(plt: Any, path: Path, metrics: Path) -> None:
    """Training and held-out loss against the step."""
    figure, axis = plt.subplots(figsize=(6, 3.5))
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    for key, label in (("loss", "training"), ("held_out_loss", "held-out (averaged weights)")):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
    axis.set_xlabel("step")
    axis.set_ylabel("denoising score matching loss")
    axis.set_yscale("log")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
