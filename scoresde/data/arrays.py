"""Arrays from .npy and .npz files."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.data.conditions import classes
from scoresde.data.dataset import Dataset, Source, Split, check_held_out, split
from scoresde.data.spec import DataSpec

LAYOUTS = ("as_is", "NHWC", "NHW")
_SHOWN = 0.002  # fraction of the values that pictures may cut off


def _usual(data: Tensor) -> tuple[float, float]:
    """Between which values all but a few lie, of at most about a million of them."""
    some = data.flatten()[:: max(1, data.numel() // 10**6)].double().sort().values
    cut = round(0.5 * _SHOWN * (len(some) - 1))
    low, high = float(some[cut]), float(some[len(some) - 1 - cut])
    return (low, high) if low < high else (float(some[0]), float(some[-1]))


@dataclass(frozen=True)
class Arrays(Source):
    """Samples in the rows of a NumPy array.

    Real numbers, or the integers 0 … levels - 1 of `levels`; how they become states is the codec's.

    Args:
        path: a .npy file, or a .npz file with the array under `key`.
        key: name of the array (N, *D) inside a .npz file; may be anything if the file holds one array.
        labels_key: name of the classes, integers (N,) from 0, inside a .npz file; empty for none.
        levels: number of quantization levels of integer data (256 for 8-bit images); None for real numbers.
        layout: "as_is", or how images are stored: "NHWC" (channels last) or "NHW" (no channel axis). Networks for
            images want (C, H, W).
        held_out: fraction kept from training, in (0, 1).
        seed: of the split.

    Raises:
        ValueError: for options out of range; at `load`, for files that are not numeric arrays, NaN or infinite
            values, integers outside the levels, or classes that do not match. Pickled objects are never read.
        FileNotFoundError: at `load`, if there is no such file.
    """

    path: str = ""
    key: str = "data"
    labels_key: str = ""
    levels: int | None = None
    layout: str = "as_is"
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_held_out(self.held_out)
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"`levels` must be >= 2, or None for real-valued data, got {self.levels}.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {self.layout!r}.")

    def load(self) -> Dataset:
        """Read, check and split; uint8 or int32 data if `levels` is given, float32 otherwise."""
        array, kinds = self._read()
        data = self._checked(array)
        labels = None if kinds is None else self._checked_labels(kinds, data.shape[0])
        condition = {} if labels is None else {"class_label": labels}
        train, held_out = split(Split(data, condition), self.held_out, self.seed)
        conditions = classes(0 if labels is None else int(labels.max()) + 1)
        shown = None
        if self.levels is None:
            if bool((train.data == train.data.flatten()[0]).all()):
                raise ValueError(f"The training data of {self.path} are constant: nothing to model.")
            shown = _usual(train.data)
        spec = DataSpec(tuple(data.shape[1:]), self.levels, conditions, range=shown)
        return Dataset(Path(self.path).stem, train, held_out, spec)

    def _read(self) -> tuple[np.ndarray, np.ndarray | None]:
        if not self.path:
            raise ValueError("`path` is empty: name a .npy or .npz file, e.g. --config.data.arrays.path=images.npz.")
        path = Path(self.path)
        if path.suffix not in (".npy", ".npz"):
            raise ValueError(f"`path` must end in .npy or .npz, got {self.path!r}.")
        if not path.is_file():
            raise FileNotFoundError(f"No such file: {self.path}")
        try:
            with path.open("rb") as file:  # np.load leaves a damaged file open
                loaded = np.load(file, allow_pickle=False)  # pickled objects could run code
                if isinstance(loaded, np.ndarray):
                    if self.labels_key:
                        raise ValueError("a .npy file holds one array: classes need a .npz file")
                    return loaded, None
                names = loaded.files
                key = self.key if self.key in names or len(names) != 1 else names[0]
                for name in (key, *([self.labels_key] if self.labels_key else [])):
                    if name not in names:
                        raise ValueError(f"no array {name!r} in the file; it holds {', '.join(names) or 'nothing'}")
                return loaded[key], loaded[self.labels_key] if self.labels_key else None
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"Cannot read {self.path}: {error}.") from error

    def _checked(self, array: np.ndarray) -> Tensor:
        if array.dtype.kind not in "biuf":
            raise ValueError(f"The array of {self.path} must hold real numbers or integers, got dtype {array.dtype}.")
        if array.ndim < 2 or 0 in array.shape:
            raise ValueError(f"The array of {self.path} must have shape (N, *D), got {array.shape}.")
        if self.layout != "as_is" and array.ndim != len(self.layout):
            raise ValueError(f"Layout {self.layout} needs {len(self.layout)} dimensions, got shape {array.shape}.")
        if self.layout == "NHWC":
            array = np.moveaxis(array, -1, 1)
        elif self.layout == "NHW":
            array = array[:, None]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).reshape(array.shape[0], -1).any(1).sum())
            raise ValueError(f"{bad} of {array.shape[0]} samples of {self.path} hold NaN or infinite values.")
        if self.levels is None:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        low, high = array.min(), array.max()
        if array.dtype.kind == "f" and (array != np.floor(array)).any():
            raise ValueError(
                f"`levels`={self.levels} needs the integers 0 … {self.levels - 1}, but {self.path} holds fractions; "
                "leave `levels` out for real-valued data."
            )
        if low < 0 or high >= self.levels:
            raise ValueError(
                f"`levels`={self.levels} needs integers in 0 … {self.levels - 1}, {self.path} has {low} … {high}."
            )
        kind = np.uint8 if self.levels <= 256 else np.int32
        return torch.from_numpy(np.ascontiguousarray(array, dtype=kind))

    def _checked_labels(self, classes: np.ndarray, n: int) -> Tensor:
        if classes.dtype.kind not in "iu" or classes.shape != (n,):
            raise ValueError(
                f"Classes must be integers of shape ({n},), got {classes.dtype} of shape {classes.shape}."
            )
        if classes.min() < 0:
            raise ValueError(f"Classes must be >= 0, got {classes.min()}.")
        return torch.from_numpy(classes.astype(np.int64))
