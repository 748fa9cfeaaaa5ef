"""The error of the steps, from runs along the same path with half and with a quarter of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde.likelihood.path import Groups, Nodes, Tracer
from scoresde.likelihood.settings import Settings
from sde_lib import Knot


@dataclass
class Halvings:
    """By how much log p moved with the steps.

    Attributes:
        changes: from half of the steps to all, and from a quarter to half, (B,) each.
        calls: network calls of both runs.
        knots: knots of both, at each of which one estimate was made.
        kept_log_prob: log p by all steps and the one probe that is kept along the path, (B,); None if it is exact.
    """

    changes: tuple[Tensor, Tensor]
    calls: int
    knots: int
    kept_log_prob: Tensor | None

    @property
    def discretization(self) -> Tensor:
        """The error of the steps, (B,): of a method of order five the second halving leaves 1/32, so that a change that
        is small by chance is no bar."""
        last, before = (change.abs() for change in self.changes)
        return torch.maximum(last, before / 32.0)


def halved(
    settings: Settings, tracer: Tracer, nodes: Nodes, knots: Sequence[Knot], x: Tensor, kept: Sequence[Tensor] | None
) -> Halvings:
    """Both runs, on every second and on every fourth knot, and what they tell.

    Args:
        settings, tracer: of the whole run.
        nodes: what it found; the last trace at each knot is by `kept`.
        knots: what it was asked to walk along.
        x: where from, (B, *D).
        kept: one probe for all knots and runs, because fresh ones would hide the difference behind their noise; None
            for exact traces.
    """
    coarse = replace(tracer, differentiable=False, coarse=True, splits=())
    only: Groups = None if kept is None else [kept]

    def total(n: Nodes) -> Tensor:
        return settings.log_prior(n.latent).detach() + n.integral([t.values[:, -1].detach() for t in n.traces])

    with torch.no_grad():
        levels = [coarse.follow(x.detach(), knots[::stride], lambda k: only) for stride in (2, 4)]
        whole, half, quarter = (total(n) for n in (nodes, *levels))
    calls, places = sum(n.calls for n in levels), sum(len(n.knots) for n in levels)
    return Halvings((whole - half, half - quarter), calls, places, None if kept is None else whole)
