"""Bits per dimension of a data set: what the figure is of, how far off it may be, and where it can go on."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.data.spec import DataSpec
from scoresde.likelihood.dequantization import Dequantization, as_dequantization, name_of
from scoresde.likelihood.doors import check_density, check_labels, check_options
from scoresde.likelihood.log_likelihood import log_likelihood
from scoresde.likelihood.result import Likelihood
from scoresde.likelihood.scores import COLUMNS, ScoreFile, fingerprint
from scoresde.models.score_model import ScoreModel
from scoresde.storage.models import usable_device
from scoresde.storage.processes import process
from sde_lib import SDE
from sde_lib._checks import check_count
from solvers import PerSample, Status

BOUNDS = ("elbo", "iw")


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


def bits_per_dim(
    model: ScoreModel,
    data: Tensor,
    *,
    labels: Tensor | None = None,
    levels: int | None = None,
    dequantization: str | Dequantization = "auto",
    samples: int = 1,
    bound: str = "elbo",
    batch_size: int = 256,
    seed: int = 0,
    devices: Sequence[str | torch.device] | None = None,
    path: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> BitsPerDim:
    r"""Score a data set under a model, by `log_likelihood`.

    Integer data k in 0 … L - 1 are dequantized, z = k + u with u in [0, 1)^D, and the figure is a bound on
    :math:`-\log_2 P(k) / D`, with P the probability of the bin under the model's density at t_min (see
    `scoresde.likelihood.dequantization`); so it is comparable to the bits/dim of any other model of the same integers.
    Continuous data give the negative log density in data units, which is a number of bits only up to their units.

    Every scaling is accounted for: with :math:`x = (z - \mathrm{shift}) / \mathrm{scale}` and the state
    :math:`\alpha x` at t_min, :math:`\log p_z = \log p_{t_{min}}(\alpha x) + D \log(\alpha / \mathrm{scale})`.

    Every sample draws from a noise stream of its own, so results depend neither on the batch size nor on how the work
    is split. In a process group of `torch.distributed` each process scores its share, and all get the whole result.

    Args:
        model: a score model with a data specification.
        data: (N, *D) in data units, checked for shape, range, levels and finiteness. All are scored, in batches.
        labels: class labels (N,) for a conditional model.
        levels: number of levels the data are meant to have; must agree with the model's.
        dequantization: of integer data: "uniform"; "truncated_normal", which fits the noise at t_min; "auto": the
            latter where that noise is at least a quarter of a bin wide; or a density of one's own (see
            `Dequantization`).
        samples: draws K per sample.
        bound: what is made of them: "elbo", the mean of log p - log q, or "iw", the logarithm of the mean of p / q,
            which is tighter with K > 1. The noise of a trace estimate biases an exponential: half its variance is
            subtracted, which is right to first order and calls for standard errors below about one nat.
        batch_size: samples per batch.
        seed: noise; sample i draws from the stream of seed, i and the draw's number alone.
        devices: several devices of this process, each with a copy of the model; the model's own by default.
        path: a CSV file that takes a row per sample as they are done; a run that was killed goes on there.
        resume: False starts the file anew.
        progress: progress bar; on a terminal by default.
        **options: of `log_likelihood` (steps, tol, divergence, probes, num_probes, target_se, …).

    Raises:
        TypeError: for an option that there is not, labels or data that are no tensor.
        ValueError: for data that do not fit the specification, a model without one or of no density, options out of
            range, or a file that belongs to other data or settings.
    """
    if devices is not None:
        if isinstance(devices, str) or not devices:
            raise ValueError(f"`devices` must be a list of at least one device, or None, got {devices!r}.")
        devices = [usable_device(device) for device in devices]
    check_options("bits_per_dim", log_likelihood, options, ("rev", "x", "rng", "condition", "keep", "progress"))
    spec, law = _check(model, data, labels, levels, samples, bound, batch_size, seed)
    as_dequantization(dequantization, spec, law.knot(law.t_min))  # refuses an unknown name before the first batch
    name = name_of(dequantization, spec, law.knot(law.t_min))
    options = {"sigma_data": model.sigma_data, **options}
    job = _Job(spec, law, dequantization, samples, bound, seed, {**options, "keep": False})
    shown = {k: v if isinstance(v, int | float | str | bool | None) else repr(v) for k, v in options.items()}
    settings = {"bound": bound, "dequantization": name, "samples": samples, "seed": seed, "options": shown}
    rank, world = process()
    opened = None if path is None else ScoreFile(Path(path), settings | fingerprint(model, data, labels), resume)
    with nullcontext() if opened is None else opened as file:
        done = {} if file is None else file.rows
        todo = [i for i in range(len(data)) if i not in done][rank::world]
        batches = [todo[low : low + batch_size] for low in range(0, len(todo), batch_size)]
        disable = rank > 0 or None if progress is None else not progress
        with tqdm(total=len(todo), desc="bits/dim", unit="sample", disable=disable, file=sys.stderr) as bar:
            for part, rows in _scored(model, job, data, labels, batches, devices):
                done.update(zip(part, rows, strict=True))
                if file is not None:
                    file.add({i: done[i] for i in part})
                bar.update(len(part))
        done = _gathered(done)
        if file is not None:
            file.merge(done)
    table = torch.tensor([done[i] for i in range(len(data))], dtype=torch.float64)
    corrected = tuple(options.get("correct", ()))
    return _result(table, spec, law, name if spec.levels is not None else None, bound, samples, corrected)


def _check(
    model: ScoreModel,
    data: Tensor,
    labels: Tensor | None,
    levels: int | None,
    samples: int,
    bound: str,
    batch_size: int,
    seed: int,
) -> tuple[DataSpec, SDE]:
    if not isinstance(model, ScoreModel):
        raise TypeError(f"bits_per_dim needs a ScoreModel, got {type(model).__name__} (see log_likelihood).")
    check_density("bits_per_dim", model.reverse())
    spec = model.data_spec
    if spec is None:
        raise ValueError("bits_per_dim needs a model with a data_spec: shape, scaling and levels of the data.")
    if not isinstance(model.law, SDE):
        raise ValueError("bits_per_dim goes through the ODE, which a chain does not have: use elbo() for its bound.")
    if len(data) == 0:
        raise ValueError("`data` is empty.")
    check_count("samples", samples)
    check_count("batch_size", batch_size)
    if not isinstance(seed, int):
        raise TypeError(f"`seed` must be an int, got {seed!r}.")
    if bound not in BOUNDS:
        raise ValueError(f"`bound` must be one of {', '.join(BOUNDS)}, got {bound!r}.")
    if levels is not None and levels != spec.levels:
        raise ValueError(f"`levels` = {levels}, but the model was made for data with {spec.levels or 'no'} levels.")
    spec.check(data)
    check_labels(spec, labels, len(data))
    return spec, model.law


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """What is done with every batch."""

    spec: DataSpec
    law: SDE
    dequantization: str | Dequantization
    samples: int
    bound: str
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def score(self, model: ScoreModel, batch: Tensor, labels: Tensor | None, index: Sequence[int]) -> list[list[float]]:
        """A row of figures (`COLUMNS`) per sample."""
        spec, knot, bits = self.spec, self.law.knot(self.law.t_min), self.spec.dims * math.log(2.0)
        batch = batch.to(model.device)
        condition = {} if labels is None else {"class_label": labels.to(model.device)}
        alpha = float(knot.alpha)
        jacobian = spec.dims * math.log(alpha / spec.scale)
        dequantize = as_dequantization(self.dequantization, spec, knot)
        drawn: list[Likelihood] = []
        logs: list[Tensor] = []
        for k in range(self.samples):
            # one stream per (seed, sample, draw)
            noise = PerSample([(self.seed * self.samples + k) * 2**32 + i for i in index])
            u, log_q = None, torch.zeros(len(batch), dtype=torch.float64)
            if spec.levels is not None:
                draw = noise.bind(torch.empty(batch.shape, dtype=torch.float64, device=batch.device))
                u, q = dequantize(batch, draw.normal("dequant"))
                log_q = q.cpu()
            x = alpha * spec.encode(batch, u, dtype=torch.float64)
            result = log_likelihood(model.reverse(), x.to(model.dtype), rng=noise, condition=condition, **self.options)
            drawn.append(result)
            logs.append(result.log_prob + jacobian - log_q)
        log_p, spread = self._combined(torch.stack(logs), torch.stack([r.trace_se for r in drawn]))
        status = torch.stack([r.status for r in drawn])
        columns = (
            -log_p / bits,
            spread / bits,
            torch.stack([r.discretization for r in drawn]).amax(0) / bits,
            torch.stack([r.truncation for r in drawn]).mean(0) / bits,
            torch.stack([r.prior_mismatch for r in drawn]).mean(0) / bits,
            torch.stack([r.precision for r in drawn]).amax(0) / bits,
            torch.stack([r.nfe for r in drawn]).sum(0).double(),
            torch.stack([r.vjps for r in drawn]).sum(0).double(),
            # the first that is not OK
            status.gather(0, (status != Status.OK).long().argmax(0, keepdim=True))[0].double(),
        )
        rows: list[list[float]] = torch.stack([c.cpu() for c in columns], 1).tolist()
        return rows

    def _combined(self, logs: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """One log probability from K draws, and its standard error by the traces."""
        if self.bound == "elbo" or len(logs) == 1:
            return logs.mean(0), errors.square().sum(0).sqrt() / len(logs)
        shifted = logs - 0.5 * torch.nan_to_num(errors).square()
        shares = torch.softmax(shifted, 0)
        return torch.logsumexp(shifted, 0) - math.log(len(logs)), (shares * errors).square().sum(0).sqrt()


def _scored(
    model: ScoreModel,
    job: _Job,
    data: Tensor,
    labels: Tensor | None,
    batches: Sequence[Sequence[int]],
    devices: Sequence[str | torch.device] | None,
) -> Iterator[tuple[Sequence[int], list[list[float]]]]:
    """Batches and their rows, in the order in which they are done."""

    def run(which: ScoreModel, part: Sequence[int]) -> tuple[Sequence[int], list[list[float]]]:
        at = torch.tensor(part)
        return part, job.score(which, data[at], None if labels is None else labels[at], part)

    model.eval()
    if devices is None or len(devices) < 2:
        there = model if not devices else copy.deepcopy(model).to(devices[0])
        for part in batches:
            yield run(there, part)
        return
    copies = [copy.deepcopy(model).to(device) for device in devices]

    def share(k: int) -> Iterable[tuple[Sequence[int], list[list[float]]]]:
        return [run(copies[k], part) for part in batches[k :: len(copies)]]

    with ThreadPoolExecutor(len(copies)) as pool:
        for found in pool.map(share, range(len(copies))):
            yield from found


def _gathered(done: dict[int, list[float]]) -> dict[int, list[float]]:
    """The rows of all processes."""
    world = process()[1]
    if world == 1:
        return done
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, done)
    return {i: row for part in parts for i, row in part.items()}


# --- the result ------------------------------------------------------------------------------------------------------


def _result(
    table: Tensor,
    spec: DataSpec,
    law: SDE,
    dequantization: str | None,
    bound: str,
    samples: int,
    corrected: tuple[str, ...],
) -> BitsPerDim:
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
