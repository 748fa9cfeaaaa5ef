"""Checkpoints of a run: folders of safetensors and JSON, written whole, read without unpickling anything.

A checkpoint is a folder `step_00001000/` with `model.safetensors`, `ema.safetensors`, `optimizer.safetensors` and
`state.json` (step, configuration, counters, and the digest of every tensor file). It is written under a
temporary name beside its place, synced to disk and renamed, so a folder of that name is always complete: a kill or a
full disk in the middle leaves the earlier ones as they were. Every file holds a digest of itself. Model files carry
the model's configuration in their header and can be loaded alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scoresde.storage.digests import BLANK, KEY, intact, sealed
from scoresde.storage.files import INCOMPLETE, one_line, read_json, sync, write_whole
from scoresde.storage.tensors import FORMAT, CheckpointError, not_finite, read_tensors, write_tensors

TENSOR_FILES = ("model", "ema", "optimizer")
STATE = "state.json"
_STEP = re.compile(r"step_(\d{8,})$")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Contents of a checkpoint folder.

    Attributes:
        path: the folder.
        step: optimizer steps done.
        tensors: per file ("model", "ema", "optimizer"), tensors by name.
        state: everything else, from state.json.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def checkpoints(root: str | Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _STEP.match(p.name) and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest(root: str | Path) -> Path | None:
    """Newest complete checkpoint in a folder, or None."""
    found = checkpoints(root)
    return found[-1] if found else None


def save_checkpoint(
    root: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    model_config: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of a step, then delete all but the newest `keep`.

    Args:
        root: folder of the run's checkpoints.
        step: optimizer steps done.
        tensors: "model", "ema" and "optimizer" -> tensors by name.
        state: what else the run needs, JSON-able.
        model_config: `ScoreModel.config()`.
        keep: number of checkpoints to keep, >= 1.

    Raises:
        ValueError: for keep < 1 or weights that are not finite: a bad checkpoint never pushes out a good one.
        FileExistsError: if the step has been saved already.
        OSError: if the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    if keep < 1:
        raise ValueError(f"`keep` must be >= 1, got {keep}.")
    root = Path(root)
    target = root / f"step_{step:08d}"
    if target.exists():
        raise FileExistsError(f"{target} exists already; checkpoints are never overwritten.")
    for file in TENSOR_FILES:
        bad = not_finite(tensors[file])
        if bad is not None:
            what = "Optimizer state" if file == "optimizer" else "Weight"
            raise ValueError(
                f"{what} {bad!r} ({file}) is NaN or infinite at step {step}: not saved, earlier checkpoints are kept. "
                "Lower the learning rate or the clipping norm."
            )
    temporary = root / f"{INCOMPLETE}{target.name}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        files = {}
        for file in TENSOR_FILES:
            path = temporary / f"{file}.safetensors"
            files[path.name] = write_tensors(tensors[file], path, None if file == "optimizer" else model_config)
        entry = {KEY: BLANK, "format": FORMAT, "step": step, "files": files, "model": model_config, **state}
        write_whole(temporary / STATE, sealed(json.dumps(entry, indent=1, allow_nan=False)))
        temporary.rename(target)
        sync(root)
    except OSError as error:
        earlier = latest(root)
        kept = f"the newest complete checkpoint is {earlier}" if earlier else "there is no earlier checkpoint"
        raise OSError(
            error.errno, f"Could not save step {step} in {root}: {error.strerror or error}; {kept}"
        ) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(root)[:-keep]:
        # renamed first: a half-deleted folder must not look like a checkpoint
        doomed = old.with_name(f"{INCOMPLETE}{old.name}-{os.getpid()}")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return target


def clean(root: str | Path) -> None:
    """Remove what killed runs left half-written or half-deleted. Call it only where no other run is writing."""
    root = Path(root)
    if root.is_dir():
        for path in root.glob(f"{INCOMPLETE}*"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def read_state(path: str | Path) -> dict[str, Any]:
    """What state.json of a checkpoint folder says: at least `step`, and `files`, names with their digests.

    Raises:
        FileNotFoundError: if it is not a checkpoint.
        CheckpointError: if the file is damaged or changed, or of another format.
    """
    file = Path(path) / STATE
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no {STATE}.")
    remedy = f"Use an earlier checkpoint: delete {path} to continue from the one before it."
    try:
        state = read_json(file)
        format_, step, files = state["format"], state["step"], state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {one_line(error)} {remedy}") from error
    if format_ != FORMAT:
        raise CheckpointError(f"{path} has format {format_!r}; this version reads {FORMAT!r}.")
    if not intact(file):
        raise CheckpointError(f"{file} is not what was written: damaged or changed. {remedy}")
    if type(step) is not int or not isinstance(files, dict):
        raise CheckpointError(f"{file} is damaged: `step` is a number and `files` is a mapping. {remedy}")
    found: dict[str, Any] = state
    return found


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and verify a checkpoint folder.

    Raises:
        FileNotFoundError: if it is not a checkpoint.
        CheckpointError: if a file is missing, truncated or changed.
    """
    path = Path(path)
    state = read_state(path)
    tensors = {}
    for file in TENSOR_FILES:
        member = path / f"{file}.safetensors"
        if not member.is_file() or member.name not in state["files"]:
            raise CheckpointError(f"{path} lacks {member.name}. Use an earlier checkpoint.")
        tensors[file], _ = read_tensors(member, state["files"][member.name])
    return Checkpoint(path, state["step"], tensors, state)
