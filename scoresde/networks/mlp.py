"""A residual multilayer perceptron for vectors."""

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.data.conditions import Conditions, ConditionSpec
from scoresde.networks.conditioning import ConditionEmbedding
from scoresde.networks.embeddings import check_count, check_dropout, check_inputs, zeroed


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
    """Residual SiLU blocks on the flattened state, each told the noise level and the conditions.

    ``forward(x, noise_level, **condition)``: x (B, *D), noise level (B,) -> (B, *D). Rows do not see each other. The
    output starts at zero. Images are flattened beside the state, and tokens are pooled: see `ConditionEmbedding`.

    Args:
        shape: D, e.g. ``(2,)``; anything is flattened.
        conditions: name -> `ConditionSpec`, or its arguments.
        width: features of the hidden layers, even.
        depth: number of residual blocks.
        dropout: probability inside the blocks.
        embedding: "sinusoidal" (noise levels of hundreds, such as 999 t) or "fourier" (of order one).
        max_period: longest wavelength of the sinusoidal embedding, in units of the noise level / 2 pi.
        fourier_scale: standard deviation of the Fourier embedding's frequencies.
        target_noise_level: whether there is a second noise level, see `ConditionEmbedding`.

    Raises:
        ValueError: for an empty shape or an option out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        conditions: Conditions | None = None,
        width: int = 128,
        depth: int = 4,
        dropout: float = 0.0,
        embedding: str = "sinusoidal",
        max_period: float = 10000.0,
        fourier_scale: float = 16.0,
        target_noise_level: bool = False,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"`shape` must name at least one dimension, all >= 1, got {self.shape}.")
        check_count("width", width, 4)
        check_count("depth", depth)
        check_dropout(dropout)
        d = math.prod(self.shape)

        def inlet(spec: ConditionSpec) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(spec.shape), width, bias=False))

        self.condition = ConditionEmbedding(
            width,
            conditions,
            embedding,
            max_period,
            fourier_scale,
            target_noise_level=target_noise_level,
            pool_tokens=True,
            inlet=inlet,
        )
        self.inlet = nn.Linear(d, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outlet = zeroed(nn.Linear(width, d))

    def forward(
        self, x: Tensor, noise_level: Tensor, *, target_noise_level: Tensor | None = None, **condition: Any
    ) -> Tensor:
        check_inputs(x, noise_level, self.shape)
        given = self.condition(noise_level, target_noise_level, condition=condition)
        h = self.inlet(x.flatten(1))
        if given.inlet is not None:
            h = h + given.inlet
        for block in self.blocks:
            h = block(h, given.vector)
        return self.outlet(F.silu(self.norm(h))).reshape(x.shape)
