"""Pictures without a plotting library: grids of images, and histograms of two-dimensional points, as PNG."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from scoresde.data.spec import DataSpec


def image_grid(
    data: Tensor,
    low: float,
    high: float,
    columns: int | None = None,
    zoom: int = 1,
    pad: int = 1,
    background: int = 96,
) -> Tensor:
    """Images side by side as one 8-bit picture.

    Args:
        data: (N, C, H, W) with C = 1 or 3.
        low: value shown black.
        high: value shown white, > low.
        columns: images per row; about as many as rows if None.
        zoom: side of a pixel.
        pad: pixels between images, before zooming.
        background: grey level of what lies between the images, 0 … 255.

    Returns:
        uint8 of shape (height, width, C).

    Raises:
        ValueError: for data that are not one- or three-channel images, or low >= high.
    """
    if data.ndim != 4 or data.shape[1] not in (1, 3) or data.shape[0] == 0:
        raise ValueError(f"Images must have shape (N, 1 or 3, H, W) with N >= 1, got {tuple(data.shape)}.")
    if not low < high:
        raise ValueError(f"`low` must be < `high`, got {low} and {high}.")
    n, c, h, w = data.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    values = ((data.detach().cpu().double() - low) / (high - low)).nan_to_num(0.0).clamp(0.0, 1.0) * 255.0
    cells = torch.full((rows * columns, c, h + pad, w + pad), float(background), dtype=torch.float64)
    cells[:n, :, :h, :w] = values
    sheet = cells.reshape(rows, columns, c, h + pad, w + pad).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * (h + pad), columns * (w + pad), c)
    sheet = sheet[: rows * (h + pad) - pad, : columns * (w + pad) - pad]  # no margin after the last ones
    return sheet.round().to(torch.uint8).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


def point_density(points: Tensor, low: float, high: float, bins: int = 128) -> Tensor:
    """Histogram of points (N, 2) on [low, high]^2 as a picture, y upwards: uint8 (bins, bins, 1)."""
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"Points must have shape (N, 2), got {tuple(points.shape)}.")
    cell = ((points.detach().cpu().double() - low) * (bins / (high - low))).floor()
    cell = cell[((cell >= 0) & (cell < bins)).all(1)].long()
    counts = torch.bincount(cell[:, 1] * bins + cell[:, 0], minlength=bins * bins).reshape(bins, bins).double()
    # square root: the tails stay visible beside the modes
    shade = (counts / counts.max().clamp(min=1.0)).sqrt() * 255.0
    return shade.round().to(torch.uint8).flip(0)[..., None]


def picture(data: Tensor, spec: DataSpec, columns: int | None = None) -> Tensor | None:
    """Samples in data units as a picture: images as a grid, 2-D points as a histogram, None for anything else."""
    shape = tuple(spec.shape)
    if len(shape) == 3 and shape[0] in (1, 3):
        return image_grid(data, *shown_range(data, spec), columns, zoom=max(1, 32 // shape[1]))
    if shape == (2,):
        return point_density(data, *shown_range(data, spec))
    return None


def shown_range(data: Tensor, spec: DataSpec) -> tuple[float, float]:
    """Low and high end of a picture: of the levels, of the specification, or of what is shown."""
    if spec.levels is not None:
        return 0.0, spec.levels - 1.0
    if spec.range is not None:
        return spec.range
    finite = data[torch.isfinite(data)]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    return (low, high) if low < high else (low - 1.0, high + 1.0)


def save_png(image: Tensor, path: str | Path) -> None:
    """Write a uint8 picture (H, W, 1 or 3); a failed write leaves no half file."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = image.numpy()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
