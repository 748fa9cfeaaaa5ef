"""The diffusion transformer of this field (DiT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.data.conditions import Conditions, ConditionSpec
from scoresde.networks.attention import CrossAttention, Tokens
from scoresde.networks.conditioning import ConditionEmbedding, check_images
from scoresde.networks.embeddings import check_count, check_dropout, check_inputs, zeroed

FEATURES = 256
"""Sinusoidal features of a noise level, whatever the width of the network."""


def position_table(
    rows: int, columns: int, width: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    r"""Fixed embedding of the places of a grid, row after row: (rows columns, width).

    At row r and column c: sin and cos of :math:`c \omega_k`, then sin and cos of :math:`r \omega_k`, with
    :math:`\omega_k = 10000^{-4 k / width}`, k < width / 4. The column comes first, as in the published weights.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5, one half of the features per axis.

    Args:
        rows: height of the grid.
        columns: width of the grid.
        width: features, a multiple of four.
        dtype: of the result; float32 or float64, in which it is evaluated.
        device: of the result.
    """
    quarter = width // 4
    ramp = torch.arange(quarter, dtype=dtype, device=device) / quarter
    omega = torch.exp(-math.log(10000.0) * ramp)

    def axis(places: int) -> Tensor:
        angle = torch.arange(places, dtype=dtype, device=device)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], 1)

    across = axis(columns)[None].expand(rows, columns, -1)
    along = axis(rows)[:, None].expand(rows, columns, -1)
    return torch.cat([across, along], 2).reshape(rows * columns, width)


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of every token, then one scale 1 + `scale` and one `shift` per row: (B, N, width) -> the same."""
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=1e-6), 1.0 + scale[:, None])


class DiTBlock(nn.Module):
    r"""Self-attention and an MLP, both modulated: x (B, N, width), c (B, width) -> (B, N, width).

    .. math:: x \leftarrow x + g_1 \, \mathrm{attention}((1 + s_1) \, \mathrm{norm}(x) + b_1), \qquad
              x \leftarrow x + g_2 \, \mathrm{mlp}((1 + s_2) \, \mathrm{norm}(x) + b_2),

    where :math:`(b_1, s_1, g_1, b_2, s_2, g_2)` is a linear map of c, zero at first ("adaLN-zero"): the block starts
    as the identity. The MLP is linear -> gelu (in its tanh form) -> linear. Between the two, tokens of conditions are
    read, if there are any: x <- x + cross-attention(norm(x), tokens), zero at first (Chen et al. 2023,
    arXiv:2310.00426).

    Args:
        width: features of a token.
        heads: of attention, a divisor of the width.
        hidden: features inside the MLP.
        dropout: of the results of attention and MLP.
        reads: whether there are tokens.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, reads: bool) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        # outputs in the order (q, k, v) x heads x channels of a head
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.reading = CrossAttention(width, width, heads) if reads else None

    def _attention(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).reshape(b, n, width))

    def forward(self, x: Tensor, c: Tensor, tokens: Tokens | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, 1)
        h = self._attention(normed(x, shift1, scale1))
        x = torch.addcmul(x, gate1[:, None], self.dropout(h))
        if self.reading is not None and tokens is not None:
            x = x + self.dropout(self.reading(F.layer_norm(x, x.shape[-1:], eps=1e-6), tokens))
        h = self.second(F.gelu(self.first(normed(x, shift2, scale2)), approximate="tanh"))
        return torch.addcmul(x, gate2[:, None], self.dropout(h))


class DiTOutlet(nn.Module):
    """A modulated norm, and a linear map to the pixels of a patch: (B, N, width), (B, width) -> (B, N, pixels)."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.modulation, self.linear = nn.Linear(width, 2 * width), nn.Linear(width, pixels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c).chunk(2, 1)
        return self.linear(normed(x, shift, scale))


