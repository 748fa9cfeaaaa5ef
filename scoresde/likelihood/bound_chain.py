"""The variational bound of a chain: a KL for every step, and a decoder at the first level."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.likelihood.bound import Bound, Run, Variances, as_bound, prior_kl, total
from sde_lib import Chain, Knot, Prediction

HEAD = 4
"""Levels next to the data that are drawn twice where the others are drawn once: their terms fall too steeply to tell
noise from trend by differences (on DDPM's 1000 levels 31 nats^2 of trend beside a variance of 0.8)."""
Variance = str | Callable[[Tensor, Knot], Tensor]


def bound_of_chain(run: Run, chain: Chain, times: int | None, draws: int, variance: Variance) -> Bound:
    """`elbo` on a chain."""
    x, b = run.x, len(run.x)
    zero = torch.zeros(b, dtype=torch.int64, device=x.device)
    m = chain.n - 1
    twice = m if m <= HEAD + 1 else HEAD  # a single level left over would have no neighbour
    cells = [[i] for i in range(1, chain.n)]
    if times is None:
        counts = [2] * twice + [1] * (m - twice)
    elif times >= 2 * m:
        counts = [times // m] * m
    else:
        cells = _cells(chain, times // 2)
        counts = [2] * len(cells)
    steps: list[Tensor] = []
    for cell in [cell for cell, count in zip(cells, counts, strict=True) for _ in range(count)]:
        inside = (run.uniform(len(steps)) * len(cell)).long().clamp(max=len(cell) - 1) if len(cell) > 1 else zero
        steps.append(cell[0] + inside)
    kl = torch.empty(len(steps), b, dtype=torch.float64, device=x.device)
    for which, noise, prediction in run.at(steps, "noise"):
        kl[which] = step_kl(run, chain, prediction, noise, variance).reshape(-1, b)
    if times is None:
        head, rest = kl[: 2 * twice].reshape(twice, 2, b), kl[2 * twice :]
        diffusion = head.mean(1).sum(0) + rest.sum(0)
        variances = Variances.of_means(head)
        variances = variances + Variances.from_neighbours(rest) if len(rest) else variances
    else:
        sizes = torch.tensor([float(len(cell)) for cell in cells], dtype=kl.dtype, device=kl.device)[:, None]
        equal = sizes[:, None] * kl.reshape(len(cells), -1, b)
        diffusion, variances = equal.mean(1).sum(0), Variances.of_means(equal)
    decoded = torch.empty(draws, b, dtype=torch.float64, device=x.device)
    for which, noise, prediction in run.at([zero] * draws, "decoder"):
        decoded[which] = -total(log_decoder(run, chain, prediction, noise, variance)).reshape(-1, b)
    prior = prior_kl(x, chain.levels[-1], chain.prior_std)
    of = "-log P of the integers" if run.bins else "-log p"
    what = f"variational bound on {of} of a chain of {chain.n} steps"
    variances = variances + Variances.of_means(decoded[None])
    return as_bound(run, (decoded.mean(0), diffusion, prior), variances, len(steps) + draws, what)


def _cells(chain: Chain, count: int) -> list[list[int]]:
    """The levels from 1 up in at most `count` cells of equal range in lambda: near the data a cell holds one level."""
    lams = [float(level.half_log_snr) for level in chain.levels]
    if math.isinf(lams[-1]):  # alpha = 0
        lams[-1] = 2.0 * lams[-2] - lams[-3] if len(lams) > 2 else lams[0] - 1.0
    cells: dict[int, list[int]] = {}
    for i in range(1, chain.n):
        place = (lams[0] - lams[i]) / (lams[0] - lams[-1])
        cells.setdefault(max(0, math.ceil(place * count - 1e-9) - 1), []).append(i)
    return list(cells.values())


def _log_variance(run: Run, chain: Chain, prediction: Prediction, variance: Variance) -> Tensor:
    """Of the model's step from the prediction's level, shaped to go with the state, float64."""
    knot, x = prediction.knot, prediction.x
    if not isinstance(variance, str):
        learned = variance(x, knot)
        if learned.shape != x.shape:
            raise ValueError(f"`variance` must return a log variance like x, {tuple(x.shape)}, got {learned.shape}.")
        return learned.double()
    index = torch.as_tensor(knot.index)
    if variance == "small":
        table = torch.cat([chain.posterior_std[1:2].square(), chain.posterior_std[1:].square()])
    elif run.bins is None:
        table = chain.betas
    else:
        table = torch.cat([chain.posterior_std[1:2].square(), chain.betas[1:]])
    return table.to(x.device)[index].log()


def _square(run: Run, prediction: Prediction, noise: Tensor) -> Tensor:
    """(x - x_hat)^2 less its control variate, float64; x_hat - x = (sigma / alpha) (eps - eps_hat)."""
    knot, repeat = prediction.knot, len(prediction.x) // len(run.x)
    x = run.x.repeat(repeat, *[1] * (run.x.ndim - 1)).double()
    alpha, sigma = torch.as_tensor(knot.alpha).double(), torch.as_tensor(knot.sigma).double()
    ratio = torch.where(alpha > 0, sigma / alpha, 0.0).to(x.device)
    return (x - prediction.data.double()).square() - ratio.square() * run.scatter(knot, noise)


def step_kl(run: Run, chain: Chain, prediction: Prediction, noise: Tensor, variance: Variance) -> Tensor:
    """KL of the posterior of the step from the prediction's level against the model's, (rows,)."""
    index = torch.as_tensor(prediction.knot.index)
    weight, std = (table.to(noise.device)[index] for table in (chain.posterior_x_0, chain.posterior_std))
    log_model, log_true = _log_variance(run, chain, prediction, variance), 2.0 * std.log()
    off = weight.square() * _square(run, prediction, noise)
    terms = log_model - log_true - 1.0 + torch.exp(log_true - log_model) + off * torch.exp(-log_model)
    return 0.5 * total(terms.expand_as(off))


def log_decoder(run: Run, chain: Chain, prediction: Prediction, noise: Tensor, variance: Variance) -> Tensor:
    """log p(x | x_0) per element: of the density, or of the bin whose middle is x."""
    log_variance = _log_variance(run, chain, prediction, variance)
    if run.bins is None:
        square = _square(run, prediction, noise)
        return -0.5 * (square * torch.exp(-log_variance) + log_variance + math.log(2.0 * math.pi))
    bins = run.bins
    mean, k = bins.data(prediction.data), bins.data(run.x).floor()
    k = k.repeat(len(mean) // len(k), *[1] * (k.ndim - 1))
    std = bins.spread(torch.exp(0.5 * log_variance), mean)
    low, high = (k - mean) / std, (k + 1.0 - mean) / std
    low = torch.where(k <= 0, -math.inf, low)
    high = torch.where(k >= bins.levels - 1, math.inf, high)
    # both ends on the side where the tail is small: a difference of numbers near one would lose it
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log1p(-torch.exp(lower - upper))
