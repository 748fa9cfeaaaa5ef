"""Validation at the door and look-up in the tables, shared by the three packages."""

import difflib
import inspect
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a finite number above zero."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}.")


def check_nonnegative(name: str, value: float) -> None:
    """Raise unless `value` is a finite number, zero or above."""
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")


def check_ordered(low_name: str, low: float, high_name: str, high: float) -> None:
    """Raise unless 0 < low < high, both finite."""
    check_positive(low_name, low)
    check_positive(high_name, high)
    if not low < high:
        raise ValueError(f"`{low_name}` must be < `{high_name}`, got {low_name}={low}, {high_name}={high}.")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise unless `value` is an int of at least `least` and, if it is given, at most `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        upto = "" if most is None else f" and <= {most:,}"
        raise ValueError(f"`{name}` must be an int >= {least}{upto}, got {value!r}.")


def as_number(name: str, value: Any) -> float:
    """`value` as a Python float; TypeError for texts, lists and None, which `float` would read or explain badly."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"`{name}` must be a number or a tensor, got {value!r}.")
    return float(value)


def as_float64(name: str, values: Any) -> Tensor:
    """`values` as a float64 tensor on the host, whatever torch's default device; TypeError for what is none, such as a
    text or rows of unequal length."""
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be numbers or a tensor of them, got {values!r} ({error}).") from error


def check_state(name: str, x: Any) -> None:
    """Raise unless `x` is a floating-point tensor with a batch dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a tensor of shape (B, *D), got {type(x).__name__}.")
    if not x.is_floating_point():
        raise TypeError(f"`{name}` must be floating point, got {x.dtype}; convert it with `.float()`.")
    if x.ndim < 1 or x.shape[0] == 0:
        raise ValueError(f"`{name}` must have shape (B, *D) with B >= 1, got {tuple(x.shape)}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean …?' for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


class Table(dict[str, type[T]]):
    """Name -> class. Open: "module:Class" names a class of one's own, a subclass of `base`.

    It is found among the modules that are imported already. Nothing is ever imported because a name says so: names come
    from files, too.

    Args:
        base: what every entry is a subclass of.
        entries: name -> class.
    """

    def __init__(self, base: type, entries: Mapping[str, type[T]]) -> None:
        super().__init__(entries)
        self.base = base
        _NAMES.update((cls, name) for name, cls in entries.items())

    def own(self, name: str, what: str) -> type[T]:
        """The class "module:Class"."""
        module, _, key = name.partition(":")
        if not key.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"The {what} {name!r} must be a name of the table, or module:Class.")
        if module not in sys.modules:
            raise ValueError(
                f"The {what} {name!r} is code of your own: import {module} first, or give --import {module}."
            )
        found = getattr(sys.modules[module], key, None)
        if found is None:
            raise ValueError(f"{module} has no {what} {key!r}.{did_you_mean(key, vars(sys.modules[module]))}")
        if not isinstance(found, type) or not issubclass(found, self.base):
            base = f"{self.base.__module__}.{self.base.__qualname__}"
            raise ValueError(f"{name} is no {what}: it has to be a subclass of {base}.")
        return cast("type[T]", found)


_NAMES: dict[type, str] = {}


def name_of(cls: type) -> str:
    """The name of a class in the table that it stands in; its own name if it stands in none."""
    return _NAMES.get(cls, cls.__name__)


def full_name(cls: type) -> str:
    """The name under which `lookup` finds a class: that of its table, or "module:Class"."""
    return _NAMES.get(cls) or f"{cls.__module__}:{cls.__qualname__}"


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """Entry `name` of `table`, or of an open one (`Table`) the class "module:Class" of one's own.

    An unknown name lists the known ones and suggests the nearest.
    """
    if name not in table:
        if isinstance(table, Table) and ":" in str(name):
            return table.own(name, what)
        known = ", ".join(sorted(table))
        more = ", or a class of your own, module:Class" if isinstance(table, Table) else ""
        raise ValueError(f"Unknown {what} {name!r}.{did_you_mean(str(name), table)} Known: {known}{more}.")
    return table[name]


def section_key(name: str) -> str:
    """Under what key a section keeps the options of its entry `name`: the name, or the class of "module:Class"."""
    return name.partition(":")[2] or name


def options_of(cls: Any) -> dict[str, Any]:
    """Constructor options of `cls` with their defaults (`inspect.Parameter.empty` where there is none)."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def build(
    table: Mapping[str, Any], section: Mapping[str, Any], what: str, *, via: str | None = None, **given: Any
) -> Any:
    """Build the class that a config section names: ``{"name": "vp", "vp": {"beta_max": 10.0}}``.

    Options may be such sections themselves: a class says ``tables = {"times": TIMES}``, and its option `times` is
    ``{"name": "uniform", "uniform": {…}}``, or an object (a name of "" leaves it to the constructor).

    Args:
        table: name -> class (or factory).
        section: `name`, and one sub-section of options per name; only the named one is read.
        what: how errors call the thing, e.g. ``"sde"``.
        via: the class method that builds, by its name; the constructor if None.
        **given: options from code; they win over the section's.

    Raises:
        ValueError: for an unknown name or an option that the constructor does not have.
    """
    name = section["name"]
    cls = lookup(table, name, what)
    make = cls if via is None else getattr(cls, via)
    options = {**dict(section.get(section_key(name)) or {}), **given}
    accepted = options_of(make)
    for key in options:
        if key not in accepted:
            raise ValueError(
                f"{what} {name!r} has no option {key!r}; accepted: {', '.join(accepted) or 'none'}."
                f"{did_you_mean(key, accepted)}"
            )
    for key, inner in getattr(cls, "tables", {}).items():
        if isinstance(options.get(key), Mapping):
            section = options.pop(key)
            if section.get("name"):
                options[key] = build(inner, section, f"{what}.{key}")
    return make(**options)
