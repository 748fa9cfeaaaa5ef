"""Finished runs in a file of one JSON object per line, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from scoresde.storage.files import one_line, parse_json, replacing
from scoresde.storage.rows import RowFile

FORMAT = "scoresde-comparison-2"


class RunStore:
    """The runs of a comparison on disk.

    The first line is a header: the settings that every run shares, and what the network answered to a probe. The
    following lines are runs, each appended and synced when it is done. A half-written last line, left by a killed
    process, is dropped. Other comparisons are kept out while it is open. A context manager.

    Args:
        path: the file; its folder is made.
        settings: must equal the header's, field by field.
        probe: name -> figures of the problem and a tolerance, relative to the largest of them; the header's must agree
            to it: above rounding on another machine, below another model or metric.
        resume: False deletes what the file holds.

    Raises:
        LockedError: if another comparison writes there.
        ValueError: if the file is damaged, or belongs to another comparison; the message names what differs and what to
            do.
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
        header = json.dumps({"format": FORMAT, "settings": dict(settings), "probe": figures}, allow_nan=False)

        def keep(lines: list[str]) -> list[str]:
            if not resume or not lines:
                return [header]
            self._check(lines[0], settings, probe)
            self.runs = {run["key"]: run for run in map(self._run, range(2, len(lines) + 1), lines[1:])}
            return lines

        self._file = RowFile(path, keep)

    def _run(self, number: int, line: str) -> dict[str, Any]:
        what = f"Line {number} of {self.path}"
        found = parse_json(line, what)
        if not isinstance(found, dict) or not {"key", "status"} <= set(found):
            raise ValueError(f"{what} is no run of a comparison: delete the line, and it is run anew.")
        return found

    def _check(self, header: str, settings: Mapping[str, Any], probe: Mapping[str, tuple[list[float], float]]) -> None:
        remedy = "Give another path, or resume=False (--restart) to start anew."
        refusal = f"{self.path} is not a comparison of this version (format {FORMAT!r}). {remedy}"
        try:
            found = parse_json(header, "Its first line")
        except ValueError as error:
            raise ValueError(refusal) from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(refusal)
        if not isinstance(found.get("settings"), dict) or not isinstance(found.get("probe"), dict):
            raise ValueError(f"The first line of {self.path} is damaged. {remedy}")
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
        if not file.is_file():
            return run, None
        try:
            return run, torch.from_numpy(np.load(file))
        except (EOFError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({one_line(error)}): delete it.") from error

    def add(self, run: dict[str, Any], samples: Tensor | None = None) -> None:
        """Append a finished run; samples to show of it go into a folder beside the file."""
        if samples is not None:
            with replacing(self._samples / f"{_word(run['key'])}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, samples.numpy())
        self.runs[run["key"]] = run
        self._file.add([json.dumps(run, allow_nan=False)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _word(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
