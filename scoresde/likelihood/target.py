"""More probes at the knots of a trajectory: so many, or as many as a target takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde.likelihood.divergence import check_trace_options
from scoresde.likelihood.path import Groups, measure
from scoresde.likelihood.pool import Pool
from scoresde.likelihood.precision import allow_tf32
from scoresde.likelihood.result import Likelihood
from scoresde.likelihood.settings import PILOT
from scoresde.likelihood.sums import Sums
from scoresde.likelihood.words import enough_memory
from sde_lib._checks import check_positive

FEWEST = 4
"""Estimates per knot that a target takes at the least: fewer may agree by chance where one knot rules."""
TOGETHER = 16
"""Estimates taken from one network call at a knot: each holds its products until their scatter is known."""


@dataclass(frozen=True)
class Refinement:
    """What `Likelihood.refine` calls: the likelihood of the sums with more probes, which can be refined again."""

    sums: Sums

    def __call__(self, num_probes: int | None, target_se: float | None) -> Likelihood:
        latent = self.sums.nodes.latent
        with enough_memory(latent), allow_tf32(self.sums.settings.tf32, latent.device):
            sums = self.sums if target_se is None else reached(self.sums, target_se)
            sums = sums if num_probes is None else _with_more(sums, num_probes)
        return replace(sums.likelihood(), _more=Refinement(sums))


def _with_more(sums: Sums, num_probes: int) -> Sums:
    """With so many more estimates per knot for every sample."""
    check_trace_options("auto", num_probes, 1)
    sums = sums.copy()
    _grow(sums, sums.rest, sums.rest.count + num_probes)
    return sums


def reached(sums: Sums, target: float) -> Sums:
    r"""As many probes as a standard error of `target` takes, by the pilot, which is then left out.

    With the variance V of one estimate by the pilot, of nu degrees of freedom, :math:`n = V / \mathrm{target}^2
    \cdot \nu / (\nu - 2)`: the second factor is the mean of the true variance over V, so that the mean square
    error, over what the pilot may say, is that of the target. Given the pilot, n is a number like any other and the
    n new estimates know nothing of it: their mean is unbiased and their bar that of a sample of fixed size. A rule
    that stops on the estimates it reports is neither: those stop that happen to agree (Anscombe 1953; the two
    stages are Stein's, 1945, whose pooled mean is unbiased for normal estimates only).
    """
    check_positive("target_se", target)
    sums = sums.copy()
    if sums.settings.exact:
        return sums
    shape = sums.nodes.latent.shape[1:]
    most = math.prod(shape) // sums.settings.probes.size(shape)  # estimates that cost as much as the exact trace
    _grow(sums, sums.pilot, torch.full_like(sums.pilot.count, float(PILOT)))
    noise, dof = (v.cpu() for v in sums.pilot.variance(sums.weights))
    wanted = noise * sums.pilot.count / target**2 / (1.0 - 2.0 / dof)
    wanted = torch.nan_to_num(wanted, nan=0.0).clamp(min=float(FEWEST)).ceil()  # nan: failed, or exact already
    # few different numbers, so that many samples share a call: 4, 6, 8, 12, 16, 24, 32 …
    octave = 2.0 ** wanted.log2().floor()
    rounded = torch.where(wanted > 1.5 * octave, 2.0 * octave, torch.where(wanted > octave, 1.5 * octave, octave))
    sums.settled = True
    _grow(sums, sums.rest, torch.where(wanted >= most, math.inf, rounded))
    return sums


def _grow(sums: Sums, pool: Pool, wanted: Tensor) -> None:
    """So many estimates per knot of every sample in a pool; inf for the exact trace."""
    exact = torch.isinf(sums.pilot.count) | torch.isinf(sums.rest.count)
    if bool((short := torch.isinf(wanted) & ~exact).any()):
        _measure(sums, pool, short, math.inf, 0)
    wanted = torch.where(exact | torch.isinf(wanted), 0.0, wanted)
    while bool((short := pool.count < wanted).any()):
        drawn = (sums.pilot.count + sums.rest.count)[short]
        rows = short & (sums.pilot.count + sums.rest.count == drawn.min())
        # those that need the fewest go as far as they must, the others with them
        n = min(float((wanted - pool.count)[rows].min()), float(TOGETHER))
        _measure(sums, pool, rows, n, int(drawn.min()))


def _measure(sums: Sums, pool: Pool, which: Tensor, n: float, start: int) -> None:
    """n estimates per knot for some samples, the first of them the start-th that is drawn there."""
    nodes, settings, exact = sums.nodes, sums.settings, math.isinf(n)
    rows = which.nonzero().flatten()
    at = rows.to(nodes.latent.device)
    rev, traces = sums.rev.select(at), []
    for k, (knot, state) in enumerate(zip(nodes.knots, nodes.states, strict=True)):
        groups: Groups = None
        if not exact:
            groups = [[v[at] for v in settings.group(sums.draw, "probe", k, start + j)] for j in range(int(n))]
        with torch.no_grad():
            splits = () if exact else (int(n),)
            _, found = measure(rev, knot, state[at], groups, settings.chunk, False, settings.probes, splits)
        traces.append(found)
    pool.put(rows, Pool.exact(traces) if exact else Pool.of(traces, 0, int(n), 0))
    sums.nfe[rows] += len(nodes.knots) * sums.rev.nfe_per_call
    size = settings.probes.size(nodes.latent.shape[1:])
    sums.vjps[rows] += len(nodes.knots) * int(nodes.latent[0].numel() if exact else n * size)
