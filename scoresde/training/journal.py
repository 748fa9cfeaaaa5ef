"""What a run writes: metrics, pictures, checkpoints; and how it is found again."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor
from tqdm.auto import tqdm

from scoresde import config as configs
from scoresde.config import ConfigError
from scoresde.images import save_png
from scoresde.storage import Checkpoint, CheckpointError, latest, read_checkpoint, save_checkpoint
from scoresde.storage.checkpoints import clean
from scoresde.storage.files import one_line
from scoresde.storage.processes import told
from scoresde.training.assembly import Run
from scoresde.training.evaluation import held_out_loss, sample_picture
from scoresde.training.metrics import Metrics
from scoresde.training.settings import check_same_run

Sampler = Callable[[Any, ConfigDict], Tensor]
Callback = Callable[[int, dict[str, float]], None]

_DIVERGED = (
    "The loss is {loss} between steps {first} and {last}. Lower training.learning_rate or training.clip, and resume "
    "from the last checkpoint."
)


class TrainingError(ArithmeticError):
    """Training failed numerically; the last checkpoint is still good."""


class Journal:
    """Writes the files of a run.

    Args:
        run: the run.
        workdir: its folder.
        sampler: see `scoresde.train`.
        callback: likewise.

    Attributes:
        sums: phase -> sum of the losses of `count` steps, on the device: added to at every step, read at a record.
        count: number of steps since the last record.
    """

    def __init__(self, run: Run, workdir: Path, sampler: Sampler | None, callback: Callback | None) -> None:
        self.r, self.workdir, self.sampler, self.callback = run, workdir, sampler, callback
        self.root = workdir / "checkpoints"
        self.sums = {p.name: torch.zeros((), dtype=torch.float64, device=run.device) for p in run.phases}
        self.count = 0
        self.metrics: Metrics | None = None  # of the first process

    # --- a run that was there before ----------------------------------------------------------------------------------
    def found(self, resume: bool) -> Checkpoint | None:
        """The newest checkpoint of the same run, if there is one."""
        newest = latest(self.root)
        if newest is None:
            return None
        if not resume:
            raise ConfigError(f"{self.workdir} holds a run at {newest.name}; resume it, or choose another --workdir.")
        found = read_checkpoint(newest)
        if not isinstance(found.state.get("config"), dict):
            raise CheckpointError(f"{newest / 'state.json'} is incomplete: it has no configuration.")
        paced = self.r.objective.paced or any(phase.options.decay != "constant" for phase in self.r.phases)
        check_same_run(configs.from_dict(found.state["config"]), self.r.config, self.workdir, paced)
        return found

    def restore(self, found: Checkpoint) -> float:
        """Go on from a checkpoint; returns the seconds that were spent already."""
        state, scaler = found.state, self.r.accelerator.scaler
        try:
            self.r.state.load(found)
            self.count = int(state["loss_count"])
            for name, total in self.sums.items():
                total.fill_(float(state["loss_sums"][name]))
            if scaler is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
            return float(state["seconds"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{found.path / 'state.json'} is incomplete: {error!r}.") from error

    def open(self, step: int, stack: ExitStack) -> None:
        """Write config.json and go on with metrics.jsonl, which `stack` closes."""
        if self.r.main:
            clean(self.root)
            configs.save(self.r.config, self.workdir / "config.json")
            self.metrics = Metrics(self.workdir, step, self.r.config.training.tensorboard)
            stack.callback(self.metrics.close)

    # --- what happens now and then ------------------------------------------------------------------------------------
    def log(self, step: int, seconds: float, values: dict[str, Any], bar: Any) -> None:
        """A record of the losses since the last one. Where there are several phases, their names follow those of the
        values: ``loss.critic``."""
        several = len(self.sums) > 1
        totals, count = self._totals(step), self.count
        losses = {f"loss.{name}" if several else "loss": total / count for name, total in totals.items()}
        for total in self.sums.values():
            total.zero_()
        self.count = 0
        metrics = {**losses, **{name: float(value) for name, value in values.items()}, "seconds": seconds}
        if self.metrics is not None:
            self.metrics.scalars(step, **metrics)
            bar.set_postfix({**{name: f"{v:.4g}" for name, v in losses.items()}, "step": step}, refresh=False)
        if self.callback is not None:
            self.callback(step, metrics)

    def _totals(self, step: int) -> dict[str, float]:
        """Sums of the losses since the last record, means over all processes."""
        found = {name: float(self.r.accelerator.reduce(total, "mean")) for name, total in self.sums.items()}
        for total in found.values():
            if not math.isfinite(total):
                raise TrainingError(_DIVERGED.format(loss=total, first=step - self.count + 1, last=step))
        return found

    def evaluate(self, step: int) -> None:
        """A record of the held-out loss; by all processes."""
        r, t = self.r, self.r.config.training
        place = (r.config.seed, step, t.steps)
        loss = held_out_loss(r.objective, r.averages, r.held_out, r.data, t.eval_samples, place, r.device)
        if self.metrics is not None:
            self.metrics.scalars(step, held_out_loss=loss)

    def sample(self, step: int) -> None:
        """A picture of samples, where they have one; drawn by all processes."""
        r = self.r
        try:
            image = sample_picture(r.objective, r.averages, r.config, self.sampler, r.held_out)
            if image is not None and self.metrics is not None:
                save_png(image, self.workdir / "samples" / f"step_{step:08d}.png")
                self.metrics.image(step, "samples", image)
        except Exception as error:  # whatever the sampler, the disk or a picture library say: the run goes on
            if r.main or not told(error):
                tell(f"No picture of the samples after step {step}: {one_line(error)}")

    def save(self, step: int, seconds: float) -> None:
        """A checkpoint."""
        totals, r = self._totals(step), self.r
        if r.main:
            scaler = r.accelerator.scaler
            state = {
                "config": configs.to_dict(r.config),
                **r.state.counters(),
                "seconds": seconds,
                "loss_sums": totals,
                "loss_count": self.count,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            tensors, models, keep = r.state.tensors(), r.state.models(), r.config.training.keep
            save_checkpoint(self.root, step, tensors, state, r.state.result, models, keep)


def tell(text: str) -> None:
    """A line for whoever watches, between those of the progress bar."""
    tqdm.write(text, file=sys.stderr)
