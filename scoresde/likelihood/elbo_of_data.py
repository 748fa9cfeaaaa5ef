"""Bits per dimension of a data set by the variational bound."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.likelihood.dequantization import AUTO, bin_scale
from scoresde.likelihood.doors import check_codec, check_density, check_labels, check_options
from scoresde.likelihood.elbo import elbo
from scoresde.models.score_model import ScoreModel
from sde_lib import Chain
from sde_lib._checks import check_count
from solvers import PerSample


@dataclass
class DataBound:
    """Bits per dimension of a data set by the variational bound.

    Attributes:
        mean: over the samples.
        standard_error: of the mean, over samples; it contains the noise of times and draws.
        per_sample: (N,), float64, in bits/dim, as are the following.
        sample_error: standard error of each.
        reconstruction: the decoder's part.
        diffusion: the path's part.
        prior: the prior's part.
        nfe: network evaluations per sample, (N,).
        what: a sentence that says what the figure is.
    """

    mean: float
    standard_error: float
    per_sample: Tensor
    sample_error: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    prior: Tensor
    nfe: Tensor
    what: str

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.standard_error:.4f} bits/dim ({self.what})"

    def summary(self) -> dict[str, Any]:
        """All but the figures per sample, ready for JSON."""
        parts = {name: float(getattr(self, name).mean()) for name in ("reconstruction", "diffusion", "prior")}
        return {
            "mean": self.mean,
            "standard_error": self.standard_error,
            **parts,
            "nfe_per_sample": float(self.nfe.double().mean()),
            "count": len(self.per_sample),
            "what": self.what,
        }


def elbo_of_data(
    model: ScoreModel,
    data: Tensor,
    *,
    labels: Tensor | None = None,
    dequantization: str = "auto",
    batch_size: int = 256,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> DataBound:
    """Bits per dimension of a data set by `elbo`: of integers where the data have levels, else of the density.

    Args:
        model: a score model on an SDE or a chain, with a data specification.
        data: (N, *D) in data units, checked. All are scored, in batches.
        labels: class labels (N,) for a conditional model.
        dequantization: of integers: "none" bounds -log P with the discrete decoder, from the middles of the bins;
            "uniform" bounds the density at k + u, u uniform, whose average bounds -log P too; "auto": the former
            where the noise at t_min is at least a quarter of a bin wide. A model that was trained on dequantized data
            has spread its mass over the bins, and narrow noise about their middles leaves out most of it.
        batch_size: samples per batch; results do not depend on it.
        seed: noise; sample i draws from the stream of seed and i alone.
        progress: progress bar; on a terminal by default.
        **options: of `elbo` (times, draws, variance).

    Raises:
        TypeError: for what is no score model, an option that there is not, labels or data that are no tensor.
        ValueError: for data that do not fit the specification, or a model without one or of no density.
    """
    if not isinstance(model, ScoreModel):
        raise TypeError(f"elbo_of_data needs a ScoreModel, got {type(model).__name__} (see elbo).")
    check_density("elbo_of_data", model.reverse())
    check_options("elbo_of_data", elbo, options, ("rev", "x", "data_spec", "codec", "rng", "condition"))
    check_count("batch_size", batch_size)
    spec = model.data_spec
    if spec is None:
        raise ValueError("elbo_of_data needs a model with a data_spec: shape, scaling and levels of the data.")
    if len(data) == 0:
        raise ValueError("`data` is empty.")
    codec = check_codec(model)
    spec.check(data)
    check_labels(spec, labels, len(data))
    if dequantization not in ("auto", "none", "uniform"):
        raise ValueError(f"`dequantization` must be auto, none or uniform, got {dequantization!r}.")
    law = model.law
    if dequantization == "auto":
        first = law.levels[0] if isinstance(law, Chain) else law.knot(law.t_min)
        dequantization = "none" if bin_scale(codec) * math.exp(-float(first.half_log_snr)) >= AUTO else "uniform"
    discrete = spec.levels is not None and dequantization == "none"
    rev, bounds = model.reverse(), []
    with tqdm(
        total=len(data), desc="elbo", unit="sample", disable=None if progress is None else not progress, file=sys.stderr
    ) as bar:
        for low in range(0, len(data), batch_size):
            part = slice(low, low + batch_size)
            batch = data[part].to(model.device)
            rng = PerSample([seed * 2**32 + low + i for i in range(len(batch))])
            u = None
            if spec.levels is not None and not discrete:
                like = torch.empty(batch.shape, dtype=torch.float64, device=batch.device)
                u = torch.special.ndtr(rng.bind(like).normal("dequant"))
            x = model.encode(batch, u, dtype=torch.float64).to(model.dtype)
            condition = {} if labels is None else {"class_label": labels[part].to(model.device)}
            given = {"sigma_data": model.sigma_data, **options}
            bounds.append(
                elbo(rev, x, data_spec=spec if discrete else None, codec=codec, rng=rng, condition=condition, **given)
            )
            bar.update(len(x))
    bits = spec.dims * math.log(2.0)
    jacobian = 0.0 if discrete else -(codec.log_volume or 0.0)
    column = {
        name: torch.cat([getattr(bound, name) for bound in bounds]) / bits
        for name in ("nats", "standard_error", "reconstruction", "diffusion", "prior")
    }
    figures = column["nats"] + jacobian / bits
    dequantized = "" if discrete or spec.levels is None else f", {spec.levels} levels dequantized uniformly"
    return DataBound(
        mean=float(figures.mean()),
        standard_error=float(figures.std() / math.sqrt(len(figures))) if len(figures) > 1 else math.nan,
        per_sample=figures,
        sample_error=column["standard_error"],
        reconstruction=column["reconstruction"] + jacobian / bits,
        diffusion=column["diffusion"],
        prior=column["prior"],
        nfe=torch.cat([bound.nfe for bound in bounds]),
        what=bounds[0].what + dequantized,
    )
