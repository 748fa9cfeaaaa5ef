r"""Denoising score matching, in continuous time and on a chain.

For :math:`x_t = \alpha x_0 + \sigma \epsilon` the loss at one time is a weight times
:math:`\|\hat\epsilon(x_t) - \epsilon\|^2`; its minimiser is :math:`E[\epsilon | x_t] = -\sigma \nabla\log p_t`
(Vincent 2011; Song et al. 2021, arXiv:2011.13456, eq. 7). The objective is an average over t uniform in
[t_min, t_max]; drawing t otherwise changes the variance, never the expectation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sde_lib import SDE, Chain, Knot
from sde_lib._checks import check_state

if TYPE_CHECKING:
    from scoresde.models.score_model import ScoreModel

WEIGHTINGS = ("uniform", "likelihood", "raw")
TIMES = ("uniform", "importance", "lognormal")
REDUCTIONS = ("mean", "half_sum")


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss and what it is made of.

    Attributes:
        value: mean of `per_sample`, a scalar that carries the graph.
        per_sample: (B,), weights included.
        t: time (or level) of each sample, (B,).
    """

    value: Tensor
    per_sample: Tensor
    t: Tensor


def continuous_loss(
    model: ScoreModel,
    x_0: Tensor,
    *,
    weighting: str = "uniform",
    times: str = "uniform",
    reduce: str = "mean",
    stratified: bool = True,
    rng: torch.Generator | None = None,
    condition: Mapping[str, Any] | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    log_sigma_mean: float = -1.2,
    log_sigma_std: float = 1.2,
) -> Loss:
    r"""Denoising score matching over [t_min, t_max].

    Args:
        model: a score model on an SDE.
        x_0: data in model units, (B, *D).
        weighting: lambda(t) in :math:`\lambda \|\hat s - s\|^2`. "uniform": lambda = sigma^2, every noise level counts
            the same (Song et al. 2021, eq. 7). "likelihood": lambda = g^2, the bound on the negative log likelihood
            (Song et al. 2021b, arXiv:2101.09258). "raw": mean square error of the network's own output.
        times: how t is drawn: "uniform", or "importance" with density in proportion to g^2 / sigma^2, which makes
            the weight of "likelihood" constant. Since :math:`g^2 / \sigma^2 = -2\, d\lambda_t / dt`, this is uniform in
            the half log SNR, and exact through `time_at`. The objective is the same. "lognormal": log(sigma / alpha)
            normal, cut off at the ends; this is another objective, with the weight of a noise level times its density
            (Karras et al. 2022, arXiv:2206.00364, Table 1, with weighting "raw" and the parameterization "edm").
        reduce: over the elements of a sample: "mean", or "half_sum" (half the sum, Song et al.'s
            ``reduce_mean=False``; with "likelihood" weighting it is in nats per unit time).
        stratified: spread the times of a batch evenly (one random shift of a lattice; Kingma et al. 2021,
            arXiv:2107.00630, app. I.1). Each time alone is still drawn from its law.
        rng: generator of times and noise, on the device of `x_0` or the CPU; torch's global one if None.
        condition: keyword arguments of the network, batch first.
        t: times (B,) to use instead of drawing; they are taken to be drawn as `times` says.
        noise: (B, *D) to use instead of drawing.
        log_sigma_mean: of "lognormal" times; EDM's value for images in [-1, 1].
        log_sigma_std: likewise.

    Raises:
        TypeError: for an `x_0` that is no floating-point tensor.
        ValueError: for a chain, unknown option values, times outside the law's, or shapes that do not match.
    """
    law = getattr(model, "law", None)
    if not isinstance(law, SDE):
        lives = "this one lives on a chain: use chain_loss" if isinstance(law, Chain) else f"got {type(model).__name__}"
        raise ValueError(f"continuous_loss needs a ScoreModel on an SDE; {lives}.")
    _check(x_0, weighting, WEIGHTINGS, reduce, noise, rng)
    if times not in TIMES:
        raise ValueError(f"`times` must be one of {', '.join(TIMES)}, got {times!r}.")
    if times == "lognormal" and (weighting == "likelihood" or not log_sigma_std > 0.0):
        raise ValueError('"lognormal" times need `log_sigma_std` > 0 and another weighting than "likelihood".')
    # where g enters, the integral over time stops where g is finite: only the flow SDE's end is lost
    plain = times != "importance" and weighting != "likelihood"
    t_min, t_max = law.t_min, law.t_max if plain else law.drift_t_max
    first, last = law.knot(t_min), law.knot(t_max)
    if t is None:
        u = _lattice(x_0, rng) if stratified else _draw(torch.rand, (x_0.shape[0],), x_0, rng, torch.float64)
        if times == "uniform":
            t = t_min + (t_max - t_min) * u
        else:
            if times == "importance":
                lam = first.half_log_snr + (last.half_log_snr - first.half_log_snr) * u
            else:
                # u may be 0, where the quantile is infinite
                lam = -(log_sigma_mean + log_sigma_std * torch.special.ndtri(u.clamp(1e-9, 1.0 - 1e-9)))
                lam = lam.clamp(float(last.half_log_snr), float(first.half_log_snr))
            t = law.time_at(lam).clamp(t_min, t_max)  # the inverse is exact up to rounding
    else:
        _check_times(t, x_0, law)
    knot = law.knot(t, ndim=x_0.ndim)
    square = _square_error(model, x_0, knot, weighting, noise, rng, condition)
    per_sample = _reduce(square, reduce)
    if not plain:
        # g^2 / sigma^2 is the weight of "likelihood", and up to its mean the density of "importance"
        ratio = torch.as_tensor(law.g2(t.double())) / torch.as_tensor(knot.sigma).reshape(-1).square()
        mean_ratio = 2.0 * (float(first.half_log_snr) - float(last.half_log_snr)) / (t_max - t_min)
        if weighting == "likelihood":
            weight = torch.full_like(ratio, mean_ratio) if times == "importance" else ratio
        else:
            weight = mean_ratio / ratio
        per_sample = weight.to(per_sample) * per_sample
    return Loss(per_sample.mean(), per_sample, t)


