"""The U-Net of this field, with the options in which the published ones differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scoresde.data.conditions import Conditions, ConditionSpec
from scoresde.networks.blocks import Outlet, Stage, conv, initialise_by_fans, joined
from scoresde.networks.conditioning import ConditionEmbedding, Embedded, check_images
from scoresde.networks.embeddings import check_count, check_dropout, check_inputs
from scoresde.networks.levels import Down, Plan
from scoresde.networks.resampling import DownConv, Resample, UpConv

CONDITIONINGS = ("scale_shift", "add")
RESAMPLINGS = ("convolution", "block")
PYRAMIDS = ("none", "skip", "residual")
COMBINES = ("sum", "cat")
UP_ATTENTIONS = ("every", "last")
INITS = ("torch", "fan_avg")


class UNet(nn.Module):
    r"""Residual blocks at several resolutions with skips between equal ones, told the noise level and the conditions.

    ``forward(x, noise_level, augment_label=None, **condition)``: x (B, C, H, W), noise level (B,), augmentation
    parameters (B, augmentations) -> (B, C, H, W), or (B, 2 C, H, W) with a learned variance. Rows do not see each
    other. The output starts at zero. `NCSNpp`, `DDPM` and `ADM` are this network with the options of those papers as
    defaults. Tokens are read where there is self-attention, and in the middle; images join the channels of x: see
    `ConditionEmbedding`.

    Source: Ho et al. 2020, arXiv:2006.11239 (structure); Song et al. 2021, arXiv:2011.13456, appendix H (filtered
    resampling, rescaled sums, pyramids, after Karras et al. 2020, arXiv:1912.04958); Dhariwal & Nichol 2021,
    arXiv:2105.05233 (scale-shift, heads of attention, resampling inside blocks); Karras et al. 2022, arXiv:2206.00364
    (augmentation labels).

    Args:
        shape: (C, H, W); H and W divisible by 2^(levels - 1).
        conditions: name -> `ConditionSpec`, or its arguments.
        channels: features at full resolution.
        multipliers: features of each level in units of `channels`; one level per entry, each half the size.
        blocks: residual blocks per level on the way down, and one more on the way up.
        attention: heights of the feature maps with self-attention after the blocks.
        middle_attention: whether the middle, at the lowest resolution, has it too.
        head_channels: features per attention head; 0: one head.
        heads: number of heads instead; 0: by `head_channels`.
        dropout: probability inside the residual blocks.
        conditioning: "scale_shift" (the condition scales and shifts after the norm) or "add" (added before it).
        embedding: "sinusoidal" (noise levels of hundreds, such as 999 t) or "fourier" (of order one).
        max_period: longest wavelength of the sinusoidal embedding, in units of the noise level / 2 pi.
        fourier_scale: standard deviation of the Fourier embedding's frequencies.
        features: of the noise level's embedding; `width` by default.
        width: features of the condition; 4 `channels` by default.
        class_entry: where classes enter, see `ConditionEmbedding`.
        augmentations: number of augmentation parameters, see `ConditionEmbedding`.
        resampling: "convolution": strided convolutions between the blocks; "block": inside residual blocks.
        fir: resample with the filter [1, 3, 3, 1] instead of means and repetition.
        end_padding: strided convolutions without filter pad the lower and right edges only (Ho et al. 2020).
        project_skips: whether skips of blocks that resample have a 1 x 1 convolution.
        rescale: divide sums of skip and branch by the root of two.
        input_pyramid: "none"; "skip": the smaller image joins through a 1 x 1 convolution; "residual": a strided
            convolution of the pyramid is added, and the sum goes on as pyramid.
        output_pyramid: "none"; "skip": every level adds to an image that is enlarged; "residual": enlarged features
            join.
        combine: of the "skip" input pyramid: "sum" or "cat".
        up_attention: on the way up after "every" block of a level, or after the "last".
        norm_groups: groups of every norm; by default a quarter of the channels, at most 32.
        norm_eps: added to the variance in norms.
        learned_variance: a second output of C channels, from which chains take a variance (Nichol & Dhariwal 2021,
            arXiv:2102.09672).
        init: how weights start: "torch", its default, or "fan_avg", variances from the mean of inputs and outputs
            (Ho et al. 2020; slower at first on the digits).
        checkpointing: forget activations inside blocks and compute them again for gradients: less memory, about a
            third more time.
        target_noise_level: whether there is a second noise level, see `ConditionEmbedding`.
        pool_tokens: whether tokens are pooled, too, see `ConditionEmbedding`.

    Raises:
        ValueError: for a shape that is not (C, H, W), sides that cannot be halved, or an option out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        conditions: Conditions | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[int] = (4,),
        middle_attention: bool = True,
        head_channels: int = 32,
        heads: int = 0,
        dropout: float = 0.0,
        conditioning: str = "scale_shift",
        embedding: str = "sinusoidal",
        max_period: float = 10000.0,
        fourier_scale: float = 16.0,
        features: int | None = None,
        width: int | None = None,
        class_entry: str = "condition",
        augmentations: int = 0,
        resampling: str = "convolution",
        fir: bool = False,
        end_padding: bool = False,
        project_skips: bool = True,
        rescale: bool = False,
        input_pyramid: str = "none",
        output_pyramid: str = "none",
        combine: str = "sum",
        up_attention: str = "every",
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        learned_variance: bool = False,
        init: str = "torch",
        checkpointing: bool = False,
        target_noise_level: bool = False,
        pool_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        multipliers, attention = tuple(multipliers), tuple(attention)
        self._check(multipliers, attention, channels, blocks, dropout, head_channels, heads)
        for name, value, known in (
            ("conditioning", conditioning, CONDITIONINGS),
            ("resampling", resampling, RESAMPLINGS),
            ("input_pyramid", input_pyramid, PYRAMIDS),
            ("output_pyramid", output_pyramid, PYRAMIDS),
            ("combine", combine, COMBINES),
            ("up_attention", up_attention, UP_ATTENTIONS),
            ("init", init, INITS),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        data, height, _ = self.shape
        width = width or 4 * channels
        self.rescale, self.resampling = rescale, resampling
        self.input_pyramid, self.output_pyramid = input_pyramid, output_pyramid
        self.learned_variance, self.checkpointing = learned_variance, checkpointing
        out = 2 * data if learned_variance else data
        # of the images in "skip" pyramids
        self.smaller = Resample(data, "down", fir) if input_pyramid == "skip" else None
        self.larger = Resample(out, "up", fir) if output_pyramid == "skip" else None

        def inlet(spec: ConditionSpec) -> nn.Module:
            return nn.Conv2d(spec.shape[0], channels, 3, padding=1, bias=False)

        self.condition = ConditionEmbedding(
            width,
            conditions,
            embedding,
            max_period,
            fourier_scale,
            features,
            class_entry,
            augmentations,
            target_noise_level,
            pool_tokens,
            inlet=inlet,
        )
        check_images(self.condition.specs, self.shape)

        plan = Plan(
            data=data,
            out=out,
            channels=channels,
            widths=tuple(multiplier * channels for multiplier in multipliers),
            blocks=blocks,
            attends=tuple(height >> i in attention for i in range(len(multipliers))),
            head_channels=head_channels,
            heads=heads,
            condition=width,
            reads=bool(self.condition.names("tokens")),
            dropout=dropout,
            scale_shift=conditioning == "scale_shift",
            norm_groups=norm_groups,
            norm_eps=norm_eps,
            resampling=resampling,
            fir=fir,
            end_padding=end_padding,
            project_skips=project_skips,
            rescale=rescale,
            input_pyramid=input_pyramid,
            output_pyramid=output_pyramid,
            combine=combine,
            up_attention=up_attention,
        )
        self.inlet = conv(data, channels)
        down, skips, now = plan.way_down()
        self.down = nn.ModuleList(down)
        self.middle = nn.ModuleList([plan.stage(now, now, middle_attention, True), Stage(plan.block(now, now))])
        self.up = nn.ModuleList(plan.way_up(now, skips))
        last = plan.widths[0]
        self.outlet = None if output_pyramid == "skip" else Outlet(last, out, norm_groups, norm_eps)
        if init == "fan_avg":
            initialise_by_fans(self)

    def _check(
        self,
        multipliers: tuple[int, ...],
        attention: tuple[int, ...],
        channels: int,
        blocks: int,
        dropout: float,
        head_channels: int,
        heads: int,
    ) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"`shape` must be (C, H, W), all >= 1, got {self.shape}; use network 'mlp' for vectors.")
        if not multipliers:
            raise ValueError("`multipliers` must name at least one level, e.g. (1, 2).")
        check_count("channels", channels, 4)
        check_count("blocks", blocks)
        check_count("head_channels", head_channels, 0)
        check_count("heads", heads, 0)
        check_dropout(dropout)
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

    def _run(self, module: nn.Module, h: Tensor, given: Embedded) -> Tensor:
        if isinstance(module, DownConv | UpConv):
            return module(h)
        told = (given.vector, given.tokens) if isinstance(module, Stage) else (given.vector,)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, h, *told, use_reentrant=False)
        return module(h, *told)

    def forward(
        self,
        x: Tensor,
        noise_level: Tensor,
        *,
        target_noise_level: Tensor | None = None,
        augment_label: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        check_inputs(x, noise_level, self.shape)
        c = self.condition(noise_level, target_noise_level, augment_label, condition)
        h = self.inlet(x) if c.inlet is None else self.inlet(x) + c.inlet
        skips, pyramid = [h], x
        stage: Any
        for stage in self.down:
            if isinstance(stage, Down):
                h = self._run(stage.features, h, c)
                if self.smaller is not None:
                    pyramid = self.smaller(pyramid)
                    h = stage.pyramid(pyramid, h)  # type: ignore[misc]
                elif self.input_pyramid == "residual":
                    h = pyramid = joined(stage.pyramid(pyramid), h, self.rescale)  # type: ignore[misc]
            else:
                h = self._run(stage, h, c)
            skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, c)
        image: Tensor | None = None
        level: Any
        for level in self.up:
            for stage in level.stages:
                h = self._run(stage, torch.cat([h, skips.pop()], 1), c)
            if self.larger is not None:
                part = level.outlet(h)
                image = part if image is None else self.larger(image) + part
            elif self.output_pyramid == "residual":
                if image is None:
                    image = level.outlet(h)
                else:
                    h = image = joined(level.enlarge(image), h, self.rescale)
            if level.up is not None:
                h = self._run(level.up, h, c)
        return image if self.outlet is None else self.outlet(h)  # type: ignore[return-value]
