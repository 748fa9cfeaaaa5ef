"""Everything that a run goes on from, by name: what a checkpoint holds, and how it comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.objectives import Objective
from scoresde.storage import Checkpoint, CheckpointError
from scoresde.storage.checkpoints import OWN
from scoresde.storage.optimizers import load_optimizer, optimizer_tensors
from scoresde.storage.tensors import check_tensors
from scoresde.training.averages import Averages
from scoresde.training.phases import Phase


def model_config(model: nn.Module) -> dict[str, Any] | None:
    """What `load_model` builds a model from; None for one that cannot be built from a file, whose weights alone are
    saved."""
    config = getattr(model, "config", None)
    try:
        found: dict[str, Any] | None = config() if callable(config) else None
    except ValueError:  # put together in code
        return None
    return found


class State:
    """The tensors of a run.

    Args:
        objective: its parts, and the buffers of its own.
        averages: of parts.
        phases: their optimizers.
    """

    def __init__(self, objective: Objective, averages: Averages, phases: Sequence[Phase]) -> None:
        self.objective, self.averages, self.phases = objective, averages, phases
        self.frozen = {name: _digest(value) for name, value in objective.frozen().items()}
        """SHA-256 of what the objective depends on and training leaves alone, by name."""
        trains = objective.trains
        average = averages.of(trains)
        self.result = (f"part.{trains}", f"part.{trains}" if average is None else f"average.{average}")
        """Files of the model: with its raw and its averaged weights."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File -> tensors by name: ``part.NAME``, ``average.NAME``, ``optimizer.PHASE``, and `OWN`."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, part in self.objective.named_children():
            found[f"part.{name}"] = part.state_dict()
        for name, module in self.averages.modules.items():
            found[f"average.{name}"] = module.state_dict()
        for phase in self.phases:
            found[f"optimizer.{phase.name}"] = optimizer_tensors(phase.optimizer, phase.parts)
        parts = dict(self.objective.named_children())
        own = {k: v for k, v in self.objective.state_dict().items() if k.partition(".")[0] not in parts}
        return {**found, OWN: own} if own else found

    def models(self) -> dict[str, dict[str, Any] | None]:
        """File -> configuration of the model in it."""
        config = model_config(self.objective.result())
        trains = self.objective.trains
        averages = [f"average.{name}" for name, rule in self.averages.rules.items() if rule.part == trains]
        return dict.fromkeys([f"part.{trains}", *averages], config)

    def counters(self) -> dict[str, Any]:
        """What is no tensor, for state.json."""
        return {
            "averages": self.averages.updates,
            "objective": path_of(self.objective),
            "frozen": self.frozen,
            "phases": {phase.name: asdict(phase.options) for phase in self.phases},
        }

    def load(self, found: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: if it is of another objective, or was trained with another teacher.
            KeyError, TypeError: for counters that are missing.
        """
        where, state, now = found.path, found.state, self.counters()
        if state["objective"] != now["objective"]:
            raise CheckpointError(f"{where} is of the objective {state['objective']}, not of {now['objective']}.")
        for name, digest in {**dict.fromkeys(state["frozen"]), **now["frozen"]}.items():
            if state["frozen"].get(name) != digest:
                raise CheckpointError(
                    f"{where} was trained with another {name!r} than this one: its digest differs. Give the same one, "
                    "or start a new run in another --workdir."
                )
        for phase in self.phases:
            before = state["phases"].get(phase.name, {})
            for name, value in now["phases"][phase.name].items():
                if before and before.get(name) != value:
                    raise CheckpointError(
                        f"{where} was trained with {name}={before.get(name)!r} in the phase {phase.name!r}, and the "
                        f"objective has {value!r}. Give it the same one, or start a new run in another --workdir."
                    )
        mine = self.tensors()
        if set(mine) != set(found.tensors):
            raise CheckpointError(f"{where} holds {_names(found.tensors)}, and the objective has {_names(mine)}.")
        for file, tensors in found.tensors.items():
            if file.startswith("optimizer."):
                phase = next(phase for phase in self.phases if file == f"optimizer.{phase.name}")
                load_optimizer(phase.optimizer, phase.parts, tensors, where)
                continue
            check_tensors(tensors, mine[file], f"{where} ({file})")
            with torch.no_grad():
                for name, value in mine[file].items():
                    value.copy_(tensors[name])
        self.averages.updates = {name: int(state["averages"][name]) for name in self.averages.updates}


def path_of(objective: Objective) -> str:
    """Where the class of an objective is, ``module:Class``."""
    return f"{type(objective).__module__}:{type(objective).__qualname__}"


def _digest(value: Path | nn.Module) -> str:
    found = hashlib.sha256()
    if isinstance(value, nn.Module):
        for name, tensor in sorted(value.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        with Path(value).open("rb") as file:
            while chunk := file.read(2**22):
                found.update(chunk)
    return found.hexdigest()


def _names(tensors: Mapping[str, Any]) -> str:
    return ", ".join(sorted(tensors))
