r"""What an error at a noise level counts.

Every weighting is a factor w of the squared error of the noise, :math:`w \|\hat\epsilon - \epsilon\|^2`, whatever the
network predicts: with :math:`F = p x_0 + q \epsilon` the error of F is :math:`(\alpha q - \sigma p) / \alpha` times
that of the noise (see `sde_lib.prediction`). So the error of the data is weighted by w SNR, that of v on a
variance-preserving law by w SNR / (SNR + 1), with :math:`\mathrm{SNR} = e^{2\lambda} = \alpha^2 / \sigma^2`.

A weighting says it in two parts, so that no digits are lost where alpha or sigma is 0: the `quantity` whose error is
taken, a `Parameterization`, and a `weight` of the distance. A weighting w > 0 of a square error changes how much each
noise level counts, never the minimiser.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde_lib import (
    Chain,
    DataPrediction,
    EDMPrediction,
    FlowPrediction,
    Knot,
    NoisePrediction,
    Parameterization,
    Table,
    VPrediction,
)
from sde_lib import _math as m
from sde_lib._checks import check_nonnegative, check_positive
from sde_lib._constants import Constants
from sde_lib._math import Real


class Weighting:
    """A weight of every noise level. Base class: the plain error of the noise."""

    integral: ClassVar[bool] = False
    """Whether the weight belongs to an integral over time that must not depend on how times are drawn: losses are then
    always divided by the density of the times."""

    def quantity(self, output: Parameterization) -> Parameterization:
        """What the error is taken of, for a network that predicts `output`."""
        return NoisePrediction()

    def weight(self, knot: Knot) -> Real:
        """Factor of the distance."""
        return 1.0

    def factor(self, knot: Knot, output: Parameterization) -> Real:
        """w: what both parts come to as a factor of the squared error of the noise."""
        a, b = self.quantity(output).coefficients(knot)
        error = b - a * knot.sigma / knot.alpha
        return self.weight(knot) * error * error

    def on(self, model: Any) -> Weighting:
        """The weighting as it runs on a model: on its law, with its `sigma_data`."""
        return self


@dataclass(frozen=True)
class UniformWeighting(Weighting):
    """w = 1: DDPM's simple loss (Ho et al. 2020, eq. 14), SMLD's, and Song et al.'s (2021, eq. 7), lambda = sigma^2.

    For predictions of the data it is known as the SNR weighting (Salimans & Ho 2022, arXiv:2202.00512, section 4).
    """


@dataclass(frozen=True)
class RawWeighting(Weighting):
    """Square error of the network's own output, whatever it predicts."""

    def quantity(self, output: Parameterization) -> Parameterization:
        return output


@dataclass(frozen=True)
class DataWeighting(Weighting):
    """w = 1 / SNR: square error of the data."""

    def quantity(self, output: Parameterization) -> Parameterization:
        return DataPrediction()


@dataclass(frozen=True)
class VWeighting(Weighting):
    r"""Square error of :math:`v = \alpha \epsilon - \sigma x_0`; w = 1 + 1 / SNR where :math:`\alpha^2 + \sigma^2 = 1`.

    "SNR + 1" of Salimans & Ho 2022, arXiv:2202.00512, section 4.
    """

    def quantity(self, output: Parameterization) -> Parameterization:
        return VPrediction()


@dataclass(frozen=True)
class FlowWeighting(Weighting):
    r"""Square error of :math:`\epsilon - x_0`, w = :math:`(1 + \sigma / \alpha)^2`: flow matching on straight paths.

    Source: Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003.
    """

    def quantity(self, output: Parameterization) -> Parameterization:
        return FlowPrediction()


@dataclass(frozen=True)
class EDMWeighting(Weighting):
    r"""Square error of EDM's network output: w = :math:`1 + (\sigma / (\alpha \sigma_d))^2`.

    In their units, y = x / alpha with noise :math:`\varsigma = \sigma / \alpha`, it is
    :math:`(\varsigma^2 + \sigma_d^2) / (\varsigma \sigma_d)^2\, \|D - x_0\|^2`. Source: Karras et al. 2022,
    arXiv:2206.00364, Table 1.

    Args:
        sigma_data: standard deviation of the data in model units; the model's own if None.
    """

    sigma_data: float | None = None

    def __post_init__(self) -> None:
        if self.sigma_data is not None:
            check_positive("sigma_data", self.sigma_data)

    def quantity(self, output: Parameterization) -> Parameterization:
        return EDMPrediction(0.5 if self.sigma_data is None else self.sigma_data)

    def on(self, model: Any) -> Weighting:
        return EDMWeighting(model.sigma_data) if self.sigma_data is None else self


@dataclass(frozen=True)
class TruncatedSNRWeighting(Weighting):
    """w = max(1, 1 / SNR): the larger of the errors of noise and data.

    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4 (max(SNR, 1) on the data).
    """

    def weight(self, knot: Knot) -> Real:
        return _maximum(m.exp(-2.0 * knot.half_log_snr), 1.0)


@dataclass(frozen=True)
class MinSNRWeighting(Weighting):
    r"""w = min(SNR, gamma) / SNR: low noise levels count as little as with a prediction of the data.

    On the data it is min(SNR, gamma), on v min(SNR, gamma) / (SNR + 1). Source: Hang et al. 2023, arXiv:2303.09556.

    Args:
        gamma: SNR above which the data's error counts the same at every level.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma)

    def weight(self, knot: Knot) -> Real:
        return _minimum(self.gamma * m.exp(-2.0 * knot.half_log_snr), 1.0)


@dataclass(frozen=True)
class SoftMinSNRWeighting(Weighting):
    """w = gamma / (SNR + gamma): as "min_snr", without the kink (Crowson et al. 2024, arXiv:2401.11605).

    Args:
        gamma: SNR at which the two regimes meet; theirs is 4, 1 / sigma_data^2 for EDM's 0.5.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma)

    def weight(self, knot: Knot) -> Real:
        return m.sigmoid(math.log(self.gamma) - 2.0 * knot.half_log_snr)


