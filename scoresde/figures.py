"""Matplotlib figures of their own, without touching pyplot's state or backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe & Ito's colours, told apart with every common colour blindness; yellow is left out, too pale for lines
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of so many inches and its axes, (rows, columns).

    Raises:
        ImportError: without matplotlib, with what to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures are drawn with matplotlib: pip install 'scoresde[plot]'") from error
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1)  # whatever the width of labels
