"""Plots of a comparison, and sheets of its samples. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scoresde.figures import LINES, image_rows, panels, plain_ticks, point_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scoresde.comparison.result import Comparison

_NAMES = {
    "path_rms": "distance to the reference path (model units, RMS)",
    "path_median": "distance to the reference path (model units, median)",
    "sliced_wasserstein": "sliced Wasserstein distance (data units)",
    "energy_distance": "energy distance (data units)",
    "mmd2": "squared kernel distance (MMD², no unit)",
    "frechet_distance": "Fréchet distance (squared units of the features)",
}


def plot(result: Comparison, y: str, path: str | Path | None, ax: Any) -> Figure:
    """Error against network calls (left) and against seconds (right), both axes logarithmic."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in result.rows:
        if row["status"] == "ok" and row[y] is not None and row[y] > 0 and row["nfe"] and row["seconds"]:
            series.setdefault(row["label"], []).append(row)
    if not series:
        raise ValueError(f"Nothing to plot: no run has a {y} above zero.")
    one = ax is not None and not hasattr(ax, "__len__")
    across = 2 if len(series) <= 8 else 3
    height = 4.2 + 0.17 * math.ceil((len(series) + 3) / across)
    with panels(ax, path, (10.5, height), 1, 1 if one else 2, sharey=True) as (figure, axes):
        handles = _curves(axes[0], result, series, y, "nfe")
        axes[0].set_xlabel("network calls per sample")
        axes[0].set_ylabel(_NAMES.get(y, y))
        if not one:
            _curves(axes[1], result, series, y, "seconds")
            device = result.environment.get("device", "")
            axes[1].set_xlabel(f"seconds for {result.settings['n']} samples{f' ({device})' if device else ''}")
        for axis in axes:
            low, high = axis.get_ylim()
            if high < 1.1 * low:  # one value: matplotlib leaves shared axes without any height
                axis.set_ylim(low / 2, high * 2)
        plain_ticks(*(axis.xaxis for axis in axes), axes[0].yaxis)
        if ax is None:
            figure.legend(handles=handles, loc="outside lower center", ncols=across, handlelength=3.5)
        else:
            axes[0].legend(handles=handles, handlelength=3.5)
    return figure


def _curves(axis: Any, result: Comparison, series: Mapping[str, list[dict[str, Any]]], y: str, key: str) -> list[Any]:
    """A line per solver, markers filled for the ODE and hollow for the SDE, and the noise limit: for the legend."""
    fits = {fit["label"]: fit for fit in result.orders(y)}
    kinds, handles = {rows[0]["kind"] for rows in series.values()}, []
    for i, (label, rows) in enumerate(series.items()):
        rows = sorted(rows, key=lambda row: row["nfe"])
        at = [row[key] for row in rows]
        at = increasing(at) if key == "seconds" else at
        bars = tuple(zip(*(_bar(row.get(f"{y}_se"), row[y]) for row in rows), strict=True))
        hollow = {"markerfacecolor": "white"} if rows[0]["kind"] == "stochastic" else {}
        style = {**LINES[i % len(LINES)], **hollow}
        line, *_ = axis.errorbar(at, [row[y] for row in rows], yerr=bars, elinewidth=0.9, **style)
        line.set_label(_named(label, fits))
        handles.append(line)
    limit = result.noise_limit(y)
    if limit is not None and limit > 0:
        label = "two samples of one law: mean + 2 s.d."
        handles.append(axis.axhline(limit, color="0.4", linestyle=":", linewidth=1.2, label=label))
    if len(kinds) > 1:
        handles += axis.plot([], [], "o", color="0.4", label="filled: probability-flow ODE")
        handles += axis.plot([], [], "o", color="0.4", markerfacecolor="white", label="hollow: reverse SDE")
    axis.set_xscale("log")
    axis.set_yscale("log")
    return handles


def increasing(seconds: Sequence[float]) -> list[float]:
    """Times in the order of their calls, none smaller than the one before.

    More calls take more time. Where the clock says otherwise it is the clock's noise, and neighbours are replaced by
    their geometric mean until the order is right: isotonic regression of log seconds, by pooling adjacent violators
    (Ayer et al. 1955, doi:10.1214/aoms/1177728423).
    """
    pools: list[tuple[float, int]] = []  # mean log, how many
    for value in seconds:
        pools.append((math.log(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools.pop(-2), pools.pop()
            pools.append(((n * a + m * b) / (n + m), n + m))
    return [math.exp(mean) for mean, n in pools for _ in range(n)]


def _bar(error: float | None, value: float) -> tuple[float, float]:
    """Lower and upper bar; the lower one stays above zero on a logarithmic axis."""
    return (0.0, 0.0) if error is None else (min(error, 0.9 * value), error)


def _named(label: str, fits: Mapping[str, Mapping[str, Any]]) -> str:
    fit = fits[label]
    if fit["order"] is None or fit["to"] < 1.5 * fit["from"]:  # two points close together say nothing
        return label
    span = f"{fit['from']:.3g} to {fit['to']:.3g} {'calls' if fit['against'] == 'nfe' else 'steps'}"
    return f"{label}: order {fit['order']:.2f} ({span})"


def sheet(
    rows: Mapping[tuple[str, float | None], Tensor],
    value_range: tuple[float, float] | None,
    columns: int,
    path: str | Path | None,
    ax: Any,
) -> Figure:
    """Samples by (solver, calls). Images: a row per solver. Points in the plane: a panel per solver."""
    first = next(iter(rows.values()))
    if first.ndim == 2:
        return point_panels({_titled(*key, " calls"): points for key, points in rows.items()}, path=path, ax=ax)
    together = torch.cat([images.double().flatten() for images in rows.values()])
    low, high = value_range or (float(together.quantile(0.01)), float(together.quantile(0.99)))
    shown = {_titled(*key): images[:columns] for key, images in rows.items()}
    return image_rows(shown, low, high, "solver, network calls", path=path, ax=ax)


def _titled(label: str, calls: float | None, unit: str = "") -> str:
    if calls is None:
        return label
    short = len(label) <= 24
    return f"{label}{', ' if short else chr(10)}{calls:.3g}{unit}"
