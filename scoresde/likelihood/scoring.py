"""Scores of batches of a data set, on one device or on several: a row of figures per sample."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde.codecs import Codec
from scoresde.data.conditions import mapped
from scoresde.data.spec import DataSpec
from scoresde.likelihood.dequantization import Dequantization, as_dequantization
from scoresde.likelihood.log_likelihood import log_likelihood
from scoresde.likelihood.result import Likelihood
from scoresde.models.score_model import ScoreModel
from sde_lib import SDE
from sde_lib.reverse import select_rows
from solvers import PerSample, Status


@dataclass
class Job:
    """What is done with every batch.

    Attributes:
        spec, law, codec: the model's.
        log_volume: log |det dx / dz| of the codec.
        dequantization, samples, bound, seed: as `bits_per_dim` was asked for.
        options: of `log_likelihood`.
    """

    spec: DataSpec
    law: SDE
    codec: Codec
    log_volume: float
    dequantization: str | Dequantization
    samples: int
    bound: str
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def score(
        self, model: ScoreModel, batch: Tensor, condition: Mapping[str, Any], index: Sequence[int]
    ) -> list[list[float]]:
        """A row of figures (`COLUMNS`) per sample."""
        spec, knot, bits = self.spec, self.law.knot(self.law.t_min), self.spec.dims * math.log(2.0)
        batch, condition = batch.to(model.device), mapped(lambda value: value.to(model.device), condition)
        alpha = float(knot.alpha)
        jacobian = spec.dims * math.log(alpha) + self.log_volume
        dequantize = as_dequantization(self.dequantization, self.codec, knot)
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
            x = alpha * model.encode(batch, u, dtype=torch.float64)
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


def scored(
    model: ScoreModel,
    job: Job,
    data: Tensor,
    condition: Mapping[str, Any],
    batches: Sequence[Sequence[int]],
    devices: Sequence[str | torch.device] | None,
) -> Iterator[tuple[Sequence[int], list[list[float]]]]:
    """Batches and their rows, in the order in which they are done."""

    def run(which: ScoreModel, part: Sequence[int]) -> tuple[Sequence[int], list[list[float]]]:
        at = torch.tensor(part)
        return part, job.score(which, data[at], select_rows(condition, at), part)

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
