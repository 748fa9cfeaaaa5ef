"""The outcome of a comparison: rows, tables, fitted orders, files and pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from scoresde.comparison.store import FORMAT
from scoresde.storage.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEANS = ("nfe", "noise_seconds", "path_median")
_MEDIANS = ("seconds", "network_seconds")
COLUMNS = (
    "label",
    "solver",
    "grid",
    "kind",
    "order",
    "budget",
    "status",
    "reason",
    "repetitions",
    "samples",
    "steps",
    "nfe",
    "nfe_max",
    "seconds",
    "seconds_se",
    "network_seconds",
    "overhead_seconds",
    "noise_seconds",
    "reference",
    "reference_error",
    "path_rms",
    "path_rms_se",
    "path_median",
)
_SHOWN = ("nfe", "seconds", "overhead_seconds", "path_rms", "path_median")


class Comparison:
    """Measured figures in rows, one per solver and budget, and what they were measured on.

    Attributes:
        runs: one dict per run (solver, budget, repetition), as measured.
        settings: the problem and what all runs share.
        environment: library version, device and threads: what the times depend on.
        floors: per metric, mean and standard deviation of its value between samples of one law.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        floors: Mapping[str, Mapping[str, float | None]],
        runs: Sequence[Mapping[str, Any]] = (),
        shape: Sequence[int] = (),
        range: tuple[float, float] | None = None,
    ) -> None:
        self.settings, self.environment, self.floors = dict(settings), dict(environment), dict(floors)
        self.runs: list[dict[str, Any]] = [dict(run) for run in runs]
        self.shape, self.range = tuple(shape), range
        self.samples: dict[tuple[str, str], Tensor] = {}

    def add(self, run: Mapping[str, Any], samples: Tensor | None = None) -> None:
        """Append a run, with samples of it to show."""
        self.runs.append(dict(run))
        if samples is not None:
            self.samples[run["label"], run["budget"]] = samples

    # --- rows -----------------------------------------------------------------------------------------------------
    @property
    def metrics(self) -> list[str]:
        """Names of the two-sample distances."""
        return list(self.settings.get("metrics", []))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per solver and budget: means over repetitions, of ``seconds`` and ``network_seconds`` medians.

        ``path_rms`` is over the samples of all repetitions; ``overhead_seconds`` is the difference of the two medians;
        ``…_se`` are standard errors of means over repetitions (None for one).
        A row whose runs did not all succeed has their status and reason, and no figures of accuracy.
        """
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in self.runs:
            groups.setdefault((run["label"], run["budget"]), []).append(run)
        return [self._row(runs) for runs in groups.values()]

    def _row(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        first = next((run for run in runs if run["status"] != "ok"), runs[0])
        row: dict[str, Any] = {name: first.get(name) for name in COLUMNS}
        row["repetitions"] = len(runs)
        for name in _MEANS:
            row[name] = _mean([run.get(name) for run in runs])
        for name in _MEDIANS:  # one slow run, held up by something else, says nothing of the solver
            values = [run.get(name) for run in runs]
            row[name] = None if _mean(values) is None else statistics.median(v for v in values if v is not None)
        row["overhead_seconds"] = None if row["seconds"] is None else row["seconds"] - row["network_seconds"]
        row["nfe_max"] = max((run["nfe_max"] for run in runs if run.get("nfe_max") is not None), default=None)
        row["seconds_se"] = _standard_error([run.get("seconds") for run in runs])
        rms = [run.get("path_rms") for run in runs]
        square = _mean([None if v is None else v * v for v in rms])
        row["path_rms"], row["path_rms_se"] = None if square is None else math.sqrt(square), _standard_error(rms)
        row["reference_error"] = _mean([run.get("reference_error") for run in runs])
        for name in self.metrics:
            row[name] = _mean([run.get(name) for run in runs])
            row[f"{name}_se"] = _standard_error([run.get(name) for run in runs])
        return row

    def orders(self, y: str = "path_rms", points: int = 3) -> list[dict[str, Any]]:
        """Observed orders: minus the slope of log error against log steps, by least squares.

        Adaptive solvers, which have no step count, are fitted against their counted calls. Used are the last `points`
        rows of each solver that lie above ten times the reference's own error (or, for a distance between samples,
        above its noise floor's mean plus four standard deviations).

        Args:
            y: column of errors.
            points: rows per fit, >= 2.

        Returns:
            One dict per solver: label, declared order, order (None with fewer than two usable rows), standard_error
            (None with two), against ("steps" or "nfe"), from, to and points.
        """
        if not isinstance(points, int) or points < 2:
            raise ValueError(f"`points` must be an int >= 2, got {points!r}.")
        self._check_column(y)
        out = []
        for label, rows in self._series().items():
            adaptive = any(run["adaptive"] for run in self.runs if run["label"] == label)
            against = "nfe" if adaptive else "steps"
            usable: dict[float, float] = {}
            for row in rows:
                value, x = row[y], row[against]
                if row["status"] == "ok" and value and x and value > self._noise(row, y):
                    usable[x] = value  # budgets that came to the same steps count once
            chosen = sorted(usable)[-points:]
            fit = _slope([math.log(x) for x in chosen], [math.log(usable[x]) for x in chosen])
            out.append(
                {
                    "label": label,
                    "declared": rows[0]["order"],
                    "order": None if fit is None else -fit[0],
                    "standard_error": None if fit is None else fit[1],
                    "against": against,
                    "from": chosen[0] if chosen else None,
                    "to": chosen[-1] if chosen else None,
                    "points": len(chosen),
                }
            )
        return out

    def noise_limit(self, metric: str, deviations: float = 2.0) -> float | None:
        """The noise floor's mean plus some standard deviations: distances below are those of samples of one law."""
        floor = self.floors.get(metric)
        return None if floor is None else (floor["mean"] or 0.0) + deviations * (floor["std"] or 0.0)

    def _noise(self, row: Mapping[str, Any], y: str) -> float:
        """The value up to which a row is too noisy to fit an order to."""
        limit = self.noise_limit(y, 4.0)
        if limit is not None:
            return limit
        return 10.0 * (row["reference_error"] or 0.0) if y.startswith("path") else 0.0

    def _series(self) -> dict[str, list[dict[str, Any]]]:
        series: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            series.setdefault(row["label"], []).append(row)
        return series

    def _check_column(self, y: str) -> None:
        known = ["path_rms", "path_median", *self.metrics]
        if y not in known:
            raise ValueError(f"`y` must be one of {', '.join(known)}, got {y!r}.")

    def _best_column(self) -> str:
        """What is plotted by default: the distance to the reference, or the first metric."""
        rows = self.rows
        found = [y for y in ("path_rms", *self.metrics) if any(row[y] is not None for row in rows)]
        if not found:
            raise ValueError("Nothing to plot: no run has a figure of accuracy.")
        return found[0]

    # --- text and files -------------------------------------------------------------------------------------------
    def table(self) -> str:
        """Aligned text. ``~`` marks a distance within the noise floor (its mean plus two standard deviations), where
        samples cannot be told from the reference samples at this sample size; ``*`` the smallest value of a column, if
        it is not among those."""
        rows = self.rows
        cells = self._cells(rows)
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]) - 1)]
        lines = []
        for line in cells:
            padded = [f"{line[i]:<{w}}" if i < 2 else f"{line[i]:>{w}}" for i, w in enumerate(widths)]
            lines.append("  ".join([*padded, line[-1]]).rstrip())
        return "\n".join([*lines, *self._notes(rows)])

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        rows = self.rows
        head, *body = ([escape(cell.strip()) for cell in line] for line in self._cells(rows))
        lines = ["".join(f"<th>{cell}</th>" for cell in head)]
        for line in body:
            aligned = (f'<td style="text-align: {"left" if i < 2 else "right"}">' for i in range(len(line) - 1))
            cells = "".join(f"{start}{cell}</td>" for start, cell in zip(aligned, line, strict=False))
            lines.append(f'{cells}<td style="text-align: left">{line[-1]}</td>')
        notes = "<br>".join(escape(note) for note in self._notes(rows))
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table><p>{notes}</p>"

    def _cells(self, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """The table's head and lines; a reason where a run did not work comes last."""
        columns = [c for c in (*_SHOWN, *self.metrics) if any(row[c] is not None for row in rows)]
        best = {}
        for column in columns:
            values = [row[column] for row in rows if row["status"] == "ok" and row[column] is not None]
            best[column] = min(values) if values and column != "nfe" else None  # fewest calls are no merit
        titles = {"overhead_seconds": "beyond net", "nfe": "NFE"}
        cells = [["solver", "budget", *(titles.get(c, c) for c in columns), ""]]
        for row in rows:
            line = [row["label"], row["budget"]]
            for column in columns:
                value = row[column]
                limit = self.noise_limit(column)
                near = value is not None and limit is not None and value <= limit
                star = value is not None and value == best[column] and row["status"] == "ok"
                line.append(_number(value, column) + ("~" if near else "*" if star else " "))
            ok = row["status"] == "ok"
            line.append("" if ok else f"{row['status']}: {row['reason']}")
            cells.append(line)
        if self.floors:
            floor = [_number(self.floors.get(c, {}).get("mean"), c) + " " for c in columns]
            cells.append(["(samples of one law)", "", *floor, ""])
        return cells

    def _notes(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Lines below the table: how many samples, on which grids, against which references."""
        n, repetitions = self.settings.get("n"), max((row["repetitions"] for row in rows), default=0)
        notes = [f"{n} samples, {_count(repetitions, 'repetition')}; * smallest of its column"]
        if self.floors:
            notes[0] += ", ~ no farther than two samples of one law are from each other"
        if any(row["seconds"] is not None for row in rows):
            notes[0] += "; beyond net: seconds that are not spent in the network"
        grids: dict[str, dict[str, None]] = {}
        for row in rows:
            if row.get("grid"):
                grids.setdefault(row["grid"], {})[row["label"]] = None
        if grids:
            named = {grid: f"{grid} ({', '.join(labels)})" for grid, labels in grids.items()}
            notes.append(f"grid: {'; '.join(named.values() if len(grids) > 1 else grids)}")
        for kind in ("deterministic", "stochastic"):
            names = dict.fromkeys(row["reference"] for row in rows if row["kind"] == kind and row["reference"])
            if names and set(names) != {"none"}:
                notes.append(f"path columns, {kind} solvers: {'; '.join(_said(n) for n in names)}")
        machines = {run["machine"] for run in self.runs}
        if len(machines) > 1:
            notes.append(f"times were taken on several machines and cannot be compared: {'; '.join(sorted(machines))}")
        return notes

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        solvers = len({run["label"] for run in self.runs})
        return f"<Comparison of {_count(solvers, 'solver')} in {_count(len(self.runs), 'run')}; print it for the table>"

    def to_csv(self, path: str | Path) -> None:
        """Write the rows, unrounded; empty where there is no figure."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(Path(path), text.getvalue())

    def to_dataframe(self) -> Any:
        """The rows as a `pandas.DataFrame`, with the columns of the CSV file.

        Raises:
            ImportError: without pandas, with what to install.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError("Data frames are of pandas: pip install pandas") from error
        return DataFrame(self.rows, columns=self._columns)

    @property
    def _columns(self) -> list[str]:
        return [*COLUMNS, *(c for name in self.metrics for c in (name, f"{name}_se"))]

    def to_json(self, path: str | Path) -> None:
        """Write everything but samples: settings, environment, floors, rows, orders and runs. Strict JSON."""
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "environment": self.environment,
            "floors": self.floors,
            "shape": list(self.shape),
            "rows": self.rows,
            "orders": self.orders(),
            "runs": self.runs,
        }
        write_whole(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Comparison:
        """Read what `to_json` wrote.

        Raises:
            ValueError: for any other file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            parts = (content[k] for k in ("settings", "environment", "floors", "runs", "shape"))
            return cls(*parts)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a comparison written by to_json ({error}).") from error

    # --- pictures -------------------------------------------------------------------------------------------------
    def plot(self, path: str | Path | None = None, y: str | None = None, *, ax: Any = None) -> Figure:
        """Draw error against network calls (left) and against seconds (right), with fitted orders in the legend.

        Points of a solver are joined in the order of their calls. Where a run with more calls was clocked faster than
        one with fewer, which is noise of the clock, the two are drawn at the geometric mean of their times (isotonic
        regression); the table keeps what was measured. Up to twenty solvers can be told apart, in grey as well.

        Args:
            path: file to write, in any format of matplotlib.
            y: column; the distance to the reference if there is one, else the first metric.
            ax: two Axes to draw on, or one for the panel of network calls alone; a new figure by default.

        Returns:
            The matplotlib figure.
        """
        from scoresde.comparison.pictures import plot

        y = self._best_column() if y is None else y
        self._check_column(y)
        return plot(self, y, path, ax)

    def sheet(
        self, path: str | Path | None = None, budget: str | None = None, columns: int = 12, *, ax: Any = None
    ) -> Figure:
        """Draw samples of the first repetition, one row (points: one panel) per solver.

        All solvers start from the same noise: a column shows what each makes of it.

        Args:
            path: file to write.
            budget: such as ``"nfe=20"``; each solver's last one that worked by default.
            columns: images per row.
            ax: Axes to draw on: one for images, one per solver for points.

        Returns:
            The matplotlib figure.

        Raises:
            ValueError: for data that are neither images nor points in the plane, or a comparison read from a file,
                which holds no samples.
        """
        from scoresde.comparison.pictures import sheet

        calls = {(row["label"], row["budget"]): row["nfe"] for row in self.rows}
        chosen: dict[str, tuple[float | None, Tensor]] = {}
        for (label, name), samples in self.samples.items():
            if budget is None or name == budget:
                chosen[label] = calls[label, name], samples
        if not chosen:
            where = f" at {budget}" if budget else ""
            raise ValueError(
                f"No samples to show{where}: they are kept for images (C, H, W) with 1 or 3 channels and for points "
                f"(2,), in the comparison that made them; here samples have shape {self.shape}."
            )
        shown = {(label, nfe): samples for label, (nfe, samples) in chosen.items()}
        return sheet(shown, self.range, columns, path, ax)


def _said(reference: str) -> str:
    return reference if reference.startswith("none") else f"distance to the {reference}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean, or None if any is missing: a mean over fewer repetitions cannot be compared."""
    found = [v for v in values if v is not None]
    return statistics.fmean(found) if found and len(found) == len(values) else None


def _standard_error(values: Sequence[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return statistics.stdev(found) / math.sqrt(len(found)) if len(found) == len(values) and len(found) > 1 else None


def _slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float | None] | None:
    """Least-squares slope and its standard error."""
    if len(x) < 2:
        return None
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    if len(x) == 2:
        return slope, None
    residual = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(residual / (len(x) - 2) / spread)


def _number(value: float | None, column: str) -> str:
    if value is None:
        return "-"
    if column == "nfe":
        return f"{value:.0f}" if value == round(value) else f"{value:.1f}"
    return f"{value:.2e}" if value != 0 and not 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
