"""A U-Net for images: residual blocks, group norm, attention, time and class conditioning."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.networks.embeddings import Condition, check_count, check_dropout, zeroed

CONDITIONINGS = ("scale_shift", "add")


def _norm(channels: int) -> nn.GroupNorm:
    """Group norm of at most 32 groups of at least four channels: statistics never cross samples."""
    groups = min(32, max(1, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-5)


class _Residual(nn.Module):
    """norm-silu-conv twice, the time entering before the second; the last convolution starts at zero."""

    def __init__(self, inputs: int, outputs: int, condition: int, dropout: float, conditioning: str) -> None:
        super().__init__()
        self.scale_shift = conditioning == "scale_shift"
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.condition = nn.Linear(condition, 2 * outputs if self.scale_shift else outputs)
        self.norm2 = _norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        c = self.condition(c)[:, :, None, None]
        if self.scale_shift:
            scale, shift = c.chunk(2, 1)
            h = torch.addcmul(shift, self.norm2(h), 1.0 + scale)
        else:
            h = self.norm2(h + c)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class _Attention(nn.Module):
    """Self-attention over the pixels, as a residual branch that starts at zero."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        while channels % self.heads:
            self.heads -= 1
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        # (B, 3 C, H, W) -> three of (B, heads, H W, C / heads)
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width).unbind(1)
        h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT)
        return x + self.out(h.mT.reshape(b, c, height, width))


class _Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Stage(nn.Module):
    """One residual block, and attention where the resolution asks for it."""

    def __init__(self, block: _Residual, attention: _Attention | None) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.block(x, c)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """Convolutional network with skip connections between equal resolutions.

    ``forward(x, label, class_label=None)``: x (B, C, H, W), label (B,), class (B,) -> (B, C, H, W). Rows do not
    see each other. The output starts at zero.

    Source: Ho et al. 2020 (structure); Dhariwal & Nichol 2021, arXiv:2105.05233 (scale-shift, heads of attention).

    Args:
        shape: (C, H, W); H and W divisible by 2^(levels - 1).
        num_classes: number of classes, 0 for none; index `num_classes` is the null token.
        channels: features at full resolution, even.
        multipliers: features of each level in units of `channels`; one level per entry, each half the size.
        blocks: residual blocks per level on the way down, and one more on the way up.
        attention: heights of the feature maps that get self-attention; the middle has it if its height is named.
        head_channels: features per attention head.
        dropout: probability inside the residual blocks.
        conditioning: "scale_shift" (the time scales and shifts after the norm) or "add" (added before it).
        embedding: "sinusoidal" (labels of hundreds, such as 999 t) or "fourier" (labels of order one).
        max_period: longest wavelength of the sinusoidal embedding, in label units / 2 pi.
        fourier_scale: standard deviation of the Fourier embedding's frequencies.

    Raises:
        ValueError: for a shape that is not (C, H, W), sides that cannot be halved, or an option out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[int] = (4,),
        head_channels: int = 32,
        dropout: float = 0.0,
        conditioning: str = "scale_shift",
        embedding: str = "sinusoidal",
        max_period: float = 10000.0,
        fourier_scale: float = 16.0,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        multipliers, attention = tuple(multipliers), tuple(attention)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"`shape` must be (C, H, W), all >= 1, got {self.shape}; use network 'mlp' for vectors.")
        if not multipliers:
            raise ValueError("`multipliers` must name at least one level, e.g. (1, 2).")
        check_count("channels", channels, 4)
        check_count("blocks", blocks)
        check_count("head_channels", head_channels)
        check_dropout(dropout)
        for multiplier in multipliers:
            check_count("multipliers", multiplier)
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"`conditioning` must be one of {', '.join(CONDITIONINGS)}, got {conditioning!r}.")
        levels, factor = len(multipliers), 2 ** (len(multipliers) - 1)
        data_channels, height, width = self.shape
        if height % factor or width % factor:
            raise ValueError(
                f"{levels} levels halve the image {levels - 1} times: height and width must be multiples of {factor}, "
                f"got {height} x {width}. Use fewer `multipliers`, or pad the images."
            )
        heights = [height >> i for i in range(levels)]
        for side in attention:
            if side not in heights:
                raise ValueError(f"`attention` names height {side}; the feature maps here have heights {heights}.")
        self.num_classes = num_classes
        features = 4 * channels
        self.condition = Condition(features, num_classes, embedding, max_period, fourier_scale)

        def stage(inputs: int, outputs: int, level: int) -> _Stage:
            block = _Residual(inputs, outputs, features, dropout, conditioning)
            return _Stage(block, _Attention(outputs, head_channels) if heights[level] in attention else None)

        self.inlet = nn.Conv2d(data_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        skips, now = [channels], channels
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(stage(now, multiplier * channels, level))
                now = multiplier * channels
                skips.append(now)
            if level < levels - 1:
                self.down.append(_Down(now))
                skips.append(now)
        self.middle = nn.ModuleList([stage(now, now, levels - 1), _Residual(now, now, features, dropout, conditioning)])
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            for _ in range(blocks + 1):
                self.up.append(stage(now + skips.pop(), multipliers[level] * channels, level))
                now = multipliers[level] * channels
            if level:
                self.up.append(_Up(now))
        self.norm, self.outlet = _norm(now), zeroed(nn.Conv2d(now, data_channels, 3, padding=1))

    def forward(self, x: Tensor, label: Tensor, *, class_label: Tensor | None = None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (B, *{self.shape}), got {tuple(x.shape)}.")
        c = self.condition(label, class_label)
        h = self.inlet(x)
        skips = [h]
        for module in self.down:
            h = module(h) if isinstance(module, _Down) else module(h, c)
            skips.append(h)
        for module in self.middle:
            h = module(h, c)
        for module in self.up:
            h = module(h) if isinstance(module, _Up) else module(torch.cat([h, skips.pop()], 1), c)
        return self.outlet(F.silu(self.norm(h)))
