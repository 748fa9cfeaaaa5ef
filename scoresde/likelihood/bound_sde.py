"""The variational bound in continuous time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde.likelihood.bins import Bins
from scoresde.likelihood.bound import Bound, Run, Variances, as_bound, prior_kl, total
from sde_lib import SDE, Knot


def bound_of_sde(run: Run, law: SDE, times: int, draws: int) -> Bound:
    """`elbo` on an SDE."""
    x, b = run.x, len(run.x)
    first, last = law.knot(law.t_min), law.knot(law.drift_t_max)
    span = float(first.half_log_snr) - float(last.half_log_snr)
    width = span / (times // 2)
    places = []
    for j in range(times):
        lam = float(last.half_log_snr) + width * (j // 2 + run.uniform(j))
        places.append(torch.as_tensor(law.time_at(lam)).clamp(law.t_min, law.drift_t_max))
    errors = torch.empty(times, b, dtype=torch.float64, device=x.device)
    for which, noise, prediction in run.at(places, "noise"):
        errors[which] = total(run.squared_error(prediction, noise)).reshape(-1, b)
    pairs = errors.reshape(-1, 2, b)
    diffusion = width * pairs.mean(1).sum(0)
    decoded, calls = _decoder(run, law, first, draws)
    prior = prior_kl(x, last, law.prior_std)
    of = "-log P of the integers" if run.bins else "-log p"
    what = f"variational bound on {of} in continuous time, from t = {law.t_min:g} to {law.drift_t_max:g}"
    variances = Variances.of_means(width * pairs) + Variances.of_means(decoded[None])
    return as_bound(run, (decoded.mean(0), diffusion, prior), variances, times + calls, what)


def _decoder(run: Run, law: SDE, first: Knot, draws: int) -> tuple[Tensor, int]:
    """-log p(x | x_0) at draws of x_0, (draws, B), and the calls made."""
    x, b = run.x, len(run.x)
    std = math.exp(-float(first.half_log_snr))
    values = torch.empty(draws, b, dtype=torch.float64, device=x.device)
    if run.bins is not None:
        for j in range(draws):
            y = x.double() + std * run.draw.normal("decoder", j).double()
            values[j] = -total(log_softmax(run.bins, y, x, std))
    else:
        places = [torch.full((b,), law.t_min, dtype=torch.float64, device=x.device)] * draws
        constant = x[0].numel() * (math.log(std) + 0.5 * math.log(2.0 * math.pi))
        for which, noise, prediction in run.at(places, "decoder"):
            # the prediction's distance from x is std (eps - eps_hat)
            values[which] = (0.5 * total(run.squared_error(prediction, noise)) + constant).reshape(-1, b)
    return values, 0 if run.bins is not None else draws


def log_softmax(bins: Bins, y: Tensor, x: Tensor, std: float) -> Tensor:
    """log P(k | y) per element of the data, with P(k | y) in proportion to N(y; x_k, std^2), at the level of which x is
    the middle. In data units, where the middle of k is k + 1/2."""
    z, here = bins.data(y), bins.data(x)
    wide, norm = bins.spread(std, z), torch.full_like(z, -math.inf)
    for k in range(bins.levels):
        norm = torch.logaddexp(norm, -0.5 * ((z - (k + 0.5)) / wide).square())
    return -0.5 * ((z - here) / wide).square() - norm
