"""A residual multilayer perceptron for vectors."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.networks.embeddings import Condition, check_count, check_dropout, zeroed


class _Block(nn.Module):
    """h + W2 dropout(silu(W1 norm(h) + A c)), W2 zero at the start."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.condition = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.second = zeroed(nn.Linear(width, width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        y = F.silu(self.first(self.norm(h)) + self.condition(c))
        return h + self.second(self.dropout(y))


class MLP(nn.Module):
    """Residual SiLU blocks on the flattened state, each told the time and the class.

    ``forward(x, label, class_label=None)``: x (B, *D), label (B,), class (B,) -> (B, *D). Rows do not see each
    other. The output starts at zero.

    Args:
        shape: D, e.g. ``(2,)``; anything is flattened.
        num_classes: number of classes, 0 for none; index `num_classes` is the null token.
        width: features of the hidden layers, even.
        depth: number of residual blocks.
        dropout: probability inside the blocks.
        embedding: "sinusoidal" (labels of hundreds, such as 999 t) or "fourier" (labels of order one).
        max_period: longest wavelength of the sinusoidal embedding, in label units / 2 pi.
        fourier_scale: standard deviation of the Fourier embedding's frequencies.

    Raises:
        ValueError: for an empty shape or an option out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        width: int = 128,
        depth: int = 4,
        dropout: float = 0.0,
        embedding: str = "sinusoidal",
        max_period: float = 10000.0,
        fourier_scale: float = 16.0,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"`shape` must name at least one dimension, all >= 1, got {self.shape}.")
        check_count("width", width, 4)
        check_count("depth", depth)
        check_dropout(dropout)
        self.num_classes = num_classes
        d = math.prod(self.shape)
        self.condition = Condition(width, num_classes, embedding, max_period, fourier_scale)
        self.inlet = nn.Linear(d, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outlet = zeroed(nn.Linear(width, d))

    def forward(self, x: Tensor, label: Tensor, *, class_label: Tensor | None = None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (B, *{self.shape}), got {tuple(x.shape)}.")
        c = self.condition(label, class_label)
        h = self.inlet(x.flatten(1))
        for block in self.blocks:
            h = block(h, c)
        return self.outlet(F.silu(self.norm(h))).reshape(x.shape)
