"""The training loop: it drives any objective, phase by phase, and knows nothing of what it trains.

Everything random at optimizer step n (which samples, their noise, what is dropped) is a function of (seed, n, phase,
update, row of the global batch), never a running stream. So there is no random state to save, a run that was
interrupted and resumed equals an uninterrupted one (bitwise on a CPU with the same number of threads and processes),
and the number of processes and of accumulated parts changes no more than the order of sums. Dropout and batch
statistics are the exception: their masks and means belong to a part of the batch, so that they are equal for an equal
split only. Runs with a wall-time budget (`training.max_seconds`) end, and lower their learning rate, by the clock:
they cannot be repeated bitwise.
"""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import nn
from tqdm.auto import tqdm

from scoresde.data import Dataset
from scoresde.data.batch import Batch
from scoresde.objectives import At, Objective
from scoresde.storage.locks import locked
from scoresde.storage.processes import first_tells
from scoresde.streams import Streams
from scoresde.training.assembly import Run, assembled
from scoresde.training.batches import batch_of
from scoresde.training.journal import Callback, Journal, Sampler, tell
from scoresde.training.phases import Phase
from scoresde.training.settings import check
from scoresde.training.signals import Signals
from solvers.counter import hashed


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """Outcome of a run.

    Attributes:
        model: what the objective makes (a `ScoreModel`, as a rule) with its averaged weights, in eval mode.
        step: optimizer steps done.
        seconds: wall time spent training, interrupted parts included.
        workdir: holds config.json, metrics.jsonl, tensorboard/, samples/ and checkpoints/.
        data: what it was trained on.
    """

    model: Any
    step: int
    seconds: float
    workdir: Path
    data: Dataset


def train(
    config: ConfigDict,
    workdir: str | Path,
    resume: bool = True,
    progress: bool | None = None,
    sampler: Sampler | None = None,
    callback: Callback | None = None,
    *,
    model: nn.Module | None = None,
    objective: Objective | None = None,
    data: Dataset | None = None,
) -> TrainingResult:
    """Train what a configuration describes, or objects of your own in the same way.

    Writes into `workdir`: config.json, metrics.jsonl, tensorboard/ (if installed), samples/ and checkpoints/. Starts
    from the newest checkpoint there. Runs on what Accelerate finds: one device, or several under torchrun, where
    `training.batch_size` is the number of samples per update over all of them. The workdir is locked: a second run in
    it is refused.

    Ctrl-C, SIGTERM and SIGHUP end the run after the step that it is at, with a checkpoint (a second Ctrl-C at once,
    without). A sample picture that cannot be drawn costs a line, not the run.

    Args:
        config: see `scoresde.config.defaults`.
        workdir: folder of the run.
        resume: continue from the newest checkpoint in `workdir`; if False, one there is an error.
        progress: whether to show a progress bar; None: on a terminal.
        sampler: (model, config) -> samples in data units for the sample pictures; `draw_samples` with one class after
            the other by default. Every process calls it, and the picture is of what the first one gets.
        callback: called with (step, metrics) after every logged step. An exception it raises ends the run.
        model: the model to train, instead of that of the sections `sde`, `network` and `model`; it is trained in place.
            One whose `config()` says how it is built comes back by `load_model`; of others, weights alone are saved.
        objective: what to train and on what loss, its model included, instead of that of the section `objective`. A
            run goes on with an objective of the same class, parts and options of its phases; that what its constructor
            was given is the same, too, is left to the caller.
        data: what to train on, instead of the section `data`.

    Raises:
        ConfigError: for settings that do not work, or a workdir whose run had other ones.
        LockedError: (an OSError) if another run is using the workdir.
        CheckpointError: for a damaged checkpoint, or one of another objective, model or teacher.
        TrainingError: if the loss becomes NaN or infinite.
        ImportError: without Accelerate (``pip install 'scoresde[train]'``).
        OSError: if a checkpoint cannot be written (a full disk); earlier ones are untouched.
        KeyboardInterrupt: after Ctrl-C, and SystemExit with 128 + its number after another signal: 143 for SIGTERM, 129
            for SIGHUP. The run was saved.
    """
    check(config)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    # the caller's random stream goes on as if nothing had happened
    with torch.random.fork_rng(devices), ExitStack() as stack:
        run = assembled(config, model, objective, data)
        loop = _Loop(run, Journal(run, Path(workdir), sampler, callback))
        loop.start(resume, stack)
        return loop.run(progress)


