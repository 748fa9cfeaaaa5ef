"""Pictures of likelihoods: a data set's bits/dim with their error bars, causes of error, convergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scoresde.figures import COLOURS, panels, plain_ticks
from scoresde.likelihood.bits_per_dim import BitsPerDim
from scoresde.likelihood.log_likelihood import log_likelihood
from sde_lib import ReverseSDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAUSES = {
    "trace_se": "trace estimate (standard error)",
    "discretization": "discretisation (difference of two runs)",
    "truncation": "truncation at t_min (bias)",
    "prior_mismatch": "prior mismatch (bias)",
    "precision": "arithmetic (order of magnitude)",
}


def histogram(result: BitsPerDim, path: str | Path | None = None, bins: int = 40, *, ax: Any = None) -> Figure:
    """Distribution of the bits/dim of samples (above), and every sample with its trace bar, sorted (below).

    Args:
        result: of `bits_per_dim`.
        path: file to write.
        bins: of the histogram.
        ax: two Axes to draw on.
    """
    ok = torch.isfinite(result.per_sample)
    values, order = result.per_sample[ok].sort()
    errors = torch.nan_to_num(result.trace_se[ok][order])
    with panels(ax, path, (7.0, 5.2), 2, 1, height_ratios=(2, 1.4)) as (figure, (top, bottom)):
        top.hist(values.numpy(), bins=bins, color=COLOURS[0], alpha=0.75)
        top.axvline(result.mean, color=COLOURS[1], label=f"mean {result.mean:.4f} ± {result.standard_error:.4f}")
        top.set(xlabel="bits/dim", ylabel="number of samples")
        top.legend()
        step = max(1, len(values) // 200)  # more bars than that hide each other
        at, shown = torch.arange(len(values))[::step], values[::step]
        bottom.errorbar(at, shown, yerr=errors[::step], fmt=".", markersize=3, elinewidth=0.8, color=COLOURS[0])
        bottom.set_xlabel(f"rank of the sample{f' (every {step}th is shown)' if step > 1 else ''}")
        bottom.set_ylabel("bits/dim ± standard error\nof the trace")
    return figure


def budget(result: BitsPerDim, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
    """Size of every cause of error: of one sample (quartiles) and in the mean over the data set, in bits/dim.

    Args:
        result: of `bits_per_dim`.
        path: file to write.
        ax: Axes to draw on.
    """
    ok = torch.isfinite(result.per_sample)
    n = int(ok.sum())
    smallest = 1e-9
    with panels(ax, path, (8.0, 3.4)) as (figure, (axis,)):
        for i, name in enumerate(CAUSES):
            values = torch.nan_to_num(getattr(result, name)[ok].abs()).double()
            quartiles = values.quantile(torch.tensor([0.25, 0.5, 0.75]).double())
            low, middle, high = (max(float(q), smallest) for q in quartiles)
            mean = float(getattr(result, name)[ok].nan_to_num().mean())
            mean = abs(mean) if name != "trace_se" else float(values.square().sum().sqrt() / n)
            axis.plot([low, high], [i, i], color=COLOURS[0], linewidth=6, alpha=0.4, solid_capstyle="butt")
            axis.plot(middle, i, "o", color=COLOURS[0], label="one sample: median and quartiles" if i == 0 else None)
            label = f"mean over {n} samples" if i == 0 else None
            axis.plot(max(mean, smallest), i, "D", color=COLOURS[1], label=label)
        row = len(CAUSES)
        axis.plot(result.standard_error, row, "D", color=COLOURS[1])
        axis.set_yticks(range(row + 1), [*CAUSES.values(), "finite data set (standard error)"])
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.set_xlabel("size in bits/dim")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


@dataclass
class Convergence:
    """How log p settles with steps and with probes. Errors are root mean squares over samples, in nats.

    Attributes:
        steps: numbers of steps.
        discretization: difference from the largest number of steps, on one kept probe or the exact trace.
        estimated: the reported discretisation bar at each number of steps.
        num_probes: numbers of estimates per knot.
        trace_se: the reported standard error at each.
        dims: D.
    """

    steps: list[int]
    discretization: list[float]
    estimated: list[float]
    num_probes: list[int]
    trace_se: list[float]
    dims: int

    def table(self) -> str:
        """Both as text."""
        lines = [f"{'steps':>6}  {'change to the last':>18}  {'reported':>10}   (nats, RMS)"]
        rows = zip(self.steps, self.discretization, self.estimated, strict=True)
        lines += [f"{n:>6}  {change:>18.3g}  {bar:>10.3g}" for n, change, bar in rows]
        lines += ["", f"{'probes':>6}  {'standard error':>18}"]
        lines += [f"{k:>6}  {se:>18.3g}" for k, se in zip(self.num_probes, self.trace_se, strict=True)]
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None, *, ax: Any = None) -> Figure:
        """Both as pictures: the error against steps (left) and against probes with the slope of theory (right).

        Args:
            path: file to write.
            ax: two Axes to draw on.
        """
        with panels(ax, path, (9.0, 3.6), 1, 2) as (figure, (left, right)):
            label = f"change to {self.steps[-1]} steps"
            left.plot(self.steps[:-1], self.discretization[:-1], "o-", color=COLOURS[0], label=label)
            left.plot(self.steps, self.estimated, "s--", color=COLOURS[1], label="reported (doubling)")
            left.set(xlabel="number of steps", ylabel="error of log p in nats (RMS over samples)")
            exact = not any(math.isfinite(se) and se > 0 for se in self.trace_se)
            if exact:
                right.text(0.5, 0.5, "exact trace: no error of this kind", transform=right.transAxes, ha="center")
                right.set_yticks([])
            else:
                right.plot(self.num_probes, self.trace_se, "o-", color=COLOURS[0], label="reported standard error")
                guide = [self.trace_se[0] * math.sqrt(self.num_probes[0] / k) for k in self.num_probes]
                right.plot(self.num_probes, guide, ":", color="0.4", label="proportional to 1 / sqrt(probes)")
                right.set_ylabel("standard error of log p in nats (RMS)")
            right.set_xlabel("probes per knot")
            bits = 1.0 / (self.dims * math.log(2.0))
            for axis, ticks in ((left, self.steps), (right, self.num_probes)):
                axis.set_xscale("log", base=2)
                axis.set_xticks(ticks, [str(k) for k in ticks])
                axis.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
                if axis is right and exact:
                    continue
                axis.set_yscale("log")
                plain_ticks(axis.yaxis)
                twin = axis.secondary_yaxis("right", functions=(_times(bits), _times(1.0 / bits)))
                twin.set_ylabel("bits/dim")
                low, high = axis.get_ylim()
                plain_ticks(twin.yaxis, view=(bits * low, bits * high))
                axis.legend()
        return figure


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda y: y * factor


def convergence(
    rev: ReverseSDE,
    x: Tensor,
    steps: Sequence[int] = (8, 16, 32, 64, 128),
    num_probes: Sequence[int] = (2, 4, 8, 16),
    seed: int = 0,
    **options: Any,
) -> Convergence:
    """Measure how the likelihood of a few samples settles with the number of steps and of probes.

    Args:
        rev: reverse SDE of a continuous law.
        x: states in model units, (B, *D).
        steps: numbers of steps, ascending, multiples of 4.
        num_probes: numbers of estimates per knot, ascending, from 2; added with `Likelihood.refine`.
        seed: of the probes.
        **options: of `log_likelihood`.

    Raises:
        ValueError: for lists that do not ascend.
    """
    for name, values in (("steps", steps), ("num_probes", num_probes)):
        if not values or list(values) != sorted(set(values)):
            raise ValueError(f"`{name}` must ascend, got {tuple(values)}.")
    options = {**options, "rng": [seed * 2**20 + i for i in range(len(x))]}
    # on the kept probe: fresh ones would hide the change of the steps behind their noise
    results = [log_likelihood(rev, x, steps=n, num_probes=1, **options) for n in steps]
    exact = results[0].kept_log_prob is None
    totals = [r.log_prob if r.kept_log_prob is None else r.kept_log_prob for r in results]
    change = [float((t - totals[-1]).square().mean().sqrt()) for t in totals]
    bars = [float(r.discretization.square().mean().sqrt()) for r in results]
    errors: list[float] = []
    result = log_likelihood(rev, x, steps=steps[min(2, len(steps) - 1)], num_probes=num_probes[0], **options)
    for before, k in zip([num_probes[0], *num_probes], num_probes, strict=False):
        result = result if k == before else result.refine(num_probes=k - before)
        errors.append(0.0 if exact else float(result.trace_se.square().mean().sqrt()))
    return Convergence(list(steps), change, bars, list(num_probes), errors, x[0].numel())
