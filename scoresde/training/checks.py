"""Whether an objective can be trained: asked before the first step, and before any file is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.config import ConfigError
from scoresde.data import Dataset, DataSpec, Split
from scoresde.objectives import At, Average, Objective
from scoresde.storage.files import one_line
from scoresde.storage.tensors import check_storable, not_finite
from scoresde.streams import Streams
from scoresde.training.batches import batch_of
from scoresde.training.buffers import unchanged


def check_data(data: Any, held_out: bool) -> None:
    """Raise unless the splits are what their specification says, every condition there; `held_out`: of those, too."""
    if not isinstance(data, Dataset):
        raise TypeError(f"`data` must be a Dataset, got {type(data).__name__}.")
    for name, split in (("train", data.train), ("held_out", data.held_out))[: 2 if held_out else 1]:
        try:
            data.spec.check(split.data)
            missing = [condition for condition in data.spec.conditions if condition not in split.condition]
            if missing:
                raise ValueError(f"The condition {missing[0]!r} of the specification is missing.")
            data.spec.check_condition(split.condition, len(split))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"The split {name!r} of the data {data.name!r}: {one_line(error)}") from error


def check_objective(objective: Any, ema_decay: float) -> None:
    """Raise unless phases, averages and the result of an objective name its parts, its parts are all there is, and what
    is frozen is none of them. Its average by default gets the decay of the run."""
    if not isinstance(objective, Objective):
        raise TypeError(f"`objective` must be an Objective, got {type(objective).__name__}.")
    objective.ema_decay = ema_decay
    parts = dict(objective.named_children())
    if not objective.phases:
        raise ConfigError("The objective has no phase: say which parts it trains, phases = {'train': ('model',)}.")
    for phase, names in objective.phases.items():
        if isinstance(names, str):
            raise ConfigError(f"The phase {phase!r} needs a tuple of parts: ({names!r},) instead of {names!r}.")
        _check_parts(parts, names, f"The phase {phase!r} trains")
        if not any(weight.requires_grad for name in names for weight in parts[name].parameters()):
            raise ConfigError(f"The phase {phase!r} trains nothing: its parts have no weights that require gradients.")
    averages = objective.averages()
    for name, rule in averages.items():
        if not isinstance(rule, Average):
            raise TypeError(f"The average {name!r} must be an Average, got {type(rule).__name__}.")
        _check_parts(parts, (rule.part,), f"The average {name!r} is of")
    _check_parts(parts, (objective.trains,), "The result is")
    for name in (*objective.phases, *averages):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"{name!r} names a file: use letters, digits, '_' and '-'.")
    if type(objective.group) is not int or objective.group < 1:
        raise ConfigError(f"`group` of the objective must be an int >= 1, got {objective.group!r}.")
    own = [name for name, _ in objective.named_parameters(recurse=False)]
    if own:
        raise ConfigError(f"The parameter {own[0]!r} of the objective is in no part: put it into a module of its own.")
    check_storable(objective.state_dict())
    seen: dict[Any, str] = {}
    for name, part in parts.items():
        bad = not_finite(part.state_dict())
        if bad is not None:
            raise ConfigError(
                f"{bad!r} of the part {name!r} is NaN or infinite, which no checkpoint takes: a mask or a table is "
                "registered by register_buffer(…, persistent=False)."
            )
        for weight in part.parameters():
            if seen.setdefault(weight, name) != name:
                raise ConfigError(f"The parts {seen[weight]!r} and {name!r} share a weight: make them one part.")
    if set(objective.result().state_dict()) != set(parts[objective.trains].state_dict()):
        raise ConfigError(f"`result()` must hold the weights of the part {objective.trains!r}, and no others.")
    _check_frozen(objective.frozen(), seen)


def _check_parts(parts: Mapping[str, nn.Module], names: Iterable[str], what: str) -> None:
    for name in names:
        if name not in parts:
            raise ConfigError(f"{what} {name!r}, which is no part of the objective; it has {', '.join(parts)}.")


def _check_frozen(frozen: Mapping[str, Any], weights: Mapping[Any, str]) -> None:
    for name, value in frozen.items():
        if isinstance(value, nn.Module):
            part = next((weights[weight] for weight in value.parameters() if weight in weights), None)
            if part is not None:
                raise ConfigError(
                    f"What is frozen as {name!r} has weights of the part {part!r}: keep a copy of its own, in a list "
                    "or a tuple, so that it is no part."
                )
        elif not isinstance(value, str | Path):
            raise TypeError(f"What is frozen as {name!r} must be a module or a file, got {type(value).__name__}.")
        elif not Path(value).is_file():
            raise FileNotFoundError(f"What is frozen as {name!r} is not there: {value}")


def tried(
    objective: Objective, splits: Sequence[Split], spec: DataSpec, part_size: int, device: torch.device
) -> dict[str, bool]:
    """A loss of every phase, with its gradient, on a few samples of the first split, and one without of held-out
    samples, the second split if there is one. What they change of buffers is undone.

    Returns:
        Phase -> whether there are weights without a gradient.
    """
    objective.eval().zero_grad()
    averages = {name: getattr(objective, rule.part) for name, rule in objective.averages().items()}
    rows = range(min(part_size, 2 * objective.group))  # two samples, of which a loss of the batch's is not one of each
    streams = Streams(0, rows, of=part_size, key=("try",), device=device)
    at = At(0, 1, streams, averages)
    batches = [batch_of(split, spec, torch.arange(len(rows)) % len(split), streams, device) for split in splits]
    unused = {}
    with unchanged(objective):
        try:
            objective.check(batches[0])
        except (TypeError, ValueError) as error:
            raise ConfigError(one_line(error)) from error
        for phase, names in objective.phases.items():
            try:
                losses = _checked(objective(phase, batches[0], at), len(rows), f"the phase {phase!r}")
            except (TypeError, ValueError) as error:
                raise ConfigError(one_line(error)) from error
            unused[phase] = _without_gradient(objective, phase, names, losses)
        for batch in batches[1:]:
            try:
                with torch.no_grad():
                    _checked(objective.held_out(batch, at), len(rows), "`held_out`")
            except (RuntimeError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"`held_out` of the objective, by default the loss of its first phase, fails without gradients: "
                    f"{one_line(error)}. Give it another one, or set training.eval_every=0."
                ) from error
    return unused


def _checked(losses: Any, n: int, what: str) -> Tensor:
    if isinstance(losses, Tensor) and tuple(losses.shape) == (n,) and losses.is_floating_point():
        return losses
    found = f"{losses.dtype} of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    raise ConfigError(
        f"An objective must return one loss per sample, floats of shape ({n},), and {what} returns {found}."
    )


def _without_gradient(objective: Objective, phase: str, names: Iterable[str], losses: Tensor) -> bool:
    """Whether weights of a phase have no gradient; a whole part without one is an error."""
    if losses.requires_grad:
        losses.sum().backward()
    missing = False
    for name in names:
        slopes = [w.grad is not None for w in getattr(objective, name).parameters() if w.requires_grad]
        if slopes and not any(slopes):
            raise ConfigError(
                f"The loss of the phase {phase!r} does not depend on the part {name!r}, which it trains. (What counts "
                "later only may have the factor 0.)"
            )
        missing = missing or not all(slopes)
    objective.zero_grad()
    return missing
