"""Moving averages of the parts of an objective, kept as modules."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scoresde.objectives import Average, Objective
from scoresde.training.buffers import moving


class Averages:
    r"""The averages that an objective asks for, by their names: copies of its parts that are not trained.

    After an update of a part, each of its averages moves as its rule says: :math:`\bar\theta \leftarrow \bar\theta +
    (1 - d_n)(\theta - \bar\theta)` at the n-th update, n = 1, 2, … (`Average`). Buffers are copied. The copies are in
    evaluation mode; they are on the device and in the memory format that the parts had.

    Source: Song et al. 2021, arXiv:2011.13456, app. H (the average), and the warm-up of their code.

    Args:
        objective: its parts are followed as `objective.averages()` says.

    Attributes:
        modules: the averages, as `At.averages` holds them.
        updates: how often each was updated.
    """

    def __init__(self, objective: Objective) -> None:
        self.rules: Mapping[str, Average] = objective.averages()
        self._parts = {name: getattr(objective, rule.part) for name, rule in self.rules.items()}
        self.modules: dict[str, nn.Module] = {
            name: copy.deepcopy(part).requires_grad_(False).eval() for name, part in self._parts.items()
        }
        self.updates = dict.fromkeys(self.rules, 0)
        self._weights = {name: _weights(module, self._parts[name]) for name, module in self.modules.items()}

    @torch.no_grad()
    def update(self, parts: Collection[str]) -> None:
        """Move the averages of some parts towards the weights that these have now."""
        for name, rule in self.rules.items():
            if rule.part in parts:
                self.updates[name] += 1
                averaged, now = self._weights[name]
                if averaged:
                    torch._foreach_lerp_(averaged, now, 1.0 - rule.kept(self.updates[name]))
                for mine, theirs in zip(moving(self.modules[name]), moving(self._parts[name]), strict=True):
                    mine.copy_(theirs)

    def of(self, part: str) -> str | None:
        """Name of the first average of a part, with which it is evaluated and sampled; None without."""
        return next((name for name, rule in self.rules.items() if rule.part == part), None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Every part that has an average holds its first one's weights, for the length of a `with` block."""
        names = [name for name, rule in self.rules.items() if self.of(rule.part) == name]
        kept = [{k: v.clone() for k, v in self._parts[name].state_dict().items()} for name in names]
        self.give(names)
        try:
            yield
        finally:
            for name, values in zip(names, kept, strict=True):
                self._parts[name].load_state_dict(values)

    def give(self, names: Collection[str]) -> None:
        """Copy averages into the parts that they are of."""
        for name in names:
            self._parts[name].load_state_dict(self.modules[name].state_dict())


def _weights(average: nn.Module, part: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that are averaged, and those that they follow."""
    pairs = [(a, p) for a, p in zip(average.parameters(), part.parameters(), strict=True) if p.is_floating_point()]
    return [a for a, _ in pairs], [p for _, p in pairs]