def chain_loss(
    model: ScoreModel,
    x_0: Tensor,
    *,
    weighting: str = "uniform",
    reduce: str = "mean",
    stratified: bool = True,
    rng: torch.Generator | None = None,
    condition: Mapping[str, Any] | None = None,
    index: Tensor | None = None,
    noise: Tensor | None = None,
) -> Loss:
    r"""Denoising score matching on the levels of a chain, all equally likely.

    With "uniform" weighting it is DDPM's :math:`\|\hat\epsilon - \epsilon\|^2` (Ho et al. 2020, eq. 14) and, on a VE
    chain, SMLD's :math:`\sigma_i^2 \|\hat s + \epsilon / \sigma_i\|^2` (Song & Ermon 2019, eq. 6): the same quantity.

    Args:
        model: a score model on a chain.
        x_0: data in model units, (B, *D).
        weighting: "uniform", or "raw": mean square error of the network's own output.
        reduce: "mean" or "half_sum", as in `continuous_loss`.
        stratified: spread the levels of a batch evenly.
        rng: generator of levels and noise; torch's global one if None.
        condition: keyword arguments of the network, batch first.
        index: levels, int64 (B,), to use instead of drawing.
        noise: (B, *D) to use instead of drawing.

    Raises:
        ValueError: for a model on an SDE, unknown option values, or shapes that do not match.
    """
    law = getattr(model, "law", None)
    if not isinstance(law, Chain):
        lives = "this one lives on an SDE: use continuous_loss" if law is not None else f"got {type(model).__name__}"
        raise ValueError(f"chain_loss needs a ScoreModel on a chain (law=sde.discretize(n)); {lives}.")
    _check(x_0, weighting, ("uniform", "raw"), reduce, noise, rng)
    if index is None:
        u = _lattice(x_0, rng) if stratified else _draw(torch.rand, (x_0.shape[0],), x_0, rng, torch.float64)
        index = (u * law.n).long().clamp(max=law.n - 1)
    elif index.shape != x_0.shape[:1] or index.is_floating_point():
        raise ValueError(f"`index` must be int64 of shape ({x_0.shape[0]},), got {index.dtype} {tuple(index.shape)}.")
    square = _square_error(model, x_0, law.knot(index, ndim=x_0.ndim), weighting, noise, rng, condition)
    per_sample = _reduce(square, reduce)
    return Loss(per_sample.mean(), per_sample, index)


