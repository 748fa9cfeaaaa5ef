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

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.networks.conditioning import Conditions
from scoresde.networks.embeddings import check_count, zeroed

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
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (B, *{self.shape}), got {tuple(x.shape)}.")
        if noise_level.shape != x.shape[:1]:
            raise ValueError(f"`noise_level` must have shape ({len(x)},), got {tuple(noise_level.shape)}.")
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


# Names in the published checkpoints.

STAGE_NAMES: Mapping[int, tuple[str, str]] = {
    4: ("1 2 3 4", "1 2 3 4"),
    5: ("1 2 3 4 5", "1 2 3 4 5"),
    6: ("1 2 3 31 4 5", "1 2 31 3 4 5"),
}
"""Number of stages -> what follows "res" in the published names, from fine to coarse, and "refine", from coarse to
fine."""

PARAMETER_NAMES = {"scale": "gamma", "mean_scale": "alpha", "shift": "beta", "table.weight": "embed.weight"}


def published_names(network: RefineNet) -> Iterator[tuple[str, str]]:
    """(name here, published name) of every parameter, each once; the tensors are equal as they are.

    The names are those of score_sde_pytorch without the prefix ``module.``, and of the networks of the two papers
    (ermongroup/ncsn, ermongroup/ncsnv2). Its buffer ``sigmas`` has no counterpart.

    Args:
        network: NCSN or NCSNv2 with 4, 5 or 6 stages.

    Raises:
        ValueError: for another number of stages, which was never published.
    """
    for ours, theirs in _published_modules(network):
        for name, _ in network.get_submodule(ours).named_parameters():
            yield f"{ours}.{name}", f"{theirs}.{PARAMETER_NAMES.get(name, name)}"


def _published_modules(network: RefineNet) -> Iterator[tuple[str, str]]:
    """(name here, published name) of every convolution and norm; some have no parameters."""
    count = len(network.stages)
    if count not in STAGE_NAMES:
        raise ValueError(f"Published networks have 4, 5 or 6 stages; this one has {count}.")
    stages, refine = (numbers.split() for numbers in STAGE_NAMES[count])
    yield from (("inlet", "begin_conv"), ("norm", "normalizer"), ("outlet", "end_conv"))
    for i, number in enumerate(stages):
        for j in range(2):
            ours, theirs = f"stages.{i}.{j}", f"res{number}.{j}"
            # a convolution and the mean after it are one published module
            inner = ".conv" if network.get_submodule(ours).halve else ""
            yield from ((f"{ours}.norm{k}", f"{theirs}.normalize{k}") for k in (1, 2))
            yield from ((f"{ours}.conv1", f"{theirs}.conv1"), (f"{ours}.conv2", f"{theirs}.conv2{inner}"))
            yield f"{ours}.skip", f"{theirs}.shortcut{inner}"
    for i, number in enumerate(refine):
        ours, theirs = f"refine.{i}", f"refine{number}"
        series = [(f"{ours}.adapt.{j}", f"{theirs}.adapt_convs.{j}", 2) for j in range(1 if i == 0 else 2)]
        series.append((f"{ours}.final", f"{theirs}.output_convs", 3 if i == count - 1 else 1))
        for own, published, units in series:
            for j in range(units):
                for kind in ("norm", "conv"):
                    yield from ((f"{own}.{j}.{kind}{k}", f"{published}.{j + 1}_{k}_{kind}") for k in (1, 2))
        parts = [("pooling", "crp")] if i == 0 else [("fusion", "msf"), ("pooling", "crp")]
        for own, published in parts:
            for kind in ("norms", "convs"):
                yield from ((f"{ours}.{own}.{kind}.{j}", f"{theirs}.{published}.{kind}.{j}") for j in (0, 1))
