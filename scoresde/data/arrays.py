"""Arrays from .npy and .npz files."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.data.columns import Column, columns
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
        labels_key: name of the classes, integers (N,) from 0, inside a .npz file, for the condition `class_label`;
            empty for none.
        conditions: what else the samples come with, as name:kind and commas, e.g. "pose:vector, text:tokens,
            style:class:12", each under its name in the .npz file, the samples first. Kinds and shapes are those of
            `ConditionSpec`. Tokens are real numbers (N, L, d), or words, integers (N, L); which of them there are is a
            mask, bool (N, L), under ``text.mask``, all without. Classes and words are as many as the file has unless a
            third part says their number. Numbers are taken as they are: bring vectors, images and tokens to mean 0 and
            standard deviation 1, for zeros stand for none. Images are stored as `layout` says of the data.
        levels: number of quantization levels of integer data (256 for 8-bit images); None for real numbers.
        layout: "as_is", or how images are stored: "NHWC" (channels last) or "NHW" (no channel axis). Networks for
            images want (C, H, W).
        held_out: fraction kept from training, in (0, 1).
        seed: of the split.

    Raises:
        ValueError: for options out of range; at `load`, for files that are not numeric arrays, NaN or infinite
            values, integers outside the levels, or conditions that do not match. Pickled objects are never read.
        FileNotFoundError: at `load`, if there is no such file.
    """

    path: str = ""
    key: str = "data"
    labels_key: str = ""
    conditions: str = ""
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
        columns(self.conditions, self.labels_key)

    def load(self) -> Dataset:
        """Read, check and split; uint8 or int32 data if `levels` is given, float32 otherwise."""
        array, arrays = self._read()
        data = self._checked(array)
        condition, conditions = {}, {}
        for column, found in arrays.items():
            if column.kind == "image":
                found = [self._channels_first(found[0], f"condition {column.name!r}")]
            try:
                condition[column.name], conditions[column.name] = column.value(found, len(data))
            except ValueError as error:
                raise ValueError(f"Cannot read {self.path}: {error}.") from error
        train, held_out = split(Split(data, condition), self.held_out, self.seed)
        shown = None
        if self.levels is None:
            if bool((train.data == train.data.flatten()[0]).all()):
                raise ValueError(f"The training data of {self.path} are constant: nothing to model.")
            shown = _usual(train.data)
        spec = DataSpec(tuple(data.shape[1:]), self.levels, conditions, range=shown)
        return Dataset(Path(self.path).stem, train, held_out, spec)

    def _read(self) -> tuple[np.ndarray, dict[Column, list[np.ndarray]]]:
        """The data, and the arrays of each condition; nothing else in the file is read."""
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
                wanted = columns(self.conditions, self.labels_key)
                if isinstance(loaded, np.ndarray):
                    if wanted:
                        raise ValueError("a .npy file holds one array: conditions need a .npz file")
                    return loaded, {}
                names = loaded.files
                key = self.key if self.key in names or len(names) != 1 else names[0]
                if key not in names:
                    raise ValueError(f"no array {key!r} in the file; it holds {', '.join(names) or 'nothing'}")
                return loaded[key], {column: [loaded[k] for k in column.keys(names)] for column in wanted}
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"Cannot read {self.path}: {error}.") from error

    def _channels_first(self, array: np.ndarray, what: str) -> np.ndarray:
        """Images that are stored as `layout` says, as (N, C, H, W)."""
        if self.layout != "as_is" and array.ndim != len(self.layout):
            needs = f"Layout {self.layout} needs {len(self.layout)} dimensions"
            raise ValueError(f"{needs}, {what} of {self.path} has shape {array.shape}.")
        if self.layout == "NHWC":
            return np.moveaxis(array, -1, 1)
        return array[:, None] if self.layout == "NHW" else array

    def _checked(self, array: np.ndarray) -> Tensor:
        if array.dtype.kind not in "biuf":
            raise ValueError(f"The array of {self.path} must hold real numbers or integers, got dtype {array.dtype}.")
        if array.ndim < 2 or 0 in array.shape:
            raise ValueError(f"The array of {self.path} must have shape (N, *D), got {array.shape}.")
        array = self._channels_first(array, "the array")
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
