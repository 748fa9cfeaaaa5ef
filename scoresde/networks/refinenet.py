"""What NCSN and NCSNv2 are made of: norms of one noise level or of many, dilated blocks, refine blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "elu": F.elu,
    "relu": F.relu,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.2),
    "silu": F.silu,
}
INTERPOLATIONS: Mapping[str, bool | None] = {"bilinear": True, "nearest": None}
"""Mode of `torch.nn.functional.interpolate` -> its `align_corners`."""


def instance_norm_plus(x: Tensor, scale: Tensor, mean_scale: Tensor, shift: Tensor) -> Tensor:
    r"""Instance norm that keeps the relative means of the channels ("InstanceNorm++"): (B, C, H, W) -> (B, C, H, W).

    .. math:: y_k = \gamma_k \left(\frac{x_k - \mu_k}{s_k} + \alpha_k \frac{\mu_k - m}{v}\right) + \beta_k

    with mean and standard deviation :math:`\mu_k, s_k` of channel k over its pixels, and :math:`m, v` of the
    :math:`\mu_k` over the channels. An instance norm alone loses the :math:`\mu_k`, and with them the colors.

    Source: Song & Ermon 2019, arXiv:1907.05600, appendix A. As in the authors' code, gamma multiplies the term with
    alpha too, 1e-5 is added to both variances, and that of the means is the unbiased one.

    Args:
        x: features, C >= 2 and more than one pixel.
        scale: gamma, (C,) or (B, C).
        mean_scale: alpha, (C,) or (B, C).
        shift: beta, (C,) or (B, C).
    """
    mean = x.mean((2, 3))
    variance, middle = torch.var_mean(mean, 1, keepdim=True)
    relative = (mean - middle) * (variance + 1e-5).rsqrt()
    scale, shift = scale[..., None, None], shift[..., None, None]
    return scale * (F.instance_norm(x, eps=1e-5) + (mean_scale * relative)[..., None, None]) + shift


class InstanceNormPlus(nn.Module):
    """`instance_norm_plus` with one scale and shift for all noise levels (NCSNv2).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02))
        self.mean_scale = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        return instance_norm_plus(x, self.scale, self.mean_scale, self.shift)


class ConditionalInstanceNormPlus(nn.Module):
    """`instance_norm_plus` with a scale and shift for each noise level, chosen by its index (NCSN).

    The rows of `table` are the noise levels, its columns the C entries of gamma, of alpha and of beta.

    Args:
        channels: C.
        levels: number of noise levels.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.table = nn.Embedding(levels, 3 * channels)
        nn.init.normal_(self.table.weight[:, : 2 * channels], 1.0, 0.02)
        nn.init.zeros_(self.table.weight[:, 2 * channels :])

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        return instance_norm_plus(x, *self.table(noise_level).chunk(3, 1))


class NoNorm(nn.Module):
    """The features as they are: what refine blocks of NCSNv2 have in place of a norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        return x


Norm = Callable[[int], nn.Module]
"""Number of channels -> a module ``norm(x, noise_level)``."""


