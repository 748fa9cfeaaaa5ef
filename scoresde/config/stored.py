"""Configurations as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from scoresde.config.defaults import defaults
from scoresde.config.errors import ConfigError
from scoresde.config.fields import no_field, plain
from scoresde.config.sections import name_entries
from scoresde.storage.files import one_line, read_json, write_whole
from sde_lib._checks import section_key


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Plain nested dictionary for JSON: tuples as lists, infinities as "inf".

    Of the entries of a table it has the options of the one that is named.
    """
    unused: set[str] = set()
    if "name" in config.keys():
        chosen = section_key(config["name"])
        unused = {k for k, v in config.items() if isinstance(v, ml_collections.ConfigDict) and k != chosen}
    kept = {k: v for k, v in config.items() if k not in unused}
    return {k: to_dict(v) if isinstance(v, ml_collections.ConfigDict) else plain(v) for k, v in kept.items()}


def from_dict(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Inverse of `to_dict`, over the defaults of this version.

    Raises:
        ConfigError: for fields that do not exist, values of the wrong type, or a class of one's own that is not
            imported.
    """
    config = defaults()
    _fill(config, config, values, "")
    return config


def _fill(root: ml_collections.ConfigDict, here: ml_collections.ConfigDict, values: Any, path: str) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.{path.rstrip('.')} is a section, got {values!r}.")
    if "name" in here.keys() and "name" in values:
        name_entries(root, [(f"{path}name", values["name"])])
    for key, value in values.items():
        if key not in here.keys():
            raise ConfigError(no_field(root, path.rstrip("."), key, list(here.keys())))
        if isinstance(here[key], ml_collections.ConfigDict):
            _fill(root, here[key], value, f"{path}{key}.")
            continue
        if value in ("inf", "-inf", "nan") and here.get_type(key) is float:
            value = float(value)
        try:
            here[key] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.{path}{key}: {one_line(error)}") from error


def save(config: ml_collections.ConfigDict, path: str | Path) -> None:
    """Write a configuration as JSON, atomically."""
    write_whole(path, json.dumps(to_dict(config), indent=1, allow_nan=False) + "\n")


def restore(path: str | Path) -> ml_collections.ConfigDict:
    """Read what `save` wrote.

    Raises:
        ConfigError: for a file that is not JSON or does not fit.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read {path}: {one_line(error)}") from error
    return from_dict(values)
