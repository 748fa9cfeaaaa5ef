"""What is looked at now and then: the loss on held-out data, by all processes, and a picture of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from scoresde.data import Dataset, Split
from scoresde.data.spec import DataSpec
from scoresde.images import picture
from scoresde.objectives import At, Objective
from scoresde.storage.processes import process
from scoresde.streams import Streams
from scoresde.training.averages import Averages
from scoresde.training.batches import batch_of
from scoresde.training.buffers import unchanged
from scoresde.training.samples import draw_samples

ROWS = 256
"""Most held-out samples that are looked at together."""


def held_out_loss(
    objective: Objective,
    averages: Averages,
    split: Split,
    data: Dataset,
    most: int,
    place: tuple[int, int, int],
    device: torch.device,
) -> float:
    """Mean loss of the averaged weights on held-out samples, always with the same times and noise; in full precision.

    Every process takes some of the samples and knows the mean of all of them. Buffers stay as they are.

    Args:
        objective: on its device; it is left in evaluation mode.
        averages: of its parts.
        split: the samples, `data.held_out` where they are to be read.
        data: what they are.
        most: number of samples that are looked at, from the first on.
        place: seed, step and total steps of the run.
        device: where the objective is.
    """
    seed, step, total = place
    group = objective.group
    n = min(len(split), most)
    n = max(n - n % group, min(group, len(split)))
    rank, world = process()
    size = group * max(1, min(ROWS, -(-n // world)) // group)
    summed = torch.zeros((), dtype=torch.float64, device=device)
    objective.eval()
    with unchanged(objective), averages.applied(), torch.no_grad():
        for start in range(rank * size, n, world * size):
            chosen = range(start, min(start + size, n))
            streams = Streams(seed, chosen, of=n, key=("held out",), device=device)
            batch = batch_of(split, data.spec, torch.arange(chosen.start, chosen.stop), streams, device)
            summed += objective.held_out(batch, At(step, total, streams, averages.modules)).double().sum()
    if world > 1:
        torch.distributed.all_reduce(summed)
    return float(summed) / n


def sample_picture(
    objective: Objective,
    averages: Averages,
    config: ConfigDict,
    sampler: Callable[..., Tensor] | None,
    split: Split,
) -> Tensor | None:
    """A picture of samples of the averaged model, uint8 (H, W, 1 or 3); None for samples that have none. All processes
    draw, the first one gets the picture. Conditions of samples are those of the split (`shown`)."""
    model: Any = objective.result()
    spec = getattr(model, "data_spec", None)
    if spec is None or picture(torch.zeros(1, *spec.shape), spec) is None:
        return None
    with averages.applied():
        model.eval()
        if sampler is None:
            samples = draw_samples(model, config, condition=shown(spec, config.sampling.n, split)).data
        else:
            samples = sampler(model, config)
    return picture(samples, spec) if process()[0] == 0 else None


def shown(spec: DataSpec, n: int, split: Split) -> dict[str, Any]:
    """Conditions of n samples to show: one class after the other, and of other kinds those of held-out samples."""
    found = split.rows(torch.arange(n) % len(split)).condition
    classes = {name: kind.classes for name, kind in spec.conditions.items() if kind.kind == "class"}
    return {name: torch.arange(n) % classes[name] if name in classes else found[name] for name in spec.conditions}
