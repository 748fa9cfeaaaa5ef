"""Modules of the user, imported because the command line says so: ``--import my_module``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

HELP = "module of your own, also from the current folder: configurations may name its classes, module:Class"


@contextmanager
def own_code(modules: Iterable[str] = ()) -> Iterator[None]:
    """The current folder at the end of the path, where a file hides nothing, and modules imported.

    Raises:
        ValueError: for a module that cannot be imported, whatever it raises.
    """
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        for module in modules:
            try:
                import_module(module)
            except Exception as error:
                kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
                raise ValueError(f"--import {module}: it cannot be imported: {kind}{error}") from error
        yield
    finally:
        sys.path.remove(here)
