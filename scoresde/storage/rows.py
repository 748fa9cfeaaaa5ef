"""Files that grow by a line at a time: scores, comparisons, metrics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from scoresde.storage.files import write_whole
from scoresde.storage.locks import locked


def read_lines(path: str | Path) -> list[str]:
    """Complete lines of a text file. What follows the last line break is half a line, left by a killed process or a
    full disk: it is dropped.

    Raises:
        OSError: if there is none, or it cannot be read.
        ValueError: if it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}.") from error


class RowFile:
    """Writer of a text file that takes complete lines at its end; a context manager.

    A line that `add` has returned from is on the disk, whatever happens next. Opening leaves a file alone that is as it
    should be; otherwise the whole file is written beside its place and renamed, so that a kill at any moment loses no
    line.

    Args:
        path: the file; its folder is made.
        keep: complete lines that the file has ([] if there is none) -> those that it is to have.
        exclusive: whether to keep other processes out for as long as it is open.

    Raises:
        LockedError: if another process has it open.
        OSError: if it cannot be read or written.
    """

    def __init__(self, path: Path, keep: Callable[[list[str]], Sequence[str]], exclusive: bool = True) -> None:
        self.path = path
        with ExitStack() as stack:
            if exclusive:  # before the file is looked at
                stack.enter_context(locked(path.with_name(f".{path.name}.lock"), str(path)))
            text = "".join(f"{line}\n" for line in keep(read_lines(path) if path.exists() else []))
            if not path.exists() or path.read_bytes() != text.encode():
                write_whole(path, text)
            self._file = stack.enter_context(path.open("ab", buffering=0))
            self._stack = stack.pop_all()

    def add(self, lines: Iterable[str]) -> None:
        """Append lines and sync them to disk.

        Raises:
            OSError: if they do not all fit (a full disk); the file then ends where it ended before.
        """
        data = "".join(f"{line}\n" for line in lines).encode()
        end = self.path.stat().st_size
        try:
            if self._file.write(data) != len(data):
                raise OSError(f"{self.path} could not take a whole line: the disk is full")
            os.fsync(self._file.fileno())
        except OSError:
            os.truncate(self.path, end)
            raise

    def close(self) -> None:
        """Let others in."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
