"""The learned uncertainty of a loss at a noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MOST = 20.0
"""Largest |lambda| that is told apart: beyond, nothing is left to learn, and alpha = 0 is at minus infinity."""


class Uncertainty(nn.Module):
    r"""u(lambda): a linear function of random Fourier features of the noise level, 0 at first.

    Trained on :math:`e^{-u} \ell + u` its optimum is :math:`u = \log E[\ell]` at every noise level (Karras et al. 2024,
    arXiv:2312.02696; the noise level is :math:`c_{noise} = \tfrac14 \log(\sigma / \alpha)`). Frequencies and
    phases are the same in every run, and are saved.

    Args:
        features: number of Fourier features.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2.0 * math.pi * torch.randn(features, generator=rng, device="cpu"))
        self.register_buffer("phases", 2.0 * math.pi * torch.rand(features, generator=rng, device="cpu"))
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, half_log_snr: Tensor) -> Tensor:
        """(B,) lambdas -> (B,) u."""
        noise_level = -0.25 * half_log_snr.clamp(-MOST, MOST).to(self.frequencies.dtype)
        angles = noise_level[:, None] * self.frequencies + self.phases
        return (torch.cos(angles) * math.sqrt(2.0 / len(self.weight))) @ self.weight
