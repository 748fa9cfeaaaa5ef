"""The training loop.

Everything random at optimizer step n (which samples, times, noise, dropout) comes from generators seeded by
(seed, n, process, part), never from a running stream. So there is no random state to save, and a run that was
interrupted and resumed equals an uninterrupted one: bitwise on a CPU with the same number of threads. Runs with a
wall-time budget (`training.max_seconds`) end, and lower their learning rate, by the clock: they cannot be repeated
bitwise.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from tqdm.auto import tqdm

from scoresde import config as configs
from scoresde.config import ConfigError
from scoresde.data import Dataset, Split
from scoresde.data.spec import DataSpec
from scoresde.images import picture, save_png
from scoresde.losses import chain_loss, continuous_loss
from scoresde.models.score_model import ScoreModel
from scoresde.storage import Checkpoint, CheckpointError, latest, read_checkpoint, save_checkpoint
from scoresde.storage.checkpoints import clean
from scoresde.storage.files import one_line
from scoresde.storage.locks import locked
from scoresde.storage.optimizers import load_optimizer, optimizer_tensors
from scoresde.storage.processes import first_tells
from scoresde.storage.tensors import check_tensors
from scoresde.training.ema import EMA
from scoresde.training.metrics import Metrics
from scoresde.training.samples import draw_samples
from scoresde.training.settings import OPTIMIZERS, PRECISIONS, check, check_same_run, learning_rate
from scoresde.training.signals import Signals
from scoresde.training.streams import CLASSES, DROPOUT, EVAL, FLIP, NOISE, Order, generator, mix
from sde_lib import Chain, lookup

Sampler = Callable[[ScoreModel, ConfigDict], Tensor]
Callback = Callable[[int, dict[str, float]], None]


_DIVERGED = (
    "The loss is {loss} between steps {first} and {last}. Lower training.learning_rate or training.clip, and resume "
    "from the last checkpoint."
)


class TrainingError(ArithmeticError):
    """Training failed numerically; the last checkpoint is still good."""


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """Outcome of a run.

    Attributes:
        model: the model with its averaged weights, in eval mode.
        step: optimizer steps done.
        seconds: wall time spent training, interrupted parts included.
        workdir: holds config.json, metrics.jsonl, tensorboard/, samples/ and checkpoints/.
        data: what it was trained on.
    """

    model: ScoreModel
    step: int
    seconds: float
    workdir: Path
    data: Dataset


class _Objective(nn.Module):
    """The loss as a module: the wrappers of Accelerate (DDP, autocast) act on `forward` only."""

    def __init__(self, model: ScoreModel, config: ConfigDict) -> None:
        super().__init__()
        self.model = model
        t = config.training
        self.options: dict[str, Any] = {"weighting": t.weighting, "reduce": t.reduce}
        self.loss: Callable[..., Any] = chain_loss
        if not isinstance(model.law, Chain):
            self.loss = continuous_loss
            self.options["times"] = t.times
            if t.times == "lognormal":
                self.options.update(log_sigma_mean=t.log_sigma_mean, log_sigma_std=t.log_sigma_std)

    def forward(self, x_0: Tensor, classes: Tensor | None, rng: torch.Generator) -> Tensor:
        """(B,) losses."""
        condition = {} if classes is None else {"class_label": classes}
        return self.loss(self.model, x_0, rng=rng, condition=condition, **self.options).per_sample


def train(
    config: ConfigDict,
    workdir: str | Path,
    resume: bool = True,
    progress: bool | None = None,
    sampler: Sampler | None = None,
    callback: Callback | None = None,
) -> TrainingResult:
    """Train a score model by denoising score matching.

    Writes into `workdir`: config.json, metrics.jsonl, tensorboard/ (if installed), samples/ and checkpoints/. Starts
    from the newest checkpoint there. Runs on what Accelerate finds: one device, or several under torchrun, where
    `training.batch_size` is the number of samples per optimizer step over all of them. The workdir is locked: a second
    run in it is refused.

    Ctrl-C, SIGTERM and SIGHUP end the run after the step that it is at, with a checkpoint (a second Ctrl-C at once,
    without). A sample picture that cannot be drawn costs a line, not the run.

    Args:
        config: see `scoresde.config.defaults`.
        workdir: folder of the run.
        resume: continue from the newest checkpoint in `workdir`; if False, one there is an error.
        progress: whether to show a progress bar; None: on a terminal.
        sampler: (model, config) -> samples in data units for the sample pictures; `draw_samples` with one class after
            the other by default.
        callback: called with (step, metrics) after every logged step. An exception it raises ends the run.

    Raises:
        ConfigError: for settings that do not work, or a workdir whose run had other ones.
        LockedError: (an OSError) if another run is using the workdir.
        CheckpointError: for a damaged checkpoint.
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
        run = _Run(config, Path(workdir), sampler, callback)
        run.start(resume, stack)
        return run.run(progress)


