"""Figures per sample in a CSV file that an interrupted scoring goes on with."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.score_model import ScoreModel

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

    Rows are appended, flushed and synced as they are done. A half-written last row, left by a killed process, is
    dropped. In a process group every process but the first writes a file of its own beside it (``name.rank1.csv``), and
    all are read.

    Args:
        path: the file; its folder is made.
        settings: must equal the file's.
        resume: False starts the file anew.

    Raises:
        ValueError: if the file belongs to other data, another model or other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool = True) -> None:
        d = torch.distributed
        rank = d.get_rank() if d.is_available() and d.is_initialized() else 0
        self.path = path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
        self.settings = json.loads(json.dumps(settings))
        self.rows: dict[int, list[float]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        files = sorted({path, *path.parent.glob(f"{path.stem}.rank*{path.suffix}")})
        if resume:
            for file in files:
                if file.exists() and file.stat().st_size:
                    self.rows.update(self._read(file))
        elif rank == 0:
            for file in files:
                file.unlink(missing_ok=True)
        if not self.path.exists() or not resume or rank == 0:
            # written anew, so that a half-written row is gone
            rows = self.rows if rank == 0 else {}
            self.path.write_text(self._head() + "".join(_line(i, row) for i, row in sorted(rows.items())), "utf-8")

    def _head(self) -> str:
        return f"# {json.dumps(self.settings)}\nindex,{','.join(COLUMNS)}\n"

    def _read(self, file: Path) -> dict[int, list[float]]:
        lines = file.read_text("utf-8").split("\n")
        remedy = "Give another path, or resume=False (--restart) to start anew."
        try:
            found = json.loads(lines[0].removeprefix("# ")) if lines[0].startswith("# ") else None
        except ValueError:
            found = None
        if not isinstance(found, dict) or lines[1:2] != [f"index,{','.join(COLUMNS)}"]:
            raise ValueError(f"{file} is not a file of scores. {remedy}")
        differ = [k for k in self.settings if found.get(k) != self.settings[k]]
        if differ:
            then = "; ".join(f"{k}: {found.get(k)} then, {self.settings[k]} now" for k in differ)
            raise ValueError(f"{file} holds scores of something else ({then}). {remedy}")
        rows = {}
        for row in csv.reader(lines[2:-1]):  # the last piece is empty, or half a row
            if len(row) == len(COLUMNS) + 1:
                rows[int(row[0])] = [float(value) for value in row[1:]]
        return rows

    def add(self, rows: Mapping[int, Sequence[float]]) -> None:
        """Append finished rows."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(i, row) for i, row in rows.items()))
            file.flush()
            os.fsync(file.fileno())


def _line(index: int, row: Sequence[float]) -> str:
    return f"{index},{','.join(repr(float(v)) for v in row)}\n"


def fingerprint(model: ScoreModel, data: Tensor, labels: Tensor | None) -> dict[str, str]:
    """What tells models and data apart: hashes of all weights and of all samples."""
    weights = hashlib.sha256(repr((model.law, model.parameterization, model.data_spec)).encode())
    for name, value in sorted(model.state_dict().items()):
        weights.update(name.encode() + _bytes(value))
    samples = hashlib.sha256(_bytes(data))
    if labels is not None:
        samples.update(_bytes(labels))
    return {"model": weights.hexdigest()[:16], "data": samples.hexdigest()[:16]}


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
