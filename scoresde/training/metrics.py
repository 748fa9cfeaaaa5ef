"""Metrics of a run: a JSONL file always, TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics file; a half-written last line, left by a killed run, is dropped."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Metrics:
    """Writer of scalars and pictures.

    Args:
        workdir: gets `metrics.jsonl` and `tensorboard/`.
        step: records after this step are dropped first: they belong to a part of the run that is done again.
        tensorboard: whether to write TensorBoard events if the package is installed.
    """

    def __init__(self, workdir: str | Path, step: int = 0, tensorboard: bool = True) -> None:
        self.path = Path(workdir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= step]
            temporary = self.path.with_name(".metrics.jsonl.tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")
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
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
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
