"""Finished runs in a file of one JSON object per line, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "scoresde-comparison-1"


class RunStore:
    """The runs of a comparison on disk.

    The first line is a header: the settings that every run shares, and what the network answered to a probe. The
    following lines are runs, each appended, flushed and synced when it is done. A half-written last line, left by a
    killed process, is dropped.

    Args:
        path: the file; its folder is made.
        settings: must equal the header's, field by field.
        probe: figures of the problem; must equal the header's up to `probe_tolerance`.
        probe_tolerance: relative, of the largest figure: above rounding on another machine, below another model.
        resume: False deletes what the file holds.

    Raises:
        ValueError: if the file belongs to another comparison; the message names what differs and what to do.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        probe: list[float],
        probe_tolerance: float,
        resume: bool = True,
    ) -> None:
        self.path = path
        self.runs: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "settings": dict(settings), "probe": probe}
        lines = _lines(path) if resume and path.exists() else []
        if lines:
            self._check(lines[0], header, probe_tolerance)
            self.runs = {line["key"]: line for line in lines[1:]}
        temporary = path.with_name(f".{path.name}.tmp")
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in (lines or [header]))
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    def _check(self, found: Mapping[str, Any], header: Mapping[str, Any], tolerance: float) -> None:
        remedy = "Give another path, or resume=False (--restart) to start anew."
        if found.get("format") != FORMAT:
            raise ValueError(f"{self.path} is not a comparison of this version (format {FORMAT!r}). {remedy}")
        old, new = found["settings"], json.loads(json.dumps(header["settings"]))
        differ = [f"{k} ({old.get(k)} then, {new.get(k)} now)" for k in new if old.get(k) != new[k]]
        if differ:
            raise ValueError(f"{self.path} holds a comparison with other settings: {'; '.join(differ)}. {remedy}")
        scale = max(map(abs, found["probe"]), default=0.0)
        gaps = [abs(a - b) for a, b in zip(found["probe"], header["probe"], strict=False)]
        if len(found["probe"]) != len(header["probe"]) or not all(gap <= tolerance * scale for gap in gaps):
            raise ValueError(f"{self.path} holds a comparison of another score: the network answers differently "
                             f"now. {remedy}")  # fmt: skip

    def add(self, run: dict[str, Any]) -> None:
        """Append a finished run."""
        self.runs[run["key"]] = run
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
