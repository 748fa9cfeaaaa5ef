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
from typing import TYPE_CHECKING, Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from scoresde.config import make_data, make_law
from scoresde.data.spec import DataSpec
from scoresde.figures import LINES, image_rows, panels, plain_ticks, require_matplotlib
from scoresde.guidance import inpaint
from scoresde.likelihood import bits_per_dim
from scoresde.metrics import energy_distance, energy_distance_error, gaussian_bits_per_dim, sliced_wasserstein
from scoresde.models.score_model import ScoreModel
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    ("recommended", Recommended(), {"nfe": 18, "grid": Blended()}),
    ("adaptive ODE", AdaptiveRungeKutta(rtol=1e-3, atol=1e-3), {}),
)
"""What the table compares: name, solver, and how it is run."""


@dataclass(frozen=True)
class Row:
    """One line of the table: calls per sample, seconds for all, distances of the samples to held-out data, the energy
    distance with its standard error by bootstrap."""

    solver: str
    nfe: float
    seconds: float
    energy_distance: float
    energy_distance_error: float
    sliced_wasserstein: float


def main(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """Run the whole demo and return its summary.

    Raises:
        ImportError: without matplotlib.
        ValueError: for data or a forward law that the demo cannot show, before anything is trained.
    """
    require_matplotlib()
    _check(config)
    result = train(config, workdir)
    if config.training.max_seconds and result.step < FEW_STEPS:
        print(
            f"Only {result.step} training steps fitted into {config.training.max_seconds:.0f} s, where two idle cores "
            "make 1350, so that the figures below are those of a half-trained model. Raise "
            "--config.training.max_seconds, or let nothing else run on this machine."
        )
    model, data = result.model, result.data
    spec = data.spec
    held_out, training = data.held_out.data, data.train.data
    n = len(held_out)

    pictures: dict[str, Tensor] = {}
    rows: list[Row] = []
    for name, solver, options in ROWS:
        start = time.perf_counter()
        options = {"rng": config.seed, "device": model.device, **options}
        solution = sample(model.reverse(), (n, *model.state_shape), solver, **options)
        seconds = time.perf_counter() - start
        drawn = model.decode(solution.x).cpu()
        nfe = float(solution.nfe.double().mean())
        rows.append(Row(name, nfe, seconds, *_distances(drawn, held_out)))
        pictures[f"{name}, {nfe:.0f}"] = drawn[:SHOWN]
    generator = torch.Generator().manual_seed(config.seed)
    subset = training[torch.randperm(len(training), generator=generator)[:n]]
    rows.append(Row("training digits (floor)", 0.0, 0.0, *_distances(subset, held_out)))
    pictures["held-out digits"] = held_out[:SHOWN]
    table = _table(rows)
    print(table)

    scores = bits_per_dim(model, held_out)
    gaussian, gaussian_error = gaussian_bits_per_dim(training, held_out, spec)
    print(f"held-out bits/dim: {scores}")
    causes = ", ".join(f"{name.replace('_', ' ')} {value:.1e}" for name, value in scores.systematic.items())
    print(f"errors that more held-out digits would not reduce, in bits/dim: {causes}")
    print(f"a Gaussian with the mean and covariance of the training digits: {gaussian:.4f} +- {gaussian_error:.4f}")
    gain = gaussian - scores.mean
    print(f"the model is {abs(gain):.4f} bits/dim {'better' if gain > 0 else 'worse'} than this Gaussian")

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

    _pictures(model, spec, pictures, held_out[:SHOWN], config.seed, workdir)
    _curve(workdir / "metrics.jsonl", path=workdir / "training.png")
    print(f"pictures, table and summary in {workdir}")
    return summary


def _check(config: ConfigDict) -> None:
    spec, law = make_data(config).spec, make_law(config)
    if len(spec.shape) != 3 or spec.levels is None:
        raise ValueError(f"The demo shows images with integer grey levels; these data have shape {spec.shape}.")
    if isinstance(law, Chain):
        raise ValueError("The demo computes exact likelihoods and needs continuous time: choose an SDE without levels.")
    if config.codec.name != "affine":
        raise ValueError("The demo shows states as pictures, halves of which it holds: leave codec.name at affine.")


def _pictures(
    model: ScoreModel, spec: DataSpec, drawn: dict[str, Tensor], held_out: Tensor, seed: int, workdir: Path
) -> None:
    assert spec.levels is not None
    high = spec.levels - 1.0
    image_rows(drawn, 0.0, high, "solver, network calls", path=workdir / "samples.png")
    image_rows(_forward(model, held_out, seed), 0.0, high, "time t", path=workdir / "forward.png")
    if spec.num_classes:
        image_rows(_classes(model, spec, seed), 0.0, high, "class", path=workdir / "classes.png")
    image_rows(_inpainting(model, held_out, seed), 0.0, high, path=workdir / "inpainting.png")


def _distances(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    return energy_distance(x, y), energy_distance_error(x, y), sliced_wasserstein(x, y)


def _table(rows: Sequence[Row]) -> str:
    lines = [f"{'solver':<26}{'NFE':>7}{'seconds':>10}{'energy':>10}{'+-':>9}{'sliced W2':>12}"]
    for r in rows:
        lines.append(
            f"{r.solver:<26}{r.nfe:>7.0f}{r.seconds:>10.1f}{r.energy_distance:>10.4f}"
            f"{r.energy_distance_error:>9.4f}{r.sliced_wasserstein:>12.4f}"
        )
    return "\n".join(lines)


def _forward(model: ScoreModel, data: Tensor, seed: int) -> dict[str, Tensor]:
    """Digits on their way to noise, one row per time, the same noise throughout."""
    x_0 = model.encode(data)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    law = model.law
    times = [law.t_min + (law.t_max - law.t_min) * i / 7 for i in range(8)]
    return {f"{t:.3g}": model.decode(law.perturb(x_0, t, noise)) for t in times}


def _classes(model: ScoreModel, spec: DataSpec, seed: int) -> dict[str, Tensor]:
    """Class-conditional samples with guidance, one row per class."""
    per_class = 12
    labels = torch.arange(spec.num_classes, device=model.device).repeat_interleave(per_class)
    options: dict[str, Any] = {"steps": 18, "grid": Karras(), "rng": seed}
    drawn = model.sample(len(labels), Heun(), {"class_label": labels}, guidance=2.0, **options).cpu()
    return {str(c): part for c, part in enumerate(drawn.split(per_class))}


def _inpainting(model: ScoreModel, data: Tensor, seed: int) -> list[tuple[str, Tensor]]:
    """Held-out digits, their upper halves, and three completions of the lower halves."""
    mask = torch.zeros(model.state_shape, dtype=torch.bool)
    mask[:, : mask.shape[1] // 2] = True
    rows = [("held-out digits", data), ("known half", torch.where(mask, data, torch.zeros_like(data)))]
    known = model.encode(data).to(model.device)
    solver = PredictorCorrector(ReverseDiffusion(), Langevin(snr=0.1, steps=2))
    for i in range(3):
        solution = sample(
            model.reverse(),
            (len(data), *model.state_shape),
            solver,
            steps=60,
            grid=UniformHalfLogSNR(),
            rng=seed + i,
            project=inpaint(known, mask),
            device=model.device,
        )
        rows.append(("completions" if i == 1 else "", model.decode(solution.x).cpu()))  # one label for the three
    return rows


def _curve(metrics: Path, *, path: Path | None = None, ax: Axes | None = None) -> Figure:
    """Training and held-out loss against the step."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    with panels(ax, path, (6.0, 3.5)) as (figure, (axis,)):
        for i, (key, label) in enumerate((("loss", "training"), ("held_out_loss", "held-out, averaged weights"))):
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                style = {"color": LINES[i]["color"], "marker": LINES[i]["marker"] if len(points) < 40 else None}
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.set(xlabel="optimizer step", ylabel="denoising score matching loss (no unit)", yscale="log")
        plain_ticks(axis.yaxis)
        axis.legend()
    return figure
