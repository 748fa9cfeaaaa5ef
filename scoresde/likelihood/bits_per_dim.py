"""Bits per dimension of a data set, with the Jacobian of the data's scaling and a standard error."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.likelihood.log_likelihood import log_likelihood
from scoresde.score_model import ScoreModel
from solvers import PerSample, Status


@dataclass
class BitsPerDim:
    """Bits per dimension of a data set.

    Attributes:
        mean: over the data set; an upper bound on the negative log probability of integer data (uniform
            dequantization), the negative log density in data units otherwise.
        standard_error: of the mean, over samples; it contains the noise of dequantization and probes.
        per_sample: (N,), float64.
        trace_se: standard error of the trace estimate per sample, in bits/dim, (N,).
        nfe: network evaluations per sample, (N,), summed over dequantizations.
        status: `solvers.Status` per sample, (N,).
        t_min: the noise level's time at which the density was evaluated.
        what: a sentence that says what the figure is.
    """

    mean: float
    standard_error: float
    per_sample: Tensor
    trace_se: Tensor
    nfe: Tensor
    status: Tensor
    t_min: float
    what: str

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.standard_error:.4f} bits/dim ({self.what})"


def bits_per_dim(
    model: ScoreModel,
    data: Tensor,
    *,
    labels: Tensor | None = None,
    samples: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> BitsPerDim:
    r"""Score a data set under a model, by `log_likelihood`.

    Integer data k are dequantized uniformly, z = k + u with u ~ U[0, 1)^D: the density of z integrates over each bin
    to a probability, and by Jensen :math:`-E_u \log p(k + u) \ge -\log P(k)` (Theis et al. 2016, arXiv:1511.01844,
    section 3.1), for any number of levels. Model units enter through the Jacobian of the data specification's
    scaling: :math:`\log p_z = \log p_x - D \log(\mathrm{scale})`.

    Args:
        model: a score model with a data specification.
        data: (N, *D) in data units, checked for range, levels and finiteness. All are scored, in batches.
        labels: class labels (N,) for a conditional model.
        samples: dequantizations per sample; their log densities are averaged.
        batch_size: samples per batch; results do not depend on it beyond rounding.
        seed: noise; sample i draws from the stream of seed and i alone.
        progress: progress bar; on a terminal by default.
        **options: of `log_likelihood` (divergence, probes, rtol, …).

    Raises:
        ValueError: for data that do not fit the specification, or a model without one.
    """
    spec = model.data_spec
    if spec is None:
        raise ValueError("bits_per_dim needs a model with a data_spec: shape, scaling and levels of the data.")
    if len(data) == 0:
        raise ValueError("`data` is empty.")
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"`samples` must be an int >= 1, got {samples!r}.")
    spec.check(data)
    options.setdefault("sigma_data", model.sigma_data)
    bits = spec.dims * math.log(2.0)
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    disable = None if progress is None else not progress
    starts = tqdm(range(0, len(data), batch_size), desc="bits/dim", unit="batch", disable=disable, file=sys.stderr)
    rev = model.reverse()
    for start in starts:
        batch = data[start : start + batch_size].to(model.device)
        condition = {} if labels is None else {"class_label": labels[start : start + batch_size].to(model.device)}
        log_prob, variance = torch.zeros(len(batch), dtype=torch.float64), torch.zeros(len(batch), dtype=torch.float64)
        nfe, status = torch.zeros(len(batch), dtype=torch.int64), torch.zeros(len(batch), dtype=torch.int64)
        for k in range(samples):
            # one stream per (seed, sample, dequantization)
            noise = PerSample([(seed * samples + k) * 2**32 + start + i for i in range(len(batch))])
            draw = noise.bind(torch.empty(batch.shape, dtype=torch.float64, device=batch.device))
            u = torch.special.ndtr(draw.normal("dequant")) if spec.levels is not None else None
            x = spec.encode(batch, u, dtype=torch.float64).to(model.dtype)
            result = log_likelihood(rev, x, rng=noise, condition=condition, **options)
            log_prob += (result.log_prob - spec.dims * math.log(spec.scale)) / samples
            variance += (result.trace_se / samples).square()
            nfe += result.nfe
            status = torch.where(status == Status.OK, result.status, status)
        rows.append((-log_prob / bits, variance.sqrt() / bits, nfe, status))
    per_sample, trace_se, nfe, status = (torch.cat(column) for column in zip(*rows, strict=True))
    solved = per_sample[status == Status.OK]
    error = float(solved.std() / math.sqrt(len(solved))) if len(solved) > 1 else math.nan
    t_min = model.law.t_min
    if spec.levels is None:
        what = f"negative log density in data units at t = {t_min:g}"
    else:
        what = f"bound by uniform dequantization of {spec.levels} levels, density at t = {t_min:g}"
    if len(solved) < len(per_sample):
        what += f"; {len(per_sample) - len(solved)} of {len(per_sample)} samples failed and are left out"
    mean = float(solved.mean()) if len(solved) else math.nan
    return BitsPerDim(mean, error, per_sample, trace_se, nfe, status, t_min, what)
