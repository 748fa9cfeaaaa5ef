"""Samples of a model as the `sampling` section of a configuration asks for them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from ml_collections import ConfigDict
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.config import ConfigError, make_grid, make_solver
from scoresde.models.score_model import ScoreModel
from scoresde.storage.files import one_line
from sde_lib import Chain, GaussianMixture, Law, ReverseSDE

if TYPE_CHECKING:
    from solvers import Solution


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
    spec, s = model.data_spec, config.sampling
    if spec is None:
        raise ConfigError("This model has no data specification, so its samples have no shape.")
    n = s.n if n is None else n
    _check_counts(config, n)
    labels = _labels(class_label, n, spec.num_classes)
    if labels is None and s.guidance != 1.0:
        raise ConfigError(f"Guidance {s.guidance} needs a class to guide to; give one, or leave guidance at 1.")
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
        solution = _solved(rev, (len(rows), *model.state_shape), config, rows, model.device)
        drawn.append(model.decode(solution.x).cpu())
        calls.append(solution.nfe)
    return Samples(torch.cat(drawn), torch.cat(calls), time.perf_counter() - started)


def check_sampling(config: ConfigDict, law: Law) -> None:
    """Raise a `ConfigError` unless samples can be drawn as the `sampling` section asks.

    Whatever the solver, the grid, the budget and `sampling.end` refuse, they refuse of a single number under an exact
    score, too: so one is drawn.
    """
    _check_counts(config, config.sampling.n)
    if not math.isfinite(config.sampling.guidance):
        raise ConfigError(f"sampling.guidance must be finite, got {config.sampling.guidance}.")
    _solved(GaussianMixture([[0.0]], std=0.5).reverse(law), (1, 1), config, range(1), torch.device("cpu"))


def _check_counts(config: ConfigDict, n: int) -> None:
    if n < 1 or config.sampling.batch_size < 1:
        raise ConfigError(
            f"sampling.n and sampling.batch_size must be >= 1, got {n} and {config.sampling.batch_size}."
        )


def _solved(
    rev: ReverseSDE, shape: tuple[int, ...], config: ConfigDict, rows: Iterable[int], device: torch.device
) -> Solution:
    from solvers import sample

    s = config.sampling
    solver = make_solver(config)
    grid = None if isinstance(rev.law, Chain) else make_grid(config)  # a chain has levels of its own
    budget: dict[str, Any] = {"nfe": s.nfe} if s.nfe is not None else {"steps": s.steps}
    if solver.adaptive:
        budget = {}
    seeds = [s.seed * 2**32 + i for i in rows]
    try:
        return sample(rev, shape, solver, grid=grid, end=s.end, rng=seeds, device=device, **budget)
    except (OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"sampling: {one_line(error)}") from error


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
