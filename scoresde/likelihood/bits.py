"""Bits per dimension of a data set: the figures, their errors, and what they are of."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.data.spec import DataSpec
from scoresde.likelihood.scores import COLUMNS
from sde_lib import SDE
from solvers import Status


@dataclass
class BitsPerDim:
    """Bits per dimension of a data set. Figures per sample are (N,), float64, in bits/dim unless said otherwise.

    Attributes:
        mean: over the samples that were solved: an upper bound on the negative log probability of integer data, the
            negative log density in data units otherwise; `what` says it.
        standard_error: of the mean, over samples; it contains the noise of dequantization and probes.
        per_sample: the figure of each sample.
        trace_se: standard error by the trace estimate.
        discretization: as in `Likelihood`, largest of the draws.
        truncation: as in `Likelihood`, signed, for log p; no error of a bound by dequantization, which is of the
            density at t_min.
        prior_mismatch: as in `Likelihood`, signed, for log p.
        precision: as in `Likelihood`.
        nfe: network evaluations per sample, over all draws.
        vjps: vector-Jacobian products per sample, over all draws.
        status: `solvers.Status` per sample.
        levels: of integer data, or None.
        dequantization: how they were dequantized; None for continuous data.
        bound: "elbo" or "iw".
        samples: draws per sample.
        t_min: the time at which the density was evaluated.
        what: a sentence that says what the figure is.
        corrected: which of the terms are part of the figures, as in `Likelihood`, whose bound on what they leave
            (`remainder`) is not kept here.
    """

    mean: float
    standard_error: float
    per_sample: Tensor
    trace_se: Tensor
    discretization: Tensor
    truncation: Tensor
    prior_mismatch: Tensor
    precision: Tensor
    nfe: Tensor
    vjps: Tensor
    status: Tensor
    levels: int | None
    dequantization: str | None
    bound: str
    samples: int
    t_min: float
    what: str
    corrected: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.standard_error:.4f} bits/dim ({self.what})"

    @property
    def systematic(self) -> dict[str, float]:
        """What does not average out over the data set, in bits/dim of the mean, by cause: the discretisation and the
        precision are sizes, truncation and prior mismatch terms in log p with a sign, without those that are corrected.
        """
        ok, done = torch.isfinite(self.per_sample), [{"prior": "prior_mismatch"}.get(c, c) for c in self.corrected]
        causes = [c for c in ("discretization", "truncation", "prior_mismatch", "precision") if c not in done]
        return {name: float(getattr(self, name)[ok].mean()) for name in causes}

    def summary(self) -> dict[str, Any]:
        """All but the figures per sample, ready for JSON."""
        given = {k: v for k, v in asdict(self).items() if not isinstance(v, Tensor)}
        return {
            **given,
            "count": len(self.per_sample),
            "failed": int((~torch.isfinite(self.per_sample)).sum()),
            "not_converged": int((self.status == Status.NOT_CONVERGED).sum()),
            "mean_trace_se": float(self.trace_se.nanmean()),
            "systematic": self.systematic,
            "nfe_per_sample": float(self.nfe.double().mean()),
            "vjps_per_sample": float(self.vjps.double().mean()),
        }


def bits_of(
    table: Tensor,
    spec: DataSpec,
    law: SDE,
    dequantization: str | None,
    bound: str,
    samples: int,
    corrected: tuple[str, ...],
) -> BitsPerDim:
    """The result of a table of rows of `COLUMNS`; `dequantization` is None for continuous data."""
    column = dict(zip(COLUMNS, table.unbind(1), strict=True))
    status = column["status"].long()
    figures = column["bits_per_dim"]
    solved = figures[torch.isfinite(figures)]
    error = float(solved.std() / math.sqrt(len(solved))) if len(solved) > 1 else math.nan
    place = "t = 0" if "truncation" in corrected else f"t = {law.t_min:g}"
    if dequantization is None:
        what = f"negative log density in data units at {place}"
    else:
        kind = {"elbo": "bound", "iw": f"importance-weighted bound, {samples} draws,"}[bound]
        kind = "bound" if samples == 1 else kind
        what = f"{kind} by {dequantization} dequantization of {spec.levels} levels, density at {place}"
    failed, unsettled = len(figures) - len(solved), int((status == Status.NOT_CONVERGED).sum())
    if failed:
        what += f"; {failed} of {len(figures)} samples failed and are left out"
    if bool(torch.isnan(column["trace_se"])[torch.isfinite(figures)].any()):
        left = ", and log p is not corrected for it" if bound == "iw" and samples > 1 else ""
        what += f"; the noise of the probes is unknown{left}: take more of them"
    if unsettled:
        what += f"; {unsettled} of {len(figures)} samples are not settled: take more steps"
    return BitsPerDim(
        mean=float(solved.mean()) if len(solved) else math.nan,
        standard_error=error,
        per_sample=figures,
        trace_se=column["trace_se"],
        discretization=column["discretization"],
        truncation=column["truncation"],
        prior_mismatch=column["prior_mismatch"],
        precision=column["precision"],
        nfe=column["nfe"].long(),
        vjps=column["vjps"].long(),
        status=status,
        levels=spec.levels,
        dequantization=dequantization,
        bound=bound,
        samples=samples,
        t_min=law.t_min,
        what=what,
        corrected=corrected,
    )
