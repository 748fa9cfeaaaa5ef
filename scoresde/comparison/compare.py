"""Many solvers on one problem, from the same start and on the same noise."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.comparison.bench import Bench, grid_key, integers
from scoresde.comparison.judges import Judges, Metric
from scoresde.comparison.references import Flow, References
from scoresde.comparison.result import Comparison
from scoresde.comparison.runs import Runs
from scoresde.comparison.specs import budgets_of, entries_of
from scoresde.comparison.store import RunStore
from scoresde.comparison.stored_references import ReferenceStore
from scoresde.metrics import Features
from scoresde.models.score_model import ScoreModel
from scoresde.storage.processes import first_tells, process, together
from sde_lib import ReverseSDE
from solvers import Solver
from solvers.grids import GridLike


def compare(
    problem: ReverseSDE | ScoreModel,
    solvers: Any,
    *,
    nfe: Sequence[int] = (5, 10, 20, 50),
    rtol: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4),
    condition: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
    shape: Sequence[int] | None = None,
    n: int = 256,
    repetitions: int = 3,
    seed: int = 0,
    grid: GridLike = None,
    end: str = "denoise",
    start: Tensor | None = None,
    path_error: bool = True,
    flow: Flow | None = None,
    tolerance: float | None = None,
    refine: int = 8,
    strong: Solver | None = None,
    samples: Tensor | Callable[[int, int], Tensor] | None = None,
    floor: Tensor | None = None,
    metrics: Sequence[str] | Mapping[str, Metric] | None = None,
    features: Features | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    min_run_time: float = 0.05,
    path: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> Comparison:
    r"""Run solvers at several budgets and set accuracy, network calls and time side by side.

    All runs start from the same prior draws and follow the same Brownian path: sample i of repetition r has its own
    seed, whatever the solver, grid or batch. A row of the result holds the means over repetitions of

    - ``nfe``: network calls per sample as counted by the run (guidance included), not the budget;
    - ``seconds``: wall clock for all n samples, after an untimed run of one sample (imports, tables of coefficients).
      A run shorter than `min_run_time` is repeated by `torch.utils.benchmark` for so long on ordinary noise, and the
      median counts; so does the median over repetitions. A longer run is timed once: drawing its shared path costs
      many times an ordinary draw and is an expense of the comparison, so the time it took is replaced by that of as
      many `torch.randn` calls;
    - ``network_seconds``: the network's share, measured around each call inside a run (events in the stream on a GPU:
      the run is not held up), and ``overhead_seconds`` = seconds - network_seconds, what the solver adds to it;
    - ``path_rms``, ``path_median``: over samples, of the distance
      :math:`\sqrt{\tfrac1D \sum_d (x_d - x^*_d)^2}` to the reference :math:`x^*` from the same start, in model units;
    - one column per metric: distance of the samples to `samples`, in data units.

    The reference is named in the row. Deterministic solver: `flow`, or the probability-flow ODE by
    `AdaptiveRungeKutta` at `tolerance`, between the solver's own first and last times. Stochastic solver: `refine`
    times as many steps of the solver itself (or of `strong`) on the same Brownian path, so that the figure is the
    strong error; a solver that draws noise outside the path (correctors, churn, torchsde) has no such limit and gets
    distances only. Every solver on a chain: itself over all levels.

    In a process group of `torch.distributed` the processes divide the samples of every run and of every reference,
    batch by batch, and all get the whole result; the first one writes. Figures are those of one process, bitwise where
    the batches are the same (`batch_size` <= n / processes), else as batches of another size round. The seconds are
    those of the slowest process for its share: they are of so many processes, as the row's `machine` says.

    A budget that is too small, and a run that fails, become rows with a ``status`` ("skipped", "failed") and a
    ``reason``. Adaptive solvers run at each `rtol` (with atol = rtol) instead of `nfe`, unless their rtol is not the
    class's default: then once, as they are. Given times take the place of budgets likewise.

    Args:
        problem: a `ScoreModel`, or a `ReverseSDE` such as ``mixture.reverse(sde)``, with `shape`.
        solvers: ``"heun, ddim(eta=0.5)@karras(rho=5)"``, or a sequence of such texts, `Solver` instances and (label,
            solver, grid), or a mapping label -> text, solver or (solver, grid). A grid after @ or in the tuple is the
            solver's own. Any name in `solvers.SOLVERS`.
        nfe: budgets of network calls per sample.
        rtol: tolerances of adaptive solvers.
        condition: conditions by name, n rows each: sample i has row i, whatever the batch or the repetition. They are
            added to those that a `ReverseSDE` has already.
        guidance: scale of classifier-free guidance, see `ClassifierFreeGuidance`; 1: none. References are guided, too.
        shape: D of one sample; a score model knows its own.
        n: samples per repetition.
        repetitions: of everything, with other starts and noise; they give the ``_se`` columns, standard errors.
        seed: of starts and noise.
        grid: for solvers without one of their own; `Blended` steps by default, on a chain its levels.
        end: "denoise" (posterior mean after the last step, one more call) or "stop".
        start: states to start from, (n, *D), instead of prior draws.
        path_error: whether to measure distances to references, which cost calls of their own. Without, the noise
            is one stream per sample instead of a path.
        flow: exact probability-flow map (x, from knot, to knot) -> x, where it is known.
        tolerance: of the adaptive reference; 1e-10 in float64, 1e-6 in float32.
        refine: steps of a stochastic reference per step of the solver's largest budget, where the error of a
            first-order method therefore comes out too small by a share of 1 / refine; 0 for no such references.
        strong: a solver whose run on the same path is the reference of every stochastic one.
        samples: reference samples in data units, (M, *D), or a function (count, seed) -> (count, *D).
        floor: more samples of the same law, independent of `samples` (training data, where `samples` are held out):
            their distance to `samples` is the noise floor. Without: fresh ones if `samples` is a function, else
            `samples` split in two, which overstates it.
        metrics: names in `scoresde.metrics.METRICS`, or name -> function (x, y) -> float. By default the sliced
            Wasserstein, energy and kernel distances, and the Fréchet distance if `features` is given.
        features: of the Fréchet distance.
        decode: model units to data units; a score model knows its own.
        batch_size: samples per run of a solver; all n if None. No figure but time and memory depends on it.
        dtype: of the states. Orders above two need float64.
        device: of the states; the model's, or the CPU.
        min_run_time: seconds for which a run that is shorter is repeated to time it; 0 for no repetitions.
        path: a ``.jsonl`` file (or a folder, for ``compare.jsonl`` in it) that finished runs are appended to. Calling
            again with it skips them; solvers, budgets and repetitions may be added. References lie beside it, in
            ``…_references``, a state per sample each, and are not solved again either (unless a `flow` is given).
        resume: False starts the file anew.
        progress: progress bars of the runs and of each reference. A comparison takes minutes, so they are shown by
            default if standard error is a terminal.

    Raises:
        TypeError, ValueError: for arguments that do not fit together, or a `path` with another comparison in it.
    """
    entries = entries_of(solvers)
    nfe, (repetitions,) = integers("nfe", nfe), integers("repetitions", [repetitions])
    if isinstance(rtol, float | int):
        rtol = (rtol,)
    if not all(isinstance(r, float | int) and 0 < r < 1 for r in rtol):
        raise ValueError(f"`rtol` must hold numbers in (0, 1), got {rtol!r}.")
    if not isinstance(min_run_time, float | int) or not 0 <= min_run_time < math.inf:
        raise ValueError(f"`min_run_time` must be a number of seconds >= 0, got {min_run_time!r}.")
    paths = bool(path_error and refine)
    bench = Bench(
        problem, shape, n, seed, grid, end, start, decode, batch_size, dtype, device, paths, condition, guidance
    )
    references = References(bench, path_error, flow, tolerance, refine, strong, progress)
    judges = together(lambda: Judges(samples, floor, metrics, features, bench.n, bench.data_shape, repetitions))
    runs = Runs(bench, references, judges, min_run_time)
    probe = runs.probe()
    store: RunStore | None = None

    def opened() -> None:
        nonlocal store
        if path is not None:
            file = Path(path)
            file = file if file.suffix == ".jsonl" else file / "compare.jsonl"
            begun = resume and file.exists() and file.stat().st_size > 0
            store = RunStore(file, runs.settings(), probe, resume)
            references.store = ReferenceStore(file.with_name(f"{file.stem}_references"), resume=begun)

    first_tells(opened)
    plan = [
        (r, entry, budget)
        for r in range(repetitions)
        for entry in entries
        for budget in budgets_of(entry, bench.grid_of(entry), nfe, rtol)
    ]
    result = Comparison(runs.settings(), runs.environment(), judges.floors, shape=bench.data_shape, range=bench.range)
    most = {entry.label: references.most_steps(entry, nfe) for entry in entries}
    disable = process()[0] > 0 or (None if progress is None else not progress)
    shown = tqdm(plan, desc="comparing", unit="run", disable=disable, file=sys.stderr)
    with nullcontext() if store is None else store, shown as bar:
        for r, entry, budget in bar:
            bar.set_postfix_str(f"{entry.label} {budget.name}", refresh=False)
            reference = references.name(entry, budget, most[entry.label])
            where = grid_key(bench.grid_of(entry))
            key = f"{budget.solver!r} | {where} | {budget.name} | {reference} | repetition {r}"
            done = first_tells(partial(_stored, store, key))
            if done is None:
                figures, kept = runs.execute(entry, budget, r, most[entry.label])
                done = {"key": key, "repetition": r, "budget": budget.name, **figures}, kept
                first_tells(partial(_store, store, *done))
            run, kept = done
            result.add({**run, "label": entry.label}, kept)
    return result


def _stored(store: RunStore | None, key: str) -> tuple[dict[str, Any], Tensor | None] | None:
    return None if store is None else store.find(key)


def _store(store: RunStore | None, run: dict[str, Any], samples: Tensor | None) -> None:
    if store is not None:
        store.add(run, samples)
