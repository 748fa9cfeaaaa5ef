"""Wrappers of a reverse SDE (guidance, clipping) and projections for the `project` hook (inpainting)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sde_lib import DataPrediction, Knot, Prediction, ReverseSDE
from solvers import Draw
from solvers.solver import Project


class Wrapper(ReverseSDE):
    """Base: a reverse SDE around another one. A subclass gives `__call__` and `around`."""

    def __init__(self, inner: ReverseSDE) -> None:
        super().__init__(inner.law, inner.network, inner.parameterization, inner.condition)
        self.inner = inner
        self.nfe_per_call = inner.nfe_per_call

    def around(self, inner: ReverseSDE) -> Wrapper:
        """The same wrapper around another reverse SDE."""
        raise NotImplementedError

    def given(self, **condition: Any) -> ReverseSDE:
        return self.around(self.inner.given(**condition))

    def select(self, rows: Tensor) -> ReverseSDE:
        return self.around(self.inner.select(rows))


class ClassifierFreeGuidance(Wrapper):
    r"""Guidance without a classifier: :math:`F = F_\varnothing + w (F_c - F_\varnothing)`.

    Every parameterization is affine in the score at fixed x, so mixing raw outputs mixes scores. w = 1 is the
    conditional model, w = 0 the unconditional one. Costs two network evaluations per call.

    Source: Ho & Salimans 2022, arXiv:2207.12598, eq. 6 (their guidance weight is w - 1).

    Args:
        inner: a conditional reverse SDE.
        scale: w.
        null: conditions of the unconditional model; ``{"class_label": None}`` by default.
    """

    def __init__(self, inner: ReverseSDE, scale: float, null: dict[str, Any] | None = None) -> None:
        super().__init__(inner)
        self.scale = float(scale)
        self.null = {"class_label": None} if null is None else null
        self.nfe_per_call = 2 * inner.nfe_per_call

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        conditional = self.inner(x, t)
        free = self.inner.given(**self.null)(x, conditional.knot)
        return conditional.replace(torch.lerp(free.raw, conditional.raw, self.scale))

    def around(self, inner: ReverseSDE) -> Wrapper:
        return ClassifierFreeGuidance(inner, self.scale, self.null)


class ClipData(Wrapper):
    """Clips the data prediction to [low, high]; noise and score are derived again from the clipped data.

    Args:
        inner: reverse SDE.
        low: lowest value in model units.
        high: highest value in model units.
    """

    def __init__(self, inner: ReverseSDE, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(inner)
        if not low < high:
            raise ValueError(f"`low` must be < `high`, got {low}, {high}.")
        self.low, self.high = low, high

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        prediction = self.inner(x, t)
        return prediction.replace(prediction.data.clamp(self.low, self.high), DataPrediction())

    def around(self, inner: ReverseSDE) -> Wrapper:
        return ClipData(inner, self.low, self.high)


def inpaint(known: Tensor, mask: Tensor) -> Project:
    """A projection that holds the known elements to the forward process of their values, at every knot.

    At the data end they are exactly `known`. Source: Song et al. 2021, appendix I.2 (their code starts from noiseless
    known pixels and loses the final denoising; this does neither).

    Args:
        known: data in model units, shape (B, *D) or D.
        mask: True (or 1) where the data are known, broadcastable to (B, *D).
    """
    mask = mask.bool()

    def project(x: Tensor, knot: Knot, draw: Draw) -> Tensor:
        values = known.to(x)
        if not knot.is_data:
            noise = draw.normal("inpaint", knot.half_log_snr)
            values = knot.alpha * values + knot.sigma * noise
        return torch.where(mask.to(x.device), values, x)

    return project
