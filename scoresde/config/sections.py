"""Sections of tables: a name, and the constructor's defaults of every entry.

    c.sde.name = "vp"           which entry
    c.sde.vp.beta_max = 20.0    options of an entry; those of entries that are not named do not count

An option of an entry may be such a section itself: a class that says ``tables = {"times": TIMES}`` has the sub-section
``times`` with a name and the options of every entry of `TIMES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_collections
from ml_collections import config_dict

from scoresde.config.errors import ConfigError
from scoresde.config.fields import check_field
from sde_lib import Table, lookup
from sde_lib._checks import full_name, section_key

_VALUES = (bool, int, float, str)
_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple, "Sequence": tuple}


@dataclass(frozen=True)
class Place:
    """Where a table stands in the configuration.

    Attributes:
        table: name -> class.
        what: how errors call an entry.
        default: name of the entry that is chosen unless another one is.
        given: options that come from code, so that they are no fields.
        via: class method that builds an entry, whose options are the fields; the constructor if None.
    """

    table: Mapping[str, Any]
    what: str
    default: str
    given: frozenset[str] = frozenset()
    via: str | None = None

    def section(self) -> ml_collections.ConfigDict:
        """The section, with the defaults."""
        section = ml_collections.ConfigDict({"name": self.default})
        for key, cls in self.table.items():
            section[key] = self.options(cls)
        return section

    def options(self, cls: Any) -> ml_collections.ConfigDict:
        """The options of one class with their defaults."""
        found, tables = ml_collections.ConfigDict(), getattr(cls, "tables", {})
        for option in self.parameters(cls).values():
            if option.name in self.given or option.kind in (option.VAR_POSITIONAL, option.VAR_KEYWORD):
                continue
            if option.name == "name" and tables:
                raise TypeError(f"{cls.__qualname__} has `tables`, so that no option may be called `name`.")
            if option.name in tables:
                found[option.name] = self._inner_section(cls, option)
            elif option.default is None or option.default is option.empty:
                found[option.name] = config_dict.placeholder(kind_of(option.annotation))
            elif isinstance(option.default, list | tuple):
                found[option.name] = tuple(option.default)
            elif isinstance(option.default, _VALUES):
                real = type(option.default) is int and kind_of(option.annotation) is float
                found[option.name] = float(option.default) if real else option.default
            # an object as default has no place in a file: such an option is for code only
        return found

    def _inner_section(self, cls: Any, option: inspect.Parameter) -> ml_collections.ConfigDict:
        """The section of an option; where an object is the default, with what that object says."""
        place = self.inner(cls, option.name)
        section = place.section()
        if place.default and not isinstance(option.default, str):
            options = section[place.default]
            for key in [key for key in options.keys() if isinstance(getattr(option.default, key, None), _VALUES)]:
                options[key] = getattr(option.default, key)
        return section

    def parameters(self, cls: Any) -> Mapping[str, inspect.Parameter]:
        """What builds a class takes."""
        return _parameters(getattr(cls, self.via) if self.via else cls)

    def inner(self, cls: Any, option: str) -> Place:
        """The place of an option that is a section itself."""
        table, default = cls.tables[option], self.parameters(cls)[option].default
        if not isinstance(default, str):  # an object that stands for its class, or none
            default = next((name for name, entry in table.items() if type(default) is entry), "")
        return Place(table, f"{self.what}.{option}", default)

    def lookup(self, name: Any) -> Any:
        """The entry `name`, or a `ConfigError` that lists the names."""
        try:
            return lookup(self.table, name, self.what)
        except ValueError as error:
            raise ConfigError(str(error)) from error


@lru_cache(maxsize=1000)
def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def kind_of(annotation: Any) -> type:
    """Type of an optional field, from an annotation such as ``float | None`` (a type, or its text)."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    for part in str(text).split("|"):
        found = _TYPES.get(part.strip().split("[")[0].rsplit(".", 1)[-1])
        if found is not None:
            return found
    return object


def places() -> dict[str, Place]:
    """Dotted path of a section -> the table that it is of."""
    from scoresde.codecs import CODECS
    from scoresde.data import DATASETS
    from scoresde.networks import NETWORKS
    from scoresde.objectives import OBJECTIVES
    from sde_lib import SDES
    from solvers import GRIDS, SOLVERS

    return {
        "sde": Place(SDES, "sde", "vp"),
        "network": Place(NETWORKS, "network", "unet", frozenset({"shape", "conditions"})),
        "data": Place(DATASETS, "data set", "digits"),
        "codec": Place(CODECS, "codec", "affine", frozenset({"spec", "data"}), via="fit"),
        "objective": Place(OBJECTIVES, "objective", "denoising", frozenset({"model"})),
        "sampling.solver": Place(SOLVERS, "solver", "heun"),
        "sampling.grid": Place(GRIDS, "grid", "blended"),  # the default everywhere; a chain has its own levels
    }