class _Run:
    """One run: what `train` keeps between its steps."""

    def __init__(
        self, config: ConfigDict, workdir: Path, sampler: Sampler | None, callback: Callback | None
    ) -> None:
        """Build everything; nothing is written."""
        self.config, self.workdir, self.section = config, workdir, config.training
        self.sampler, self.callback = sampler or _one_class_after_the_other, callback
        self.root = workdir / "checkpoints"
        self.accelerator = _accelerator(self.section)
        self.main = self.accelerator.is_main_process
        parts = self.section.accumulation * self.accelerator.num_processes
        if self.section.batch_size % parts:
            raise ConfigError(
                f"training.batch_size={self.section.batch_size} must be a multiple of {parts} (accumulation "
                f"{self.section.accumulation} x {self.accelerator.num_processes} processes)."
            )
        self.part_size = self.section.batch_size // parts
        self.data = configs.make_data(config)
        if config.sampling.guidance != 1.0 and not self.data.spec.num_classes:
            raise ConfigError(f"sampling.guidance={config.sampling.guidance} needs data with classes; 1 is none.")
        torch.manual_seed(mix(config.seed))
        self.model = configs.make_model(config, self.data.spec, self.data.train.data)
        self._check_loss()
        self.model.to(self.accelerator.device)
        if self.section.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.section.compile:
            self.model.network.compile()
        self.ema = EMA(self.model, self.section.ema_decay)
        t = self.section
        make: Any = lookup(OPTIMIZERS, t.optimizer, "optimizer")
        betas = (t.beta1, t.beta2)
        optimizer = make(
            self.model.parameters(), t.learning_rate, betas=betas, eps=t.eps, weight_decay=t.weight_decay, fused=True
        )
        self.objective, self.optimizer = self.accelerator.prepare(_Objective(self.model, config), optimizer)
        self.step, self.seconds, self.saved = 0, 0.0, -1
        self.loss_sum, self.loss_count = torch.zeros((), dtype=torch.float64, device=self.accelerator.device), 0
        self.train_data = _placed(self.data.train, self.accelerator.device)
        self.held_out = _placed(self.data.held_out, self.accelerator.device)
        self.order = Order(len(self.train_data), t.batch_size, config.seed)
        self.metrics: Metrics | None = None
        # of signals and clocks, which the CPUs agree on: no device has to be waited for
        parallel = self.accelerator.num_processes > 1
        self.hosts = torch.distributed.new_group(backend="gloo") if parallel else None

    # --- before the first step ----------------------------------------------------------------------------------------
    def start(self, resume: bool, stack: ExitStack) -> None:
        """Take the workdir for as long as `stack` is open, and go on with the run in it."""

        def lock() -> None:
            stack.enter_context(locked(self.workdir / ".lock", f"The workdir {self.workdir}"))

        first_tells(lock)
        found = self._found(resume)
        if found is not None:
            self._restore(found)
        if self.main:
            clean(self.root)
            configs.save(self.config, self.workdir / "config.json")
            self.metrics = Metrics(self.workdir, self.step, self.section.tensorboard)
            stack.callback(self.metrics.close)

    def _found(self, resume: bool) -> Checkpoint | None:
        newest = latest(self.root)
        if newest is None:
            return None
        if not resume:
            raise ConfigError(
                f"{self.workdir} holds a run at {newest.name}; resume it, or choose another --workdir."
            )
        found = read_checkpoint(newest)
        if not isinstance(found.state.get("config"), dict):
            raise CheckpointError(f"{newest / 'state.json'} is incomplete: it has no configuration.")
        check_same_run(configs.from_dict(found.state["config"]), self.config, self.workdir)
        return found

    def _check_loss(self) -> None:
        """One tiny evaluation, so that a misspelt weighting fails before the first step and before any file."""
        x_0 = self.model.encode(self.data.train.data[:1])
        try:
            with torch.no_grad():
                _Objective(self.model, self.config)(x_0, None, generator(0))
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error

    def _restore(self, found: Checkpoint) -> None:
        where = found.path
        for name in ("model", "ema"):
            check_tensors(found.tensors[name], self.model.state_dict(), f"{where} ({name})")
        self.model.load_state_dict(found.tensors["model"])
        state = found.state
        try:
            self.ema.load(found.tensors["ema"], int(state["ema_updates"]))
            load_optimizer(self.optimizer.optimizer, self.model, found.tensors["optimizer"], where)
            self.step, self.seconds, self.saved = found.step, float(state["seconds"]), found.step
            self.loss_sum.fill_(float(state["loss_sum"]))
            self.loss_count = int(state["loss_count"])
            scaler = self.accelerator.scaler
            if scaler is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
            before, now = state["processes"], self.accelerator.num_processes
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where / 'state.json'} is incomplete: {error!r}.") from error
        if before != now and self.main:
            _tell(
                f"The run in {self.workdir} goes on with {now} process(es) and had {before}: from step {self.step + 1} "
                "on it draws other noise than it would have."
            )

    # --- the loop -----------------------------------------------------------------------------------------------------
    def run(self, progress: bool | None) -> TrainingResult:
        t = self.section
        by_clock = t.max_seconds > 0
        disable = True if not self.main else None if progress is None else not progress
        bar = tqdm(
            total=round(t.max_seconds) if by_clock else t.steps,
            initial=round(self.seconds) if by_clock else self.step,
            unit="s" if by_clock else "step",
            desc="training",
            disable=disable,
        )
        started = time.perf_counter() - self.seconds
        with Signals(once=self.hosts is None) as signals, bar:
            while True:
                self.seconds = time.perf_counter() - started
                fraction, caught = self._agreed(signals.caught)
                if fraction >= 1.0 or caught:
                    break
                norm, rate = self._step(fraction)
                self.step += 1
                if self.step % t.log_every == 0:
                    self._log(bar, rate, norm)
                if _due(self.step, t.eval_every):
                    self._evaluate()
                if _due(self.step, t.sample_every) and not signals.caught:
                    self._sample()
                if _due(self.step, t.checkpoint_every):
                    self._save()
                bar.update((round(self.seconds) if by_clock else self.step) - bar.n)
            if self.step != self.saved:
                self._save()
        if caught:
            self._end(caught)
        shadow = self.ema.state_dict()
        self.model.load_state_dict(shadow)
        return TrainingResult(self.model.eval(), self.step, self.seconds, self.workdir, self.data)

    def _agreed(self, caught: int) -> tuple[float, int]:
        """How much of the run is done (the larger of steps and wall time), and the signal by which it is to end, if
        any: the same on every process."""
        t = self.section
        clock = self.seconds / t.max_seconds if t.max_seconds > 0 and self.main else 0.0  # process 0's rules
        if self.hosts is not None:
            both = torch.tensor([clock, float(caught)], dtype=torch.float64)
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, self.hosts)
            clock, caught = float(both[0]), int(both[1])
        return max(self.step / t.steps, clock), caught

    def _end(self, caught: int) -> None:
        """Leave as the signal asks, after the run was saved."""
        if self.main:
            _tell(f"{signal.Signals(caught).name}: saved after step {self.step}; the same command goes on from there.")
        if caught == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + caught)

    def _step(self, fraction: float) -> tuple[Tensor | None, float]:
        """One optimizer step; returns the gradient norm and the learning rate."""
        t, accelerator = self.section, self.accelerator
        rate = learning_rate(t, self.step + 1, fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.train()
        rows = self.order.rows(self.step)
        for part in range(t.accumulation):
            first = (part * accelerator.num_processes + accelerator.process_index) * self.part_size
            mine = rows[first : first + self.part_size]
            where = (self.config.seed, self.step, accelerator.process_index, part)
            x_0, classes = self._batch(self.train_data, mine, where, t.class_dropout, t.flip)
            torch.manual_seed(mix(DROPOUT, *where))
            last = part == t.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.objective):
                loss = self.objective(x_0, classes, generator(NOISE, *where)).mean() / t.accumulation
                accelerator.backward(loss)
            self.loss_sum += loss.detach().double()
        self.loss_count += 1
        norm = accelerator.clip_grad_norm_(self.model.parameters(), t.clip) if t.clip > 0.0 else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return norm, rate

    def _batch(
        self, split: Split, rows: Tensor, where: tuple[int, ...], class_dropout: float, flip: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Samples in model units, dequantized where they have levels, and their classes, some replaced by null.

        With `flip`, half of the samples are mirrored along their last dimension.
        """
        spec: DataSpec = self.data.spec
        device = self.accelerator.device
        found = split.rows(rows).to(device)
        data = found.data
        rng = generator(CLASSES, *where)
        u = torch.rand(data.shape, generator=rng).to(device) if spec.levels is not None else None
        x_0 = self.model.encode(data, u)
        if flip:
            mirrored = (torch.rand(len(rows), generator=generator(FLIP, *where)) < 0.5).to(device)
            x_0 = torch.where(mirrored.reshape(-1, *[1] * (x_0.ndim - 1)), x_0.flip(-1), x_0)
        classes = found.condition.get("class_label")
        if classes is None:
            return x_0, None
        dropped = (torch.rand(len(rows), generator=rng) < class_dropout).to(device)
        return x_0, torch.where(dropped, spec.num_classes, classes)

    # --- what happens now and then ------------------------------------------------------------------------------------
    def _log(self, bar: Any, rate: float, norm: Tensor | None) -> None:
        mean = self.accelerator.reduce(self.loss_sum / self.loss_count, "mean")
        loss = float(mean)
        self.loss_sum.zero_()
        self.loss_count = 0
        if not math.isfinite(loss):
            first = self.step - self.section.log_every + 1
            raise TrainingError(_DIVERGED.format(loss=loss, first=first, last=self.step))
        values = {"loss": loss, "learning_rate": rate, "seconds": self.seconds}
        if norm is not None:
            values["gradient_norm"] = float(norm)
        if self.metrics is not None:
            self.metrics.scalars(self.step, **values)
            bar.set_postfix(loss=f"{loss:.4g}", step=self.step, refresh=False)
        if self.callback is not None:
            self.callback(self.step, values)

    def _evaluate(self) -> None:
        """Loss of the averaged weights on held-out data, always with the same times and noise."""
        if self.metrics is None:
            return
        n = min(len(self.held_out), self.section.eval_samples)
        objective = _Objective(self.model.eval(), self.config)
        total = 0.0
        with self.ema.applied(), torch.no_grad():
            for start in range(0, n, 256):
                rows = torch.arange(start, min(start + 256, n))
                where = (self.config.seed, start)
                x_0, classes = self._batch(self.held_out, rows, (EVAL, *where), 0.0)
                total += float(objective(x_0, classes, generator(EVAL, NOISE, *where)).double().sum())
        self.metrics.scalars(self.step, held_out_loss=total / n)

    def _sample(self) -> None:
        spec = self.data.spec
        if self.metrics is None or picture(torch.zeros(1, *spec.shape), spec) is None:
            return
        try:
            with self.ema.applied():
                image = picture(self.sampler(self.model.eval(), self.config), spec)
            if image is not None:
                save_png(image, self.workdir / "samples" / f"step_{self.step:08d}.png")
                self.metrics.image(self.step, "samples", image)
        except Exception as error:  # whatever the sampler, the disk or a picture library say: the run goes on
            _tell(f"No picture of the samples after step {self.step}: {one_line(error)}")

    def _save(self) -> None:
        loss_sum = float(self.accelerator.reduce(self.loss_sum, "mean"))
        if not math.isfinite(loss_sum):
            raise TrainingError(_DIVERGED.format(loss=loss_sum, first=self.step - self.loss_count + 1, last=self.step))
        if self.main:
            scaler = self.accelerator.scaler
            tensors = {
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": optimizer_tensors(self.optimizer.optimizer, self.model),
            }
            state = {
                "config": configs.to_dict(self.config),
                "ema_updates": self.ema.updates,
                "seconds": self.seconds,
                "loss_sum": loss_sum,
                "loss_count": self.loss_count,
                "scaler": None if scaler is None else scaler.state_dict(),
                "processes": self.accelerator.num_processes,
            }
            save_checkpoint(self.root, self.step, tensors, state, self.model.config(), self.section.keep)
        self.saved = self.step


def _tell(text: str) -> None:
    """A line for whoever watches, between those of the progress bar."""
    tqdm.write(text, file=sys.stderr)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _one_class_after_the_other(model: ScoreModel, config: ConfigDict) -> Tensor:
    classes = 0 if model.data_spec is None else model.data_spec.num_classes
    labels = torch.arange(config.sampling.n) % classes if classes else None
    return draw_samples(model, config, class_label=labels).data


def _placed(split: Split, device: torch.device) -> Split:
    """A split on the device if it is small enough to live there for good."""
    if split.data.numel() * split.data.element_size() > 2**30:
        return split
    return split.to(device)


def _accelerator(section: ConfigDict) -> Any:
    try:
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("Training needs Accelerate: pip install 'scoresde[train]'") from error
    # Accelerate keeps precision and device for the whole process; an earlier run in it may have had other ones
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        return Accelerator(mixed_precision=PRECISIONS[section.precision], cpu=section.cpu)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"training.precision={section.precision!r} does not work here: {error}") from error
