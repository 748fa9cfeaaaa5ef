"""A variational bound on -log p, and what bounds in continuous time and of chains are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.likelihood.bins import Bins
from scoresde.likelihood.intervals import half_width, satterthwaite
from sde_lib import Knot, Prediction, ReverseSDE
from solvers.noise import Draw


@dataclass
class Bound:
    """An upper bound on -log p in nats, per sample: (B,), float64, on the CPU.

    Attributes:
        nats: the bound, an unbiased estimate of it.
        standard_error: of `nats`, by the random times and noise. Multiply by the t-quantile of `dof` degrees of
            freedom, as `bar` does.
        dof: degrees of freedom of `standard_error` (Welch and Satterthwaite).
        reconstruction: the decoder's part.
        diffusion: the path's part.
        prior: the prior's part.
        nfe: network evaluations.
        what: what it is a bound of.
    """

    nats: Tensor
    standard_error: Tensor
    dof: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    prior: Tensor
    nfe: Tensor
    what: str

    def bar(self, confidence: float = 0.95) -> Tensor:
        """Half width of the confidence interval of `nats`: t-quantile times standard error, (B,)."""
        return half_width(self.standard_error, self.dof, confidence)


@dataclass
class Run:
    """Data, noise, and batches of evaluations.

    Attributes:
        rev: the reverse SDE, or of a chain, under its conditions.
        x: states, (B, *D).
        draw: noise of their shape.
        bins: of integers, whose middles x are; None for the density.
        sigma_data: standard deviation of the data for the control variate; 0 for none.
        batch_rows: rows per network call.
    """

    rev: ReverseSDE
    x: Tensor
    draw: Draw
    bins: Bins | None
    sigma_data: float
    batch_rows: int

    def scatter(self, knot: Knot, noise: Tensor) -> Tensor:
        """c^2 (eps^2 - 1), float64, of mean zero."""
        signal, sigma = (torch.as_tensor(k).double() for k in (knot.alpha * self.sigma_data, knot.sigma))
        c = signal.square() / (signal.square() + sigma.square())
        return c.square().to(noise.device) * (noise.double().square() - 1.0)

    def squared_error(self, prediction: Prediction, noise: Tensor) -> Tensor:
        """(eps - eps_hat)^2 less its control variate, float64."""
        return (prediction.noise - noise).double().square() - self.scatter(prediction.knot, noise)

    def uniform(self, j: int) -> Tensor:
        """The j-th uniform numbers, (B,) in [0, 1), float64; a draw of the state's shape holds D of them."""
        d = self.x[0].numel()
        normal = self.draw.normal("time", j // d).reshape(len(self.x), -1)[:, j % d]
        return torch.special.ndtr(normal.double()).clamp(max=1 - 1e-12)

    def at(self, places: list[Tensor], *key: Any) -> Iterator[tuple[slice, Tensor, Prediction]]:
        """Predictions at alpha x + sigma eps for times or levels (B,), in batches: (which, eps, prediction)."""
        x, b, law = self.x, len(self.x), self.rev.law
        together = max(1, self.batch_rows // b)
        for low in range(0, len(places), together):
            part = places[low : low + together]
            noise = torch.cat([self.draw.normal(*key, low + j) for j in range(len(part))])
            rows = torch.arange(b, device=x.device).repeat(len(part))
            knot = law.knot(torch.cat(part), x.ndim)
            alpha, sigma = (torch.as_tensor(c).to(x.dtype) for c in (knot.alpha, knot.sigma))
            state = alpha * x[rows] + sigma * noise
            found = [
                self.rev.select(rows[r])(state[r], knot.select(r))
                for r in torch.arange(len(rows), device=x.device).split(self.batch_rows)
            ]
            raw = torch.cat([prediction.raw for prediction in found])
            yield slice(low, low + len(part)), noise, Prediction(state, knot, raw, found[0].parameterization)


def total(x: Tensor) -> Tensor:
    """Over the elements of a sample, float64."""
    return x.reshape(len(x), -1).sum(1, dtype=torch.float64)


def prior_kl(x: Tensor, knot: Knot, std: float) -> Tensor:
    """KL(N(alpha x, sigma^2 I) || N(0, std^2 I)), (B,)."""
    d, ratio = x[0].numel(), (float(knot.sigma) / std) ** 2
    return 0.5 * ((float(knot.alpha) / std) ** 2 * total(x.double().square()) + d * (ratio - 1.0 - math.log(ratio)))


@dataclass
class Variances:
    """Independent estimates of variances, (k, B), that add up, and the degrees of freedom of each, (k,)."""

    values: Tensor
    dof: Tensor

    @classmethod
    def of_means(cls, values: Tensor) -> Variances:
        """Of the means of equal draws, (k, n, B)."""
        k, n = values.shape[:2]
        return cls(values.var(1) / n, torch.full((k,), n - 1.0, dtype=torch.float64, device=values.device))

    @classmethod
    def from_neighbours(cls, kl: Tensor) -> Variances:
        r"""Of the sum over levels from one draw of each, (m, B).

        Four neighbours at a time: :math:`(k_1 - k_2 - k_3 + k_4)^2` has no part of a trend that is linear over them,
        and its expectation is :math:`v_1 + v_2 + v_3 + v_4` otherwise, so every level's variance counts once, those of
        the ends too. (Squared second differences, :math:`(k_1 - 2 k_2 + k_3)^2 / 6`, count the first and last level a
        sixth.) Up to three that are left over at the noisy end give their sample variance. What a trend leaves adds to
        it.
        """
        m = len(kl)
        values, dof = [], []
        sizes = [4] * (m // 4) + [m % 4] * (m % 4 > 0)
        if m % 4 == 1 and m > 1:
            sizes[-2:] = [2, 3]
        for part in kl.split(sizes):
            four = len(part) == 4
            values.append((part[0] - part[1] - part[2] + part[3]).square() if four else len(part) * part.var(0))
            dof.append(1.0 if four else len(part) - 1.0)
        return cls(torch.stack(values), torch.tensor(dof, dtype=kl.dtype, device=kl.device))

    def __add__(self, other: Variances) -> Variances:
        return Variances(torch.cat([self.values, other.values]), torch.cat([self.dof, other.dof]))

    def sum(self) -> tuple[Tensor, Tensor]:
        """The variance of the sum, (B,), and its degrees of freedom (`satterthwaite`)."""
        return self.values.sum(0), satterthwaite(self.values, self.dof[:, None])


def as_bound(run: Run, parts: tuple[Tensor, Tensor, Tensor], variances: Variances, nfe: int, what: str) -> Bound:
    """The bound of its parts (reconstruction, diffusion, prior), (B,) each, and its scatter, on the CPU."""
    reconstruction, diffusion, prior = (p.cpu() for p in parts)
    nats = reconstruction + diffusion + prior
    calls = torch.full(nats.shape, nfe * run.rev.nfe_per_call, dtype=torch.int64)
    variance, dof = variances.sum()
    return Bound(nats, variance.sqrt().cpu(), dof.cpu(), reconstruction, diffusion, prior, calls, what)
