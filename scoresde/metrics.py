"""Two-sample distances, and the Gaussian that any density model must beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde.score_model import DataSpec


def energy_distance(x: Tensor, y: Tensor) -> float:
    r"""Energy distance :math:`2 E\|x - y\| - E\|x - x'\| - E\|y - y'\|`, >= 0 in expectation and 0 for equal laws.

    Unbiased (pairs of a sample with itself are left out), so equal laws scatter around zero.

    Source: Szekely & Rizzo 2013, doi:10.1016/j.jspi.2013.03.018.

    Args:
        x: (N, *D).
        y: (M, *D).
    """
    a, b = _pair(x, y)
    within = [torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in (a, b)]
    return float(2.0 * torch.cdist(a, b).mean() - within[0] - within[1])


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 512, seed: int = 0) -> float:
    r"""Sliced 2-Wasserstein distance: root mean square, over random directions, of the distance between projections.

    Biased upwards on finite samples: compare with the value between two samples of the same law and size.

    Source: Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3.

    Args:
        x: (N, *D).
        y: (M, *D); quantiles are matched where N and M differ.
        projections: number of directions.
        seed: of the directions.
    """
    a, b = _pair(x, y)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    levels = (torch.arange(max(len(a), len(b)), dtype=torch.float64) + 0.5) / max(len(a), len(b))
    p, q = (_quantiles((v @ directions).sort(0).values, levels) for v in (a, b))
    return math.sqrt(float((p - q).square().mean()))


def _quantiles(ordered: Tensor, levels: Tensor) -> Tensor:
    """Step quantiles of sorted columns: exact optimal transport where the sizes agree."""
    return ordered[(levels * len(ordered)).long().clamp(max=len(ordered) - 1)]


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1:] != y.shape[1:] or len(x) < 2 or len(y) < 2:
        raise ValueError(f"Need two samples of one shape and two rows each, got {tuple(x.shape)}, {tuple(y.shape)}.")
    a, b = (v.detach().double().cpu().reshape(len(v), -1) for v in (x, y))
    return a, b


def gaussian_bits_per_dim(train: Tensor, held_out: Tensor, spec: DataSpec) -> tuple[float, float]:
    """Bits/dim of `held_out` under a full-covariance Gaussian fitted to `train`, and the mean's standard error.

    Integer data are dequantized uniformly like a model's (`bits_per_dim`): the fit and the expected log density over
    the noise are taken in closed form, the noise adding 1/12 to every variance.

    Args:
        train: (N, *D) in data units.
        held_out: (M, *D) in data units.
        spec: of the data.
    """
    a, b = (v.double().reshape(len(v), -1) + (0.5 if spec.levels else 0.0) for v in (train, held_out))
    d = a.shape[1]
    noise = 1.0 / 12.0 if spec.levels else 0.0
    mean, covariance = a.mean(0), torch.cov(a.T, correction=0) + noise * torch.eye(d, dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)
    square = torch.linalg.solve_triangular(factor, (b - mean).T, upper=False).square().sum(0)
    expected = square + noise * torch.cholesky_inverse(factor).trace()
    nats = 0.5 * (expected + d * math.log(2 * math.pi)) + factor.diagonal().log().sum()
    bits = nats / (d * math.log(2.0))
    return float(bits.mean()), float(bits.std() / math.sqrt(len(bits)))
