"""Wrappers of a reverse SDE (guidance, clipping) and projections for the `project` hook (inpainting)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sde_lib import DataPrediction, Knot, Prediction, ReverseSDE, Wrapper
from sde_lib._checks import as_number
from solvers import Draw
from solvers.solver import Project


class ClassifierFreeGuidance(Wrapper):
    r"""Guidance without a classifier: :math:`F = F_\varnothing + w (F_c - F_\varnothing)`.

    Every parameterization is affine in the score at fixed x, so mixing raw outputs mixes scores. w = 1 is the
    conditional model, w = 0 the unconditional one. Costs two network evaluations per call, which budgets (``nfe=``)
    count. The result is the score of no density unless w is 0 or 1; then it describes what `inner` does.

    Source: Ho & Salimans 2022, arXiv:2207.12598, eq. 6 (their guidance weight is w - 1).

    Args:
        inner: a conditional reverse SDE.
        scale: w, a finite number.
        null: conditions of the unconditional model, batch first as any; None for every condition that `inner` has when
            called, by default.

    Raises:
        ValueError: for a scale that is not finite; when called without any condition to leave out.
    """

    describes = "guided"
    per_row = ("null",)

    def __init__(self, inner: ReverseSDE, scale: float, null: Mapping[str, Any] | None = None) -> None:
        super().__init__(inner)
        self.scale = as_number("scale", scale)
        if not math.isfinite(self.scale):
            raise ValueError(f"The guidance `scale` must be a finite number, got {scale!r}.")
        if self.scale in (0.0, 1.0):
            self.describes = inner.describes
        self.null = None if null is None else dict(null)
        self.nfe_per_call = 2 * inner.nfe_per_call

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        null = dict.fromkeys(self.condition) if self.null is None else self.null
        if self.null is None and not null:
            raise ValueError(
                "Guidance needs a condition to leave out, and this model was given none: pass condition={…}, e.g. "
                '{"class_label": labels}.'
            )
        conditional = self.inner(x, t)
        free = self.inner.given(**null)(x, conditional.knot)
        return conditional.replace(torch.lerp(free.raw, conditional.raw, self.scale))


class ClipData(Wrapper):
    """Clips the data prediction to [low, high]; noise and score are derived again from the clipped data.

    It describes what `inner` does. What the data prediction estimates, E[x_0 | x_t], lies between the bounds that all
    data lie between, so that clipping only ever brings an estimate nearer: as an estimate of the same density it has a
    likelihood, and the bound on it (`elbo`) is never looser for data within.

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


def inpaint(known: Tensor, mask: Tensor) -> Project:
    r"""A projection that holds the known elements to the forward process of their values, at every knot.

    At the data end they are exactly `known`; the others follow the reverse SDE beside them. **This is not conditional
    sampling**, however many steps are taken: the score is asked about known elements whose noise is drawn anew at every
    knot, so that the unknown ones are pulled too weakly. For a standard normal pair with correlation 0.5 and a known
    first element y, the second ends with mean 0.27 y and variance 0.82, where its conditional law has 0.5 y and 0.75;
    with correlation 0.8, 0.50 y and 0.49 for 0.8 y and 0.36 (VP, steps to zero).

    Source: Song et al. 2021, appendix I.2 (their code starts from noiseless known pixels and loses the final denoising;
    this does neither).

    Args:
        known: data in model units, shape (B, *D) or D.
        mask: True (or 1) where the data are known, broadcastable to (B, *D).

    Raises:
        TypeError: if `known` or `mask` is no tensor.
        ValueError: for known values that are not finite.
    """
    for name, value in (("known", known), ("mask", mask)):
        if not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}.")
    if not all(n == m or 1 in (n, m) for n, m in zip(known.shape[::-1], mask.shape[::-1], strict=False)):
        raise ValueError(f"`known` {tuple(known.shape)} and `mask` {tuple(mask.shape)} must fit each other.")
    mask = mask.bool()
    if not bool((torch.isfinite(known) | ~mask).all()):
        raise ValueError("`known` holds NaN or infinite values where `mask` says that the data are known.")

    there: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def project(x: Tensor, knot: Knot, draw: Draw) -> Tensor:
        if not all(_fits(value.shape, x.shape) for value in (known, mask)):
            raise ValueError(
                f"`known` {tuple(known.shape)} and `mask` {tuple(mask.shape)} must fit states of shape "
                f"{tuple(x.shape)}: (B, *D) or D."
            )
        place = x.dtype, x.device
        if place not in there:  # one copy a run: each waits for the device
            there[place] = known.to(x), mask.to(x.device)
        values, held = there[place]
        if not knot.is_data:
            noise = draw.normal("inpaint", knot.half_log_snr)
            values = knot.alpha * values + knot.sigma * noise
        return torch.where(held, values, x)

    return project


def _fits(shape: torch.Size, state: torch.Size) -> bool:
    """Whether a tensor of `shape` is broadcast to `state`."""
    return len(shape) <= len(state) and all(n in (1, m) for n, m in zip(shape[::-1], state[::-1], strict=False))
