"""What a few estimates of a trace tell about their own variance."""

from __future__ import annotations

import torch
from torch import Tensor


def squares(signs: Tensor, shares: Tensor) -> Tensor:
    r"""What K estimates by signs say about the variance of one, (B, 3): two sums of squares, for `variance`, and the
    degrees of freedom of the first.

    With z the signs and :math:`d_i = z_i (J^T z)_i` the share of element i in the estimate :math:`\sum_i d_i`,

    .. math:: \mathrm{Var}\, d_i = \sum_{j \ne i} J_{ji}^2, \qquad
              \mathrm{Var} \sum_i d_i = 2 \sum_{i \ne j} S_{ij}^2 = 2 \sum_i \mathrm{Var}\, d_i - 2 \|A\|_F^2, \qquad
              \|A\|_F^2 = E (z^T A z')^2,

    S and A the symmetric and the antisymmetric part of J, z' other signs. So the variance is known from the scatter of
    the D shares, in which the diagonal drops out, instead of that of their sum. Both are unbiased, but where few
    directions rule, :math:`J \approx v v^T`, the sum is skew and has the kurtosis of a chi-square with one degree of
    freedom, 15: the sample variance of K sums has :math:`2 / (2 / (K - 1) + 12 / K)` degrees of freedom, 0.5 for K = 4,
    and falls with their mean, so that bars of the t-distribution miss. The scatter of the shares has K - 1 there, and
    more where more directions matter. It is a quadratic form of M, the Jacobian without its diagonal: per estimate it
    has the effective rank :math:`r = (\mathrm{tr} M^2)^2 / \mathrm{tr} M^4`, which :math:`\mathrm{tr} M^2 = E |M z|^2`
    and :math:`\mathrm{tr} M^4 = E (z'^T M^2 z)^2` measure; it is at most the number of elements that take part,
    :math:`(\sum_i e_i)^2 / \sum_i e_i^2` with :math:`e_i = \mathrm{Var}\, d_i`. Half of it is counted, for two elements
    that are coupled to each other alone have two eigenvalues and but one sign. (The Jacobian of a score is symmetric, a
    network's nearly.)

    Args:
        signs: z, (B, K, D).
        shares: d, (B, K, D).
    """
    k = signs.shape[1]
    away = shares - shares.mean(1, keepdim=True)
    energy = away.square().sum(1, dtype=torch.float64)
    both = 2.0 * energy.sum(1)
    if k == 1:
        return torch.zeros_like(both)[:, None].expand(-1, 3)
    products = shares * signs
    one, other = (products[:, :-1] * signs[:, 1:]).sum(2), (products[:, 1:] * signs[:, :-1]).sum(2)
    skew = (0.5 * (one - other)).double().square().mean(1)
    off = away * signs
    gram = (off @ off.transpose(1, 2)).double().square()
    norms = torch.diagonal(gram, dim1=1, dim2=2)
    pairs = norms.sqrt().sum(1).square() - norms.sum(1)
    tiny = torch.finfo(torch.float64).tiny
    rank = pairs / (gram.sum((1, 2)) - norms.sum(1)).clamp(min=tiny)
    rank = torch.minimum(rank, energy.sum(1).square() / energy.square().sum(1).clamp(min=tiny))
    return torch.stack([both, 2.0 * (k - 1) * skew, (k - 1) * (0.5 * rank).clamp(1.0, signs.shape[2])], 1)


def variance(squares: Tensor) -> Tensor:
    """Of `squares` over K - 1: the variance of one estimate, (B,). The part of the antisymmetric is itself an estimate:
    at most half is taken off, which is that of entries without any symmetry."""
    return torch.maximum(squares[..., 0] - squares[..., 1], 0.5 * squares[..., 0])
