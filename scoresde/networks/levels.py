"""The levels of a U-Net: what stands at each resolution, on the way down and on the way up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from scoresde.networks.blocks import Attention, Combine, Outlet, Reading, ResidualBlock, Stage, heads_of
from scoresde.networks.resampling import DownConv, UpConv


class Down(nn.Module):
    """To half the resolution: the features, and the input pyramid that joins them."""

    def __init__(self, features: ResidualBlock | DownConv, pyramid: Combine | DownConv | None) -> None:
        super().__init__()
        self.features, self.pyramid = features, pyramid


class Level(nn.Module):
    """One resolution on the way up: stages, the output pyramid, and the way to the next resolution."""

    def __init__(
        self, stages: list[nn.Module], enlarge: nn.Module | None, outlet: nn.Module | None, up: nn.Module | None
    ) -> None:
        super().__init__()
        self.stages, self.enlarge, self.outlet, self.up = nn.ModuleList(stages), enlarge, outlet, up


@dataclass(frozen=True)
class Plan:
    """What the stages of one U-Net have in common; see `UNet` for what is not said here.

    Attributes:
        data: channels of the image that comes in.
        out: channels of the image that goes out.
        channels: features at full resolution.
        widths: features of each level, the finest first.
        blocks: residual blocks per level on the way down.
        attends: whether each level has self-attention.
        condition: width of the condition.
        reads: whether there are tokens to read, which is done where there is self-attention, and in the middle.
    """

    data: int
    out: int
    channels: int
    widths: tuple[int, ...]
    blocks: int
    attends: tuple[bool, ...]
    head_channels: int
    heads: int
    condition: int
    reads: bool
    dropout: float
    scale_shift: bool
    norm_groups: int | None
    norm_eps: float
    resampling: str
    fir: bool
    end_padding: bool
    project_skips: bool
    rescale: bool
    input_pyramid: str
    output_pyramid: str
    combine: str
    up_attention: str

    def block(self, inputs: int, outputs: int, resample: str = "") -> ResidualBlock:
        """A residual block."""
        norms = (self.norm_groups, self.norm_eps)
        rest = (self.dropout, self.scale_shift, self.rescale, *norms, resample, self.fir, self.project_skips)
        return ResidualBlock(inputs, outputs, self.condition, *rest)

    def stage(self, inputs: int, outputs: int, attends: bool, reads: bool) -> Stage:
        """A residual block, attention to the other pixels, and attention to tokens if there are any."""
        norms = (self.norm_groups, self.norm_eps)
        block, attention, reading = self.block(inputs, outputs), None, None
        if attends:
            attention = Attention(outputs, self.head_channels, self.heads, self.rescale, *norms)
        if reads and self.reads:
            heads = heads_of(outputs, self.head_channels, self.heads)
            reading = Reading(outputs, self.condition, heads, *norms)
        return Stage(block, attention, reading)

    def way_down(self) -> tuple[list[nn.Module], list[int], int]:
        """The way down, the features of every skip connection, and those that arrive in the middle."""
        made: list[nn.Module] = []
        skips, now, image = [self.channels], self.channels, self.data
        for level, width in enumerate(self.widths):
            for _ in range(self.blocks):
                made.append(self.stage(now, width, self.attends[level], self.attends[level]))
                now = width
                skips.append(now)
            if level == len(self.widths) - 1:
                break
            inside = self.resampling == "block"
            halved = self.block(now, now, "down") if inside else DownConv(now, now, self.fir, self.end_padding)
            pyramid: Combine | DownConv | None = None
            if self.input_pyramid == "skip":
                pyramid = Combine(image, now, self.combine)
                now = 2 * now if self.combine == "cat" else now
            elif self.input_pyramid == "residual":
                pyramid, image = DownConv(image, now, self.fir, self.end_padding), now
            made.append(Down(halved, pyramid))
            skips.append(now)
        return made, skips, now

    def way_up(self, now: int, skips: list[int]) -> list[Level]:
        """The way up from `now` features, the coarsest level first; it uses up the skips."""
        made: list[Level] = []
        image = 0
        for level in reversed(range(len(self.widths))):
            stages: list[nn.Module] = []
            for i in range(self.blocks + 1):
                inputs, now = now + skips.pop(), self.widths[level]
                wanted = self.attends[level] and (self.up_attention == "every" or i == self.blocks)
                stages.append(self.stage(inputs, now, wanted, wanted))
            enlarge: nn.Module | None = None
            outlet: nn.Module | None = None
            if self.output_pyramid == "skip":
                outlet = Outlet(now, self.out, self.norm_groups, self.norm_eps)
            elif self.output_pyramid == "residual":
                enlarge = UpConv(image, now, self.fir) if image else None
                outlet = None if image else Outlet(now, now, self.norm_groups, self.norm_eps, zero=False)
                image = now
            larger: nn.Module | None = None
            if level:
                larger = self.block(now, now, "up") if self.resampling == "block" else UpConv(now, now, self.fir)
            made.append(Level(stages, enlarge, outlet, larger))
        return made
