"""log p along a fixed grid: the trajectory with its traces, the ends, the error of the steps."""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde.likelihood.ends import remainder, terms
from scoresde.likelihood.halving import halved
from scoresde.likelihood.path import Groups, Tracer, ascending_knots
from scoresde.likelihood.settings import FixedSteps, Settings
from scoresde.likelihood.sums import Sums
from sde_lib import ReverseSDE
from solvers.noise import Draw


def by_fixed_steps(rev: ReverseSDE, x: Tensor, settings: Settings, way: FixedSteps, draw: Draw) -> Sums:
    """One run upward from x, (B, *D), and all that its likelihood is put together from."""
    tracer = Tracer(
        rev, way.solver, settings.sigma_data, way.joint, settings.chunk, way.batch_rows, way.differentiable,
        probes=settings.probes, splits=settings.splits,
    )  # fmt: skip
    knots = ascending_knots(settings.law, way.grid, way.steps)
    kept = None if settings.exact or not settings.doubling else settings.group(draw, "kept")

    def groups(k: int) -> Groups:
        if settings.exact:
            return None
        fresh = [settings.group(draw, "probe", k, j) for j in range(settings.num_probes)]
        return fresh if kept is None else [*fresh, kept]

    with torch.set_grad_enabled(way.differentiable and torch.is_grad_enabled()):
        nodes = tracer.follow(x, knots, groups)
        log_prior = settings.log_prior(nodes.latent)
        ends = terms(rev, settings, *nodes.ends)
    left, calls, products = remainder(rev, settings, *nodes.ends, draw)
    calls += nodes.calls + int(ends[1].slope != 0.0)
    products += len(nodes.knots) * settings.products(x.shape[1:], settings.num_probes + (kept is not None))
    halvings = None
    if settings.doubling:
        halvings = halved(settings, tracer, nodes, knots, x, kept)
        calls += halvings.calls
        products += halvings.knots * settings.products(x.shape[1:], 1)
    nfe, vjps = torch.full((len(x),), calls * rev.nfe_per_call), torch.full((len(x),), products)
    return Sums(rev, settings, draw, nodes, log_prior, ends, left, halvings, nfe, vjps, way.check)
