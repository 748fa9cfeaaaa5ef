"""Sections of a table: a name, and the constructor's defaults of every entry."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple, "Sequence": tuple}


def section_of(name: str, table: Mapping[str, Any], skip: Iterable[str] = ()) -> ml_collections.ConfigDict:
    """`name`, and a sub-section of constructor defaults for every entry of a table."""
    section = ml_collections.ConfigDict({"name": name})
    for key, cls in table.items():
        section[key] = ml_collections.ConfigDict()
        for option in inspect.signature(cls).parameters.values():
            if option.name in skip or option.kind in (option.VAR_POSITIONAL, option.VAR_KEYWORD):
                continue
            if option.default is None or option.default is option.empty:
                section[key][option.name] = config_dict.placeholder(kind_of(option.annotation))
            elif isinstance(option.default, list | tuple):
                section[key][option.name] = tuple(option.default)
            elif isinstance(option.default, bool | int | float | str):
                section[key][option.name] = option.default
            # an object as default has no place in a file: such an option is for code only
    return section


def kind_of(annotation: Any) -> type:
    """Type of an optional field, from an annotation such as ``float | None`` (a type, or its text)."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    for part in str(text).split("|"):
        found = _TYPES.get(part.strip().split("[")[0].rsplit(".", 1)[-1])
        if found is not None:
            return found
    return object
