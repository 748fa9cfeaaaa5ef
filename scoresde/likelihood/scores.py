"""Figures per sample in a CSV file that an interrupted scoring goes on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from scoresde.models.score_model import ScoreModel
from scoresde.storage.files import parse_json, write_whole
from scoresde.storage.processes import first_tells, process, together
from scoresde.storage.rows import RowFile, read_lines

COLUMNS = (
    "bits_per_dim",
    "trace_se",
    "discretization",
    "truncation",
    "prior_mismatch",
    "precision",
    "nfe",
    "vjps",
    "status",
)
"""Figures of a sample, in this order; the errors are in bits/dim."""


class ScoreFile:
    """A CSV file: a comment with the settings as JSON, the names of the columns, a row per sample.

    Rows are appended and synced as they are done. A half-written last row, left by a killed process, is dropped. In a
    process group the first process reads and tells the others what is done; every other one writes a file of its own
    beside it (``name.rank1.csv``), which the first takes over at the end, or when the scoring goes on after a kill.
    Other runs are kept out while it is open. A context manager.

    Args:
        path: the file; its folder is made.
        settings: must equal the file's.
        resume: False starts the file anew.

    Attributes:
        rows: figures of the samples that are done, by index.

    Raises:
        LockedError: if another run writes there.
        ValueError: if the file belongs to other data, another model or other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool = True) -> None:
        self.path, self._rank = path, process()[0]
        self.settings = json.loads(json.dumps(settings))
        self.rows: dict[int, list[float]] = first_tells(lambda: self._opened(resume))
        together(self._beside)

    def _beside(self) -> None:
        """In the other processes: a file of their own."""
        if self._rank:
            name = f"{self.path.stem}.rank{self._rank}{self.path.suffix}"
            self._file = RowFile(self.path.with_name(name), lambda _: self._head(), exclusive=False)

    def _opened(self, resume: bool) -> dict[int, list[float]]:
        """In the first process: the rows of all files, which are then in its own."""
        rows: dict[int, list[float]] = {}

        def keep(lines: list[str]) -> list[str]:
            if resume:
                rows.update(self._read(self.path, lines) if lines else {})
                for file in self._others():
                    rows.update(self._read(file, read_lines(file)))
            return self._lines(rows)

        self._file = RowFile(self.path, keep)
        for file in self._others():
            file.unlink()
        return rows

    def _others(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.rank*{self.path.suffix}"))

    def _head(self) -> list[str]:
        return [f"# {json.dumps(self.settings)}", f"index,{','.join(COLUMNS)}"]

    def _lines(self, rows: Mapping[int, Sequence[float]]) -> list[str]:
        return [*self._head(), *(_line(i, row) for i, row in rows.items())]

    def _read(self, file: Path, lines: list[str]) -> dict[int, list[float]]:
        remedy = "Give another path, or resume=False (--restart) to start anew."
        head, columns = [*lines, "", ""][:2]
        if not head.startswith("# {") or columns != self._head()[1]:
            raise ValueError(f"{file} is not a file of scores. {remedy}")
        found = parse_json(head.removeprefix("# "), f"The first line of {file}")
        differ = [k for k in self.settings if found.get(k) != self.settings[k]]
        if differ:
            then = "; ".join(f"{k}: {found.get(k)} then, {self.settings[k]} now" for k in differ)
            raise ValueError(f"{file} holds scores of something else ({then}). {remedy}")
        rows = {}
        for number, line in enumerate(lines[2:], 3):
            index, *figures = line.split(",")
            try:
                rows[int(index)] = [float(value) for value in figures]
            except ValueError:
                figures = []
            if len(figures) != len(COLUMNS):
                raise ValueError(f"Line {number} of {file} is damaged: delete the line to score that sample anew.")
        return rows

    def add(self, rows: Mapping[int, Sequence[float]]) -> None:
        """Append finished rows."""
        self._file.add(_line(i, row) for i, row in rows.items())

    def merge(self, rows: Mapping[int, Sequence[float]]) -> None:
        """In the first process: take over the rows of all, which have to be done. The others' files are removed."""
        if self._rank == 0 and self._others():
            write_whole(self.path, "".join(f"{line}\n" for line in self._lines(dict(sorted(rows.items())))))
            for file in self._others():
                file.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _line(index: int, row: Sequence[float]) -> str:
    return f"{index},{','.join(repr(float(v)) for v in row)}"


def fingerprint(model: ScoreModel, data: Tensor, condition: Mapping[str, Any]) -> dict[str, str]:
    """What tells models, data and conditions apart: hashes of all weights, with the codec's, of all samples, and of all
    they are conditioned on."""
    codec = None if model.codec is None else (model.codec.name, model.codec.config())
    weights = hashlib.sha256(repr((model.law, model.parameterization, model.data_spec, codec)).encode())
    for name, value in sorted(model.state_dict().items()):
        weights.update(name.encode() + _bytes(value))
    samples = hashlib.sha256(_bytes(data))
    given = hashlib.sha256()
    _add(given, condition)
    found = {"model": weights, "data": samples, "condition": given}
    return {name: digest.hexdigest()[:16] for name, digest in found.items()}


def _add(digest: Any, value: Any) -> None:
    """A condition to a digest: names, types and shapes tell apart what the bytes alone would not."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(f"{name!r}{{".encode())
            _add(digest, value[name])
            digest.update(b"}")
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + _bytes(value))
    else:
        digest.update(repr(value).encode())


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
