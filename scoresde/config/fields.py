"""Fields of a configuration by their dotted paths: which there are, which are in use, which differ."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

import ml_collections

from scoresde.config.errors import ConfigError
from sde_lib._checks import section_key


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field."""
    for key in config.keys():
        if isinstance(config[key], ml_collections.ConfigDict):
            yield from flatten(config[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", config[key]


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples as lists, infinities as texts."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def differences(a: ml_collections.ConfigDict, b: ml_collections.ConfigDict) -> list[str]:
    """Dotted paths of the fields in which two configurations differ.

    The options of table entries that neither of the two uses do not count.
    """
    left, right = dict(flatten(a)), dict(flatten(b))
    differ = [p for p in sorted({*left, *right}) if plain(left.get(p)) != plain(right.get(p))]
    return [p for p in differ if _used(a, p) or _used(b, p)]


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Raise a `ConfigError` that names the first field in use that is NaN, which every comparison lets through."""
    for path, value in flatten(config):
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(v, float) and math.isnan(v) for v in values) and _used(config, path):
            raise ConfigError(f"config.{path} is not a number, got {value!r}.")


def _used(config: ml_collections.ConfigDict, path: str) -> bool:
    """Whether a field lies in no sub-section of an entry that is not named."""
    here = config
    for part in path.split(".")[:-1]:
        if "name" in here.keys() and part != section_key(here["name"]):
            return False
        here = here[part]
    return True


def check_field(config: ml_collections.ConfigDict, field: str) -> None:
    """Raise a one-line error with the nearest name if there is no such field."""
    here: Any = config
    parts = field.split(".")
    for i, part in enumerate(parts):
        if not isinstance(here, ml_collections.ConfigDict):
            raise ConfigError(f"config.{'.'.join(parts[:i])} is a value and has no field {part!r}.")
        part = part.split("[")[0]
        if part not in here.keys():
            raise ConfigError(no_field(config, ".".join(parts[:i]), part, list(here.keys())))
        here = here[part]
    if isinstance(here, ml_collections.ConfigDict):
        raise ConfigError(f"config.{field} is a section; set one of its fields: {', '.join(here.keys())}.")


def no_field(config: ml_collections.ConfigDict, section: str, part: str, present: list[str]) -> str:
    """What is said of a field that a section does not have."""
    where = f"config.{section}" if section else "config"
    near = difflib.get_close_matches(part, present, 1)
    if near:
        return f"{where} has no field {part!r}. Did you mean {near[0]!r}?"
    if part[:1].isupper() and "name" in present:
        return f"{where} has no field {part!r}; a class of your own is named first: {where}.name=module:{part}."
    leaves = [path for path, _ in flatten(config)]
    # a field, or a section, whose field is the name of what is chosen there
    elsewhere = [path for path in leaves if f".{path}".endswith((f".{part}", f".{part}.name"))]
    if not elsewhere:
        last = difflib.get_close_matches(part, {path.rsplit(".", 1)[-1] for path in leaves}, 1, 0.75)
        elsewhere = [path for path in leaves if last and path.rsplit(".", 1)[-1] == last[0]]
    if elsewhere:
        return f"{where} has no field {part!r}. Did you mean config.{elsewhere[0]}?"
    return f"{where} has no field {part!r}; it has {', '.join(present)}."
