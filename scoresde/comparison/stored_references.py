"""References that a comparison has solved, kept in files, so that one that goes on need not solve them again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from scoresde.storage.tensors import CheckpointError, read_tensors, write_tensors


class Reference(NamedTuple):
    """States to be reached, (n, *D), an estimate of their own error, and what they are; without states: why."""

    x: Tensor | None
    error: float | None
    name: str


class ReferenceStore:
    """One safetensors file per reference, in a folder beside the file of runs.

    A key says how a reference is made. Which problem it belongs to is said by the header of the file of runs, so the
    folder is emptied when that file is begun anew.

    Args:
        folder: where; it is made when the first reference is kept.
        resume: False deletes the references that it holds.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder = folder
        if not resume:
            for file in folder.glob("*.safetensors"):
                file.unlink()

    def find(self, key: str, like: Tensor) -> Reference | None:
        """The reference of this key with the dtype and device of `like`, or None. A damaged file is solved again."""
        try:
            tensors, about = read_tensors(self._file(key))
        except (FileNotFoundError, CheckpointError):
            return None
        if about is None or about["key"] != key or tensors["x"].shape != like.shape:
            return None
        return Reference(tensors["x"].to(like.device, like.dtype), about["error"], about["name"])

    def keep(self, key: str, reference: Reference) -> None:
        """Write a reference that was reached."""
        if reference.x is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {"key": key, "name": reference.name, "error": reference.error}
            write_tensors({"x": reference.x}, self._file(key), about)

    def _file(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
