"""What the U-Nets are made of: residual blocks that may change the resolution, attention, inlets and outlets."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.networks.attention import CrossAttention, Tokens
from scoresde.networks.embeddings import zeroed
from scoresde.networks.resampling import Resample


def group_norm(channels: int, groups: int | None = None, eps: float = 1e-5) -> nn.GroupNorm:
    """Group norm of `groups` groups, or of at most 32 with at least four channels each; a divisor of the channels.

    Statistics are taken within each sample: rows of a batch do not see each other.
    """
    if groups is not None and (not isinstance(groups, int) or groups < 1):
        raise ValueError(f"`norm_groups` must be an int >= 1, got {groups!r}.")
    groups = min(32, max(1, channels // 4)) if groups is None else min(groups, channels)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=eps)


def conv(inputs: int, outputs: int, size: int = 3, zero: bool = False) -> nn.Conv2d:
    """A convolution that keeps the resolution; `zero` makes a branch start as nothing."""
    module = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    return zeroed(module) if zero else module  # type: ignore[return-value]


def initialise_by_fans(network: nn.Module) -> None:
    """Uniform weights of variance 1 / mean(inputs, outputs), zero biases; what starts at zero stays there.

    Ho et al. 2020 and Song et al. 2021, whose code leaves a variance of 1e-10 instead of zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not getattr(module, "starts_at_zero", False):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def joined(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """Sum of skip and branch, divided by the root of two if `rescale`."""
    return (x + h) * math.sqrt(0.5) if rescale else x + h


class ResidualBlock(nn.Module):
    r"""norm-silu-conv twice, with the condition in between: (B, C, H, W), (B, condition) -> (B, C', H', W').

    The condition is added before the second norm, or scales and shifts after it (`scale_shift`; Dhariwal & Nichol
    2021). With `resample`, both branches are halved or doubled before the first convolution (BigGAN; Brock et al. 2019,
    arXiv:1809.11096).

    Args:
        inputs: C.
        outputs: C'.
        condition: width of the condition.
        dropout: before the second convolution.
        scale_shift: how the condition enters.
        rescale: divide the sum of skip and branch by the root of two.
        norm_groups: see `group_norm`.
        norm_eps: added to the variance in norms.
        resample: "", "down" or "up".
        fir: resample with the filter [1, 3, 3, 1].
        project: whether the skip of a block that resamples has a 1 x 1 convolution even where C' = C.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        condition: int,
        dropout: float = 0.0,
        scale_shift: bool = False,
        rescale: bool = False,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        resample: str = "",
        fir: bool = False,
        project: bool = True,
    ) -> None:
        super().__init__()
        self.scale_shift, self.rescale = scale_shift, rescale
        self.norm1, self.conv1 = group_norm(inputs, norm_groups, norm_eps), conv(inputs, outputs)
        self.resample = Resample(inputs, resample, fir) if resample else nn.Identity()
        self.condition = nn.Linear(condition, 2 * outputs if scale_shift else outputs)
        self.norm2, self.dropout = group_norm(outputs, norm_groups, norm_eps), nn.Dropout(dropout)
        self.conv2 = conv(outputs, outputs, zero=True)
        bare = inputs == outputs and not (resample and project)
        self.skip = nn.Identity() if bare else conv(inputs, outputs, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        c = self.condition(c)[:, :, None, None]
        if self.scale_shift:
            scale, shift = c.chunk(2, 1)
            h = torch.addcmul(shift, self.norm2(h), 1.0 + scale)
        else:
            h = self.norm2(h + c)
        h = self.conv2(self.dropout(F.silu(h)))
        return joined(self.skip(self.resample(x)), h, self.rescale)


def heads_of(channels: int, head_channels: int, heads: int) -> int:
    """Number of heads: `heads`, or those of `head_channels` each (0: one head); lowered to a divisor of `channels`."""
    heads = heads or (max(1, channels // head_channels) if head_channels else 1)
    while channels % heads:
        heads -= 1
    return heads


class Attention(nn.Module):
    """Self-attention over the pixels, as a residual branch: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        head_channels: channels per head, 0 for one head; the number of heads is lowered to a divisor of C.
        heads: number of heads, whatever C is; 0: by `head_channels`.
        rescale: divide the sum of skip and branch by the root of two.
        norm_groups: see `group_norm`.
        norm_eps: added to the variance in the norm.
    """

    def __init__(
        self,
        channels: int,
        head_channels: int = 0,
        heads: int = 0,
        rescale: bool = False,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.heads, self.rescale = heads_of(channels, head_channels, heads), rescale
        self.norm = group_norm(channels, norm_groups, norm_eps)
        # output channels in the order (q, k, v) x heads x channels of a head
        self.qkv, self.out = conv(channels, 3 * channels, 1), conv(channels, channels, 1, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        # pixels before channels: a view where tensors are channels last
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, height * width, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).mT.reshape(b, c, height, width)
        return joined(x, self.out(h), self.rescale)


class Reading(nn.Module):
    """Attention from the pixels to tokens, as a residual branch that is zero at first: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        width: features of the tokens.
        heads: heads of attention, a divisor of C.
        norm_groups: see `group_norm`.
        norm_eps: added to the variance in the norm.
    """

    def __init__(
        self, channels: int, width: int, heads: int, norm_groups: int | None = None, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups, norm_eps)
        self.attention = CrossAttention(channels, width, heads)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        b, c, height, width = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c)
        h = self.attention(h, tokens).reshape(b, height, width, c)
        # the sum is not rescaled: without tokens to read, x goes on as it is
        return x + h.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """A residual block; after it attention to the other pixels and to tokens, where there are any."""

    def __init__(
        self, block: ResidualBlock, attention: Attention | None = None, reading: Reading | None = None
    ) -> None:
        super().__init__()
        self.block, self.attention, self.reading = block, attention, reading

    def forward(self, x: Tensor, c: Tensor, tokens: Tokens | None = None) -> Tensor:
        x = self.block(x, c)
        x = x if self.attention is None else self.attention(x)
        return x if self.reading is None or tokens is None else self.reading(x, tokens)


class Outlet(nn.Module):
    """norm-silu-conv."""

    def __init__(self, inputs: int, outputs: int, groups: int | None, eps: float, zero: bool = True) -> None:
        super().__init__()
        self.norm, self.conv = group_norm(inputs, groups, eps), conv(inputs, outputs, zero=zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


class Combine(nn.Module):
    """The image joins the features through a 1 x 1 convolution: added, or in front of them ("cat")."""

    def __init__(self, image: int, features: int, combine: str) -> None:
        super().__init__()
        self.conv, self.combine = conv(image, features, 1), combine

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        part: Tensor = self.conv(image)
        return torch.cat([part, h], 1) if self.combine == "cat" else part + h