class DiT(nn.Module):
    r"""Diffusion transformer: patches as tokens, blocks of attention that the noise level and conditions modulate.

    ``forward(x, noise_level, **condition)``: x (B, C, H, W), noise level (B,) -> (B, C, H, W), or (B, 2 C, H, W) with a
    learned variance. Rows do not see each other. The output starts at zero, and every block as the identity. Tokens of
    conditions are read by every block; images join the channels of x: see `ConditionEmbedding`.

    Patches of p x p pixels become N = H W / p^2 tokens by a linear map, plus `position_table`; after the blocks
    (`DiTBlock`) each token becomes the p x p pixels of its patch again. Cost grows as N^2: p = 2 is meant for latents
    of 32 x 32 or 64 x 64, larger patches for pixels. Published sizes, with p = 2, 4 or 8 (DiT-S/2 etc.), and their
    millions of parameters at p = 2 for (4, 32, 32), 1000 classes and a learned variance:

    ======== ===== ===== ===== ========
    name     depth width heads millions
    ======== ===== ===== ===== ========
    DiT-S    12    384   6     33
    DiT-B    12    768   12    130
    DiT-L    24    1024  16    458
    DiT-XL   28    1152  16    675
    ======== ===== ===== ===== ========

    The defaults are DiT-S/2. The position table is computed where it is used, so it follows dtype and device and is in
    neither the parameters nor the state.

    Attention is torch's fused one where there is one. That has no second derivatives, no forward mode, and loops over
    batches of gradients with a warning: evaluate the network under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``
    for those, as `divergence` and the likelihoods do by themselves.

    Initial values are those of the paper's code: Xavier uniform weights, zero biases, N(0, 0.02^2) for the class table
    and the noise level's two maps, zeros for all modulations and the last map.

    Source: Peebles & Xie 2023, arXiv:2212.09748, with adaLN-zero. Deviations: H need not equal W; dropout; classes are
    dropped at random by the caller, who passes the null class, not in here.

    Args:
        shape: (C, H, W); H and W multiples of `patch`.
        conditions: name -> `ConditionSpec`, or its arguments.
        patch: side p of a patch.
        width: features of a token, a multiple of 4 (sin and cos of two coordinates) and of `heads`.
        depth: number of blocks.
        heads: heads of attention.
        mlp_ratio: features inside a block's MLP, in units of `width`.
        max_period: P of the frequencies P^(-i / 128), for noise levels of hundreds such as 999 t.
        dropout: probability, on the results of attention and MLP; the paper has none.
        learned_variance: a second output of C channels, from which chains take a variance (Nichol & Dhariwal 2021,
            arXiv:2102.09672), as in the published weights.
        target_noise_level: whether there is a second noise level, see `ConditionEmbedding`.
        pool_tokens: whether tokens are pooled, too, see `ConditionEmbedding`.

    Raises:
        ValueError: for a shape that is not (C, H, W), sides that are not multiples of the patch, or an option out of
            range; by `forward` for an x or a condition of the wrong shape.
        TypeError: by `forward` for a condition that it was built without.
    """

    def __init__(
        self,
        shape: Sequence[int],
        conditions: Conditions | None = None,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        max_period: float = 10000.0,
        dropout: float = 0.0,
        learned_variance: bool = False,
        target_noise_level: bool = False,
        pool_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"`shape` must be (C, H, W), all >= 1, got {self.shape}; use network 'mlp' for vectors.")
        for name, value in (("patch", patch), ("width", width), ("depth", depth), ("heads", heads)):
            check_count(name, value)
        data, high, wide = self.shape
        if high % patch or wide % patch:
            raise ValueError(
                f"Height and width must be multiples of `patch` = {patch}, got {high} x {wide}. "
                "Use another `patch`, or pad the images."
            )
        if width % 4:
            raise ValueError(f"`width` must be a multiple of 4 (sin and cos of two coordinates), got {width}.")
        if width % heads:
            raise ValueError(f"`width` must be a multiple of `heads` = {heads}, got {width}.")
        if not int(mlp_ratio * width) >= 1:
            raise ValueError(f"`mlp_ratio` must leave the MLP at least one feature, got {mlp_ratio}.")
        if not max_period > 1.0:
            raise ValueError(f"`max_period` must be > 1, got {max_period}.")
        check_dropout(dropout)
        self.patch, self.width, self.learned_variance = patch, width, learned_variance
        self.rows, self.columns = high // patch, wide // patch
        self.outputs = 2 * data if learned_variance else data
        self.inlet = nn.Conv2d(data, width, patch, patch)

        def inlet(spec: ConditionSpec) -> nn.Module:
            return nn.Conv2d(spec.shape[0], width, patch, patch, bias=False)

        self.condition = ConditionEmbedding(
            width,
            conditions,
            # the embedding's own frequencies, P^(-i / (half - 1)), reach the end of their range; these stop short
            max_period=max_period ** ((FEATURES // 2 - 1) / (FEATURES // 2)),
            features=FEATURES,
            target_noise_level=target_noise_level,
            pool_tokens=pool_tokens,
            inlet=inlet,
        )
        check_images(self.condition.specs, self.shape)
        reads = bool(self.condition.names("tokens"))
        hidden = int(mlp_ratio * width)
        self.blocks = nn.ModuleList([DiTBlock(width, heads, hidden, dropout, reads) for _ in range(depth)])
        self.outlet = DiTOutlet(width, patch * patch * self.outputs)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not getattr(module, "starts_at_zero", False):
                # the convolution is a linear map of patches, and its fans are counted as such
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        condition = self.condition
        classes = [condition.branches[name] for name in condition.names("class")]
        for module in (condition.first, condition.second, *classes):
            nn.init.normal_(module.weight, std=0.02)
        block: Any
        for block in self.blocks:
            zeroed(block.modulation)
        zeroed(self.outlet)

    def forward(
        self, x: Tensor, noise_level: Tensor, *, target_noise_level: Tensor | None = None, **condition: Any
    ) -> Tensor:
        check_inputs(x, noise_level, self.shape)
        c, tokens, extra = self.condition(noise_level, target_noise_level, condition=condition)
        h = (self.inlet(x) if extra is None else self.inlet(x) + extra).flatten(2).transpose(1, 2)
        kind = self.inlet.weight.dtype  # not h's: under autocast tokens are summed up in the parameters' precision
        exact = torch.float64 if kind == torch.float64 else torch.float32
        h = h + position_table(self.rows, self.columns, self.width, exact, h.device).to(kind)
        for block in self.blocks:
            h = block(h, c, tokens)
        # a token holds its patch in the order row, column, channel
        pixels = self.outlet(h, c).reshape(-1, self.rows, self.columns, self.patch, self.patch, self.outputs)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.outputs, *self.shape[1:])
