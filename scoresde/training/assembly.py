"""What a run is made of: device, data, objective, phases, averages. Nothing is written here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import nn

from scoresde import config as configs
from scoresde.config import ConfigError
from scoresde.data import Dataset, Split
from scoresde.objectives import Objective
from scoresde.storage.processes import hosts
from scoresde.training.averages import Averages
from scoresde.training.batches import Order, condition_dropout, placed
from scoresde.training.buffers import moving, same
from scoresde.training.checks import check_data, check_objective, tried
from scoresde.training.optimizers import phase_options
from scoresde.training.phases import Phase
from scoresde.training.settings import PRECISIONS
from scoresde.training.state import State
from solvers.counter import hashed


@dataclass(frozen=True, eq=False)
class Run:
    """The objects of a run.

    Attributes:
        config: its configuration.
        accelerator: Accelerate's.
        data: what is trained on; `train_data` and `held_out` are its splits, on the device if they are small.
        objective: what is trained, on the device.
        phases: of the objective, in their order.
        averages: of its parts.
        state: all tensors to go on from.
        order: of the rows.
        dropout: condition -> fraction of the samples that are trained without it.
        part_size: rows of one accumulated part in one process.
        hosts: group of the processes' CPUs, which agree on signals and clocks without waiting for a device.
    """

    config: ConfigDict
    accelerator: Any
    data: Dataset
    train_data: Split
    held_out: Split
    objective: Objective
    phases: list[Phase]
    averages: Averages
    state: State
    order: Order
    dropout: dict[str, float]
    part_size: int
    hosts: Any

    def to_train(self) -> None:
        """Parts of phases into training mode, all others into evaluation mode."""
        trained = {name for names in self.objective.phases.values() for name in names}
        self.objective.train()
        for name, part in self.objective.named_children():
            if name not in trained:
                part.eval()

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        found: torch.device = self.accelerator.device
        return found

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return bool(self.accelerator.is_main_process)

    def same_buffers(self) -> None:
        """Buffers (batch statistics, what an objective remembers) of process 0 in all processes."""
        same(moving(self.objective))


def assembled(config: ConfigDict, model: nn.Module | None, objective: Objective | None, data: Dataset | None) -> Run:
    """The run of a configuration, or of objects that are given instead of its sections.

    Raises:
        ConfigError: for what does not work together.
    """
    t = config.training
    accelerator = _accelerator(t)
    device, world = accelerator.device, accelerator.num_processes
    data = configs.make_data(config) if data is None else data
    check_data(data, t.eval_every > 0)
    if config.sampling.guidance != 1.0 and not data.spec.conditions:
        raise ConfigError(f"sampling.guidance={config.sampling.guidance} needs data with conditions; 1 is none.")
    torch.manual_seed(hashed(config.seed) >> 1)
    if objective is None:
        made = configs.make_model(config, data.spec, data.train.data) if model is None else model
        objective = configs.make_objective(config, made)
    elif model is not None:
        raise ConfigError("Give a model or an objective, which has its model already, not both.")
    check_objective(objective, t.ema_decay)
    part_size = _part_size(config, world, objective.group)
    options = phase_options(t, objective)
    for value in objective.frozen().values():
        if isinstance(value, nn.Module):
            value.to(device).eval().requires_grad_(False)
    objective.to(device)
    if t.channels_last:
        objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    same(objective.state_dict().values())  # own objects may differ between processes
    train_data, held_out = placed(data.train, device), placed(data.held_out, device)
    splits = (train_data, held_out) if t.eval_every > 0 else (train_data,)
    unused = tried(objective, splits, data.spec, part_size, device)
    phases = [Phase(objective, name, options[name], accelerator, unused[name]) for name in objective.phases]
    averages = Averages(objective)
    if t.compile:
        for part in {name for names in objective.phases.values() for name in names}:
            network: Any = objective.get_submodule(part)
            getattr(network, "network", network).compile()
    return Run(
        config,
        accelerator,
        data,
        train_data,
        held_out,
        objective,
        phases,
        averages,
        State(objective, averages, phases),
        Order(len(train_data), t.batch_size, config.seed),
        condition_dropout(t.condition_dropout, data.spec.conditions),
        part_size,
        hosts() if world > 1 else None,
    )


def _part_size(config: ConfigDict, world: int, group: int) -> int:
    t = config.training
    parts = t.accumulation * world
    if t.batch_size % parts:
        raise ConfigError(
            f"training.batch_size={t.batch_size} must be a multiple of {parts} (accumulation {t.accumulation} x "
            f"{world} processes)."
        )
    if t.batch_size // parts % group:
        raise ConfigError(
            f"This objective couples {group} consecutive samples, and a part has {t.batch_size // parts} (training."
            f"batch_size={t.batch_size} over {parts} parts): they must be a multiple."
        )
    return int(t.batch_size // parts)


def _accelerator(section: ConfigDict) -> Any:
    try:
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("Training needs Accelerate: pip install 'scoresde[train]'") from error
    # Accelerate keeps precision and device for the whole process; an earlier run in it may have had other ones
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # without being told so, Accelerate takes processes of CPUs for as many runs of one process
    cpu = section.cpu or not torch.accelerator.is_available()
    try:
        return Accelerator(mixed_precision=PRECISIONS[section.precision], cpu=cpu)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"training.precision={section.precision!r} does not work here: {error}") from error