class _Loop:
    """What `train` keeps between its steps."""

    def __init__(self, run: Run, journal: Journal) -> None:
        self.r, self.journal, self.section = run, journal, run.config.training
        self.step, self.seconds, self.saved = 0, 0.0, -1

    def start(self, resume: bool, stack: ExitStack) -> None:
        """Take the workdir for as long as `stack` is open, and go on with the run in it."""
        workdir = self.journal.workdir

        def lock() -> None:
            stack.enter_context(locked(workdir / ".lock", f"The workdir {workdir}"))

        first_tells(lock)
        found = self.journal.found(resume)
        if found is not None:
            self.seconds = self.journal.restore(found)
            self.step = self.saved = found.step
        self.journal.open(self.step, stack)

    def run(self, progress: bool | None) -> TrainingResult:
        """Steps until the run is done, and its result."""
        t, r = self.section, self.r
        by_clock = t.max_seconds > 0
        bar = tqdm(
            total=round(t.max_seconds) if by_clock else t.steps,
            initial=round(self.seconds) if by_clock else self.step,
            unit="s" if by_clock else "step",
            desc="training",
            disable=True if not r.main else None if progress is None else not progress,
        )
        started = time.perf_counter() - self.seconds
        with Signals(once=r.hosts is None) as signals, bar:
            while True:
                self.seconds = time.perf_counter() - started
                fraction, caught = self._agreed(signals.caught)
                if fraction >= 1.0 or caught:
                    break
                values = self._step(fraction)
                self.step += 1
                if self.step % t.log_every == 0:
                    self.journal.log(self.step, self.seconds, values, bar)
                if _due(self.step, t.eval_every):
                    self.journal.evaluate(self.step)
                if _due(self.step, t.sample_every) and not self._agreed(signals.caught)[1]:
                    self.journal.sample(self.step)
                if _due(self.step, t.checkpoint_every):
                    self._save()
                bar.update((round(self.seconds) if by_clock else self.step) - bar.n)
            if self.step != self.saved:
                self._save()
        if caught:
            self._end(caught)
        average = r.averages.of(r.objective.trains)
        r.averages.give([] if average is None else [average])
        return TrainingResult(r.objective.result().eval(), self.step, self.seconds, self.journal.workdir, r.data)

    def _save(self) -> None:
        self.journal.save(self.step, self.seconds)
        self.saved = self.step

    def _agreed(self, caught: int) -> tuple[float, int]:
        """How much of the run is done (the larger of steps and wall time), and the signal by which it is to end, if
        any: the same on every process."""
        t = self.section
        clock = self.seconds / t.max_seconds if t.max_seconds > 0 and self.r.main else 0.0  # process 0's rules
        if self.r.hosts is not None:
            both = torch.tensor([clock, float(caught)], dtype=torch.float64)
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, self.r.hosts)
            clock, caught = float(both[0]), int(both[1])
        return max(self.step / t.steps, clock), caught

    def _end(self, caught: int) -> None:
        """Leave as the signal asks, after the run was saved."""
        if self.r.main:
            tell(f"{signal.Signals(caught).name}: saved after step {self.step}; the same command goes on from there.")
        if caught == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + caught)

    def _step(self, fraction: float) -> dict[str, Any]:
        """All phases once; returns learning rates and gradient norms by name."""
        r = self.r
        values: dict[str, Any] = {}
        r.to_train()
        total = self._total(fraction)
        number = self.step * sum(phase.options.updates for phase in r.phases)
        for phase in r.phases:
            rate = phase.set_rate(self.step + 1, fraction)
            for update in range(phase.options.updates):

                def part(i: int, phase: Phase = phase, update: int = update, number: int = number) -> tuple[Batch, At]:
                    return self._part(i, phase.name, update, number, total)

                loss, norm, done = phase.update(part, self.section.accumulation)
                self.journal.sums[phase.name] += loss / phase.options.updates
                r.same_buffers()
                if done:
                    r.averages.update(phase.parts.keys())
                number += 1
            named = "" if len(r.phases) == 1 else f".{phase.name}"
            values[f"learning_rate{named}"] = rate
            if norm is not None:
                values[f"gradient_norm{named}"] = norm
        self.journal.count += 1
        return values

    def _total(self, fraction: float) -> int:
        """Steps of the run; a guess where it ends by the clock."""
        t, done = self.section, self.step + 1
        return int(t.steps if t.max_seconds <= 0 else min(t.steps, max(done, round(done / max(fraction, 1e-9)))))

    def _part(self, part: int, phase: str, update: int, number: int, total: int) -> tuple[Batch, At]:
        """This process's samples of one accumulated part of batch `number`."""
        r, seed = self.r, self.r.config.seed
        first = (part * r.accelerator.num_processes + r.accelerator.process_index) * r.part_size
        mine = range(first, first + r.part_size)
        streams = Streams(seed, mine, self.section.batch_size, self.step, (phase, update), r.device)
        rows = r.order.rows(number)[mine.start : mine.stop]
        batch = batch_of(r.train_data, r.data.spec, rows, streams, r.device, r.dropout, self.section.flip)
        where = (seed, self.step, phase, update, r.accelerator.process_index, part)
        torch.manual_seed(hashed("dropout", *where) >> 1)
        return batch, At(self.step, total, streams, r.averages.modules)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
