"""Halving and doubling of images: plain or with an anti-aliasing filter, alone or with a convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _kernel(like: Tensor, gain: float = 1.0) -> Tensor:
    """The separable binomial filter (Zhang 2019, arXiv:1904.11486; Karras et al. 2020, arXiv:1912.04958), one per
    channel, (C, 1, 4, 4)."""
    # [1, 3, 3, 1], made on the device: a list would be copied there from the host, which waits for it
    taps = 4.0 - 2.0 * (torch.arange(4, dtype=like.dtype, device=like.device) - 1.5).abs()
    kernel = torch.outer(taps, taps) * (gain / taps.sum() ** 2)
    return kernel.expand(like.shape[1], 1, 4, 4)


def downsample(x: Tensor, fir: bool) -> Tensor:
    """Half the height and width, (B, C, H, W): the mean of 2 x 2 pixels, or the filter at every second pixel."""
    if not fir:
        return F.avg_pool2d(x, 2)
    return F.conv2d(x, _kernel(x), stride=2, padding=1, groups=x.shape[1])


def upsample(x: Tensor, fir: bool) -> Tensor:
    """Twice the height and width: every pixel four times, or zeros between the pixels and the filter."""
    if not fir:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv_transpose2d(x, _kernel(x, 4.0), stride=2, padding=1, groups=x.shape[1])


class DownConv(nn.Module):
    """A 3 x 3 convolution at every second pixel, after the filter or without it.

    Without, the image is padded on all sides, or at its lower and right edges only (`end_padding`; Ho et al. 2020).
    """

    def __init__(self, inputs: int, outputs: int, fir: bool, end_padding: bool = False) -> None:
        super().__init__()
        self.fir, self.end_padding = fir, end_padding
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=0 if fir or end_padding else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.fir:
            x = F.conv2d(x, _kernel(x), padding=2, groups=x.shape[1])
        elif self.end_padding:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class UpConv(nn.Module):
    """Twice the size and a 3 x 3 convolution: of repeated pixels, or of zeros between them with the filter after it."""

    def __init__(self, inputs: int, outputs: int, fir: bool) -> None:
        super().__init__()
        self.fir = fir
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fir:
            return self.conv(upsample(x, False))
        # a convolution of the image with zeros in between is a transposed one with the flipped kernel
        weight = self.conv.weight.flip(2, 3).transpose(0, 1)
        h = F.conv_transpose2d(x, weight, stride=2)
        h = F.conv2d(h, _kernel(h, 4.0), padding=1, groups=h.shape[1])
        return h if self.conv.bias is None else h + self.conv.bias[:, None, None]
