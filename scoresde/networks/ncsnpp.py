"""NCSN++, DDPM++ and DDPM: the U-Nets of Ho et al. 2020 and Song et al. 2021, one class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.networks.embeddings import (
    EMBEDDINGS,
    FourierEmbedding,
    SinusoidalEmbedding,
    check_count,
    check_dropout,
)
from scoresde.networks.resampling import DownConv, UpConv, downsample, upsample

RESAMPLING = ("block", "convolution")
PYRAMIDS = ("none", "skip", "residual")
COMBINES = ("sum", "cat")


def _norm(channels: int, groups: int | None) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32) if groups is None else groups, channels, eps=1e-6)


def _initialised(module: nn.Conv2d | nn.Linear, scale: float = 1.0) -> nn.Conv2d | nn.Linear:
    """Uniform weights of variance scale / mean of inputs and outputs, zero biases; scale 0 leaves 1e-10."""
    weight = module.weight
    receptive = weight[0, 0].numel() if weight.ndim > 2 else 1
    mean = 0.5 * receptive * (weight.shape[0] + weight.shape[1])
    bound = math.sqrt(3.0 * (scale or 1e-10) / mean)
    nn.init.uniform_(weight, -bound, bound)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def _conv(inputs: int, outputs: int, size: int = 3, scale: float = 1.0) -> nn.Module:
    return _initialised(nn.Conv2d(inputs, outputs, size, padding=size // 2), scale)


class _Block(nn.Module):
    """norm-silu-conv twice, with the time added in between; `resample` halves or doubles both branches."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        condition: int,
        dropout: float,
        rescale: bool,
        groups: int | None,
        resample: str = "",
        fir: bool = False,
    ) -> None:
        super().__init__()
        self.resample, self.fir, self.rescale = resample, fir, rescale
        self.norm1, self.conv1 = _norm(inputs, groups), _conv(inputs, outputs)
        self.condition = _initialised(nn.Linear(condition, outputs))
        self.norm2, self.dropout = _norm(outputs, groups), nn.Dropout(dropout)
        self.conv2 = _conv(outputs, outputs, scale=0.0)
        self.skip = _conv(inputs, outputs, 1) if inputs != outputs or resample else nn.Identity()

    def _resampled(self, x: Tensor) -> Tensor:
        if not self.resample:
            return x
        return (downsample if self.resample == "down" else upsample)(x, self.fir)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(self._resampled(F.silu(self.norm1(x))))
        h = h + self.condition(c)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return _joined(self.skip(self._resampled(x)), h, self.rescale)


class _Attention(nn.Module):
    """Self-attention over the pixels with one head, as a residual branch."""

    def __init__(self, channels: int, rescale: bool, groups: int | None) -> None:
        super().__init__()
        self.rescale = rescale
        self.norm = _norm(channels, groups)
        self.qkv, self.out = _conv(channels, 3 * channels, 1), _conv(channels, channels, 1, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, 1, c, height * width).unbind(1)
        h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT)
        return _joined(x, self.out(h.mT.reshape(b, c, height, width)), self.rescale)


