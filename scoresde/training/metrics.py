"""Metrics of a run: a JSONL file always, TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from scoresde.storage.files import parse_json
from scoresde.storage.rows import RowFile, read_lines


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics file; a half-written last line, left by a killed run, is dropped.

    Raises:
        OSError: if it cannot be read.
        ValueError: for a line that is not a record.
    """
    return [_record(line, number, path) for number, line in enumerate(read_lines(path), 1)]


def _record(line: str, number: int, path: str | Path) -> dict[str, Any]:
    where = f"Line {number} of {path}"
    found = parse_json(line, where)
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        raise ValueError(f"{where} is not a record of metrics: delete the line, or move the file away.")
    return found


class Metrics:
    """Writer of scalars and pictures.

    Args:
        workdir: gets `metrics.jsonl` and `tensorboard/`.
        step: records after this step are dropped first: they belong to a part of the run that is done again.
        tensorboard: whether to write TensorBoard events if the package is installed.

    Raises:
        ValueError: for a metrics file with a damaged line.
    """

    def __init__(self, workdir: str | Path, step: int = 0, tensorboard: bool = True) -> None:
        self.path = path = Path(workdir) / "metrics.jsonl"

        def keep(lines: list[str]) -> list[str]:
            return [line for number, line in enumerate(lines, 1) if _record(line, number, path)["step"] <= step]

        self._file = RowFile(path, keep, exclusive=False)  # the whole workdir is locked
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1 if step else None)

    def scalars(self, step: int, **values: float) -> None:
        """One record. JSON has no NaN or infinity: they are written as null."""
        record = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        self._file.add([json.dumps(record)])
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: Tensor) -> None:
        """A uint8 picture (H, W, 1 or 3), to TensorBoard only."""
        if self._board is not None:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()
