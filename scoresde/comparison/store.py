"""Finished runs in a file of one JSON object per line, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = "scoresde-comparison-2"


class RunStore:
    """The runs of a comparison on disk.

    The first line is a header: the settings that every run shares, and what the network answered to a probe. The
    following lines are runs, each appended, flushed and synced when it is done. A half-written last line, left by a
    killed process, is dropped.

    Args:
        path: the file; its folder is made.
        settings: must equal the header's, field by field.
        probe: name -> figures of the problem and a tolerance, relative to the largest of them; the header's must agree
            to it: above rounding on another machine, below another model or metric.
        resume: False deletes what the file holds.

    Raises:
        ValueError: if the file belongs to another comparison; the message names what differs and what to do.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        probe: Mapping[str, tuple[list[float], float]],
        resume: bool = True,
    ) -> None:
        self.path = path
        self._samples = path.with_name(f"{path.stem}_samples")
        self.runs: dict[str, dict[str, Any]] = {}
        figures = {name: values for name, (values, _) in probe.items()}
        lines: list[dict[str, Any]] = [{"format": FORMAT, "settings": dict(settings), "probe": figures}]
        if resume and path.exists() and path.stat().st_size:
            lines = _lines(path)
            self._check(lines[0] if lines else {}, settings, probe)
            self.runs = {line["key"]: line for line in lines[1:]}
        write_whole(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))

    def _check(
        self, found: Mapping[str, Any], settings: Mapping[str, Any], probe: Mapping[str, tuple[list[float], float]]
    ) -> None:
        remedy = "Give another path, or resume=False (--restart) to start anew."
        if found.get("format") != FORMAT:
            raise ValueError(f"{self.path} is not a comparison of this version (format {FORMAT!r}). {remedy}")
        old, new = found["settings"], json.loads(json.dumps(settings))
        differ = [f"{k} ({old.get(k)} then, {new.get(k)} now)" for k in new if old.get(k) != new[k]]
        if differ:
            raise ValueError(f"{self.path} holds a comparison with other settings: {'; '.join(differ)}. {remedy}")
        for name, (values, tolerance) in probe.items():
            before = found["probe"].get(name, [])
            limit = tolerance * max(map(abs, before), default=0.0)
            if len(before) != len(values) or any(abs(a - b) > limit for a, b in zip(before, values, strict=True)):
                what = "of another score: the network" if name == "network" else f"under another metric: {name!r}"
                raise ValueError(f"{self.path} holds a comparison {what} answers differently now. {remedy}")

    def find(self, key: str) -> tuple[dict[str, Any], Tensor | None] | None:
        """A run that worked, with its samples if they are still there; what did not work may work now."""
        run = self.runs.get(key)
        if run is None or run["status"] != "ok":
            return None
        file = self._samples / f"{_word(key)}.npy"
        return run, torch.from_numpy(np.load(file)) if file.is_file() else None

    def add(self, run: dict[str, Any], samples: Tensor | None = None) -> None:
        """Append a finished run; samples to show of it go into a folder beside the file."""
        if samples is not None:
            self._samples.mkdir(exist_ok=True)
            np.save(self._samples / f"{_word(run['key'])}.npy", samples.numpy())
        self.runs[run["key"]] = run
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _word(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of the file, up to the first line that is none."""
    found: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            break
        if not isinstance(content, dict):
            break
        found.append(content)
    return found


def write_whole(path: Path, text: str) -> None:
    """Replace a file by a complete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def one_line(error: BaseException | str) -> str:
    """A message fit for a row of a table."""
    return " ".join(str(error).split())[:400]


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