def conv(inputs: int, outputs: int, size: int = 3, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps the resolution, whatever its dilation."""
    return nn.Conv2d(inputs, outputs, size, padding=dilation * (size // 2), dilation=dilation, bias=bias)


class Series(nn.ModuleList):
    """Modules one after the other, each told the noise level."""

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        for module in self:
            x = module(x, noise_level)
        return x


class DilatedBlock(nn.Module):
    """norm-act-conv twice, beside a skip: (B, C, H, W) -> (B, C', H', W').

    The first block of a stage has a convolution on its skip and may change the number of channels; where it does not
    dilate, it also halves height and width, by the mean of 2 x 2 pixels.

    Args:
        inputs: C.
        outputs: C'.
        norm: makes the norms.
        act: the activation.
        dilation: of all 3 x 3 convolutions, the skip's included.
        first: whether this is the first block of a stage other than the finest.
    """

    def __init__(
        self, inputs: int, outputs: int, norm: Norm, act: Activation, dilation: int = 1, first: bool = False
    ) -> None:
        super().__init__()
        self.act, self.halve = act, first and dilation == 1
        self.norm1, self.conv1 = norm(inputs), conv(inputs, inputs, dilation=dilation)
        self.norm2, self.conv2 = norm(inputs), conv(inputs, outputs, dilation=dilation)
        self.skip = conv(inputs, outputs, 1 if self.halve else 3, dilation) if first else nn.Identity()

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x, noise_level)))
        h = self.conv2(self.act(self.norm2(h, noise_level)))
        h = self.skip(x) + h
        # the published code pools branch and skip each; their sum has the same mean
        return F.avg_pool2d(h, 2) if self.halve else h


class ResidualUnit(nn.Module):
    """norm-act-conv twice, added to the input ("RCU", residual convolution unit).

    Args:
        channels: C.
        norm: makes the norms.
        act: the activation.
    """

    def __init__(self, channels: int, norm: Norm, act: Activation) -> None:
        super().__init__()
        self.act = act
        self.norm1, self.conv1 = norm(channels), conv(channels, channels, bias=False)
        self.norm2, self.conv2 = norm(channels), conv(channels, channels, bias=False)

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x, noise_level)))
        h = self.conv2(self.act(self.norm2(h, noise_level)))
        return x + h


class Fusion(nn.Module):
    """Sum of features of several resolutions, at the first one's ("MSF", multi-resolution fusion).

    Each is normed, convolved and, where its size differs, interpolated.

    Args:
        inputs: number of channels of each.
        outputs: number of channels of the sum.
        norm: makes the norms.
        interpolation: a key of `INTERPOLATIONS`.
    """

    def __init__(self, inputs: Sequence[int], outputs: int, norm: Norm, interpolation: str) -> None:
        super().__init__()
        self.interpolation = interpolation
        self.norms = nn.ModuleList(norm(n) for n in inputs)
        self.convs = nn.ModuleList(conv(n, outputs) for n in inputs)

    def forward(self, features: Sequence[Tensor], noise_level: Tensor) -> Tensor:
        size = features[0].shape[2:]
        total: Tensor | None = None
        for x, norm, convolve in zip(features, self.norms, self.convs, strict=True):
            h = convolve(norm(x, noise_level))
            if h.shape[2:] != size:
                corners = INTERPOLATIONS[self.interpolation]
                h = F.interpolate(h, size=size, mode=self.interpolation, align_corners=corners)
            total = h if total is None else total + h
        assert total is not None
        return total


class ChainedPooling(nn.Module):
    """Adds what is seen through larger and larger windows ("CRP", chained residual pooling).

    Every step norms, pools 5 x 5 pixels without changing the resolution, and convolves what the one before made; the
    activated input and all steps are summed.

    Args:
        channels: C.
        norm: makes the norms.
        act: the activation.
        pool: the pooling, of (x, size, stride, padding).
        steps: length of the chain.
    """

    def __init__(self, channels: int, norm: Norm, act: Activation, pool: Callable[..., Tensor], steps: int = 2) -> None:
        super().__init__()
        self.act, self.pool = act, pool
        self.norms = nn.ModuleList(norm(channels) for _ in range(steps))
        self.convs = nn.ModuleList(conv(channels, channels, bias=False) for _ in range(steps))

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        total = h = self.act(x)
        for norm, convolve in zip(self.norms, self.convs, strict=True):
            h = convolve(self.pool(norm(h, noise_level), 5, 1, 2))
            total = total + h
        return total


class RefineBlock(nn.Module):
    """Residual units for every input, their fusion, chained pooling, residual units.

    Args:
        inputs: number of channels of each input; the first has the resolution of the output. A single input is not
            fused, so that its number of channels is `outputs`.
        outputs: number of channels of the output.
        units: number of residual units at the end.
        norm: makes the norms.
        act: the activation.
        pool: see `ChainedPooling`.
        interpolation: see `Fusion`.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: int,
        units: int,
        norm: Norm,
        act: Activation,
        pool: Callable[..., Tensor],
        interpolation: str,
    ) -> None:
        super().__init__()
        self.adapt = nn.ModuleList(Series(ResidualUnit(n, norm, act) for _ in range(2)) for n in inputs)
        self.fusion = Fusion(inputs, outputs, norm, interpolation) if len(inputs) > 1 else None
        self.pooling = ChainedPooling(outputs, norm, act, pool)
        self.final = Series(ResidualUnit(outputs, norm, act) for _ in range(units))

    def forward(self, features: Sequence[Tensor], noise_level: Tensor) -> Tensor:
        adapted = [adapt(x, noise_level) for adapt, x in zip(self.adapt, features, strict=True)]
        h = adapted[0] if self.fusion is None else self.fusion(adapted, noise_level)
        return self.final(self.pooling(h, noise_level), noise_level)
