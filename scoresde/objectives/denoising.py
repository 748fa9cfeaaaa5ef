r"""Denoising score matching, on SDEs and chains alike.

For :math:`x_t = \alpha x_0 + \sigma \epsilon` the loss at one time is a weight times
:math:`\|\hat\epsilon(x_t) - \epsilon\|^2`; its minimiser is :math:`E[\epsilon | x_t] = -\sigma \nabla\log p_t`
(Vincent 2011; Song et al. 2021, arXiv:2011.13456, eq. 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scoresde.data.batch import Batch
from scoresde.objectives.clocks import Times
from scoresde.objectives.metrics import METRICS, Metric
from scoresde.objectives.objective import At, Objective
from scoresde.objectives.times import TIMES
from scoresde.objectives.uncertainty import Uncertainty
from scoresde.objectives.weightings import WEIGHTINGS, Weighting
from scoresde.streams import Streams
from sde_lib import SDE, Chain, Knot, lookup
from sde_lib._checks import check_nonnegative, check_state


class DenoisingScoreMatching(Objective):
    r"""Denoising score matching at the knots of a model's law.

    .. math:: E_{t,\epsilon}\; \frac{w}{p}\; d(\hat q - q), \qquad q = a x_0 + b \epsilon,\ x_t = \alpha x_0 + \sigma
              \epsilon

    The times say how t is drawn and, where they are `corrected` or the weighting is an integral over time, divide by
    their density p; the weighting says the quantity q and the weight w; the metric is the distance d. On a chain with
    uniform times and weighting it is DDPM's :math:`\|\hat\epsilon - \epsilon\|^2` (Ho et al. 2020, eq. 14) and, on a VE
    chain, SMLD's :math:`\sigma_i^2 \|\hat s + \epsilon / \sigma_i\|^2` (Song & Ermon 2019, eq. 6): the same quantity.

    Args:
        model: a `ScoreModel` on an SDE or a chain.
        times: how noise levels are drawn: one of `TIMES`, or its name.
        weighting: what they count: one of `WEIGHTINGS`, or its name.
        metric: how the error is measured: one of `METRICS`, or its name.
        stratified: spread the times of a global batch evenly (one random shift of a lattice; Kingma et al. 2021,
            arXiv:2107.00630, app. I.1). Each time alone is still drawn from its law.
        uncertainty: learn u(t), the log of the expected loss at a noise level, and train on :math:`e^{-u} \ell + u`, so
            that every level counts the same (Karras et al. 2024, arXiv:2312.02696). It is a part of its own,
            `Uncertainty`, and not needed afterwards.
        input_perturbation: gamma: the state is noised with :math:`\epsilon + \gamma\xi` but the target stays epsilon,
            as a network meets its own errors in sampling (Ning et al. 2023, arXiv:2301.11706; they use 0.1). It biases
            the score: not for likelihoods.

    Raises:
        TypeError: for a model without a law.
        ValueError: for unknown names, or times and weightings that do not work on the law.
    """

    tables: ClassVar[Mapping[str, Mapping[str, Any]]] = {"times": TIMES, "weighting": WEIGHTINGS, "metric": METRICS}

    def __init__(
        self,
        model: nn.Module,
        times: Times | str = "uniform",
        weighting: Weighting | str = "uniform",
        metric: Metric | str = "mean",
        stratified: bool = True,
        uncertainty: bool = False,
        input_perturbation: float = 0.0,
    ) -> None:
        super().__init__()
        law = getattr(model, "law", None)
        if not isinstance(law, SDE | Chain):
            raise TypeError(f"`model` must be a ScoreModel, which has a law, got {type(model).__name__}.")
        check_nonnegative("input_perturbation", input_perturbation)
        self.model: Any = model
        self.law = law
        self.times: Times = _entry("times", times, Times, TIMES)
        self.weighting: Weighting = _entry("weighting", weighting, Weighting, WEIGHTINGS).on(model)
        self.metric: Metric = _entry("metric", metric, Metric, METRICS)
        self.stratified, self.input_perturbation = stratified, input_perturbation
        self.drawer = self.times.on(law, self.times.corrected or self.weighting.integral)
        self.uncertainty = Uncertainty() if uncertainty else None
        self.phases = {"train": ("model", "uncertainty") if uncertainty else ("model",)}

    # --- what the loop calls ------------------------------------------------------------------------------------------
    def forward(self, phase: str, batch: Batch, at: At) -> Tensor:
        x_0, knot, noise = self._drawn(batch, at.streams)
        moved = noise
        if self.input_perturbation:
            more = at.streams.normal("input_perturbation", x_0.shape[1:], x_0.dtype)
            moved = noise + self.input_perturbation * more
        losses = self._losses(x_0, knot, noise, moved, batch.condition)
        if self.uncertainty is None:
            return losses
        u = self.uncertainty(knot.spread(knot.half_log_snr, x_0)).to(losses.dtype)
        return torch.exp(-u) * losses + u

    def held_out(self, batch: Batch, at: At) -> Tensor:
        """(B,) losses without what only training has: the learned uncertainty, and the input perturbation."""
        x_0, knot, noise = self._drawn(batch, at.streams)
        return self._losses(x_0, knot, noise, noise, batch.condition)

    # --- at times of one's own ----------------------------------------------------------------------------------------
    def at_times(
        self, x_0: Tensor, t: Tensor, noise: Tensor, condition: Mapping[str, Any] | None = None
    ) -> Tensor:
        """(B,) losses at given times (levels on a chain) and noise, weights included: `held_out` without its draws.

        Args:
            x_0: states without noise, (B, *D), in model units.
            t: times, or levels, int64, (B,). They are taken to be drawn as `times` says.
            noise: epsilon, (B, *D).
            condition: the network's arguments, batch first.

        Raises:
            TypeError: for states that are no floating-point tensor.
            ValueError: for shapes that do not match, or times that the law does not have.
        """
        check_state("x_0", x_0)
        if x_0.ndim < 2:
            raise ValueError(f"`x_0` must have shape (B, *D), got {tuple(x_0.shape)}.")
        if noise.shape != x_0.shape:
            raise ValueError(f"`noise` must have the shape of x_0, {tuple(x_0.shape)}, got {tuple(noise.shape)}.")
        if not isinstance(t, Tensor) or t.shape != x_0.shape[:1]:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"`t` must be a tensor of shape ({x_0.shape[0]},), got {got}.")
        # a look at times on an accelerator would wait for it; a float32 end is taken for the law's own
        if isinstance(self.law, SDE) and t.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = self.law.t_min, self.law.t_max
            inside = (t >= low * (1 - 1e-6)) & (t <= high * (1 + 1e-6))
            if not bool(inside.all()):
                raise ValueError(f"`t` must lie in [{low}, {high}], got {t[~inside][0].item()}.")
        return self._losses(x_0, self.law.knot(t, ndim=x_0.ndim), noise, noise, condition or {})

    # ------------------------------------------------------------------------------------------------------------------
    def _drawn(self, batch: Batch, streams: Streams) -> tuple[Tensor, Knot, Tensor]:
        """States, knots and noise of a batch."""
        x_0 = self._encoded(batch.data, streams)
        u = streams.lattice("times") if self.stratified else streams.uniform("times", dtype=torch.float64)
        knot = self.law.knot(self.drawer.draw(u), ndim=x_0.ndim)
        return x_0, knot, streams.normal("noise", x_0.shape[1:], x_0.dtype)

    def _encoded(self, data: Tensor, streams: Streams) -> Tensor:
        """Data as states, integers dequantized; never in half precision, which a loss is not computed in."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        spec = self.model.data_spec
        if spec is None:
            return data.to(dtype)
        u = streams.uniform("dequantization", tuple(data.shape[1:]), dtype) if spec.levels is not None else None
        x_0: Tensor = self.model.encode(data, u, dtype, streams)
        return x_0

    def _losses(self, x_0: Tensor, knot: Knot, noise: Tensor, moved: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """(B,) at knots; `moved` is the noise in the state, `noise` the one to find."""

        def cast(value: Any) -> Any:
            return value.to(x_0.device, x_0.dtype) if isinstance(value, Tensor) else value

        state = cast(knot.alpha) * x_0 + cast(knot.sigma) * moved
        prediction = self.model.predict(state, knot, **condition)
        # the error of the output as it is, without cancellation, times d(quantity) / d(output)
        p, q = prediction.parameterization.coefficients(knot)
        a, b = self.weighting.quantity(prediction.parameterization).coefficients(knot)
        share = (knot.alpha * b - knot.sigma * a) / (knot.alpha * q - knot.sigma * p)
        error = cast(share) * (prediction.raw - (cast(p) * x_0 + cast(q) * noise))
        losses = self.metric(error)
        weight = self.weighting.weight(knot)
        if self.drawer.corrected:
            weight = weight / self.drawer.density(knot)
        return losses * knot.spread(weight, losses, losses.dtype)


class EDM(DenoisingScoreMatching):
    r"""The loss of Karras et al. 2022 (arXiv:2206.00364, Table 1): lognormal noise levels, and weights that make the
    network's output of unit variance count the same at every one. `uncertainty` makes it that of EDM2
    (arXiv:2312.02696).

    In y = x / alpha with noise :math:`\varsigma = \sigma / \alpha`: :math:`\lambda(\varsigma)\, \|D(y) - x_0\|^2`,
    :math:`\lambda = (\varsigma^2 + \sigma_d^2) / (\varsigma \sigma_d)^2`, averaged over the elements.

    Args:
        model, times, weighting, metric, stratified, uncertainty, input_perturbation: of `DenoisingScoreMatching`.
    """

    def __init__(
        self,
        model: nn.Module,
        times: Times | str = "lognormal",
        weighting: Weighting | str = "edm",
        metric: Metric | str = "mean",
        stratified: bool = True,
        uncertainty: bool = False,
        input_perturbation: float = 0.0,
    ) -> None:
        super().__init__(model, times, weighting, metric, stratified, uncertainty, input_perturbation)


def _entry(name: str, value: Any, kind: type[Any], table: Mapping[str, type[Any]]) -> Any:
    """An entry of a table, given by itself or by its name."""
    if isinstance(value, str):
        return lookup(table, value, name)()
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be one of {', '.join(table)}, or such an object, got {value!r}.")
    return value
