"""Halving and doubling of images: plain or with an anti-aliasing filter, alone or with a convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Filter(nn.Module):
    """The separable binomial filter [1, 3, 3, 1] on every channel by itself (Zhang 2019, arXiv:1904.11486; Karras et
    al. 2020, arXiv:1912.04958).

    The kernel is a buffer outside of the state dict: no forward pass makes it or copies it from the host, which would
    wait for the device and cannot be captured in a CUDA graph. Its entries are exact in float16 and bfloat16 too.

    Args:
        channels: C.
        gain: sum of the kernel; 4 where it follows zeros between the pixels.
    """

    kernel: Tensor

    def __init__(self, channels: int, gain: float = 1.0) -> None:
        super().__init__()
        self.channels, self.gain = channels, gain
        self.register_buffer("kernel", torch.empty(channels, 1, 4, 4), persistent=False)
        self._fill()

    def _fill(self) -> None:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device="cpu") / 8.0
        self.kernel.copy_(self.gain * torch.outer(taps, taps))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Filter:
        super()._apply(fn, recurse)
        self._fill()  # `to_empty` leaves memory as it was, and no state dict restores what is not in it
        return self

    def forward(self, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        """(B, C, H, W) -> (B, C, (H + 2 padding - 4) // stride + 1, …)."""
        return F.conv2d(x, self.kernel, stride=stride, padding=padding, groups=self.channels)

    def enlarged(self, x: Tensor) -> Tensor:
        """Of the image with zeros between its pixels: (B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return F.conv_transpose2d(x, self.kernel, stride=2, padding=1, groups=self.channels)


class Resample(nn.Module):
    """Half or twice the height and width, (B, C, H, W).

    "down": the mean of 2 x 2 pixels, or the filter at every second pixel. "up": every pixel four times, or zeros
    between the pixels and the filter.

    Args:
        channels: C.
        way: "down" or "up".
        fir: with the filter.
    """

    def __init__(self, channels: int, way: str, fir: bool) -> None:
        super().__init__()
        self.way = way
        self.filter = Filter(channels, 4.0 if way == "up" else 1.0) if fir else None

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is None:
            return F.avg_pool2d(x, 2) if self.way == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.filter(x, stride=2) if self.way == "down" else self.filter.enlarged(x)


class DownConv(nn.Module):
    """A 3 x 3 convolution at every second pixel, after the filter or without it.

    Without, the image is padded on all sides, or at its lower and right edges only (`end_padding`; Ho et al. 2020).
    """

    def __init__(self, inputs: int, outputs: int, fir: bool, end_padding: bool = False) -> None:
        super().__init__()
        self.end_padding = end_padding
        self.filter = Filter(inputs) if fir else None
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=0 if fir or end_padding else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is not None:
            x = self.filter(x, padding=2)
        elif self.end_padding:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class UpConv(nn.Module):
    """Twice the size and a 3 x 3 convolution: of repeated pixels, or of zeros between them with the filter after it."""

    def __init__(self, inputs: int, outputs: int, fir: bool) -> None:
        super().__init__()
        self.filter = Filter(outputs, 4.0) if fir else None
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # a convolution of the image with zeros in between is a transposed one with the flipped kernel
        weight = self.conv.weight.flip(2, 3).transpose(0, 1)
        h = self.filter(F.conv_transpose2d(x, weight, stride=2))
        return h if self.conv.bias is None else h + self.conv.bias[:, None, None]
