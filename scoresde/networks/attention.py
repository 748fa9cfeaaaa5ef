"""Attention to the tokens of conditions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.networks.embeddings import zeroed


class Tokens(NamedTuple):
    """Tokens of all conditions that have some: values (B, S, width), mask (B, S); the first one is always there."""

    values: Tensor
    mask: Tensor


class CrossAttention(nn.Module):
    """Attention from features to tokens: (B, N, channels), `Tokens` -> (B, N, channels), zero at first.

    Tokens where the mask is False have weight 0 exactly. Without positions in them, tokens are a set: their order does
    not matter.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.2; as a condition, Rombach et al. 2022, arXiv:2112.10752.

    Args:
        channels: features of the queries, a multiple of `heads`.
        width: features of the tokens.
        heads: heads of attention.
    """

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # output channels of `kv` in the order (k, v) x heads x channels of a head
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(width, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        b, n, channels = x.shape
        q = self.q(x).reshape(b, n, self.heads, -1).transpose(1, 2)
        kv = self.kv(tokens.values)
        k, v = kv.reshape(b, -1, 2, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=tokens.mask[:, None, None])
        out: Tensor = self.out(h.transpose(1, 2).reshape(b, n, channels))
        return out


class Pool(nn.Module):
    """Attention from one learned query to the tokens: `Tokens` -> (B, width), zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width))
        self.attention = CrossAttention(width, width, math.gcd(8, width))

    def forward(self, tokens: Tokens) -> Tensor:
        pooled: Tensor = self.attention(self.query.expand(tokens.values.shape[0], 1, -1), tokens)
        return pooled[:, 0]
