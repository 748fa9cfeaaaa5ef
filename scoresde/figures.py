"""What every picture drawn with matplotlib shares: its figure, its style, its lines and its ticks.

A picture function takes ``ax=``, one Axes or as many as it has panels, and ``path=``, a file to write; it returns the
matplotlib figure. Without `ax` it makes a figure in the style of the library, which touches neither pyplot's state nor
its backend and shows itself in a notebook.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scoresde.data.spec import DataSpec
from scoresde.images import image_grid, picture, shown_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("scoresde.mplstyle")
"""The style file of the library and its notebooks; ``plt.style.use("scoresde.scoresde")`` in one's own."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""The colours of the style: Okabe and Ito's, without yellow."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)))

LINES: tuple[dict[str, Any], ...] = tuple(
    {"color": COLOURS[i % 7], "marker": _MARKERS[i % 10], "linestyle": _DASHES[i % 2 + 2 * (i // 10)]}
    for i in range(20)
)
"""Twenty line styles. Marker and dashes alone tell them apart, so that a picture can be read in grey."""


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, if matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Pictures are drawn with matplotlib: pip install 'scoresde[plot]'") from error


@contextmanager
def panels(
    ax: Any = None,
    path: str | Path | None = None,
    size: tuple[float, float] = (7.0, 4.0),
    rows: int = 1,
    columns: int = 1,
    **options: Any,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """The figure and the panels to draw on; written to `path` afterwards, if there is one.

    Args:
        ax: the caller's Axes, one or an array of rows x columns, whose style is the caller's; None for a new figure.
        path: file, in any format of matplotlib; its folder is made.
        size: inches of a new figure.
        rows: of panels.
        columns: of panels.
        **options: of `Figure.subplots`.

    Raises:
        ImportError: without matplotlib, with what to install.
        ValueError: for another number of Axes.
    """
    require_matplotlib()
    import matplotlib.style

    if ax is not None:
        axes = _axes_of(ax, rows * columns)
        figure: Any = axes[0].figure
        yield figure, axes
        _write(figure, path)
        return
    with matplotlib.style.context(STYLE):
        figure = _new_figure(size)
        yield figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)
        _write(figure, path)


def _axes_of(ax: Any, count: int) -> list[Axes]:
    """The caller's Axes in reading order."""
    axes = list(ax.flat) if hasattr(ax, "flat") else list(ax) if isinstance(ax, Sequence) else [ax]
    if len(axes) != count or not all(hasattr(axis, "figure") for axis in axes):
        wanted = "one matplotlib Axes" if count == 1 else f"{count} matplotlib Axes"
        raise ValueError(f"`ax` must be {wanted} for this picture, got {len(axes)} ({type(ax).__name__}).")
    return axes


def _new_figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Picture(Figure):
        """Shows itself in a notebook, where pyplot need not be running."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
            return buffer.getvalue()

    figure = Picture(figsize=size)
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: str | Path | None) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def plain_ticks(*axes: Any, view: tuple[float, float] | None = None) -> None:
    """Ticks of logarithmic axes as 5, 10, 20 and 0.02, where they span few decades; powers of ten elsewhere.

    Args:
        *axes: an `axis.xaxis` or `axis.yaxis` each, after the data are drawn.
        view: what they show, for a secondary axis, which does not know it before it is drawn.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in axes:
        low, high = sorted(axis.get_view_interval() if view is None else view)
        if not (low > 0 and high / low < 3e3):
            continue
        # few decades need more of their numbers
        subs = (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
        axis.set_major_locator(LogLocator(base=10, subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def image_rows(
    rows: Sequence[tuple[str, Tensor]] | Mapping[str, Tensor],
    low: float,
    high: float,
    name: str = "",
    *,
    path: str | Path | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Rows of images, each with its label on the left.

    Args:
        rows: (label, images (N, C, H, W) with C = 1 or 3) per row; shorter rows end earlier. A label may be empty.
        low: value shown black.
        high: value shown white.
        name: what the labels are, written beside them.
        path: file to write.
        ax: Axes to draw on.
    """
    pairs = list(rows.items()) if isinstance(rows, Mapping) else list(rows)
    columns = max(len(images) for _, images in pairs)
    height = pairs[0][1].shape[2]
    cells = [_filled(images.double(), columns, low, high) for _, images in pairs]
    sheet = image_grid(torch.cat(cells), 0.0, 1.0, columns, background=255).squeeze(-1).numpy()
    with panels(ax, path, (0.55 * columns, 0.55 * len(pairs))) as (figure, (axis,)):
        if ax is None:  # images fill the figure; labels lie outside and are saved with it
            figure.set_layout_engine("none")
            axis.set_position((0.0, 0.0, 1.0, 1.0))
        axis.imshow(sheet, cmap="gray" if sheet.ndim == 2 else None, vmin=0, vmax=255, interpolation="nearest")
        axis.set_yticks([(height - 1) / 2 + i * (height + 1) for i in range(len(pairs))], [label for label, _ in pairs])
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.set_ylabel(name)
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure


def _filled(images: Tensor, columns: int, low: float, high: float) -> Tensor:
    """A row of images as shades in [0, 1], with white ones where it ends early."""
    shades = ((images.cpu() - low) / (high - low)).clamp(0.0, 1.0)
    white = torch.ones(columns - len(shades), *shades.shape[1:], dtype=shades.dtype)
    return torch.cat([shades, white])


def point_panels(
    rows: Mapping[str, Tensor], unit: str = "data units", *, path: str | Path | None = None, ax: Any = None
) -> Figure:
    """Points in the plane, a panel per entry with its name above, on common axes.

    Args:
        rows: name -> points (N, 2).
        unit: of both coordinates.
        path: file to write.
        ax: as many Axes as entries.
    """
    across = min(len(rows), 5)
    down = -(-len(rows) // across) if ax is None else 1
    # neither a stray sample nor an entry that is far off may shrink the panels of the others
    extent = 1.08 * statistics.median(float(points.double().abs().quantile(0.998)) for points in rows.values())
    width = across if ax is None else len(rows)
    with panels(ax, path, (2.0 * across + 0.5, 2.3 * down + 0.4), down, width) as (figure, axes):
        for i, axis in enumerate(axes):
            if i >= len(rows):
                axis.set_axis_off()
                continue
            label, points = list(rows.items())[i]
            size = min(12.0, max(1.5, 3000.0 / len(points)))  # fewer points are drawn larger
            axis.scatter(points[:, 0].cpu(), points[:, 1].cpu(), s=size, alpha=0.35, linewidths=0, color=COLOURS[0])
            axis.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
            axis.text(0.5, 1.02, label, transform=axis.transAxes, ha="center", va="bottom", fontsize=8)
            left, lowest = i % width == 0, i + width >= len(rows)
            axis.set(xlabel=f"$x_1$ ({unit})" if lowest else "", ylabel=f"$x_2$ ({unit})" if left else "")
            axis.tick_params(labelbottom=lowest, labelleft=left)  # the axes are common
    return figure


def samples_picture(
    data: Tensor,
    spec: DataSpec,
    columns: int | None = None,
    *,
    path: str | Path | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Samples in data units, as training draws them: a grid of images, or a histogram of points in the plane.

    Args:
        data: (N, C, H, W) with C = 1 or 3, or (N, 2).
        spec: of the data.
        columns: images per row; about as many as rows if None.
        path: file to write.
        ax: Axes to draw on.

    Raises:
        ValueError: for data of another shape, which have no picture.
    """
    image = picture(data, spec, columns)
    if image is None:
        raise ValueError(f"Images (N, 1 or 3, H, W) and points (N, 2) have pictures, got shape {tuple(data.shape)}.")
    sheet, points = image.squeeze(-1).numpy(), data.ndim == 2
    with panels(ax, path, (4.5, 4.5 * sheet.shape[0] / sheet.shape[1])) as (figure, (axis,)):
        low, high = shown_range(data, spec)
        place = (low, high, low, high) if points else None
        axis.imshow(sheet, cmap="gray" if sheet.ndim == 2 else None, vmin=0, vmax=255, extent=place)
        axis.grid(False)
        if points:
            axis.set(xlabel="$x_1$ (data units)", ylabel="$x_2$ (data units)")
        else:
            axis.set_axis_off()
    return figure
