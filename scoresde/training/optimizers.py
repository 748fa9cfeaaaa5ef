"""Optimizers, and how the learning rate goes: by name, for every phase of an objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import nn

from scoresde.config import ConfigError, lookup_entry
from scoresde.objectives import Objective

DECAYS: Mapping[str, Callable[[float], float]] = {
    "constant": lambda f: 1.0,
    "linear": lambda f: 1.0 - f,
    "cosine": lambda f: 0.5 * (1.0 + math.cos(math.pi * f)),
}
"""Name -> factor of the learning rate after a fraction f of the run."""


@dataclass(frozen=True)
class PhaseOptions:
    """How one phase is optimized; the fields of the section `training` that a phase may have of its own.

    Args:
        updates: how many times per step, each on a batch of its own.
        optimizer: a name in `OPTIMIZERS`.
        learning_rate: at its highest.
        beta1: decay of the first moment; momentum of "sgd".
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled in "adamw", added to the gradient in the others.
        warmup: steps in which the learning rate rises linearly.
        decay: a name in `DECAYS`.
        clip: greatest norm of the gradient of all the phase's parts; 0: no clipping.

    Raises:
        ConfigError: for an unknown name or a value that makes no sense.
    """

    updates: int
    optimizer: str
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    warmup: int
    decay: str
    clip: float

    def __post_init__(self) -> None:
        lookup_entry(OPTIMIZERS, self.optimizer, "training.optimizer")
        lookup_entry(DECAYS, self.decay, "training.decay")
        for name, good, wanted in (
            ("updates", self.updates >= 1, ">= 1"),
            ("learning_rate", self.learning_rate > 0.0, "> 0"),
            ("beta1", 0.0 <= self.beta1 < 1.0, "in [0, 1)"),
            ("beta2", 0.0 <= self.beta2 < 1.0, "in [0, 1)"),
            ("eps", self.eps > 0.0, "> 0"),
            ("weight_decay", self.weight_decay >= 0.0, ">= 0"),
            ("warmup", self.warmup >= 0, ">= 0"),
            ("clip", self.clip >= 0.0, ">= 0"),
        ):
            if not good or math.isinf(getattr(self, name)):
                wanted = wanted if not good else "finite"
                raise ConfigError(f"training.{name} must be {wanted}, got {getattr(self, name)}.")

    def rate(self, n: int, fraction: float) -> float:
        """Learning rate of the n-th step (1, 2, …): linear warm-up, times the decay after `fraction` of the run."""
        warm = min(1.0, n / self.warmup) if self.warmup > 0 else 1.0
        return self.learning_rate * warm * DECAYS[self.decay](min(max(fraction, 0.0), 1.0))

    def optimizer_of(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimizer of these parameters."""
        return OPTIMIZERS[self.optimizer](list(parameters), self)


Weights = list[nn.Parameter]


def _adam(kind: type[torch.optim.Adam]) -> Callable[[Weights, PhaseOptions], torch.optim.Optimizer]:
    def make(weights: Weights, o: PhaseOptions) -> torch.optim.Optimizer:
        betas = (o.beta1, o.beta2)
        return kind(weights, o.learning_rate, betas=betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)

    return make


def _sgd(weights: Weights, o: PhaseOptions) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, o.learning_rate, momentum=o.beta1, weight_decay=o.weight_decay, fused=True)


OPTIMIZERS: Mapping[str, Callable[[Weights, PhaseOptions], torch.optim.Optimizer]] = {
    "adam": _adam(torch.optim.Adam),
    "adamw": _adam(torch.optim.AdamW),
    "sgd": _sgd,
}
"""Name -> function that makes the optimizer of some parameters with the options of a phase."""

def _whole(value: Any) -> int:
    number = int(value)
    if not isinstance(value, str) and number != value:
        raise ValueError(f"{value!r} is no whole number.")
    return number


_OF: Mapping[str, Callable[[Any], Any]] = {"int": _whole, "float": float, "str": str}
_KINDS = {f.name: _OF[str(f.type)] for f in fields(PhaseOptions)}


def common_options(section: ConfigDict) -> PhaseOptions:
    """What the section `training` says for every phase, with one update a step.

    Raises:
        ConfigError: for an unknown name or a value that makes no sense.
    """
    return PhaseOptions(**{name: section.get(name, 1) for name in _KINDS})


def phase_options(section: ConfigDict, objective: Objective) -> dict[str, PhaseOptions]:
    """The options of every phase: those of the section `training`, one update a step; then what the objective itself
    says (`Objective.optimizers`); then ``training.phases``, e.g. ``"critic:learning_rate=1e-4,updates=2;generator:
    beta1=0"``.

    Raises:
        ConfigError: for a phase or an option that does not exist, or a value that makes no sense.
    """
    common = common_options(section)
    given = overrides(section.phases)
    for name in (*given, *objective.optimizers):
        lookup_entry(objective.phases, name, "phase")
    found = {}
    for phase in objective.phases:
        changes = {**objective.optimizers.get(phase, {}), **given.get(phase, {})}
        for name in changes:
            lookup_entry(_KINDS, name, f"option of the phase {phase!r}")
        try:
            found[phase] = replace(common, **{name: _KINDS[name](value) for name, value in changes.items()})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Phase {phase!r}: {error}") from error
    return found


def overrides(text: str) -> dict[str, dict[str, str]]:
    """Options by phase from their text.

    Raises:
        ConfigError: for a text of another form.
    """
    found: dict[str, dict[str, str]] = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        phase, colon, options = part.partition(":")
        pairs = [pair.partition("=") for pair in options.split(",")]
        if not colon or not all(name.strip() and equals for name, equals, _ in pairs):
            raise ConfigError(
                f"training.phases={text!r}: write PHASE:OPTION=VALUE,OPTION=VALUE;PHASE:…, e.g. critic:updates=2."
            )
        found[phase.strip()] = {name.strip(): value.strip() for name, _, value in pairs}
    return found