# --- classes of one's own ---------------------------------------------------------------------------------------------
def own(section: ml_collections.ConfigDict, place: Place, name: str) -> None:
    """Give a section the options of a class of one's own, "module:Class", under the name of the class.

    Raises:
        ConfigError: if it is not imported, or no class of the table's kind, or called like a field that is there.
    """
    cls, key = place.lookup(name), section_key(name)
    options, there = place.options(cls), section.get(key)
    if key == "name" or key in place.table or (there is not None and not isinstance(there, ml_collections.ConfigDict)):
        raise ConfigError(f"The {place.what} {name!r} is called like another field here, {key!r}: rename the class.")
    if there is None or set(there.keys()) != set(options.keys()):
        with section.unlocked():
            section[key] = options
        section.lock()


def opened(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config`, with the options of every class of one's own that it names.

    Raises:
        ConfigError: see `own`.
    """
    for _, section, place in _sections(config):
        if is_own(place, section["name"]):
            own(section, place, section["name"])
    return config


def name_entries(config: ml_collections.ConfigDict, names: Iterable[tuple[str, Any]]) -> None:
    """Set names of entries by their fields, ("network.name", "mlp"): they say which fields there are.

    Raises:
        ConfigError: for a field that does not exist, and see `own`.
    """
    for field, name in sorted(names, key=lambda named: named[0].count(".")):  # outer sections first
        check_field(config, field)
        section: Any = config
        for part in field.split(".")[:-1]:
            section = section[part]
        if not isinstance(name, str):
            raise ConfigError(f"config.{field} must be a name, got {name!r}.")
        section["name"] = name
        if ":" in name:
            opened(config)


def use(config: ml_collections.ConfigDict, path: str, entry: str | type, **options: Any) -> None:
    """Choose an entry and set options of it: ``use(config, "network", MyNet, width=32)``.

    Args:
        config: a configuration.
        path: its section, e.g. "network", "sampling.solver".
        entry: a name of the section's table, or a class: of the table, or of one's own ("module:Class" in files).
        **options: of the entry; the others keep their values.

    Raises:
        ConfigError: for an unknown section, name or option, or a value of the wrong type.
        TypeError: for what is no configuration, or no name or class.
    """
    if not isinstance(config, ml_collections.ConfigDict) or not isinstance(entry, str | type):
        wrong = f"`entry` must be a name or a class, got {entry!r}"
        if not isinstance(config, ml_collections.ConfigDict):
            wrong = f"`config` must be a configuration, config.load(name), got {type(config).__name__}"
        raise TypeError(f"{wrong}.")
    name = entry if isinstance(entry, str) else full_name(entry)
    name_entries(config, [(f"{path}.name", name)])
    _place(config, path).lookup(name)
    for option, value in options.items():
        field = f"{path}.{section_key(name)}.{option}"
        check_field(config, field)
        try:
            config.update_from_flattened_dict({field: value})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.{field}: {error}") from error


def _sections(config: ml_collections.ConfigDict) -> Iterator[tuple[str, ml_collections.ConfigDict, Place]]:
    """(dotted path, section, place) of the sections of tables that are in use, outer ones first."""
    for path, place in places().items():
        section: Any = config
        for part in path.split("."):
            section = section[part]
        yield from _within(path, section, place)


def _within(
    path: str, section: ml_collections.ConfigDict, place: Place
) -> Iterator[tuple[str, ml_collections.ConfigDict, Place]]:
    yield path, section, place
    name = section["name"]
    if name in place.table or is_own(place, name):
        cls, key = place.lookup(name), section_key(name)
        for option in getattr(cls, "tables", {}):
            if option in section[key].keys():
                yield from _within(f"{path}.{key}.{option}", section[key][option], place.inner(cls, option))


def _place(config: ml_collections.ConfigDict, path: str) -> Place:
    """The place of a section that is in use."""
    found = {at: place for at, _, place in _sections(config)}
    if path not in found:
        raise ConfigError(f"config.{path} is not in use: choose the entry that it belongs to first.")
    return found[path]


def is_own(place: Place, name: Any) -> bool:
    """Whether `name` is that of a class of one's own, as far as the table allows one."""
    return isinstance(place.table, Table) and isinstance(name, str) and ":" in name
