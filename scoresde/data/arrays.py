"""Arrays from .npy and .npz files."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.data.dataset import Dataset, check_held_out, split
from scoresde.data.spec import DataSpec

LAYOUTS = ("as_is", "NHWC", "NHW")


@dataclass(frozen=True)
class Arrays:
    """Samples in the rows of a NumPy array.

    Real-valued data are shifted and scaled to mean 0 and standard deviation 1 over all elements of the training
    split. Data with `levels` are the integers 0 … levels - 1 and are mapped to [-1, 1].

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
        array, classes = self._read()
        data = self._checked(array)
        labels = None if classes is None else self._checked_labels(classes, data.shape[0])
        train, held_out = split(data, labels, self.held_out, self.seed)
        num_classes = 0 if labels is None else int(labels.max()) + 1
        if self.levels is not None:
            spec = DataSpec.integers(tuple(data.shape[1:]), self.levels, num_classes)
        else:
            std, mean = torch.std_mean(train.data.double())
            if not float(std) > 0.0:
                raise ValueError(f"The training data of {self.path} are constant ({float(mean)}): nothing to model.")
            spec = DataSpec(tuple(data.shape[1:]), float(mean), float(std), None, num_classes)
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
