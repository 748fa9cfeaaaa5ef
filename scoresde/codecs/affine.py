"""Shift and scale: what every model without another codec has."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from scoresde.codecs.codec import Codec
from scoresde.data.spec import DataSpec
from sde_lib._checks import lookup
from sde_lib._constants import Constants

PER = ("all", "channel", "element")
Numbers = float | list[Any] | tuple[Any, ...]


class Affine(Codec):
    r"""x = (z - shift) / scale, with numbers for all elements, or one for each channel, column or element.

    Args:
        data_shape: D, of one sample; the state has the same.
        shift: z that becomes x = 0: a number, or (nested lists of) numbers that are broadcast to D.
        scale: z per unit of x, > 0, likewise.

    Raises:
        ValueError: for numbers that are not finite, scales that are not > 0, or shapes that do not fit.
    """

    name = "affine"

    def __init__(self, data_shape: tuple[int, ...], shift: Numbers = 0.0, scale: Numbers = 1.0) -> None:
        super().__init__(data_shape, data_shape)
        self.shift, self.scale = self._numbers("shift", shift), self._numbers("scale", scale)
        self._tables = None
        if isinstance(self.shift, list) or isinstance(self.scale, list):
            wide = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (self.shift, self.scale))
            self._tables = Constants(*(torch.broadcast_to(v, self.data_shape).flatten().tolist() for v in wide))
        lowest = self.scale if isinstance(self.scale, float) else float(self._tables.columns[1].min())  # type: ignore[union-attr]
        if not lowest > 0.0:
            raise ValueError(f"`scale` must be > 0, got {scale!r}.")

    def _numbers(self, name: str, value: Any) -> Any:
        """A float, or nested lists of them that can be broadcast to a sample."""
        try:
            table = torch.tensor(value, dtype=torch.float64, device="cpu")
            torch.broadcast_to(table, self.data_shape)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{name}` must be a number, or numbers that are broadcast to {self.data_shape}, got {value!r}."
            ) from error
        if not bool(torch.isfinite(table).all()):
            raise ValueError(f"`{name}` must be finite, got {value!r}.")
        return table.tolist()

    @classmethod
    def fit(
        cls,
        spec: DataSpec,
        data: Tensor | None = None,
        per: str = "all",
        shift: float | None = None,
        scale: float | None = None,
    ) -> Self:
        """Integers 0 … L - 1 are spread over [-1, 1), with shift = scale = L / 2; real numbers get mean 0 and standard
        deviation 1.

        Args:
            spec: of the data.
            data: (N, *D) in data units, what means and deviations are taken of; None: real numbers stay as they are.
            per: of which means and deviations are taken: "all" elements together, every "channel" (of the layout; where
                there are none, every column), or every "element". With "channel" and "element" integers are measured,
                too.
            shift: instead of what is measured.
            scale: instead of what is measured.

        Raises:
            ValueError: for an unknown `per`, or constant data.
        """
        lookup(dict.fromkeys(PER), per, "per")
        mean: Any = 0.0
        std: Any = 1.0
        if spec.levels is not None and per == "all":
            mean = std = spec.levels / 2
        elif data is not None and (shift is None or scale is None):
            kept = {"all": [], "element": list(range(len(spec.shape)))}.get(per)
            if kept is None:
                kept = [spec.channel_axis or 0]
            over = [0, *(i + 1 for i in range(len(spec.shape)) if i not in kept)]
            std, mean = torch.std_mean(spec.dequantize(data, dtype=torch.float64), over, keepdim=True, correction=0)
            if not bool((std > 0.0).all()):
                where = "The data are" if per == "all" else f"At least one {per} of the data is"
                raise ValueError(f"{where} constant: there is no scale to divide by; give `scale`, or leave it out.")
            mean, std = (float(v) if per == "all" else v[0].tolist() for v in (mean, std))
        return cls(spec.shape, mean if shift is None else shift, std if scale is None else scale)

    @property
    def log_volume(self) -> float:
        if self._tables is None:
            return -math.prod(self.data_shape) * math.log(self.scale)
        return -float(self._tables.columns[1].log().sum())

    def scales(self, like: Tensor) -> Tensor:
        """z per unit of x, of every element: (*D) in the dtype and on the device of a tensor."""
        scale = self._on(like)[1]
        return scale if isinstance(scale, Tensor) else like.new_full(self.data_shape, scale)

    def _on(self, like: Tensor) -> tuple[Any, Any]:
        """Shift and scale where a tensor is."""
        if self._tables is None:
            return self.shift, self.scale
        shift, scale = (column.to(like.dtype).reshape(self.data_shape) for column in self._tables.on(like.device))
        return shift, scale

    def encode(self, z: Tensor, draw: Any = None) -> Tensor:
        shift, scale = self._on(z)
        return (z - shift) / scale

    def decode(self, x: Tensor) -> Tensor:
        shift, scale = self._on(x)
        return x * scale + shift

    def config(self) -> dict[str, Any]:
        return {"data_shape": list(self.data_shape), "shift": self.shift, "scale": self.scale}