def _joined(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    return (x + h) * math.sqrt(0.5) if rescale else x + h


class _Outlet(nn.Module):
    """norm-silu-conv to the channels of an image."""

    def __init__(self, inputs: int, outputs: int, groups: int | None, scale: float = 0.0) -> None:
        super().__init__()
        self.norm, self.conv = _norm(inputs, groups), _conv(inputs, outputs, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


class _Combine(nn.Module):
    """The image joins the features through a 1 x 1 convolution."""

    def __init__(self, image: int, features: int, combine: str) -> None:
        super().__init__()
        self.conv, self.combine = _conv(image, features, 1), combine

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        joined: Tensor = self.conv(image)
        return torch.cat([joined, h], 1) if self.combine == "cat" else joined + h


class _Down(nn.Module):
    """To half the resolution: the features, and the input pyramid that joins them."""

    def __init__(self, features: nn.Module, pyramid: nn.Module | None) -> None:
        super().__init__()
        self.features, self.pyramid = features, pyramid


class _Level(nn.Module):
    """What happens at one resolution on the way up: blocks, attention, the output pyramid, and the next resolution."""

    def __init__(
        self,
        blocks: list[nn.Module],
        attention: nn.Module | None,
        enlarge: nn.Module | None,
        outlet: nn.Module | None,
        up: nn.Module | None,
    ) -> None:
        super().__init__()
        self.blocks, self.attention = nn.ModuleList(blocks), attention
        self.enlarge, self.outlet, self.up = enlarge, outlet, up


class NCSNpp(nn.Module):
    r"""U-Net of residual blocks with one-head attention, and pyramids of the input and the output.

    ``forward(x, label, class_label=None)``: x (B, C, H, W), label (B,), class (B,) -> (B, C, H, W). Rows do not see
    each other.

    * NCSN++ (the defaults): filtered resampling inside the blocks, skips rescaled by :math:`1 / \sqrt 2`, a residual
      input pyramid, Fourier embedding of log sigma (label "log_sigma");
    * DDPM++: ``fir=False, input_pyramid="none", embedding="sinusoidal"`` (label "t999" or "index");
    * DDPM: besides, ``resampling="convolution", rescale=False, norm_groups=32``.

    Source: Ho et al. 2020, arXiv:2006.11239; Song et al. 2021, arXiv:2011.13456, appendix H; blocks that resample:
    Brock et al. 2019, arXiv:1809.11096; pyramids: Karras et al. 2020, arXiv:1912.04958. Deviations: division by sigma
    and recentring are the score model's; classes, which the sources do not have, are added to the embedding.

    Args:
        shape: (C, H, W); H and W divisible by 2^(levels - 1).
        num_classes: number of classes, 0 for none; index `num_classes` is the null token.
        channels: features at full resolution.
        multipliers: features of each level in units of `channels`.
        blocks: residual blocks per level on the way down, and one more on the way up.
        attention: heights of the feature maps with attention: after every block on the way down, once on the way up.
        dropout: probability inside the residual blocks.
        embedding: "fourier" or "sinusoidal".
        fourier_scale: standard deviation of the Fourier embedding's frequencies.
        fir: resample with the filter [1, 3, 3, 1] instead of means and repetition.
        resampling: "block": inside residual blocks (BigGAN); "convolution": by strided convolutions in between (DDPM).
        rescale: divide the sum of skip and branch by the root of two.
        input_pyramid: "none"; "skip": the smaller image joins through a 1 x 1 convolution; "residual": a strided
            convolution of the pyramid is added, and the sum goes on as pyramid.
        output_pyramid: "none"; "skip": every level adds to an image that is enlarged; "residual": enlarged features
            join.
        combine: of the "skip" input pyramid: "sum" or "cat".
        norm_groups: groups of every norm; by default a quarter of the channels, at most 32.

    Raises:
        ValueError: for a shape that is not (C, H, W), sides that cannot be halved, or an option out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding: str = "fourier",
        fourier_scale: float = 16.0,
        fir: bool = True,
        resampling: str = "block",
        rescale: bool = True,
        input_pyramid: str = "residual",
        output_pyramid: str = "none",
        combine: str = "sum",
        norm_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        multipliers, attention = tuple(multipliers), tuple(attention)
        self._check(multipliers, attention, channels, blocks, dropout, num_classes)
        for name, value, known in (
            ("embedding", embedding, EMBEDDINGS),
            ("resampling", resampling, RESAMPLING),
            ("input_pyramid", input_pyramid, PYRAMIDS),
            ("output_pyramid", output_pyramid, PYRAMIDS),
            ("combine", combine, COMBINES),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        data, height, _ = self.shape
        levels, wide = len(multipliers), 4 * channels
        heights = [height >> i for i in range(levels)]
        self.num_classes, self.fir, self.rescale, self.resampling = num_classes, fir, rescale, resampling
        self.input_pyramid, self.output_pyramid = input_pyramid, output_pyramid

        if embedding == "fourier":
            self.embedding: nn.Module = FourierEmbedding(2 * channels, fourier_scale)
        else:
            self.embedding = SinusoidalEmbedding(channels)
        features = 2 * channels if embedding == "fourier" else channels
        self.condition = nn.ModuleList([_initialised(nn.Linear(n, wide)) for n in (features, wide)])
        self.classes = nn.Embedding(num_classes + 1, wide) if num_classes else None

        def block(inputs: int, outputs: int, resample: str = "") -> _Block:
            return _Block(inputs, outputs, wide, dropout, rescale, norm_groups, resample, fir)

        def attend(width: int, level: int) -> nn.Module | None:
            return _Attention(width, rescale, norm_groups) if heights[level] in attention else None

        self.inlet = _conv(data, channels)
        self.down = nn.ModuleList()
        skips, now, image = [channels], channels, data
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                found = attend(multiplier * channels, level)
                self.down.append(nn.ModuleList([block(now, multiplier * channels), *([found] if found else [])]))
                now = multiplier * channels
                skips.append(now)
            if level == levels - 1:
                break
            features_down: nn.Module = block(now, now, "down") if resampling == "block" else DownConv(now, now, fir)
            pyramid: nn.Module | None = None
            if input_pyramid == "skip":
                pyramid = _Combine(image, now, combine)
                now = 2 * now if combine == "cat" else now
            elif input_pyramid == "residual":
                pyramid, image = DownConv(image, now, fir), now
            self.down.append(_Down(features_down, pyramid))
            skips.append(now)
        self.middle = nn.ModuleList([block(now, now), _Attention(now, rescale, norm_groups), block(now, now)])
        self.up = nn.ModuleList()
        image = 0
        for level in reversed(range(levels)):
            steps: list[nn.Module] = []
            for _ in range(blocks + 1):
                steps.append(block(now + skips.pop(), multipliers[level] * channels))
                now = multipliers[level] * channels
            enlarge: nn.Module | None = None
            outlet: nn.Module | None = None
            if output_pyramid == "skip":
                outlet = _Outlet(now, data, norm_groups)
            elif output_pyramid == "residual":
                enlarge = UpConv(image, now, fir) if image else None
                outlet = None if image else _Outlet(now, now, norm_groups, 1.0)
                image = now
            up: nn.Module | None = None
            if level:
                up = block(now, now, "up") if resampling == "block" else UpConv(now, now, fir)
            self.up.append(_Level(steps, attend(now, level), enlarge, outlet, up))
        self.outlet = None if output_pyramid == "skip" else _Outlet(now, data, norm_groups)

    def _check(
        self,
        multipliers: tuple[int, ...],
        attention: tuple[int, ...],
        channels: int,
        blocks: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"`shape` must be (C, H, W), all >= 1, got {self.shape}; use network 'mlp' for vectors.")
        if not multipliers:
            raise ValueError("`multipliers` must name at least one level, e.g. (1, 2).")
        check_count("channels", channels, 4)
        check_count("blocks", blocks)
        check_dropout(dropout)
        if num_classes < 0:
            raise ValueError(f"`num_classes` must be >= 0, got {num_classes}.")
        for multiplier in multipliers:
            check_count("multipliers", multiplier)
        levels, factor = len(multipliers), 2 ** (len(multipliers) - 1)
        _, height, width = self.shape
        if height % factor or width % factor:
            raise ValueError(
                f"{levels} levels halve the image {levels - 1} times: height and width must be multiples of {factor}, "
                f"got {height} x {width}. Use fewer `multipliers`, or pad the images."
            )
        heights = [height >> i for i in range(levels)]
        for side in attention:
            if side not in heights:
                raise ValueError(f"`attention` names height {side}; the feature maps here have heights {heights}.")

    def _conditioned(self, label: Tensor, class_label: Tensor | None) -> Tensor:
        """What every block is told: silu of the embedding after two linear maps, (B, 4 channels)."""
        first, second = self.condition
        c = second(F.silu(first(self.embedding(label).to(self.inlet.weight.dtype))))
        if self.classes is None:
            if class_label is not None:
                raise ValueError("This network was built without classes: call it without `class_label`.")
        else:
            if class_label is None:
                class_label = torch.full_like(label, self.num_classes, dtype=torch.int64)
            if class_label.shape != label.shape:
                raise ValueError(f"`class_label` must have shape {tuple(label.shape)}, got {tuple(class_label.shape)}.")
            c = c + self.classes(class_label)
        return F.silu(c)

    def forward(self, x: Tensor, label: Tensor, *, class_label: Tensor | None = None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (B, *{self.shape}), got {tuple(x.shape)}.")
        c = self._conditioned(label, class_label)
        h = self.inlet(x)
        skips, pyramid = [h], x
        for stage in self.down:
            if isinstance(stage, _Down):
                h = stage.features(h, c) if isinstance(stage.features, _Block) else stage.features(h)
                if self.input_pyramid == "skip":
                    pyramid = downsample(pyramid, self.fir)
                    h = stage.pyramid(pyramid, h)  # type: ignore[misc]
                elif self.input_pyramid == "residual":
                    h = pyramid = _joined(stage.pyramid(pyramid), h, self.rescale)  # type: ignore[misc]
            else:
                h = stage[0](h, c)  # type: ignore[index]
                for attention in stage[1:]:  # type: ignore[index]
                    h = attention(h)
            skips.append(h)
        first, attention, second = self.middle
        h = second(attention(first(h, c)), c)
        image: Tensor | None = None
        for level in self.up:
            assert isinstance(level, _Level)
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], 1), c)
            if level.attention is not None:
                h = level.attention(h)
            if self.output_pyramid == "skip":
                part = level.outlet(h)  # type: ignore[misc]
                image = part if image is None else upsample(image, self.fir) + part
            elif self.output_pyramid == "residual":
                if image is None:
                    image = level.outlet(h)  # type: ignore[misc]
                else:
                    h = image = _joined(level.enlarge(image), h, self.rescale)  # type: ignore[misc]
            if level.up is not None:
                h = level.up(h, c) if isinstance(level.up, _Block) else level.up(h)
        if self.outlet is None:
            assert image is not None
            return image
        result: Tensor = self.outlet(h)
        return result