@dataclass(frozen=True)
class P2Weighting(Weighting):
    r"""w = :math:`(k + \mathrm{SNR})^{-\gamma}` (Choi et al. 2022, arXiv:2204.00227).

    Args:
        gamma: how strongly low noise levels are weighed down; 0 is "uniform".
        k: SNR at which that begins.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        check_nonnegative("gamma", self.gamma)
        check_positive("k", self.k)

    def weight(self, knot: Knot) -> Real:
        # (k + SNR)^-gamma without the overflow of SNR
        return m.exp(-self.gamma * (math.log(self.k) + m.softplus(2.0 * knot.half_log_snr - math.log(self.k))))


@dataclass(frozen=True)
class LikelihoodWeighting(Weighting):
    r"""w = :math:`g^2 / \sigma^2` of uniform times: the path's part of the bound on the negative log likelihood.

    Half the sum of its square errors (metric "half_sum") averages to :math:`\int \|\hat\epsilon - \epsilon\|^2
    d\lambda`, per unit of time. On a chain, where time is counted in whole chains, it is the sum of the KLs of its
    steps of the posterior's variance, and at level 0 the decoder's square error over the variance of level 1: the terms
    of `elbo`. Sources: Song et al. 2021b, arXiv:2101.09258; Kingma et al. 2021, arXiv:2107.00630; Ho et al.
    2020, eq. 5.
    """

    integral: ClassVar[bool] = True

    def weight(self, knot: Knot) -> Real:
        return knot.g2 / (knot.sigma * knot.sigma)

    def on(self, model: Any) -> Weighting:
        law = model.law
        if not isinstance(law, Chain):
            return self
        if law.n < 2:
            raise ValueError("The likelihood weighting needs a chain of at least 2 levels.")
        std = torch.cat([law.posterior_std[1:2], law.posterior_std[1:]])
        share = torch.cat([torch.ones_like(std[:1]), law.posterior_x_0[1:]])
        return _PerLevel((law.n * (share / std).square()).tolist(), DataPrediction())


@dataclass(frozen=True)
class SigmoidWeighting(Weighting):
    r"""w = :math:`g^2 / \sigma^2\; \mathrm{sigmoid}(b - 2\lambda)`: the bound's integral over lambda, with low noise
    levels weighed down. As a weight of the integral it is monotone, so that it is a bound for noised data.

    Source: Kingma & Gao 2023, arXiv:2303.00848; Hoogeboom et al. 2024, arXiv:2410.19324, where it stands as
    :math:`e^b\, \mathrm{sigmoid}(2\lambda - b)` on the data.

    Args:
        bias: b, the log SNR at which the weight of the integral is one half; large images want smaller values.
    """

    bias: float = 2.0
    integral: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.bias, int | float) or not math.isfinite(self.bias):
            raise ValueError(f"`bias` must be a finite number, got {self.bias!r}.")

    def _share(self, knot: Knot) -> Real:
        return m.sigmoid(self.bias - 2.0 * knot.half_log_snr)

    def weight(self, knot: Knot) -> Real:
        return knot.g2 / (knot.sigma * knot.sigma) * self._share(knot)

    def on(self, model: Any) -> Weighting:
        law = model.law
        if not isinstance(law, Chain):
            return self
        lams = [float(level.half_log_snr) for level in law.levels]
        if math.isinf(lams[-1]):
            raise ValueError("The sigmoid weighting is an integral over lambda, and this chain ends at alpha = 0.")
        # the trapezoid rule: half the range of lambda between the neighbours; twice, as g^2 / sigma^2 is
        widths = [a - b for a, b in zip([lams[0], *lams[:-1]], [*lams[1:], lams[-1]], strict=True)]
        shares = (float(self._share(level)) for level in law.levels)
        weights = (law.n * width * share for width, share in zip(widths, shares, strict=True))
        return _PerLevel(weights, NoisePrediction())


class _PerLevel(Weighting):
    """A weight per level of a chain."""

    integral: ClassVar[bool] = True

    def __init__(self, weights: Iterable[float], quantity: Parameterization) -> None:
        self._table, self._quantity = Constants(weights), quantity

    def quantity(self, output: Parameterization) -> Parameterization:
        return self._quantity

    def weight(self, knot: Knot) -> Real:
        index = knot.index
        if isinstance(index, Tensor):
            return self._table.on(index.device)[0][index]
        return float(self._table.columns[0][index])


WEIGHTINGS: Mapping[str, type[Weighting]] = Table(Weighting, {
    "uniform": UniformWeighting,
    "raw": RawWeighting,
    "data": DataWeighting,
    "v": VWeighting,
    "flow": FlowWeighting,
    "edm": EDMWeighting,
    "likelihood": LikelihoodWeighting,
    "sigmoid": SigmoidWeighting,
    "min_snr": MinSNRWeighting,
    "soft_min_snr": SoftMinSNRWeighting,
    "truncated_snr": TruncatedSNRWeighting,
    "p2": P2Weighting,
})
"""Name -> class of the weightings. A new one is a class and a line here."""


def _minimum(a: Real, b: float) -> Real:
    return a.clamp(max=b) if isinstance(a, Tensor) else min(a, b)


def _maximum(a: Real, b: float) -> Real:
    return a.clamp(min=b) if isinstance(a, Tensor) else max(a, b)
