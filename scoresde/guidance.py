"""Wrappers of a reverse SDE (guidance, clipping) and projections for the `project` hook (inpainting)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sde_lib import DataPrediction, Knot, Prediction, ReverseSDE, Wrapper
from sde_lib._checks import as_number
from sde_lib.reverse import knot_of
from solvers import Draw
from solvers.solver import Project


class ClassifierFreeGuidance(Wrapper):
    r"""Guidance without a classifier: :math:`F = F_\varnothing + w (F_c - F_\varnothing)`.

    Every parameterization is affine in the score at fixed x, so mixing raw outputs mixes scores. w = 1 is the
    conditional model, w = 0 the unconditional one, both exactly. Costs two network evaluations per call, which budgets
    (``nfe=``) count. The result is the score of no density unless w is 0 or 1; then it describes what `inner` does.

    Both models are asked at once, as one batch of twice the rows: x, times, conditions and whatever else belongs to
    the rows of `inner` (`per_row`) are repeated, and the conditions to be left out are followed by their nulls. That is
    equal to two calls bitwise where a row's arithmetic does not depend on the batch (closed forms, element by element),
    and to rounding where it does (matrix products and convolutions, whose order of summation depends on their size).
    Two calls are made where a null is no value of the condition's form: a function, not a `ScoreModel` with
    specifications, whose unconditional answer is that without the argument (None).

    Source: Ho & Salimans 2022, arXiv:2207.12598, eq. 6 (their guidance weight is w - 1).

    Args:
        inner: a conditional reverse SDE.
        scale: w, a finite number.
        null: conditions of the unconditional model, batch first as any, e.g. those of a negative prompt. By default
            what `inner` says stands for none (`Reverse.nulls`), of every condition that it has when called.
        drop: names of the conditions to leave out, instead of all; the others stay in both models. Not with `null`,
            which names them itself.
        at_once: whether both models are asked as one batch; False halves the memory, at twice the calls.

    Raises:
        TypeError: for names or nulls that are none.
        ValueError: for a scale that is not finite, or for `null` and `drop` together; when called, without a condition
            to leave out, for a name in `drop` that is not among the conditions, or a null of another number of rows.
    """

    describes = "guided"
    per_row = ("null",)

    def __init__(
        self,
        inner: ReverseSDE,
        scale: float,
        null: Mapping[str, Any] | None = None,
        drop: Sequence[str] | None = None,
        at_once: bool = True,
    ) -> None:
        super().__init__(inner)
        self.scale = as_number("scale", scale)
        if not math.isfinite(self.scale):
            raise ValueError(f"The guidance `scale` must be a finite number, got {scale!r}.")
        if null is not None and drop is not None:
            raise ValueError("Give `null`, whose names are left out, or `drop`, not both.")
        if null is not None and not isinstance(null, Mapping):
            raise TypeError(f"`null` must map names of conditions to values, got {type(null).__name__}.")
        if isinstance(drop, str) or not all(isinstance(name, str) for name in drop or ()):
            raise TypeError(f'`drop` must be a sequence of names of conditions, e.g. ("text",), got {drop!r}.')
        if self.scale in (0.0, 1.0):
            self.describes = inner.describes
        self.null = None if null is None else dict(null)
        self.drop = None if drop is None else tuple(drop)
        self.at_once = at_once
        self.nfe_per_call = 2 * inner.nfe_per_call

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        knot = t if isinstance(t, Knot) else knot_of(self.law, x, t)
        null = self._null(x)
        joined = self._joined(x, null) if self.at_once else None
        if joined is None:
            conditional = self.inner(x, knot)
            free = self.inner.given(**null)(x, knot)
            return conditional.replace(torch.lerp(free.raw, conditional.raw, self.scale))
        n = x.shape[0]
        rows = torch.arange(n, device=x.device).repeat(2)
        both = self.inner.select(rows).given(**joined)(torch.cat([x, x]), knot.select(rows))
        raw = torch.lerp(both.raw[n:], both.raw[:n], self.scale)
        return Prediction(x, knot, raw, both.parameterization)

    def _null(self, x: Tensor) -> dict[str, Any]:
        """The conditions of the unconditional model that differ from those of the conditional one."""
        if self.null is not None:
            return self.null
        given = [name for name, value in self.condition.items() if value is not None]
        if not given:
            raise ValueError(
                "Guidance needs a condition to leave out, and this model was given none: pass condition={…}, e.g. "
                '{"class_label": labels}.'
            )
        names = given if self.drop is None else self.drop
        for name in names:
            if name not in given:
                raise ValueError(f"Guidance cannot drop {name!r}: the conditions are {', '.join(given)}.")
        known = self.nulls(x.shape[0], x.device)
        return {name: known.get(name) for name in names}

    def _joined(self, x: Tensor, null: Mapping[str, Any]) -> dict[str, Any] | None:
        """Conditions of both models in one batch, those in `null` only; None where they do not fit into one."""
        known: Mapping[str, Any] | None = None
        joined = {}
        for name, value in null.items():
            one = self.condition.get(name)
            if one is None or value is None:  # what stands for none may be known
                known = self.nulls(x.shape[0], x.device) if known is None else known
                one, value = (known.get(name) if v is None else v for v in (one, value))
            both = _both(name, one, value)
            if both is _APART:
                return None
            joined[name] = both
        return joined


_APART = object()
"""Two values that have no common batch."""


def _both(name: str, value: Any, null: Any) -> Any:
    """A condition of a batch, followed by its null; `_APART` where the null has not the condition's form."""
    if isinstance(value, Mapping) and isinstance(null, Mapping) and value.keys() == null.keys():
        parts = {key: _both(f"{name}.{key}", value[key], null[key]) for key in value}
        return _APART if any(part is _APART for part in parts.values()) else parts
    if not isinstance(value, Tensor) or not isinstance(null, Tensor):
        same = value is null or (type(value) is type(null) and isinstance(value, _SHARED) and value == null)
        return value if same and value is not None else _APART
    if value.ndim == 0 or value.shape[1:] != null.shape[1:]:
        return value if value is null else _APART
    if len(value) != len(null):
        raise ValueError(f"The null of condition `{name}` has {len(null)} rows, the condition {len(value)}.")
    return torch.cat([value, null.to(value.dtype)])


_SHARED = (bool, int, float, str)


class ClipData(Wrapper):
    """Clips the data prediction to [low, high]; noise and score are derived again from the clipped data.

    It describes what `inner` does. What the data prediction estimates, E[x_0 | x_t], lies between the bounds that all
    data lie between, so that clipping only ever brings an estimate nearer: as an estimate of the same density it has a
    likelihood, and the bound on it (`elbo`) is never looser for data within.

    Args:
        inner: reverse SDE.
        low: lowest value of all elements of a state without noise, in model units: -1 for integers under the default
            codec.
        high: highest value, likewise: 1. Other codecs have other bounds: those that standardise have the data's,
            (low - shift) / scale, and those that mix elements (PCA, Haar) have none that are the same for all.
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
        known: states of the known data, ``model.encode(data)``, shape (B, *D) or D.
        mask: True (or 1) where states are known, broadcastable to (B, *D): elements of the state, which are those of
            the data unless the codec mixes them (PCA, Haar).

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
