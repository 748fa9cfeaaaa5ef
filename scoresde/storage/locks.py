"""Locks between processes, which the operating system releases when their holder dies."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: there is no lock, and nobody is refused
    fcntl = None  # type: ignore[assignment]


class LockedError(OSError):
    """Another process is writing there. The message says which."""


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` for the length of a block; its folder is made.

    Of all processes that see the file system one at a time is in such a block. A holder that dies, by whatever signal,
    holds nothing any more; the file that it leaves is taken over.

    Args:
        path: of the lock file, which is removed at the end.
        what: is locked, for the message.

    Raises:
        LockedError: if it is held, also by another thread of this process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _taken(path, what)
    try:
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever opened it before finds it replaced, and tries again
        file.close()


def _taken(path: Path, what: str) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if not isinstance(error, BlockingIOError):
                raise  # a file system without locks, say
            raise LockedError(
                error.errno, f"{what} is in use by {_holder(path)}. Wait for it, end it, or choose another place"
            ) from error
        if _same(path, file):
            file.seek(0)
            file.truncate()
            return file
        file.close()  # the holder before us removed it between our opening and our locking it


def _same(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just being written
        return "another process"
