"""What is looked at now and then: the loss on held-out data, by all processes, and a picture of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from scoresde.data import Dataset, Split
from scoresde.images import picture
from scoresde.objectives import At, Objective
from scoresde.storage.processes import process
from scoresde.streams import Streams
from scoresde.training.averages import Averages
from scoresde.training.batches import batch_of
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

    Every process takes some of the samples and knows the mean of all of them.

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
    with averages.applied(), torch.no_grad():
        for start in range(rank * size, n, world * size):
            chosen = range(start, min(start + size, n))
            streams = Streams(seed, chosen, of=n, key=("held out",), device=device)
            batch = batch_of(split, data.spec, torch.arange(chosen.start, chosen.stop), streams, device)
            summed += objective.held_out(batch, At(step, total, streams, averages.modules)).double().sum()
    if world > 1:
        torch.distributed.all_reduce(summed)
    return float(summed) / n


def sample_picture(
    objective: Objective, averages: Averages, config: ConfigDict, sampler: Callable[..., Tensor] | None
) -> Tensor | None:
    """A picture of samples of the averaged model, uint8 (H, W, 1 or 3); None for samples that have none. All processes
    draw, the first one gets the picture."""
    model = objective.result()
    spec = getattr(model, "data_spec", None)
    if spec is None or picture(torch.zeros(1, *spec.shape), spec) is None:
        return None
    with averages.applied():
        samples = (sampler or one_class_after_the_other)(model.eval(), config)
    return picture(samples, spec) if process()[0] == 0 else None


def one_class_after_the_other(model: Any, config: ConfigDict) -> Tensor:
    """Samples as the section `sampling` asks for them, of one class after the other where there are classes."""
    classes = 0 if model.data_spec is None else model.data_spec.num_classes
    labels = torch.arange(config.sampling.n) % classes if classes else None
    return draw_samples(model, config, condition=None if labels is None else {"class_label": labels}).data
