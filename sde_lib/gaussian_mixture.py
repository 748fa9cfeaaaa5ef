"""Gaussian mixtures: data whose score, density and samples are known at every time of every law."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sde_lib._checks import as_float64, check_count, check_state
from sde_lib.knot import DATA, Knot, Law
from sde_lib.prediction import VPrediction
from sde_lib.reverse import ReverseSDE


class GaussianMixture:
    r"""p(x_0) = sum_k w_k N(x_0; mu_k, C_k) on data of any shape.

    Under the kernel (alpha, sigma) the noisy law is the mixture of :math:`N(\alpha\mu_k, \alpha^2 C_k + \sigma^2 I)`,
    so everything a score model learns is known in closed form. It is the ground truth of the tests, and public.

    Args:
        means: (K, *D).
        std: standard deviations: a float, (K,) or (K, *D). Give this or `covariances`.
        covariances: (K, d, d) with d the number of elements of D, symmetric positive semi-definite.
        weights: (K,), positive, summing to one; equal if None.

    Raises:
        ValueError: if shapes disagree, or a std, covariance or weight is not valid.
    """

    def __init__(
        self,
        means: Tensor | Sequence[object],
        std: float | Tensor | Sequence[object] | None = None,
        covariances: Tensor | None = None,
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        means = as_float64("means", means)
        if means.ndim < 1 or means.shape[0] < 1:
            raise ValueError(f"`means` must have shape (K, *D), got {tuple(means.shape)}.")
        if not bool(torch.isfinite(means).all()):
            raise ValueError("`means` must be finite.")
        self.shape = tuple(means.shape[1:])
        k, d = means.shape[0], max(math.prod(self.shape), 1)
        if (std is None) == (covariances is None):
            raise ValueError("Give exactly one of `std` and `covariances`.")
        self._basis: Tensor | None = None
        if covariances is not None:
            covariances = torch.as_tensor(covariances, dtype=torch.float64)
            if covariances.shape != (k, d, d):
                raise ValueError(f"`covariances` must have shape {(k, d, d)}, got {tuple(covariances.shape)}.")
            if not torch.allclose(covariances, covariances.mT, rtol=1e-8, atol=1e-12):
                raise ValueError("`covariances` must be symmetric.")
            variances, self._basis = torch.linalg.eigh(covariances)
            if variances.min() < -1e-10 * variances.abs().max():
                low = float(variances.min())
                raise ValueError(f"`covariances` must be positive semi-definite, smallest eigenvalue {low}.")
            variances = variances.clamp(min=0.0)
        else:
            stds = as_float64("std", std)
            if (stds.ndim == 1 and stds.shape != (k,)) or (stds.ndim > 1 and stds.shape != means.shape):
                raise ValueError(f"`std` must be a float, ({k},) or {tuple(means.shape)}, got {tuple(stds.shape)}.")
            if not bool((stds >= 0).all()):
                raise ValueError("`std` must be >= 0.")
            stds = stds.reshape(k, -1) if stds.ndim else stds.reshape(1, 1)
            variances = stds.square().expand(k, d)
        w = torch.full((k,), 1.0 / k) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if w.shape != (k,) or not bool((w > 0).all()) or abs(float(w.sum()) - 1.0) > 1e-6:
            raise ValueError(f"`weights` must be {k} positive numbers that sum to one, got {w.tolist()}.")
        w = w.double() / w.double().sum()  # weights that went through float32 sum to one only to 1e-7
        self._means, self._variances, self._log_weights = means.reshape(k, d), variances.contiguous(), w.log()
        self._cache: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}

    # --- moments and samples ------------------------------------------------------------------------------------
    @property
    def mean(self) -> Tensor:
        """E[x_0], shape D, float64."""
        return (self._log_weights.exp()[:, None] * self._means).sum(0).reshape(self.shape)

    @property
    def covariance(self) -> Tensor:
        """Cov[x_0], shape (d, d), float64."""
        basis = torch.eye(self._means.shape[1], dtype=torch.float64) if self._basis is None else self._basis
        within = (basis * self._variances[:, None, :]) @ basis.mT
        centred = self._means - self.mean.reshape(1, -1)
        w = self._log_weights.exp()[:, None, None]
        return (w * (within + centred[:, :, None] * centred[:, None, :])).sum(0)

    def sample(self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """n exact samples, shape (n, *D)."""
        check_count("n", n)
        which = torch.multinomial(self._log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self._means.shape[1], generator=generator, dtype=torch.float64)
        offset = self._variances[which].sqrt() * noise
        if self._basis is not None:
            offset = (self._basis[which] @ offset[..., None])[..., 0]
        return (self._means[which] + offset).reshape(n, *self.shape).to(dtype)

    # --- the noisy law at a knot ---------------------------------------------------------------------------------
    def log_prob(self, x: Tensor, knot: Knot = DATA) -> Tensor:
        """log p_t(x) in nats at a knot (the data's own law by default), (B, *D) -> (B,) in the dtype of x."""
        log_joint, _, _ = self._components(x, knot)
        return torch.logsumexp(log_joint, 1)

    def score(self, x: Tensor, knot: Knot) -> Tensor:
        """grad_x log p_t(x), shape of x."""
        return self._moments(x, knot)[1] * _like(-1.0 / knot.sigma, x)

    def reverse(self, law: Law) -> ReverseSDE:
        """The exact reverse of an SDE or chain on this data; a v prediction, well conditioned at both ends."""
        return ReverseSDE(law, self._v, VPrediction())

    def _v(self, x: Tensor, knot: Knot) -> Tensor:
        data, noise = self._moments(x, knot)
        return _like(knot.alpha, x) * noise - _like(knot.sigma, x) * data

    def _moments(self, x: Tensor, knot: Knot) -> tuple[Tensor, Tensor]:
        """E[x_0 | x] and E[eps | x], each the shape of x."""
        log_joint, whitened, shrunk = self._components(x, knot)
        r = torch.softmax(log_joint, 1)[..., None]
        means, _, _, basis = self._parameters(x)
        data, noise = _like(knot.alpha, whitened) * shrunk, _like(knot.sigma, whitened) * whitened
        if basis is not None:
            data, noise = ((basis @ part[..., None])[..., 0] for part in (data, noise))
        data, noise = (r * (means + data)).sum(1), (r * noise).sum(1)
        return data.reshape(x.shape), noise.reshape(x.shape)

    def _components(self, x: Tensor, knot: Knot) -> tuple[Tensor, Tensor, Tensor]:
        """Per component: log joint density (B, K), and M^-1 (x - alpha mu), C M^-1 (x - alpha mu) in its eigenbasis."""
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != self.shape:
            check_state("x", x)
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}.")
        means, variances, log_weights, basis = self._parameters(x)
        flat = x.reshape(x.shape[0], 1, -1)
        alpha, sigma = _like(knot.alpha, means[None]), _like(knot.sigma, means[None])
        offset = flat - alpha * means
        if basis is not None:
            offset = (basis.mT @ offset[..., None])[..., 0]
        total = alpha * alpha * variances + sigma * sigma
        if total.ndim == 2:
            total = total[None]
        whitened = offset / total
        d = flat.shape[-1]
        log_density = -0.5 * (offset * whitened + total.log()).sum(-1) - 0.5 * d * math.log(2 * math.pi)
        return log_weights + log_density, whitened, variances * whitened

    def _parameters(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        key = (x.dtype, x.device)
        if key not in self._cache:
            means, variances, log_weights = (v.to(x) for v in (self._means, self._variances, self._log_weights))
            self._cache[key] = means, variances, log_weights, None if self._basis is None else self._basis.to(x)
        return self._cache[key]


def _like(c: float | Tensor, x: Tensor) -> float | Tensor:
    """A knot's coefficient shaped to multiply x: floats stay floats, per-sample values become (B, 1, …)."""
    return c.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) if isinstance(c, Tensor) else c
