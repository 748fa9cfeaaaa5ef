"""Plots of a comparison, and sheets of its samples. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scoresde.figures import COLOURS, new_figure, save_figure

if TYPE_CHECKING:
    from scoresde.comparison.result import Comparison

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_NAMES = {
    "path_rms": "distance to the reference path (RMS)",
    "path_median": "distance to the reference path (median)",
    "sliced_wasserstein": "sliced Wasserstein distance",
    "energy_distance": "energy distance",
    "mmd2": "squared kernel distance (MMD²)",
    "frechet_distance": "Fréchet distance",
}


def plot(result: Comparison, path: Path, y: str) -> None:
    """Error against network calls (left) and against seconds (right), log-log."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in result.rows:
        if row["status"] == "ok" and row[y] is not None and row[y] > 0 and row["nfe"] and row["seconds"]:
            series.setdefault(row["label"], []).append(row)
    if not series:
        raise ValueError(f"Nothing to plot: no run has a {y} above zero.")
    fits = {fit["label"]: fit for fit in result.orders(y)}
    legend_rows = math.ceil(len(series) / 2)
    height = 4.2 + 0.22 * legend_rows + 0.15
    figure, axes = new_figure(10.5, height, 1, 2, sharey=True)
    left, right = axes[0]
    for i, (label, rows) in enumerate(series.items()):
        rows = sorted(rows, key=lambda row: row["nfe"])  # the order in which the calls grow: times may not
        errors = [row[y] for row in rows]
        bars = tuple(zip(*(_bar(row.get(f"{y}_se"), row[y]) for row in rows), strict=True))
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": "--" if rows[0]["kind"] == "stochastic" else "-",
            "markersize": 5.5,
            "linewidth": 1.6,
        }
        for axis, key in ((left, "nfe"), (right, "seconds")):
            at = [row[key] for row in rows]
            axis.errorbar(at, errors, yerr=bars, elinewidth=0.9, **style, label=_named(label, fits))
    limit = result.noise_limit(y)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(which="major", alpha=0.35)
        axis.grid(which="minor", alpha=0.12)
        if limit is not None and limit > 0:
            axis.axhline(limit, color="0.4", linestyle=":", linewidth=1.2)
    left.set_xlabel("network calls per sample (NFE)")
    right.set_xlabel(f"seconds for {result.settings['n']} samples ({result.environment.get('device', '')})")
    left.set_ylabel(_NAMES.get(y, y))
    for axis in (left, right):
        _plain_ticks(axis.xaxis)
    low, high = left.get_ylim()
    if high / low < 100.0:
        _plain_ticks(left.yaxis)
    figure.suptitle(f"{result.settings['law']}\n{_note(result, y, series)}", fontsize=9)
    share = (0.22 * legend_rows + 0.15) / height  # of the legend
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=2, fontsize=8.5, frameon=False)
    figure.subplots_adjust(left=0.075, right=0.985, top=1.0 - 0.55 / height, bottom=share + 0.5 / height, wspace=0.06)
    save_figure(figure, path)


def _note(result: Comparison, y: str, series: Mapping[str, list[dict[str, Any]]]) -> str:
    """What the lines are."""
    kinds = {rows[0]["kind"] for rows in series.values()}
    parts = []
    if "deterministic" in kinds:
        parts.append("solid: probability-flow ODE")
    if "stochastic" in kinds:
        fine = ", against a fine run on the same Brownian path (strong error)" if y.startswith("path") else ""
        parts.append(f"dashed: reverse SDE{fine}")
    if (result.noise_limit(y) or 0.0) > 0:
        parts.append("below the dotted line: like samples of one law")
    return "; ".join(parts)


def _bar(error: float | None, value: float) -> tuple[float, float]:
    """Lower and upper bar; the lower one stays above zero on a logarithmic axis."""
    return (0.0, 0.0) if error is None else (min(error, 0.9 * value), error)


def _named(label: str, fits: Mapping[str, Mapping[str, Any]]) -> str:
    fit = fits[label]
    if fit["order"] is None or fit["to"] < 1.5 * fit["from"]:  # two points close together say nothing
        return label
    span = f"{fit['from']:.3g} to {fit['to']:.3g} {'calls' if fit['against'] == 'nfe' else 'steps'}"
    return f"{label}: order {fit['order']:.2f} ({span})"


def _plain_ticks(axis: Any) -> None:
    """5, 10, 20 and 0.02, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def sheet(rows: Mapping[str, Tensor], path: Path, value_range: tuple[float, float] | None, columns: int) -> None:
    """Images: a row per solver. Points in the plane: a panel per solver."""
    first = next(iter(rows.values()))
    if first.ndim == 4:
        _images(rows, path, value_range, columns)
    else:
        _points(rows, path)


def _images(rows: Mapping[str, Tensor], path: Path, value_range: tuple[float, float] | None, columns: int) -> None:
    columns = min(columns, max(len(row) for row in rows.values()))
    left = 0.09 * max(len(line) for title in rows for line in title.split("\n")) + 0.2
    width, height = left + 0.58 * columns, 0.6 * len(rows)
    figure, axes = new_figure(width, height, len(rows), columns)
    together = torch.cat([row.double().flatten() for row in rows.values()])
    low, high = value_range or (float(together.quantile(0.01)), float(together.quantile(0.99)))
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, images[:columns], strict=False):
            shown = ((image.double() - low) / (high - low)).clamp(0.0, 1.0).permute(1, 2, 0).squeeze(-1).numpy()
            axis.imshow(shown, cmap="gray" if shown.ndim == 2 else None, vmin=0.0, vmax=1.0, interpolation="nearest")
        line[0].text(-0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(left=left / width, right=0.995, top=0.99, bottom=0.01, wspace=0.08, hspace=0.08)
    save_figure(figure, path)


def _points(rows: Mapping[str, Tensor], path: Path) -> None:
    across = min(len(rows), 5)
    down = math.ceil(len(rows) / across)
    figure, axes = new_figure(2.1 * across, 2.55 * down, down, across)
    together = torch.cat([row.double() for row in rows.values()])
    # the widest 99.8 %: a stray sample of one solver must not shrink the others' panels
    extent = 1.08 * float(together.abs().flatten().quantile(0.998))
    flat = [axis for line in axes for axis in line]
    for axis in flat:
        axis.set_axis_off()
    for axis, (title, points) in zip(flat, rows.items(), strict=False):
        axis.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=1.5, alpha=0.35, linewidths=0, color=COLOURS[0])
        axis.set_xlim(-extent, extent)
        axis.set_ylim(-extent, extent)
        axis.set_aspect("equal")
        axis.set_title(title.replace("@", "\n@") if len(title.split("\n")[0]) > 24 else title, fontsize=7.5)
    figure.subplots_adjust(left=0.01, right=0.99, top=1.0 - 0.5 / (2.55 * down), bottom=0.01, wspace=0.1, hspace=0.3)
    save_figure(figure, path)
