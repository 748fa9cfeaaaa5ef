"""Two-sample distances, and the bits/dim of a fitted Gaussian, which any density model must beat.

Every distance takes two samples (N, *D) and (M, *D) of finite numbers and tends to 0 for samples of one law. None is
free of Monte Carlo noise: judge a value against the one between two samples of one law and the same sizes. Distances
depend on differences of samples only, so that moving both samples by one vector changes nothing but rounding; the
polynomial kernel and features of your own are the exceptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from scoresde.data.spec import DataSpec
from sde_lib import lookup
from sde_lib._checks import check_count, check_positive

Features = str | Callable[[Tensor], Tensor]
"""A name in `FEATURES`, or a function of samples (N, *D) that returns (N, …)."""

_BLOCK = 1024  # rows of a pairwise matrix held at a time


def energy_distance(x: Tensor, y: Tensor) -> float:
    r"""Energy distance :math:`2 E\|x - y\| - E\|x - x'\| - E\|y - y'\|`, >= 0 in expectation and 0 for equal laws.

    Unbiased (pairs of a sample with itself are left out), so equal laws scatter around zero.

    Source: Szekely & Rizzo 2013, doi:10.1016/j.jspi.2013.03.018.

    Args:
        x: (N, *D).
        y: (M, *D).
    """
    a, b = _pair(x, y)
    return -_contrast(a, b, _gaps)


def energy_distance_error(x: Tensor, y: Tensor, draws: int = 200, seed: int = 0) -> float:
    """Standard error of `energy_distance` by bootstrap: its deviation over resamplings of both samples.

    Rows are drawn with replacement; pairs of a row with a copy of itself are left out, as a sample's pairs with itself
    are in the distance, so that copies do not pull it down. It is meant for laws that differ: between equal ones the
    distance is no longer nearly normal, and the figure is its size at best.

    Source: Efron 1979, doi:10.1214/aos/1176344552.

    Args:
        x: (N, *D).
        y: (M, *D).
        draws: number of resamplings; the figure itself has a relative error of about 1 / sqrt(2 draws).
        seed: of the resamplings.
    """
    check_count("draws", draws, 2)
    a, b = _pair(x, y)
    generator = torch.Generator().manual_seed(seed)

    def counts(n: int) -> Tensor:
        """How often every row was drawn, (n, draws)."""
        rows = torch.randint(n, (n, draws), generator=generator)
        return torch.zeros(n, draws, dtype=torch.float64).scatter_add_(0, rows, torch.ones(n, draws).double())

    def mean(u: Tensor, v: Tensor, of_u: Tensor, of_v: Tensor) -> Tensor:
        total = torch.zeros(draws, dtype=torch.float64)
        for rows, weights in zip(u.split(_BLOCK), of_u.split(_BLOCK), strict=True):
            total += (weights * (_gaps(rows, v) @ of_v)).sum(0)
        pairs = of_u.sum(0) * of_v.sum(0) - (of_u.square().sum(0) if u is v else 0.0)
        return total / pairs

    of_a, of_b = counts(len(a)), counts(len(b))
    values = 2.0 * mean(a, b, of_a, of_b) - mean(a, a, of_a, of_a) - mean(b, b, of_b, of_b)
    return float(values.std())


def mmd2(x: Tensor, y: Tensor, kernel: str = "gaussian", bandwidth: float | None = None) -> float:
    r"""Squared maximum mean discrepancy :math:`E k(x, x') + E k(y, y') - 2 E k(x, y)`, unbiased.

    Pairs of a sample with itself are left out, so equal laws scatter around zero and values may be negative.
    "gaussian" is :math:`k(x, y) = e^{-\|x - y\|^2 / 2 h^2}`: a metric on all laws. "polynomial" is
    :math:`(x \cdot y / d + 1)^3`, which on Inception features is called the kernel Inception distance; it compares
    the first three moments only, and depends on where the origin is.

    Source: Gretton et al. 2012, JMLR 13:723, Lemma 6; Binkowski et al. 2018, arXiv:1801.01401, for "polynomial".

    Args:
        x: (N, *D).
        y: (M, *D), the reference.
        kernel: "gaussian" or "polynomial".
        bandwidth: h. By default the median distance between samples of y (its first 1000): the rule looks at the
            reference only, so everything that is compared with it is measured by one kernel.

    Raises:
        ValueError: for an unknown kernel, or if all samples of y are equal and no bandwidth is given.
    """
    a, b = _pair(x, y)
    if kernel == "polynomial":
        d = a.shape[1]
        return _contrast(a, b, lambda u, v: (u @ v.T / d + 1.0) ** 3)
    if kernel != "gaussian":
        raise ValueError(f'`kernel` must be "gaussian" or "polynomial", got {kernel!r}.')
    if bandwidth is None:
        first = b[:1000]
        bandwidth = float(torch.pdist(first).median())
        if bandwidth == 0.0:
            raise ValueError("The median distance between samples of `y` is zero: give a `bandwidth`.")
    check_positive("bandwidth", bandwidth)
    scale = -0.5 / (bandwidth * bandwidth)
    return _contrast(a, b, lambda u, v: _gaps(u, v).square().mul(scale).exp())


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 512, seed: int = 0) -> float:
    r"""Sliced 2-Wasserstein distance: root mean square, over random directions, of the distance between projections.

    The distance between two projected samples is exact: on a line the optimal coupling matches quantiles,
    :math:`W_2^2 = \int_0^1 (F_x^{-1}(u) - F_y^{-1}(u))^2\,du`, and both quantile functions are constant between the
    multiples of 1 / N and 1 / M. In one dimension, where every direction is the same, it is the 2-Wasserstein distance
    of the samples. As an estimate of the distance between laws it is biased upwards: compare with the value between
    two samples of one law and the same sizes.

    Source: Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3.

    Args:
        x: (N, *D).
        y: (M, *D).
        projections: number of directions.
        seed: of the directions.
    """
    check_count("projections", projections)
    a, b = _pair(x, y)
    centre = b.mean(0)  # projections of differences, not of a common offset: it would cost digits
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    p, q = (((v - centre) @ directions).sort(0).values for v in (a, b))
    if len(a) == len(b):
        return math.sqrt(float((p - q).square().mean()))
    of_x, of_y, mass = _quantile_coupling(len(a), len(b))
    return math.sqrt(float(mass @ (p[of_x] - q[of_y]).square().mean(1)))


def frechet_distance(x: Tensor, y: Tensor, features: Features = "identity") -> float:
    r"""Fréchet distance :math:`\|\mu_x - \mu_y\|^2 + \mathrm{tr}(C_x + C_y - 2 (C_x C_y)^{1/2})` of features.

    The squared 2-Wasserstein distance of the two Gaussians with the features' means and covariances; with the features
    of an Inception network it is the "FID", which is not comparable with any other features' value. Biased upwards on
    finite samples.

    No matrix root is taken and no covariance formed. With centred features :math:`X = Q_x R_x` the trace is
    :math:`\min_Q \|R_x - Q R_y\|_F^2` over orthogonal Q, whose minimizer comes from the singular vectors of
    :math:`R_x R_y^T` (orthogonal Procrustes): a sum of squares, accurate for nearly equal laws and for features that
    are constant or collinear.

    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6; the minimum: Bhatia et al. 2019, arXiv:1712.01504.

    Args:
        x: (N, *D).
        y: (M, *D).
        features: a name in `FEATURES`, or a function that maps (N, *D) to (N, …), called on parts of 256 samples
            without gradients.

    Raises:
        ValueError: for fewer samples than features + 1: the sample covariance is then singular whatever the law, and
            the distance says more about the number of samples than about them.
    """
    (a, b), n_features = _featured(x, y, features)
    mean = a.mean(0) - b.mean(0)
    roots = []
    for v in (a, b):
        if len(v) < n_features + 1:
            raise ValueError(
                f"A Fréchet distance on {n_features} features needs at least {n_features + 1} samples on each side, "
                f"got {len(a)} and {len(b)}: the covariance would be singular. Take more samples or fewer features."
            )
        roots.append(torch.linalg.qr((v - v.mean(0)) / math.sqrt(len(v) - 1), mode="r").R)
    u, _, vh = torch.linalg.svd(roots[0] @ roots[1].T)
    return float(mean.square().sum() + (roots[0] - u @ (vh @ roots[1])).square().sum())


METRICS: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "sliced_wasserstein": sliced_wasserstein,
    "energy_distance": energy_distance,
    "mmd2": mmd2,
    "frechet_distance": frechet_distance,
}
"""Name -> distance of a sample from a reference sample."""


def _identity(x: Tensor) -> Tensor:
    return x.flatten(1)


def _random_relu(x: Tensor) -> Tensor:
    """64 fixed random directions and offsets, rectified: sees beyond the first two moments of x."""
    flat = x.flatten(1).double()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(flat.shape[1], 64, generator=generator, dtype=torch.float64) / math.sqrt(flat.shape[1])
    offset = torch.randn(64, generator=generator, dtype=torch.float64)
    return torch.relu(flat @ weight.to(flat.device) + offset.to(flat.device))


FEATURES: Mapping[str, Callable[[Tensor], Tensor]] = {"identity": _identity, "random_relu": _random_relu}
"""Name -> features of samples for `frechet_distance`. A pretrained network is handed over as a function."""


def _featured(x: Tensor, y: Tensor, features: Features) -> tuple[tuple[Tensor, Tensor], int]:
    """Features of both samples in float64 on the CPU, and how many there are."""
    extract = lookup(FEATURES, features, "features") if isinstance(features, str) else features
    if not callable(extract):
        raise TypeError(f"`features` must be a name or a function, got {type(features).__name__}.")
    out = []
    for v in (x, y):
        with torch.no_grad():
            parts = [extract(part) for part in v.detach().split(256)]
        for part, given in zip(parts, v.split(256), strict=True):
            if not isinstance(part, Tensor) or part.ndim < 1 or len(part) != len(given):
                got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"`features` must return a tensor of {len(given)} rows for {len(given)}, got {got}.")
        out.append(torch.cat([part.reshape(len(part), -1) for part in parts]))
    return _pair(*out), out[0].shape[1]


def _contrast(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    """E k(a, a') + E k(b, b') - 2 E k(a, b), without pairs of a sample with itself, in blocks of rows."""
    within = []
    for v in (a, b):
        total = 0.0
        for start in range(0, len(v), _BLOCK):
            part = kernel(v[start : start + _BLOCK], v)
            part[torch.arange(len(part)), torch.arange(start, start + len(part))] = 0.0
            total += float(part.sum())
        within.append(total / (len(v) * (len(v) - 1)))
    between = sum(float(kernel(part, b).sum()) for part in a.split(_BLOCK)) / (len(a) * len(b))
    return within[0] + within[1] - 2.0 * between


def _gaps(u: Tensor, v: Tensor) -> Tensor:
    """Distances of all pairs from their differences: by inner products, rounding would grow with the offset."""
    return torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist")


def _quantile_coupling(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal coupling of n and m sorted points of equal masses: ranks on either side, and the mass of each pair.

    In units of 1 / (n m) the masses are whole numbers: the pieces between the multiples of m and of n.
    """
    ends = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()
    starts = ends[:-1]
    return starts // m, starts // n, ends.diff().double() / (n * m)


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1:] != y.shape[1:] or len(x) < 2 or len(y) < 2:
        raise ValueError(f"Need two samples of one shape and two rows each, got {tuple(x.shape)}, {tuple(y.shape)}.")
    a, b = (v.detach().double().cpu().reshape(len(v), -1) for v in (x, y))
    for name, v in (("x", a), ("y", b)):
        bad = int((~torch.isfinite(v).all(1)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(v)} samples of `{name}` hold NaN or infinite numbers, which have no distance: "
                "find out why, or leave these samples out and say so."
            )
    return a, b


def gaussian_bits_per_dim(train: Tensor, held_out: Tensor, spec: DataSpec) -> tuple[float, float]:
    """Bits/dim of `held_out` under the Gaussian with the mean and covariance of `train`, and the standard error.

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