def _check(
    x_0: Tensor, weighting: str, weightings: tuple[str, ...], reduce: str, noise: Tensor | None, rng: Any
) -> None:
    check_state("x_0", x_0)
    if x_0.ndim < 2:
        raise ValueError(f"`x_0` must have shape (B, *D), got {tuple(x_0.shape)}.")
    if rng is not None and not isinstance(rng, torch.Generator):
        raise TypeError(f"`rng` must be a torch.Generator, or None, got {type(rng).__name__}.")
    if weighting not in weightings:
        raise ValueError(f"`weighting` must be one of {', '.join(weightings)}, got {weighting!r}.")
    if reduce not in REDUCTIONS:
        raise ValueError(f"`reduce` must be one of {', '.join(REDUCTIONS)}, got {reduce!r}.")
    if noise is not None and noise.shape != x_0.shape:
        raise ValueError(f"`noise` must have the shape of x_0, {tuple(x_0.shape)}, got {tuple(noise.shape)}.")


def _check_times(t: Tensor, x_0: Tensor, law: SDE) -> None:
    if not isinstance(t, Tensor) or t.shape != x_0.shape[:1]:
        shape = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"`t` must be a tensor of shape ({x_0.shape[0]},), got {shape}.")
    # a look at times on an accelerator would wait for it; a float32 end is taken for the law's own
    if t.device.type == "cpu" and not torch.compiler.is_compiling():
        inside = (t >= law.t_min * (1 - 1e-6)) & (t <= law.t_max * (1 + 1e-6))
        if not bool(inside.all()):
            raise ValueError(f"`t` must lie in [{law.t_min}, {law.t_max}], got {t[~inside][0].item()}.")


def _draw(fn: Any, shape: Any, like: Tensor, rng: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """Random numbers where the generator lives, then on the device of `like`."""
    device = like.device if rng is None else rng.device
    return fn(shape, generator=rng, device=device, dtype=dtype).to(like.device)


def _lattice(x_0: Tensor, rng: torch.Generator | None) -> Tensor:
    """(B,) points in [0, 1): a lattice of spacing 1 / B with one random shift, each point uniform by itself."""
    b = x_0.shape[0]
    shift = _draw(torch.rand, (1,), x_0, rng, torch.float64)
    return (shift + torch.arange(b, device=x_0.device, dtype=torch.float64) / b) % 1.0


def _square_error(
    model: ScoreModel,
    x_0: Tensor,
    knot: Knot,
    weighting: str,
    noise: Tensor | None,
    rng: torch.Generator | None,
    condition: Mapping[str, Any] | None,
) -> Tensor:
    """Elementwise squared error of the noise, or of the raw output, (B, *D)."""
    if noise is None:
        noise = _draw(torch.randn, x_0.shape, x_0, rng, x_0.dtype)
    alpha, sigma = (torch.as_tensor(c).to(x_0) for c in (knot.alpha, knot.sigma))
    prediction = model.predict(alpha * x_0 + sigma * noise, knot, **(condition or {}))
    if weighting == "raw":
        p, q = (torch.as_tensor(c).to(x_0) for c in prediction.parameterization.coefficients(knot))
        return (prediction.raw - (p * x_0 + q * noise)).square()
    return (prediction.noise - noise).square()


def _reduce(square: Tensor, reduce: str) -> Tensor:
    flat = square.flatten(1)
    return flat.mean(1) if reduce == "mean" else 0.5 * flat.sum(1)
