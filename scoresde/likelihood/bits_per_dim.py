"""Bits per dimension of a data set: what the figure is of, how far off it may be, and where it can go on."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.codecs import Codec
from scoresde.data.spec import DataSpec
from scoresde.likelihood.bits import BitsPerDim, bits_of
from scoresde.likelihood.dequantization import Dequantization, as_dequantization, name_of
from scoresde.likelihood.doors import check_condition, check_density, check_options, check_volume
from scoresde.likelihood.log_likelihood import log_likelihood
from scoresde.likelihood.scores import ScoreFile, fingerprint
from scoresde.likelihood.scoring import Job, scored
from scoresde.models.score_model import ScoreModel
from scoresde.storage.models import usable_device
from scoresde.storage.processes import from_all, process, together
from sde_lib import SDE
from sde_lib._checks import check_count

BOUNDS = ("elbo", "iw")


def bits_per_dim(
    model: ScoreModel,
    data: Tensor,
    *,
    condition: Mapping[str, Any] | None = None,
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

    Every change of units is accounted for: with the codec's x of z and the state :math:`\alpha x` at t_min,
    :math:`\log p_z = \log p_{t_{min}}(\alpha x) + D \log\alpha + \log|\det dx/dz|`.

    Every sample draws from a noise stream of its own, so results depend neither on the batch size nor on how the work
    is split. In a process group of `torch.distributed` each process scores its share, and all get the whole result.

    Args:
        model: a score model with a data specification.
        data: (N, *D) in data units, checked for shape, range, levels and finiteness. All are scored, in batches.
        condition: what the samples are conditioned on, by name, N rows at every depth: the figures are of
            p(data | condition).
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
        TypeError: for an option that there is not, data that are no tensor, or a condition of another type.
        ValueError: for data or conditions that do not fit the specification, a model without one or of no density, a
            codec that is no bijection, options out of range, or a file that belongs to other data or settings.
    """
    if devices is not None:
        if isinstance(devices, str) or not devices:
            raise ValueError(f"`devices` must be a list of at least one device, or None, got {devices!r}.")
        devices = [usable_device(device) for device in devices]
    check_options("bits_per_dim", log_likelihood, options, ("rev", "x", "rng", "condition", "keep", "progress"))
    spec, law, codec = _check(model, data, levels, samples, bound, batch_size, seed)
    condition, volume = check_condition(model, condition, len(data)), check_volume("bits_per_dim", codec)
    as_dequantization(dequantization, codec, law.knot(law.t_min))  # refuses an unknown name before the first batch
    name = name_of(dequantization, codec, law.knot(law.t_min))
    options = {"sigma_data": model.sigma_data, **options}
    job = Job(spec, law, codec, volume, dequantization, samples, bound, seed, {**options, "keep": False})
    shown = {k: v if isinstance(v, int | float | str | bool | None) else repr(v) for k, v in options.items()}
    settings = {"bound": bound, "dequantization": name, "samples": samples, "seed": seed, "options": shown}
    rank, world = process()
    opened = None if path is None else ScoreFile(Path(path), settings | fingerprint(model, data, condition), resume)
    with nullcontext() if opened is None else opened as file:
        done = {} if file is None else file.rows
        todo = [i for i in range(len(data)) if i not in done][rank::world]
        batches = [todo[low : low + batch_size] for low in range(0, len(todo), batch_size)]
        disable = rank > 0 or None if progress is None else not progress

        def score() -> None:
            with tqdm(total=len(todo), desc="bits/dim", unit="sample", disable=disable, file=sys.stderr) as bar:
                for part, rows in scored(model, job, data, condition, batches, devices):
                    done.update(zip(part, rows, strict=True))
                    if file is not None:
                        file.add({i: done[i] for i in part})
                    bar.update(len(part))

        together(score)
        done = {i: row for part in from_all(done) for i, row in part.items()}
        if file is not None:
            file.merge(done)
    table = torch.tensor([done[i] for i in range(len(data))], dtype=torch.float64)
    corrected = tuple(options.get("correct", ()))
    return bits_of(table, spec, law, name if spec.levels is not None else None, bound, samples, corrected)


def _check(
    model: ScoreModel,
    data: Tensor,
    levels: int | None,
    samples: int,
    bound: str,
    batch_size: int,
    seed: int,
) -> tuple[DataSpec, SDE, Codec]:
    if not isinstance(model, ScoreModel):
        raise TypeError(f"bits_per_dim needs a ScoreModel, got {type(model).__name__} (see log_likelihood).")
    check_density("bits_per_dim", model.reverse())
    spec, codec = model.data_spec, model.codec
    if spec is None or codec is None:
        raise ValueError("bits_per_dim needs a model with a data_spec: shape and levels of the data.")
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
    return spec, model.law, codec
