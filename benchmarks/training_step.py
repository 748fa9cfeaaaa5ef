"""Milliseconds of a training step outside of network, optimizer and data reading.

    python benchmarks/training_step.py                  # this tree
    python benchmarks/training_step.py --before=FOLDER  # and another checkout, by the same script

One thread, batches of 128 x 3 x 32 x 32 eight-bit images in 10 classes, the default configuration (denoising score
matching on the variance-preserving SDE, AdamW, clipping, one average). The network multiplies its input by the sum of
its weights, so that next to nothing of the step is its own: one weight, or those of the default U-Net, which are
clipped and averaged. What a forward and backward call of it, an optimizer step and reading the rows take is measured
alone and subtracted. Thread CPU time, the best of blocks of 10 steps, and of calls.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import microseconds
from torch import Tensor, nn

SHAPE, BATCH, ROWS = (3, 32, 32), 128, 4096
BLOCK, BLOCKS = 10, 12


class Scale(nn.Module):
    """The least that can be trained: with one weight, or with those of the default U-Net."""

    def __init__(self, shape: Any = SHAPE, conditions: Any = None, full: bool = False) -> None:
        super().__init__()
        from scoresde.networks import UNet

        sizes = [p.shape for p in UNet(SHAPE, attention=(16,)).parameters()] if full else [torch.Size(())]
        self.weights = nn.ParameterList(nn.Parameter(torch.full(size, 1e-6)) for size in sizes)

    def forward(self, x: Tensor, noise_level: Tensor, **condition: Any) -> Tensor:
        return torch.stack([weight.sum() for weight in self.weights]).sum() * x


class Images:
    """Uniform noise of eight bits."""

    def load(self) -> Any:
        from scoresde.data import Dataset, Split
        from scoresde.data.spec import DataSpec

        rng = torch.Generator().manual_seed(0)
        data = torch.randint(256, (ROWS, *SHAPE), generator=rng, dtype=torch.uint8)
        labels = torch.randint(10, (ROWS,), generator=rng)
        if hasattr(DataSpec, "integers"):  # before conditions had names
            spec, condition = DataSpec.integers(SHAPE, 256, 10), labels
        else:
            from scoresde.data.conditions import classes

            spec, condition = DataSpec(SHAPE, 256, classes(10)), {"class_label": labels}
        return Dataset("images", Split(data, condition), Split(data[:8], _rows(condition, 8)), spec)


def _rows(condition: Any, n: int) -> Any:
    return condition[:n] if isinstance(condition, Tensor) else {name: value[:n] for name, value in condition.items()}


def measured(full: bool) -> dict[str, float]:
    """Milliseconds per step of the scoresde that is imported: whole, and what is subtracted."""
    torch.set_num_threads(1)
    from scoresde import config
    from scoresde.data import DATASETS
    from scoresde.networks import NETWORKS
    from scoresde.training import train

    NETWORKS["scale"], DATASETS["images"] = Scale, Images  # type: ignore[index]
    settings = config.defaults()
    settings.network.name, settings.data.name, settings.network.scale.full = "scale", "images", full
    quiet = {"eval_every": 0, "sample_every": 0, "checkpoint_every": 0, "tensorboard": False, "cpu": True}
    settings.training.update({**quiet, "batch_size": BATCH, "steps": BLOCK * (BLOCKS + 2), "log_every": BLOCK})
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(settings, folder, progress=False, callback=lambda step, values: times.append(time.thread_time()))
    blocks = [1e3 * (b - a) / BLOCK for a, b in itertools.pairwise(times[1:])]

    network, x = Scale(full=full), torch.randn(BATCH, *SHAPE)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    slope = torch.randn_like(x)

    def call() -> None:
        network(x, x).backward(slope)

    data, rows = Images().load().train.data, torch.randint(ROWS, (BATCH,))
    return {
        "weights": sum(weight.numel() for weight in network.parameters()),
        "whole": min(blocks),
        "network": microseconds(call, 1, 50) / 1e3,
        "optimizer": microseconds(optimizer.step, 1, 50) / 1e3,
        "reading": microseconds(lambda: data[rows], 1, 50) / 1e3,
    }


def of(tree: Path, full: bool) -> SimpleNamespace:
    """What this script measures with the package in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--figures", *["--full"] * full]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tree)
    return SimpleNamespace(**json.loads(found.stdout.splitlines()[-1]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="FOLDER", type=Path, help="another checkout to measure beside this one")
    parser.add_argument("--full", action="store_true", help="with --figures: the weights of the default U-Net")
    parser.add_argument("--figures", action="store_true", help="this process's figures as JSON")
    arguments = parser.parse_args()
    if arguments.figures:
        print(json.dumps(measured(arguments.full)))
        return
    trees = [("this tree", Path(__file__).resolve().parents[1])]
    if arguments.before:
        trees.insert(0, ("before", arguments.before.resolve()))
    print("| ms per step | weights | whole | network | optimizer | reading | the rest |\n|---|---|---|---|---|---|---|")
    for full in (False, True):
        for name, tree in trees:
            m = of(tree, full)
            rest = m.whole - m.network - m.optimizer - m.reading
            parts = " | ".join(f"{value:.1f}" for value in (m.whole, m.network, m.optimizer, m.reading, rest))
            print(f"| {name} | {m.weights:,} | {parts} |")


if __name__ == "__main__":
    main()
