"""The published U-Nets: `UNet` with the options of their papers."""

from __future__ import annotations

from collections.abc import Sequence

from scoresde.data.conditions import Conditions
from scoresde.networks.unet import UNet


class NCSNpp(UNet):
    r"""NCSN++ and DDPM++ (Song et al. 2021, arXiv:2011.13456, appendix H).

    One-head attention, skips rescaled by :math:`1 / \sqrt 2`, resampling inside the blocks.

    * NCSN++ (the defaults): filtered resampling, a residual input pyramid, Fourier features of log sigma (noise
      level "log_sigma", or "log_half_sigma" where the checkpoint was trained on data in [0, 1]);
    * DDPM++: ``fir=False, input_pyramid="none", embedding="sinusoidal"`` (noise level "t999", or "index" on a
      chain).

    Division by sigma and recentring of the input are the score model's. Classes and augmentations, which that paper
    does not have, enter as in Karras et al. 2022 ("SongUNet").

    Args:
        shape: (C, H, W).
        conditions: name -> `ConditionSpec`, or its arguments.
        channels: features at full resolution.
        multipliers: features of each level in units of `channels`.
        blocks: residual blocks per level; 8 in the "deep" models.
        attention: heights of the feature maps with attention.
        dropout: probability inside the residual blocks.
        embedding: "fourier" (2 `channels` features) or "sinusoidal" (`channels`).
        fourier_scale: standard deviation of the Fourier frequencies.
        wide_embedding: 2 `channels` features for a sinusoidal embedding, too.
        fir: resample with the filter [1, 3, 3, 1].
        resampling: "block", or "convolution" (blocks of DDPM).
        rescale: divide sums of skip and branch by the root of two.
        input_pyramid: see `UNet`.
        output_pyramid: see `UNet`.
        combine: see `UNet`.
        augmentations: number of augmentation parameters.
        checkpointing: see `UNet`.
        target_noise_level: see `UNet`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        conditions: Conditions | None = None,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding: str = "fourier",
        fourier_scale: float = 16.0,
        wide_embedding: bool = False,
        fir: bool = True,
        resampling: str = "block",
        rescale: bool = True,
        input_pyramid: str = "residual",
        output_pyramid: str = "none",
        combine: str = "sum",
        augmentations: int = 0,
        checkpointing: bool = False,
        target_noise_level: bool = False,
    ) -> None:
        super().__init__(
            shape,
            conditions,
            channels,
            multipliers,
            blocks,
            attention,
            head_channels=0,
            dropout=dropout,
            conditioning="add",
            embedding=embedding,
            fourier_scale=fourier_scale,
            features=2 * channels if embedding == "fourier" or wide_embedding else channels,
            class_entry="features",
            augmentations=augmentations,
            resampling=resampling,
            fir=fir,
            end_padding=True,
            rescale=rescale,
            input_pyramid=input_pyramid,
            output_pyramid=output_pyramid,
            combine=combine,
            up_attention="last",
            norm_eps=1e-6,
            init="fan_avg",
            checkpointing=checkpointing,
            target_noise_level=target_noise_level,
        )


class DDPM(UNet):
    """The U-Net of Ho et al. 2020, arXiv:2006.11239 (noise level "index" on a chain, or "t999").

    One-head attention, strided convolutions padded at the end, 32 groups in every norm.

    Args:
        shape: (C, H, W).
        conditions: name -> `ConditionSpec`, or its arguments; classes come in after the embedding's second linear map.
        channels: features at full resolution.
        multipliers: features of each level in units of `channels`.
        blocks: residual blocks per level.
        attention: heights of the feature maps with attention.
        dropout: probability inside the residual blocks.
        up_attention: after "every" block of a level on the way up, as in the paper's code, or after the "last", as in
            Song et al.'s.
        checkpointing: see `UNet`.
        target_noise_level: see `UNet`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        conditions: Conditions | None = None,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        up_attention: str = "every",
        checkpointing: bool = False,
        target_noise_level: bool = False,
    ) -> None:
        super().__init__(
            shape,
            conditions,
            channels,
            multipliers,
            blocks,
            attention,
            head_channels=0,
            dropout=dropout,
            conditioning="add",
            features=channels,
            end_padding=True,
            up_attention=up_attention,
            norm_groups=32,
            norm_eps=1e-6,
            init="fan_avg",
            checkpointing=checkpointing,
            target_noise_level=target_noise_level,
        )


class ADM(UNet):
    """The U-Net of Dhariwal & Nichol 2021, arXiv:2105.05233 (guided-diffusion), and of Karras et al. 2022.

    Scale-shift conditioning, heads of 64 channels, attention after every block of its levels.

    Args:
        shape: (C, H, W).
        conditions: name -> `ConditionSpec`, or its arguments; classes come in after the embedding's second linear map.
        channels: features at full resolution; 192 for ImageNet 64, 256 above.
        multipliers: features of each level in units of `channels`.
        blocks: residual blocks per level.
        attention: heights of the feature maps with attention.
        middle_attention: whether the middle has it too.
        head_channels: features per attention head; 0: one head.
        heads: number of heads instead; 0: by `head_channels`.
        dropout: probability inside the residual blocks.
        resampling: "block" or "convolution".
        conditioning: "scale_shift" or "add".
        embedding_channels: features of the noise level's embedding, a quarter of the condition's; `channels` if None.
        augmentations: number of augmentation parameters (Karras et al. 2022).
        learned_variance: see `UNet`.
        checkpointing: see `UNet`.
        target_noise_level: see `UNet`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        conditions: Conditions | None = None,
        channels: int = 192,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (32, 16, 8),
        middle_attention: bool = True,
        head_channels: int = 64,
        heads: int = 0,
        dropout: float = 0.1,
        resampling: str = "block",
        conditioning: str = "scale_shift",
        embedding_channels: int | None = None,
        augmentations: int = 0,
        learned_variance: bool = False,
        checkpointing: bool = False,
        target_noise_level: bool = False,
    ) -> None:
        features = embedding_channels or channels
        half = features // 2
        super().__init__(
            shape,
            conditions,
            channels,
            multipliers,
            blocks,
            attention,
            middle_attention,
            head_channels,
            heads,
            dropout=dropout,
            conditioning=conditioning,
            # their frequencies are 10000^(-i / half), ours max_period^(-i / (half - 1))
            max_period=10000.0 ** ((half - 1) / half),
            features=features,
            width=4 * features,
            augmentations=augmentations,
            resampling=resampling,
            project_skips=False,
            learned_variance=learned_variance,
            checkpointing=checkpointing,
            target_noise_level=target_noise_level,
        )
