"""Bits per dimension of a data set by the variational bound."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.data.conditions import mapped
from scoresde.data.spec import DataSpec
from scoresde.likelihood.bins import noise_in_bins
from scoresde.likelihood.bound import Bound
from scoresde.likelihood.dequantization import AUTO
from scoresde.likelihood.doors import check_condition, check_density, check_options, check_volume
from scoresde.likelihood.elbo import elbo
from scoresde.models.score_model import ScoreModel
from scoresde.storage.processes import Shares, first_tells, process, together
from sde_lib import Chain
from sde_lib._checks import check_count
from sde_lib.reverse import select_rows
from solvers import PerSample

_COLUMNS = ("nats", "standard_error", "reconstruction", "diffusion", "prior", "nfe")
"""Of a `Bound`, a number per sample."""


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
    condition: Mapping[str, Any] | None = None,
    dequantization: str = "auto",
    batch_size: int = 256,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> DataBound:
    """Bits per dimension of a data set by `elbo`: of integers where the data have levels, else of the density.

    In a process group of `torch.distributed` the processes divide the batches, and all get the whole result.

    Args:
        model: a score model on an SDE or a chain, with a data specification.
        data: (N, *D) in data units, checked. All are scored, in batches.
        condition: what the samples are conditioned on, by name, N rows at every depth.
        dequantization: of integers: "none" bounds -log P with the discrete decoder, from the middles of the bins;
            "uniform" bounds the density at k + u, u uniform, whose average bounds -log P too; "auto": the former
            where the noise at t_min is at least a quarter of a bin wide, for every element. A model that was trained on
            dequantized data has spread its mass over the bins, and narrow noise about their middles leaves out most of
            it.
        batch_size: samples per batch; results do not depend on it.
        seed: noise; sample i draws from the stream of seed and i alone.
        progress: progress bar; on a terminal by default.
        **options: of `elbo` (times, draws, variance).

    Raises:
        TypeError: for what is no score model, an option that there is not, data that are no tensor, or a condition of
            another type.
        ValueError: for data or conditions that do not fit the specification, a model without one or of no density, or a
            codec that is no bijection (or mixes the noise of the elements, for the discrete decoder).
    """
    if not isinstance(model, ScoreModel):
        raise TypeError(f"elbo_of_data needs a ScoreModel, got {type(model).__name__} (see elbo).")
    check_density("elbo_of_data", model.reverse())
    check_options("elbo_of_data", elbo, options, ("rev", "x", "data_spec", "codec", "rng", "condition"))
    check_count("batch_size", batch_size)
    spec, codec, law = model.data_spec, model.codec, model.law
    if spec is None or codec is None:
        raise ValueError("elbo_of_data needs a model with a data_spec: shape and levels of the data.")
    if len(data) == 0:
        raise ValueError("`data` is empty.")
    spec.check(data)
    condition, volume = check_condition(model, condition, len(data)), check_volume("elbo_of_data", codec)
    if dequantization not in ("auto", "none", "uniform"):
        raise ValueError(f"`dequantization` must be auto, none or uniform, got {dequantization!r}.")
    if dequantization == "auto":
        first = law.levels[0] if isinstance(law, Chain) else law.knot(law.t_min)
        dequantization = "none" if noise_in_bins(codec, first) >= AUTO else "uniform"
    discrete = spec.levels is not None and dequantization == "none"
    given = {"sigma_data": model.sigma_data, **options}
    if discrete:
        given |= {"data_spec": spec, "codec": codec}
    shares = Shares(len(data), batch_size)
    disable = process()[0] > 0 or (None if progress is None else not progress)

    def score() -> list[Bound]:
        bounds, total = [], sum(map(len, shares.mine))
        with tqdm(total=total, desc="elbo", unit="sample", disable=disable, file=sys.stderr) as bar:
            for rows in map(list, shares.mine):
                part = mapped(lambda value: value.to(model.device), select_rows(condition, torch.tensor(rows)))
                rng = PerSample([seed * 2**32 + i for i in rows])
                x = _states(model, spec, data[rows].to(model.device), rng, discrete)
                bounds.append(elbo(model.reverse(), x, rng=rng, condition=part, **given))
                bar.update(len(x))
        return bounds

    bounds = together(score)
    column = {name: shares.all([getattr(bound, name) for bound in bounds]) for name in _COLUMNS}
    what = first_tells(lambda: bounds[0].what)
    dequantized = "" if discrete or spec.levels is None else f", {spec.levels} levels dequantized uniformly"
    return _in_bits(column, spec.dims, 0.0 if discrete else -volume, what + dequantized)


def _states(model: ScoreModel, spec: DataSpec, batch: Tensor, rng: PerSample, discrete: bool) -> Tensor:
    """What is bounded of a batch of data: the middles of the bins of integers, or uniform numbers in them."""
    u = None
    if spec.levels is not None and not discrete:
        like = torch.empty(batch.shape, dtype=torch.float64, device=batch.device)
        u = torch.special.ndtr(rng.bind(like).normal("dequant"))
    return model.encode(batch, u, dtype=torch.float64).to(model.dtype)


def _in_bits(found: Mapping[str, Tensor], dims: int, jacobian: float, what: str) -> DataBound:
    """Of the bounds of all samples, in nats, that of the data, of so many dimensions: plus -log |det dx / dz|."""
    bits = dims * math.log(2.0)
    column = {name: values if name == "nfe" else values / bits for name, values in found.items()}
    figures = column["nats"] + jacobian / bits
    return DataBound(
        mean=float(figures.mean()),
        standard_error=float(figures.std() / math.sqrt(len(figures))) if len(figures) > 1 else math.nan,
        per_sample=figures,
        sample_error=column["standard_error"],
        reconstruction=column["reconstruction"] + jacobian / bits,
        diffusion=column["diffusion"],
        prior=column["prior"],
        nfe=column["nfe"],
        what=what,
    )
