"""Samples of a model as the `sampling` section of a configuration asks for them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from ml_collections import ConfigDict
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.config import ConfigError, Sampling, make_sampling
from scoresde.data.conditions import mapped
from scoresde.models.score_model import ScoreModel
from scoresde.storage.files import one_line
from scoresde.storage.processes import Shares, process, together
from sde_lib import Chain, GaussianMixture, Law, ReverseSDE

if TYPE_CHECKING:
    from solvers import Solution


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples and what they cost.

    Attributes:
        data: (n, *D) in data units, on the CPU; where several processes drew them, in the first one, and (0, *D) in the
            others.
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
    condition: Mapping[str, Any] | None = None,
    progress: bool | None = False,
) -> Samples:
    """Samples in data units. Sample i is drawn from its own stream of `sampling.seed` and i.

    In a process group of `torch.distributed` the processes divide the batches, so that every one has to call this, and
    the first one gets the samples. They are those of one process, bitwise; only if there are fewer batches than
    processes do batches become smaller, and samples equal to rounding. What fails in one process is raised in all.

    Args:
        model: a score model with a data specification.
        config: its `sampling` section says the solver, the grid, steps or nfe, end, seed, guidance and batch size.
        n: number of samples; `sampling.n` if None.
        condition: conditions by name, n rows each; None for none.
        progress: whether to show a progress bar over the batches; None: on a terminal.

    Raises:
        ConfigError: for settings or conditions that do not fit each other or the model.
    """
    from scoresde.guidance import ClassifierFreeGuidance

    condition = dict(condition or {})
    s, n = together(lambda: _checked(model, config, n, condition))
    started = time.perf_counter()
    disable = process()[0] > 0 or (None if progress is None else not progress)
    shares = Shares(n, s.batch_size, coupled=s.solver.batch_coupled)

    def draw() -> tuple[list[Tensor], list[Tensor]]:
        drawn, calls = [], []
        for rows in tqdm(shares.mine, desc="sampling", unit="batch", disable=disable, file=sys.stderr):
            rev: ReverseSDE = model.reverse(mapped(_rows_on(rows, model.device), condition))
            if s.guidance != 1.0:
                rev = ClassifierFreeGuidance(rev, s.guidance)
            solution = _solved(rev, (len(rows), *model.state_shape), s, rows, model.device)
            drawn.append(model.decode(solution.x).cpu())
            calls.append(solution.nfe.cpu())
        return drawn, calls

    data, nfe = map(shares.first, together(draw))
    if data is None or nfe is None:
        data, nfe = torch.empty(0, *model.data_shape), torch.empty(0, dtype=torch.int64)
    return Samples(data, nfe, time.perf_counter() - started)


def _checked(
    model: ScoreModel, config: ConfigDict, n: int | None, condition: Mapping[str, Any]
) -> tuple[Sampling, int]:
    """What is asked for, and how many."""
    spec, s = model.data_spec, make_sampling(config)
    if spec is None:
        raise ConfigError("This model has no data specification, so its samples have no shape.")
    n = s.n if n is None else n
    _check_counts(s, n)
    try:
        spec.check_condition(condition, n)
    except (TypeError, ValueError) as error:
        raise ConfigError(one_line(error)) from error
    if not condition and s.guidance != 1.0:
        raise ConfigError(f"Guidance {s.guidance} needs a condition to guide to; give one, or leave guidance at 1.")
    return s, n


def check_sampling(config: ConfigDict, law: Law) -> None:
    """Raise a `ConfigError` unless samples can be drawn as the `sampling` section asks.

    Whatever the solver, the grid, the budget and `sampling.end` refuse, they refuse of a single number under an exact
    score, too: so one is drawn.
    """
    s = make_sampling(config)
    _check_counts(s, s.n)
    if not math.isfinite(s.guidance):
        raise ConfigError(f"sampling.guidance must be finite, got {s.guidance}.")
    _solved(GaussianMixture([[0.0]], std=0.5).reverse(law), (1, 1), s, range(1), torch.device("cpu"))


def _check_counts(s: Sampling, n: int) -> None:
    if n < 1 or s.batch_size < 1:
        raise ConfigError(f"sampling.n and sampling.batch_size must be >= 1, got {n} and {s.batch_size}.")


def _rows_on(rows: range, device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda value: value[rows.start : rows.stop].to(device)


def _solved(
    rev: ReverseSDE, shape: tuple[int, ...], s: Sampling, rows: Iterable[int], device: torch.device
) -> Solution:
    from solvers import sample

    grid = None if isinstance(rev.law, Chain) else s.grid  # a chain has levels of its own
    budget: dict[str, Any] = {"nfe": s.nfe} if s.nfe is not None else {"steps": s.steps}
    if s.solver.adaptive:
        budget = {}
    seeds = [s.seed * 2**32 + i for i in rows]
    try:
        return sample(rev, shape, s.solver, grid=grid, end=s.end, rng=seeds, device=device, **budget)
    except (OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"sampling: {one_line(error)}") from error
