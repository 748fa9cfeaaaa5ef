"""What a model may be told beside the noise level: conditions, named and specified once.

A condition is one entry of a mapping, ``{"class_label": labels, "text": {"tokens": …, "mask": …}}``, that goes from the
data through the network, guidance, sampling and likelihood. Tensors have the batch first at every depth.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

KINDS = ("class", "vector", "image", "tokens")
TAKEN = ("self", "x", "t", "knot", "noise_level", "target_noise_level", "augment_label")
"""Arguments of networks and models that are no conditions."""


@dataclass(frozen=True)
class ConditionSpec:
    r"""One condition: what its values are, what stands for none, and how often training leaves it out.

    ======== =================================================== ===================================
    kind     value of a batch                                    none
    ======== =================================================== ===================================
    class    int64 (B,), 0 … classes - 1                         the number `classes`
    vector   floating point (B, d), `shape` = (d,)               zeros
    image    floating point (B, C, H, W), `shape` = (C, H, W)    zeros
    tokens   {"tokens": (B, L, d), "mask": bool (B, L)}, `shape` no token: a mask of False
             = (L, d); or int64 tokens (B, L) of a vocabulary of
             `classes`, `shape` = (L,)
    ======== =================================================== ===================================

    Vectors and images should have mean 0 and standard deviation 1: their null is the value 0, so that 0 is best no
    value that means something.

    Args:
        kind: one of `KINDS`.
        shape: of one value; () for a class.
        classes: number of classes, or of words of the tokens' vocabulary (0: tokens are vectors).
        dropout: fraction of the training samples that are trained without this condition, independently of the others,
            so that the model is an unconditional one, too (Ho & Salimans 2022, arXiv:2207.12598).

    Raises:
        ValueError: for a kind, shape, number or fraction that makes no sense.
    """

    kind: str
    shape: tuple[int, ...] = ()
    classes: int = 0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        shape = tuple(self.shape) if isinstance(self.shape, list | tuple) else (self.shape,)
        object.__setattr__(self, "shape", shape)
        if type(self.classes) is not int or self.classes < 0:
            raise ValueError(f"`classes` must be an int >= 0, got {self.classes!r}.")
        dims = {"class": 0, "vector": 1, "image": 3, "tokens": 1 if self.classes else 2}[self.kind]
        if len(shape) != dims or not all(type(n) is int and n >= 1 for n in shape):
            raise ValueError(f"`shape` of a condition of kind {self.kind!r} has {dims} positive ints, got {shape!r}.")
        if self.kind == "class" and not self.classes:
            raise ValueError("A class needs `classes`, the number of classes, >= 1.")
        if self.kind in ("vector", "image") and self.classes:
            raise ValueError(f"`classes` is for classes and tokens, not for a condition of kind {self.kind!r}.")
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"`dropout` must be in [0, 1], got {self.dropout!r}.")

    def null(self, n: int, device: torch.device | str | None = None) -> Any:
        """What stands for none, for n samples: a value of a batch (an expanded view, not to be written to)."""
        if self.kind == "class":
            return torch.full((), self.classes, dtype=torch.int64, device=device).expand(n)
        dtype = torch.int64 if self.classes else torch.float32
        value = torch.zeros((), dtype=dtype, device=device).expand(n, *self.shape)
        if self.kind != "tokens":
            return value
        return {"tokens": value, "mask": torch.zeros((), dtype=torch.bool, device=device).expand(n, self.shape[0])}

    def check(self, name: str, value: Any, n: int | None = None) -> None:
        """Raise unless `value` is one of this condition, for n samples (any number if None).

        Raises:
            TypeError: for a value of another type.
            ValueError: for another shape, or classes or words out of range; what tokens are where the mask is False is
                not looked at. Tensors on an accelerator are not looked into, which would wait for it.
        """
        if self.kind == "tokens":
            if not isinstance(value, Mapping) or set(value) != {"tokens", "mask"}:
                got = f"one of {', '.join(map(repr, value))}" if isinstance(value, Mapping) else _kind(value)
                raise TypeError(f'Condition `{name}` must be a mapping {{"tokens": …, "mask": …}}, got {got}.')
            _check_tensor(f"{name}.tokens", value["tokens"], self.shape, n, not self.classes)
            mask = value["mask"]
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(f"Condition `{name}.mask` must be a tensor of bool, got {_kind(mask)}.")
            if tuple(mask.shape) != (len(value["tokens"]), self.shape[0]):
                wanted = f"(B, {self.shape[0]})"
                raise ValueError(f"Condition `{name}.mask` must have shape {wanted}, got {tuple(mask.shape)}.")
            value = value["tokens"]
            absent = ~mask.reshape(*mask.shape, *[1] * (value.ndim - 2))
        else:
            _check_tensor(name, value, self.shape, n, self.kind != "class")
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if self.kind == "tokens":
            value = value.masked_fill(absent, 0)
        if self.classes:
            most = self.classes if self.kind == "class" else self.classes - 1
            low, high = int(value.min()), int(value.max())
            if low < 0 or high > most:
                none = f" ({self.classes} stands for none)" if self.kind == "class" else ""
                raise ValueError(
                    f"Condition `{name}` must be in 0 … {self.classes - 1}{none}, got values from {low} to {high}."
                )
        elif not bool(torch.isfinite(value).all()):
            raise ValueError(f"Condition `{name}` contains NaN or infinite values.")


Conditions = Mapping[str, ConditionSpec | Mapping[str, Any]]
"""Name -> what the condition is, or the arguments of `ConditionSpec`."""


def as_specs(conditions: Conditions | None) -> dict[str, ConditionSpec]:
    """Name -> specification, of specifications or of their arguments in a mapping (from JSON); nothing of None.

    Raises:
        TypeError: for something else than such a mapping.
        ValueError: for a name that is none in Python or means something else to a network, or unknown arguments.
    """
    if conditions is None:
        return {}
    if not isinstance(conditions, Mapping):
        raise TypeError(f"`conditions` must map names to ConditionSpecs, e.g. classes(10), got {conditions!r}.")
    specs = {}
    for name, spec in conditions.items():
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name in TAKEN:
            raise ValueError(
                f"A condition needs a name that can be an argument, and none of {', '.join(TAKEN)}; got {name!r}."
            )
        if isinstance(spec, Mapping):
            known = [f.name for f in fields(ConditionSpec)]
            wrong = next((key for key in spec if key not in known), None)
            if wrong is not None or "kind" not in spec:
                what = f"no entry {wrong!r}" if wrong is not None else "to have a `kind`"
                raise ValueError(f"Condition `{name}` has {what}; its entries: {', '.join(known)}.")
            spec = ConditionSpec(**spec)
        elif not isinstance(spec, ConditionSpec):
            raise TypeError(f"Condition `{name}` must be a ConditionSpec or its arguments, got {spec!r}.")
        specs[name] = spec
    return specs


def classes(n: int, dropout: float = 0.1) -> dict[str, ConditionSpec]:
    """The commonest conditions: one class of n, ``{"class_label": …}``; none if n is 0."""
    return {"class_label": ConditionSpec("class", classes=n, dropout=dropout)} if n else {}


def null_condition(
    specs: Mapping[str, ConditionSpec], n: int, device: torch.device | str | None = None
) -> dict[str, Any]:
    """No condition, for n samples: every name with what stands for none."""
    return {name: spec.null(n, device) for name, spec in specs.items()}


def replaced(value: Any, null: Any, where: Tensor) -> Any:
    """`value` with the rows `where`, bool (B,), taken from `null`; at every depth."""
    if isinstance(value, Mapping):
        return {name: replaced(value[name], null[name], where) for name in value}
    return torch.where(where.reshape(-1, *[1] * (value.ndim - 1)), null.to(value.dtype), value)


def mapped(fn: Callable[[Tensor], Any], value: Any) -> Any:
    """`fn` of every tensor, at every depth of nested mappings; other values are kept."""
    if isinstance(value, Tensor):
        return fn(value)
    return {name: mapped(fn, v) for name, v in value.items()} if isinstance(value, Mapping) else value


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _check_tensor(name: str, value: Any, shape: tuple[int, ...], n: int | None, floating: bool) -> None:
    wanted = "a floating-point tensor" if floating else "an int64 tensor, e.g. torch.tensor([0, 3])"
    fits = isinstance(value, Tensor) and (value.is_floating_point() if floating else value.dtype == torch.int64)
    if not fits:
        raise TypeError(f"Condition `{name}` must be {wanted}, got {_kind(value)}.")
    size = ", ".join(map(str, ("B" if n is None else n, *shape))) + "," * (not shape)
    if tuple(value.shape[1:]) != shape or value.ndim == 0 or (n is not None and len(value) != n):
        raise ValueError(f"Condition `{name}` must have shape ({size}), got {tuple(value.shape)}.")
    if len(value) == 0:
        raise ValueError(f"Condition `{name}` is empty: there must be one value per sample.")
