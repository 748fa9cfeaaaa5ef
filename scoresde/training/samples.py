"""Samples of a model as the `sampling` section of a configuration asks for them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.config import ConfigError, make_grid, make_solver
from scoresde.score_model import ScoreModel
from sde_lib import Chain


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples and what they cost.

    Attributes:
        data: (n, *D) in data units, on the CPU.
        nfe: network calls per sample, int64 (n,), guidance included.
        seconds: wall time.
    """

    data: Tensor
    nfe: Tensor
    seconds: float


def draw_samples(
    model: ScoreModel,
    config: ConfigDict,
    n: int | None = None,
    class_label: Tensor | int | None = None,
    progress: bool | None = False,
) -> Samples:
    """Samples in data units. Sample i is drawn from its own stream of `sampling.seed` and i.

    Args:
        model: a score model with a data specification.
        config: its `sampling` section says the solver, the grid, steps or nfe, end, seed, guidance and batch size.
        n: number of samples; `sampling.n` if None.
        class_label: a class for all, or one per sample (n,), for models with classes; None for no class.
        progress: whether to show a progress bar over the batches; None: on a terminal.

    Raises:
        ConfigError: for settings that do not fit each other or the model.
    """
    from scoresde.guidance import ClassifierFreeGuidance
    from solvers import sample

    spec, s = model.data_spec, config.sampling
    if spec is None:
        raise ConfigError("This model has no data specification, so its samples have no shape.")
    n = s.n if n is None else n
    if n < 1 or s.batch_size < 1:
        raise ConfigError(f"sampling.n and sampling.batch_size must be >= 1, got {n} and {s.batch_size}.")
    labels = _labels(class_label, n, spec.num_classes)
    if labels is None and s.guidance != 1.0:
        raise ConfigError(f"Guidance {s.guidance} needs a class to guide to; give one, or leave guidance at 1.")
    solver = make_solver(config)
    grid = None if isinstance(model.law, Chain) else make_grid(config)  # a chain has levels of its own
    budget: dict[str, Any] = {"nfe": s.nfe} if s.nfe is not None else {"steps": s.steps}
    if solver.adaptive:
        budget = {}
    drawn, calls, started = [], [], time.perf_counter()
    disable = None if progress is None else not progress
    starts = range(0, n, s.batch_size)
    for start in tqdm(starts, desc="sampling", unit="batch", disable=disable, file=sys.stderr):
        rows = range(start, min(start + s.batch_size, n))
        rev = model.reverse()
        if labels is not None:
            rev = model.reverse({"class_label": labels[rows.start : rows.stop].to(model.device)})
            if s.guidance != 1.0:
                rev = ClassifierFreeGuidance(rev, s.guidance)
        try:
            solution = sample(
                rev,
                (len(rows), *spec.shape),
                solver,
                grid=grid,
                end=s.end,
                rng=[s.seed * 2**32 + i for i in rows],
                device=model.device,
                **budget,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error
        drawn.append(spec.decode(solution.x).cpu())
        calls.append(solution.nfe)
    return Samples(torch.cat(drawn), torch.cat(calls), time.perf_counter() - started)


def _labels(class_label: Tensor | int | None, n: int, num_classes: int) -> Tensor | None:
    if class_label is None:
        return None
    if not num_classes:
        raise ConfigError("This model was trained without classes.")
    labels = torch.as_tensor(class_label, dtype=torch.int64)
    labels = labels.expand(n) if labels.ndim == 0 else labels
    if labels.shape != (n,):
        raise ConfigError(f"Classes must be one number or have shape ({n},), got {tuple(labels.shape)}.")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ConfigError(f"Classes go from 0 to {num_classes - 1}, got {int(labels.min())} … {int(labels.max())}.")
    return labels
