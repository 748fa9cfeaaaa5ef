"""Configuration files: found by name or path, run, and checked."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from scoresde.config.defaults import defaults
from scoresde.config.errors import ConfigError
from scoresde.config.fields import check_field, flatten
from scoresde.config.overrides import override
from scoresde.config.sections import name_entries, opened
from scoresde.config.stored import restore
from scoresde.storage.files import one_line

_PACKAGE = Path(__file__).resolve().parents[1]
ROOTS = (_PACKAGE.parent / "configs", _PACKAGE / "configs")
"""Where named configurations live: the checkout, then the installed package."""


def known() -> list[str]:
    """Names of the shipped configurations."""
    # a file whose name begins with _ is a base that others load
    files = (f.relative_to(r) for r in ROOTS if r.is_dir() for f in r.rglob("*.py") if f.name[0] not in "_.")
    return sorted({f.with_suffix("").as_posix() for f in files})


def find(name: str) -> Path:
    """File of a configuration: a path ending in .py or .json, or the name of a shipped one.

    Raises:
        ConfigError: if there is none; close names are listed.
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"A configuration is named by a text, or the path of a file, got {type(name).__name__}.")
    name, path = str(name), Path(name)
    if path.suffix in (".py", ".json"):
        if path.is_file():
            return path.resolve()
        for root in ROOTS:
            if (root / path).is_file():
                return root / path
        raise ConfigError(f"No configuration file {name!r}; shipped by name: {_listed()}.")
    for root in ROOTS:
        candidate = root / f"{name}.py"
        if candidate.is_file():
            return candidate
    near = difflib.get_close_matches(name, known(), 3)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ConfigError(f"Unknown configuration {name!r}; known: {_listed()}, or a path ending in .py.{meant}")


def _listed() -> str:
    """Names for an error message: those of published experiments, in folders, are too many."""
    names = known()
    plain = [name for name in names if "/" not in name]
    more = len(names) - len(plain)
    return ", ".join(plain) + (f" and {more} of published experiments (`scoresde configs`)" if more else "")


def load(name: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """A configuration by name or path, with overrides as on the command line, locked.

    Args:
        name: see `find`.
        overrides: e.g. ``["--config.training.batch_size=64", "--config.network.unet.multipliers=(1,2)"]``.

    Raises:
        ConfigError: for an unknown file, a file that does not work, a misspelt field or a value of the wrong type.
    """
    path = find(name)
    return override(restore(path) if path.suffix == ".json" else _execute(path), overrides)


def _execute(path: Path) -> ml_collections.ConfigDict:
    """Run a configuration file; loaded by path, so that files of the same name in two places do not mix."""
    spec = importlib.util.spec_from_file_location(f"_scoresde_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{path}: get_config() must return a ConfigDict, got {type(config).__name__}.")
    known_fields = defaults()
    name_entries(known_fields, ((field, value) for field, value in flatten(config) if field.endswith(".name")))
    for field, _ in flatten(opened(config)):
        check_field(known_fields, field)
    return config.lock()


def _explain(error: Exception) -> str:
    """One line for an error in a configuration file; a field that does not exist gets a suggestion."""
    text = one_line(error)
    if isinstance(error, AttributeError | KeyError) and 'Key "' in text:
        part = text.split('Key "', 1)[1].split('"', 1)[0]
        names = {piece for path, _ in flatten(defaults()) for piece in path.split(".")}
        near = difflib.get_close_matches(part, names, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        return f"there is no field {part!r}.{meant}"
    return f"{type(error).__name__}: {text}"
