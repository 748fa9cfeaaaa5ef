"""What data are: their shape, levels and conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from scoresde.data.conditions import ConditionSpec, as_specs
from sde_lib._checks import did_you_mean

LAYOUTS = {1: "D", 2: "CT", 3: "CHW", 4: "CDHW"}
"""Number of dimensions of a sample -> what they are called unless a specification says otherwise."""


@dataclass(frozen=True)
class DataSpec:
    r"""What data are, in their own units. How they become the state of a model is a codec's.

    With `levels` = L the data are integers k in 0 … L - 1, and a real number z = k + u, u in [0, 1) uniform, stands for
    each: integer k owns the bin [k, k + 1), so that a density of z integrates to the probability of k. u = 1/2 stands
    for the integer when no noise is wanted.

    Args:
        shape: D, of one sample.
        levels: number of integer levels (256 for 8-bit images), or None for real numbers.
        conditions: what each sample comes with, by name: a `ConditionSpec` or its arguments; `classes(n)`: a class.
        layout: a letter for every dimension: C for channels, anything else for space or time; "CHW" for images,
            "CT" for two dimensions and "D" for one unless it is given.
        range: low and high end of real numbers in pictures; None: those of what is shown.

    Raises:
        ValueError: for a shape, number of levels, layout or range that makes no sense.
        TypeError: for conditions that are not specified by a `ConditionSpec` or its arguments.
    """

    shape: tuple[int, ...]
    levels: int | None = None
    conditions: Mapping[str, ConditionSpec] = field(default_factory=dict)
    layout: str = ""
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.shape) if isinstance(self.shape, list | tuple) else (self.shape,)
        if not all(isinstance(n, int) and n >= 1 for n in shape) or shape == (self.shape,):
            raise ValueError(f"`shape` must be a tuple of positive ints, e.g. (3, 32, 32) or (2,), got {self.shape!r}.")
        object.__setattr__(self, "shape", shape)
        if self.levels is not None and (not isinstance(self.levels, int) or self.levels < 2):
            raise ValueError(f"`levels` must be an int >= 2, or None for continuous data, got {self.levels!r}.")
        object.__setattr__(self, "conditions", as_specs(self.conditions))
        layout = self.layout or LAYOUTS.get(len(shape), "?" * len(shape))
        if not isinstance(layout, str) or len(layout) != len(shape) or layout.count("C") > 1:
            raise ValueError(f"`layout` must name the {len(shape)} dimensions by a letter each, got {self.layout!r}.")
        object.__setattr__(self, "layout", layout)
        if self.range is not None:
            low, high = self.range if isinstance(self.range, list | tuple) and len(self.range) == 2 else (1.0, 0.0)
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"`range` must be two finite numbers, the lower one first, got {self.range!r}.")
            object.__setattr__(self, "range", (float(low), float(high)))

    @property
    def dims(self) -> int:
        """Number of elements of one sample."""
        return math.prod(self.shape)

    @property
    def channel_axis(self) -> int | None:
        """Which dimension of a sample the channels are, None without."""
        return self.layout.index("C") if "C" in self.layout else None

    @property
    def num_classes(self) -> int:
        """Number of classes of the condition `class_label`, 0 without."""
        spec = self.conditions.get("class_label")
        return spec.classes if spec is not None and spec.kind == "class" else 0

    def check(self, data: Tensor) -> None:
        """Raise unless `data` is a tensor of this shape, finite and, with levels, of their integers."""
        if not isinstance(data, Tensor):
            raise TypeError(f"Data must be a tensor (torch.as_tensor), got {type(data).__name__}.")
        if tuple(data.shape[1:]) != self.shape:
            raise ValueError(f"Data must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(data.shape)}.")
        if data.shape[0] == 0:
            raise ValueError("Data are empty: B must be at least 1.")
        if data.is_floating_point() and not bool(torch.isfinite(data).all()):
            raise ValueError("Data contain NaN or infinite values.")
        if self.levels is not None:
            if data.is_floating_point() and not bool((data == data.round()).all()):
                raise ValueError(f"Data must be integers 0 … {self.levels - 1}; got fractions (already scaled?).")
            low, high = int(data.min()), int(data.max())
            if low < 0 or high >= self.levels:
                raise ValueError(f"Data must be integers 0 … {self.levels - 1}, got values from {low} to {high}.")

    def check_condition(self, condition: Any, n: int | None = None) -> None:
        """Raise unless `condition` is None, or maps names of `conditions` to values for n samples (any n if None).

        Values of None stand for no condition.

        Raises:
            TypeError: for what is no mapping, or a value of another type.
            ValueError: for an unknown name, another shape, or classes out of range.
        """
        if condition is None:
            return
        if not isinstance(condition, Mapping):
            raise TypeError(
                f"`condition` must be a mapping of names, e.g. {{\"class_label\": labels}}, got "
                f"{type(condition).__name__}."
            )
        for name, value in condition.items():
            if name not in self.conditions:
                raise ValueError(self._unknown(name))
            if value is not None:
                self.conditions[name].check(name, value, n)

    def _unknown(self, name: str) -> str:
        if not self.conditions:
            return f"There is no condition {name!r}: these data, and models of them, have none."
        known = list(self.conditions)
        return f"There is no condition {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}."

    def dequantize(
        self, data: Tensor, u: Tensor | float | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Data as real numbers. `u` in [0, 1) dequantizes integers; 1/2 (the middle of the bin) if None."""
        z = data.to(dtype)
        return z if self.levels is None else z + (0.5 if u is None else u)

    def quantize(self, z: Tensor) -> Tensor:
        """Real numbers as data: integers (int64) where there are levels."""
        return z if self.levels is None else z.floor().clamp(0, self.levels - 1).long()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; only what differs from the defaults."""
        found: dict[str, Any] = {"shape": list(self.shape)}
        if self.levels is not None:
            found["levels"] = self.levels
        if self.conditions:
            found["conditions"] = {n: {**asdict(s), "shape": list(s.shape)} for n, s in self.conditions.items()}
        if self.layout != LAYOUTS.get(len(self.shape), "?" * len(self.shape)):
            found["layout"] = self.layout
        if self.range is not None:
            found["range"] = list(self.range)
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ValueError: for entries that do not exist or fit.
            TypeError: for values of the wrong type.
        """
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"A data specification has no entry {unknown[0]!r}; its entries: {', '.join(known)}.")
        if "shape" not in values:
            raise ValueError("A data specification needs its `shape`, e.g. [3, 32, 32].")
        return cls(**values)
