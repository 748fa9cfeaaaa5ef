"""What is trained, and on what loss: the base of all objectives. The training loop knows nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scoresde.data.batch import Batch
from scoresde.data.conditions import mapped
from scoresde.models import ScoreModel
from scoresde.streams import Streams
from sde_lib._checks import check_state


@dataclass(frozen=True)
class Average:
    r"""A moving average of the weights of one part: :math:`\bar\theta \leftarrow \bar\theta + (1 - d_n)(\theta -
    \bar\theta)` after the n-th update of the part, :math:`d_n = \min(d, (1 + n) / (10 + n))`.

    Args:
        part: name of the part.
        decay: d, in [0, 1).
        warmup: whether early weights are forgotten faster, as above; if False, :math:`d_n = d`.
    """

    part: str
    decay: float = 0.999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.decay, int | float) or not 0.0 <= self.decay < 1.0:
            raise ValueError(f"`decay` must be in [0, 1), got {self.decay!r}.")

    def kept(self, n: int) -> float:
        """d_n: the share of the average that stays at its n-th update, n = 1, 2, …"""
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay


@dataclass(frozen=True, eq=False)
class At:
    """Where training stands when a loss is asked for.

    Attributes:
        step: optimizer steps done, 0 at first.
        total: steps of the run (its best guess where a run ends by the clock).
        streams: what is random at this step, for the rows of this batch.
        averages: the averaged parts by the names of `Objective.averages`, as modules that are not trained.
    """

    step: int
    total: int
    streams: Streams
    averages: Mapping[str, nn.Module] = field(default_factory=dict)


class Objective(nn.Module):
    """A loss, and the parts that it trains: its child modules, by their names. Base class.

    A subclass assigns its parts as attributes, says in `phases` which of them are trained when, and gives `forward`.
    Parts that are no children (a frozen teacher) belong into a list or a tuple: they are neither trained nor saved.
    Whatever else has to survive an interruption is a buffer. After every update all processes have the buffers of the
    first one: what a buffer remembers of a batch should be reduced over the processes before.
    """

    phases: Mapping[str, tuple[str, ...]] = {"train": ("model",)}
    """Phase -> the parts that it trains, in the order in which they take turns at every step. A GAN:
    ``{"critic": ("critic",), "generator": ("generator",)}``. A phase's loss depends on all of its parts."""
    group: int = 1
    """Rows that a loss couples: so many consecutive rows of the global batch see each other (a transport plan, shared
    times), and have to be in one process's part. 1: every row by itself."""
    trains: ClassVar[str] = "model"
    """Name of the part that `result` is made of."""
    paced: bool = False
    """Whether the loss depends on `At.total`: then an interrupted run cannot be made longer."""
    ema_decay: float = 0.999
    """Decay of the average that `averages` has by default; a run sets it to ``training.ema_decay``."""
    optimizers: Mapping[str, Mapping[str, Any]] = {}
    """Phase -> options of its optimizer that differ from those of the section `training`, and `updates` per step:
    ``{"critic": {"learning_rate": 1e-4, "updates": 2}}``. A configuration may change them in ``training.phases``."""
    tables: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options of the constructor that are entries of a table, by their names: nested sections of a configuration."""

    def averages(self) -> dict[str, Average]:
        """Name -> a moving average of a part's weights, kept by the loop and read in `At.averages`. The first one of
        the part that `trains` names is what is sampled from."""
        return {"ema": Average(self.trains, self.ema_decay)}

    def frozen(self) -> Mapping[str, Path | nn.Module]:
        """What the loss depends on and training leaves alone, by name: a teacher, or the file that it was read from.
        The loop puts modules on its device and into evaluation mode. Digests of their tensors, or of the file, are
        saved with the run, and a resumed run with others is refused."""
        return {}

    def forward(self, phase: str, batch: Batch, at: At) -> Tensor:
        """(B,) losses of a part of the global batch; the loop takes their mean.

        Args:
            phase: a name in `phases`.
            batch: samples in data units (the objective encodes them), conditions already dropped.
            at: step, streams and averages. Everything random comes from ``at.streams``.
        """
        raise NotImplementedError

    def check(self, batch: Batch) -> None:
        """Raise TypeError or ValueError unless a batch is what the loss is of: asked once by the loop, no more. By
        default a tensor, and what the specification of the `result` says where that is a `ScoreModel`."""
        model = self.result()
        spec = model.data_spec if isinstance(model, ScoreModel) else None
        if not isinstance(batch.data, Tensor):
            raise TypeError(f"Data must be a tensor (torch.as_tensor), got {type(batch.data).__name__}.")
        if spec is not None:
            spec.check(batch.data)
        if spec is not None and spec.conditions:
            spec.check_condition(batch.condition, len(batch))
        elif isinstance(model, ScoreModel):
            if spec is None:
                check_state("data", batch.data)
            model.check_condition(batch.condition)

    def held_out(self, batch: Batch, at: At) -> Tensor:
        """(B,) losses of held-out samples, with averaged weights and without gradients; of the first phase by default
        (a loss that takes gradients itself, such as a penalty, says another one here)."""
        first: Tensor = self(next(iter(self.phases)), batch, at)
        return first

    def loss(
        self,
        data: Tensor,
        condition: Mapping[str, Any] | None = None,
        rng: torch.Generator | None = None,
        phase: str | None = None,
        averages: Mapping[str, nn.Module] | None = None,
    ) -> Tensor:
        """The mean loss of a batch, a scalar to minimise: for a loop of your own.

        Parts stay in their mode; a model's `reverse` and `sample` leave it in evaluation mode, so call `train()` after
        them. Data on the CPU are checked; a look at those on an accelerator would wait for it.

        Args:
            data: (B, *D) in data units, on any device (in model units where a model has no `data_spec`).
            condition: conditions by name, batch first.
            rng: generator, on the CPU, of a seed for everything that is random; torch's global one if None.
            phase: a name in `phases`; the first if None.
            averages: the averaged parts that the loss reads, by name.

        Raises:
            TypeError, ValueError: for data or conditions that do not fit, or a generator of another kind.
        """
        if rng is not None and (not isinstance(rng, torch.Generator) or rng.device.type != "cpu"):
            raise TypeError(f"`rng` must be a torch.Generator on the CPU, or None, got {rng!r}.")
        phase = next(iter(self.phases)) if phase is None else phase
        if phase not in self.phases:
            raise ValueError(f"There is no phase {phase!r}; there are: {', '.join(self.phases)}.")
        batch = Batch(data, condition or {})
        if isinstance(data, Tensor) and data.ndim and len(data) % self.group:
            raise ValueError(f"This objective couples {self.group} consecutive samples: {len(data)} is no multiple.")
        if not isinstance(data, Tensor) or (data.device.type == "cpu" and not torch.compiler.is_compiling()):
            self.check(batch)
        seed = int(torch.randint(2**63 - 1, (), generator=rng, device="cpu"))
        first = next(self.parameters(), None)
        device = data.device if first is None else first.device
        batch = Batch(data.to(device), mapped(lambda value: value.to(device), batch.condition))
        streams = Streams(seed, range(len(data)), len(data), device=device)
        at = At(0, 1, streams, averages or {})
        mean: Tensor = self(phase, batch, at).mean()
        return mean

    def result(self) -> nn.Module:
        """What is saved as the model: the part that `trains` names, by default."""
        found: nn.Module = getattr(self, self.trains)
        return found
