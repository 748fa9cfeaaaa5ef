"""Embeddings of the label of a time, and of the class: what conditions every block of a network."""

import math

import torch
from torch import Tensor, nn

EMBEDDINGS = ("sinusoidal", "fourier")
CLASS_ENTRIES = ("condition", "features")


class SinusoidalEmbedding(nn.Module):
    r"""cos and sin of the label at geometric frequencies :math:`\omega_i = P^{-i / (n - 1)}`, n = dim / 2.

    The shortest wavelength is :math:`2\pi` label units and the longest :math:`2\pi P`, so the label must move by
    about one unit wherever the network is to see a difference: labels such as 999 t (range 0 … 999, resolution
    about 1e-3 in t), or `log sigma` with a small P. Evaluated in the dtype of the label, never below float32.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5; Ho et al. 2020 for times.

    Args:
        dim: number of features, even and >= 4.
        max_period: P > 1. 10000 is the value of both sources.

    Raises:
        ValueError: for an odd or too small `dim`, or `max_period` <= 1.
    """

    def __init__(self, dim: int, max_period: float = 10000.0) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"`dim` must be an even number >= 4, got {dim}.")
        if not max_period > 1.0:
            raise ValueError(f"`max_period` must be > 1, got {max_period}.")
        self.dim, self.max_period = dim, float(max_period)

    def forward(self, label: Tensor) -> Tensor:
        """(B,) -> (B, dim)."""
        label = label if label.dtype in (torch.float32, torch.float64) else label.float()
        half = self.dim // 2
        # made here rather than stored: a buffer would be rounded when the module is cast to bfloat16
        ramp = torch.arange(half, dtype=label.dtype, device=label.device) / (half - 1)
        angle = label[:, None] * torch.exp(-math.log(self.max_period) * ramp)
        return torch.cat([angle.cos(), angle.sin()], 1)


class FourierEmbedding(nn.Module):
    r"""cos and sin of :math:`2\pi w_i` label with fixed :math:`w_i \sim N(0, scale^2)`.

    For labels of order one, such as `log sigma`; the resolution is about 1 / (2 pi scale) label units.

    Source: Tancik et al. 2020, arXiv:2006.10739; Song et al. 2021 (NCSN++) with scale 16.

    Args:
        dim: number of features, even and >= 2.
        scale: standard deviation of the frequencies, > 0.

    Raises:
        ValueError: for an odd or too small `dim`, or `scale` <= 0.
    """

    frequencies: Tensor

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"`dim` must be an even number >= 2, got {dim}.")
        if not scale > 0.0:
            raise ValueError(f"`scale` must be > 0, got {scale}.")
        self.register_buffer("frequencies", torch.randn(dim // 2) * scale)

    def forward(self, label: Tensor) -> Tensor:
        """(B,) -> (B, dim)."""
        label = label if label.dtype in (torch.float32, torch.float64) else label.float()
        angle = 2.0 * math.pi * label[:, None] * self.frequencies.to(label.dtype)
        return torch.cat([angle.cos(), angle.sin()], 1)


class Condition(nn.Module):
    """Label of the time, the class and the augmentation if there are any, as one vector for all blocks.

    features -> linear -> silu -> linear -> silu. The class table has one row more than there are classes: index
    `num_classes` is the null token of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), and what
    `class_label=None` stands for.

    Args:
        width: number of features of the result.
        num_classes: number of classes; 0 for none.
        embedding: "sinusoidal" or "fourier".
        max_period: see `SinusoidalEmbedding`.
        fourier_scale: see `FourierEmbedding`.
        features: number of features of the label's embedding; `width` by default.
        class_entry: "condition": the class is added after the second linear map (Dhariwal & Nichol 2021); "features":
            to the label's features (Karras et al. 2022).
        augmentations: number of augmentation parameters, added to the features by a linear map without bias; none given
            counts as zeros: no augmentation (Karras et al. 2022, F.2).

    Raises:
        ValueError: for an unknown `embedding` or `class_entry`, or a negative number of classes or augmentations.
    """

    def __init__(
        self,
        width: int,
        num_classes: int = 0,
        embedding: str = "sinusoidal",
        max_period: float = 10000.0,
        fourier_scale: float = 16.0,
        features: int | None = None,
        class_entry: str = "condition",
        augmentations: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"`num_classes` must be >= 0, got {num_classes}.")
        if augmentations < 0:
            raise ValueError(f"`augmentations` must be >= 0, got {augmentations}.")
        if class_entry not in CLASS_ENTRIES:
            raise ValueError(f"`class_entry` must be one of {', '.join(CLASS_ENTRIES)}, got {class_entry!r}.")
        features = width if features is None else features
        if embedding == "sinusoidal":
            self.label: nn.Module = SinusoidalEmbedding(features, max_period)
        elif embedding == "fourier":
            self.label = FourierEmbedding(features, fourier_scale)
        else:
            raise ValueError(f"`embedding` must be one of {', '.join(EMBEDDINGS)}, got {embedding!r}.")
        self.num_classes, self.class_entry, self.augmentations = num_classes, class_entry, augmentations
        self.first, self.second = nn.Linear(features, width), nn.Linear(width, width)
        entry = width if class_entry == "condition" else features
        self.classes = nn.Embedding(num_classes + 1, entry) if num_classes else None
        self.augment = nn.Linear(augmentations, features, bias=False) if augmentations else None

    def forward(self, label: Tensor, class_label: Tensor | None = None, augment_label: Tensor | None = None) -> Tensor:
        """Label (B,), class (B,), augmentation parameters (B, augmentations) -> (B, width).

        Raises:
            ValueError: for a class or an augmentation given to a network without, or of the wrong shape.
        """
        h = self.label(label).to(self.first.weight.dtype)
        if augment_label is not None:
            wanted = (len(label), self.augmentations)
            if self.augment is None:
                raise ValueError("This network was built without augmentations: call it without `augment_label`.")
            if augment_label.shape != wanted:
                raise ValueError(f"`augment_label` must have shape {wanted}, got {tuple(augment_label.shape)}.")
            h = h + self.augment(augment_label.to(h.dtype))
        classes = self._classes(label, class_label)
        if classes is not None and self.class_entry == "features":
            h = h + classes
        h = self.second(nn.functional.silu(self.first(h)))
        if classes is not None and self.class_entry == "condition":
            h = h + classes
        # the final activation is shared by every block, so each block needs one linear map only
        return nn.functional.silu(h)

    def _classes(self, label: Tensor, class_label: Tensor | None) -> Tensor | None:
        if self.classes is None:
            if class_label is not None:
                raise ValueError("This network was built without classes: call it without `class_label`.")
            return None
        if class_label is None:
            class_label = torch.full_like(label, self.num_classes, dtype=torch.int64)
        if class_label.shape != label.shape:
            raise ValueError(f"`class_label` must have shape {tuple(label.shape)}, got {tuple(class_label.shape)}.")
        found: Tensor = self.classes(class_label)
        return found


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with all parameters set to zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    module.starts_at_zero = True  # type: ignore[assignment]
    return module


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise unless `value` is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")


def check_dropout(value: float) -> None:
    """Raise unless 0 <= `value` < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"`dropout` must be in [0, 1), got {value}.")
