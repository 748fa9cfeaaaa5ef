"""Whole files, written beside their place, synced to disk and renamed; and JSON that is read with care."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INCOMPLETE = ".incomplete-"
"""How the names of files and folders begin that are being written, or were when a process died."""

_DEPTH = 100


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to beside `path`. At the end of the block it is synced and takes the place of `path`.

    After an error, or a kill at any moment, `path` is what it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{INCOMPLETE}{path.name}-{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Replace a file by a complete one; its folder is made."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: for what is no JSON, no UTF-8, or nested more than 100 levels deep (a text of brackets exhausts the
            stack of whatever walks through it); `where` is what the message calls the text.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {one_line(error)}.") from error
    level = [value]
    for _ in range(_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"{where} is nested more than {_DEPTH} levels deep.")


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def read_json(path: str | Path) -> Any:
    """`parse_json` of a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: see `parse_json`.
    """
    return parse_json(Path(path).read_bytes(), path)


def one_line(error: BaseException | str) -> str:
    """A message without line breaks, of at most 400 characters; the name of the error if it has no message."""
    return " ".join(str(error).split())[:400] or type(error).__name__
