"""NCSN and NCSNv2: RefineNets with dilated convolutions (Song & Ermon 2019 and 2020).

A cascade of residual stages goes from fine to coarse; a cascade of refine blocks goes back, and joins to each stage
what comes from the coarser ones (RefineNet: Lin et al. 2017, arXiv:1611.06612). The last two stages dilate their
convolutions instead of halving the resolution (Yu et al. 2017, arXiv:1705.09914). The two networks differ in their
norms, and in how refine blocks pool:

* NCSN: every norm, those inside refine blocks too, has a scale and a shift for each noise level, which its index says;
  refine blocks take means.
* NCSNv2: one scale and shift for all noise levels, no norm inside refine blocks, and refine blocks take maxima. The
  caller divides the output by sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.data.conditions import Conditions
from scoresde.networks.embeddings import check_count, check_inputs, zeroed
from scoresde.networks.refinenet import (
    ACTIVATIONS,
    INTERPOLATIONS,
    ConditionalInstanceNormPlus,
    DilatedBlock,
    InstanceNormPlus,
    NoNorm,
    Norm,
    RefineBlock,
    Series,
    conv,
)


class RefineNet(nn.Module):
    """What NCSN and NCSNv2 share: x (B, C, H, W), noise level (B,) -> (B, C, H, W).

    Args:
        shape: (C, H, W).
        conditions: none.
        channels: features at full resolution.
        multipliers: features of each stage in units of `channels`; see `NCSNv2`.
        activation: a key of `ACTIVATIONS`.
        interpolation: a key of `INTERPOLATIONS`.
        norm: makes the norms of the residual stages and the last one.
        refine_norm: makes the norms of the refine blocks.
        pool: pooling of the refine blocks.
    """

    def __init__(
        self,
        shape: Sequence[int],
        conditions: Conditions | None,
        channels: int,
        multipliers: Sequence[int],
        activation: str,
        interpolation: str,
        norm: Norm,
        refine_norm: Norm,
        pool: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        self.shape, multipliers = tuple(int(n) for n in shape), tuple(multipliers)
        self._check(conditions, channels, multipliers)
        for name, value, known in (
            ("activation", activation, ACTIVATIONS),
            ("interpolation", interpolation, INTERPOLATIONS),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        self.act = act = ACTIVATIONS[activation]
        widths = [multiplier * channels for multiplier in multipliers]
        count = len(widths)

        self.inlet = conv(self.shape[0], widths[0])
        self.stages = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(0, i - 1)]
            dilation = {count - 2: 2, count - 1: 4}.get(i, 1)
            self.stages.append(
                Series(
                    [
                        DilatedBlock(before, width, norm, act, dilation, first=i > 0),
                        DilatedBlock(width, width, norm, act, dilation),
                    ]
                )
            )
        # from coarse to fine; each makes as many features as the next stage has, so that the two can be joined
        self.refine = nn.ModuleList()
        for i in reversed(range(count)):
            inputs = [widths[i]] * (1 if i == count - 1 else 2)
            outputs, units = (widths[i - 1], 1) if i else (widths[0], 3)
            self.refine.append(RefineBlock(inputs, outputs, units, refine_norm, act, pool, interpolation))
        self.norm = norm(widths[0])
        self.outlet = zeroed(conv(widths[0], self.shape[0]))

    def _check(self, conditions: Conditions | None, channels: int, multipliers: tuple[int, ...]) -> None:
        name = type(self).__name__
        if conditions:
            raise ValueError(f"{name} takes no conditions, got {', '.join(conditions)}: use another network, or none.")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"`shape` must be (C, H, W), all >= 1, got {self.shape}; use network 'mlp' for vectors.")
        check_count("channels", channels, 2)  # a norm needs the variance of their means
        if len(multipliers) < 3:
            raise ValueError(f"`multipliers` must name at least 3 stages, e.g. (1, 2, 2, 2), got {multipliers}.")
        for multiplier in multipliers:
            check_count("multipliers", multiplier)
        if multipliers[-1] != multipliers[-2]:
            raise ValueError(
                f"`multipliers` must end with two equal numbers, got {multipliers}: the coarsest features are refined "
                "alone, without a change of their number."
            )
        _, height, width = self.shape
        factor = 2 ** (len(multipliers) - 3)
        if height % factor or width % factor:
            raise ValueError(
                f"{len(multipliers)} stages halve the image {len(multipliers) - 3} times: height and width must be "
                f"multiples of {factor}, got {height} x {width}. Use fewer `multipliers`, or pad the images."
            )
        if height * width == factor * factor:
            raise ValueError(
                f"Images of {height} x {width} end up as a single pixel after {len(multipliers)} stages, whose "
                "variance cannot be normed: use larger images or fewer `multipliers`."
            )

    def _run(self, x: Tensor, noise_level: Tensor) -> Tensor:
        h, features = self.inlet(x), []
        for stage in self.stages:
            h = stage(h, noise_level)
            features.append(h)
        # the coarsest features alone, then each finer stage with what has been refined so far
        h = self.refine[0]([features.pop()], noise_level)
        for refine in self.refine[1:]:
            h = refine([features.pop(), h], noise_level)
        return self.outlet(self.act(self.norm(h, noise_level)))

    def forward(self, x: Tensor, noise_level: Tensor, **condition: Any) -> Tensor:
        check_inputs(x, noise_level, self.shape)
        given = [name for name, value in condition.items() if value is not None]
        if given:
            raise TypeError(f"{type(self).__name__} takes no conditions: call it without {', '.join(given)}.")
        return self._run(x, noise_level)


class NCSN(RefineNet):
    r"""The noise conditional score network, a RefineNet whose norms are conditioned on the noise level.

    ``forward(x, noise_level)``: x (B, C, H, W), noise level (B,) -> (B, C, H, W). A noise level is told by its index, 0
    for the largest sigma in the published order ("index" counts the other way on a chain); floats are rounded. The
    output is the score itself. Rows do not see each other.

    Source: Song & Ermon 2019, arXiv:1907.05600, section 4.1 and appendix A. Published for x in [-1, 1]; recentring is
    the caller's. Deviation: the last convolution starts at zero, as in the other networks here.

    Args:
        shape: (C, H, W); H and W divisible by 2^(stages - 3), so even by default.
        conditions: none: there is no place for any.
        channels: features at full resolution, >= 2.
        levels: number of noise levels: rows of every norm's table.
        multipliers: see `NCSNv2`.
        activation: "elu", "relu", "leaky_relu" (slope 0.2) or "silu".
        interpolation: how coarse features are enlarged: "bilinear" (with aligned corners) or "nearest".

    Raises:
        ValueError: for conditions, a shape that is not (C, H, W), sides that cannot be halved, or an option out of
            range; in `forward` for wrong shapes of x or the noise level.
        IndexError: in `forward`, for a noise level outside 0 ... levels - 1 (on the CPU; CUDA asserts on the device).
    """

    def __init__(
        self,
        shape: Sequence[int],
        conditions: Conditions | None = None,
        channels: int = 128,
        levels: int = 10,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        activation: str = "elu",
        interpolation: str = "bilinear",
    ) -> None:
        check_count("levels", levels)
        norm = partial(ConditionalInstanceNormPlus, levels=levels)
        super().__init__(
            shape,
            conditions,
            channels,
            multipliers,
            activation,
            interpolation,
            norm=norm,
            refine_norm=norm,
            pool=F.avg_pool2d,
        )
        self.levels = levels

    def _run(self, x: Tensor, noise_level: Tensor) -> Tensor:
        return super()._run(x, (noise_level.round() if noise_level.is_floating_point() else noise_level).long())


class NCSNv2(RefineNet):
    r"""NCSN without conditioning: a RefineNet whose output, divided by sigma, is the score.

    ``forward(x, noise_level)``: x (B, C, H, W), noise level (B,) -> (B, C, H, W). The division,
    :math:`s(x, \sigma) = f(x) / \sigma`, and recentring to [-1, 1] are the caller's; the noise level is not used. Rows
    do not see each other.

    Source: Song & Ermon 2020, arXiv:2006.09011, section 3.3 (technique 3) and appendix B. Its three sizes are

    * ``(1, 2, 2, 2)``, the default, for images below 96 pixels ("ncsnv2_64"; also the stages of NCSN);
    * ``(1, 2, 2, 4, 4)`` for 96 to 128 pixels ("ncsnv2_128", "NCSNv2Deeper");
    * ``(1, 2, 2, 2, 4, 4)`` for up to 256 pixels ("ncsnv2_256", "NCSNv2Deepest").

    Deviation: the last convolution starts at zero, as in the other networks here.

    Args:
        shape: (C, H, W); H and W divisible by 2^(stages - 3), so even by default.
        conditions: none: there is no place for any.
        channels: features at full resolution, >= 2.
        multipliers: features of each stage in units of `channels`. The first is at full resolution, the last two dilate
            by 2 and by 4, and each in between halves the resolution; the last two are equal.
        activation: "elu", "relu", "leaky_relu" (slope 0.2) or "silu".
        interpolation: how coarse features are enlarged: "bilinear" (with aligned corners) or "nearest".

    Raises:
        ValueError: for conditions, a shape that is not (C, H, W), sides that cannot be halved, or an option out of
            range; in `forward` for wrong shapes of x or the noise level.
    """

    def __init__(
        self,
        shape: Sequence[int],
        conditions: Conditions | None = None,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        activation: str = "elu",
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__(
            shape,
            conditions,
            channels,
            multipliers,
            activation,
            interpolation,
            norm=InstanceNormPlus,
            refine_norm=NoNorm,
            pool=F.max_pool2d,
        )
