r"""Dequantization: from integers to the continuum that a density lives on.

With integers k in 0 … L - 1 and z = k + u, u in [0, 1)^D, a density of z integrates over each bin to a probability
P(k), and for any density q of u given k

.. math:: \log P(k) = \log E_{u \sim q}\Bigl[\frac{p(k + u)}{q(u | k)}\Bigr]
          \ge E_{u \sim q}[\log p(k + u) - \log q(u | k)].

K draws give the tighter :math:`E \log \frac1K \sum_j p(k + u_j) / q(u_j | k)` (Burda et al. 2016, arXiv:1509.00519).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from scoresde.codecs import Codec
from scoresde.likelihood.bins import noise_in_bins, noise_scales
from sde_lib import Knot, lookup


class Dequantization(Protocol):
    """A law of u given the data: a function of them and of standard normal noise.

    Called with the data (B, *D), integers, and noise (B, *D), float64, it returns u in [0, 1), shape (B, *D), and
    log q(u | data) in nats, (B,).
    """

    def __call__(self, data: Tensor, noise: Tensor, /) -> tuple[Tensor, Tensor]: ...


def uniform(codec: Codec, knot: Knot) -> Dequantization:
    """u uniform on [0, 1)^D, log q = 0 (Theis et al. 2016, arXiv:1511.01844, section 3.1)."""

    def draw(data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return torch.special.ndtr(noise), torch.zeros(len(data), dtype=torch.float64, device=data.device)

    return draw


def truncated_normal(codec: Codec, knot: Knot) -> Dequantization:
    r"""The model's own noise at t_min, cut off at the edges of the bin.

    :math:`x = x_k + (\sigma / \alpha)\, e` with e standard normal on :math:`(-\tau, \tau)`,
    :math:`\tau = \alpha / (2 s \sigma)` for bins of width 1 / s in model units, s of every element (one for all where
    the codec is a rotation, under which this noise stays what it is): the state :math:`\alpha x` has the law that the
    network was trained on, where uniform noise is wider than anything it knows. There is no truncation at t_min left to
    correct: the probability of the bin is that of the density at t_min itself.

    Source: Zheng et al. 2023, arXiv:2305.03935, section 4.1.
    """
    asked = "Truncated-normal dequantization"
    noise_scales(asked, codec, torch.empty(0))  # a codec without them is refused before the first batch

    def draw(data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        # the noise in units of the bin
        ratio = noise_scales(asked, codec, noise) * math.exp(-float(knot.half_log_snr))
        tau = 0.5 / ratio
        half = 0.5 * torch.erf(tau / math.sqrt(2.0))
        constant = -0.5 * math.log(2.0 * math.pi) - (2.0 * half).log() - ratio.log()
        # the quantile of a probability between those of -tau and tau, from below, where it keeps its digits
        inside = torch.special.ndtr(-noise.abs())
        e = torch.special.ndtri((0.5 - half) + 2.0 * half * inside).maximum(-tau) * -noise.sign()
        log_q = (constant - 0.5 * e.square()).reshape(len(data), -1).sum(1)
        return 0.5 + ratio * e, log_q

    return draw


DEQUANTIZATIONS: Mapping[str, Callable[[Codec, Knot], Dequantization]] = {
    "uniform": uniform,
    "truncated_normal": truncated_normal,
}
"""Name -> maker."""
AUTO = 0.25
"""Noise at t_min, in units of the bin, from which "auto" takes the truncated normal."""


def name_of(what: str | Dequantization, codec: Codec, knot: Knot) -> str:
    """The name of a dequantization, with "auto" resolved.

    "auto" is the truncated normal where the noise at t_min is wide enough to fill the bin of every element, and uniform
    elsewhere: a narrow normal would leave out most of the bin over which a model trained on dequantized data has spread
    its mass. Under a codec that mixes their noise it is uniform.
    """
    if what == "auto":
        return "truncated_normal" if noise_in_bins(codec, knot) >= AUTO else "uniform"
    return what if isinstance(what, str) else str(getattr(what, "__name__", "own"))


def as_dequantization(what: str | Dequantization, codec: Codec, knot: Knot) -> Dequantization:
    """The dequantization of a name, or one's own with its answers checked."""
    if isinstance(what, str):
        what = name_of(what, codec, knot)
        kind: Any = lookup(DEQUANTIZATIONS, what, "dequantization")
        made: Dequantization = kind(codec, knot)
        return made
    if not callable(what):
        raise TypeError(f"`dequantization` must be a name or a function of (data, noise), got {what!r}.")
    own = what

    def draw(data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        u, log_q = own(data, noise)
        if u.shape != data.shape or log_q.shape != data.shape[:1]:
            raise ValueError(
                f"A dequantization must return u like the data, {tuple(data.shape)}, and log q of shape "
                f"({len(data)},), got {tuple(u.shape)} and {tuple(log_q.shape)}."
            )
        if not bool(((u >= 0) & (u < 1)).all()):
            raise ValueError("A dequantization must return u in [0, 1): the density of a bin stops at its edges.")
        return u.double(), log_q.double()

    return draw
