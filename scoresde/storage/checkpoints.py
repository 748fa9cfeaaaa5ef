"""Checkpoints of a run: folders of safetensors and JSON, written whole, read without unpickling anything.

A checkpoint is a folder `step_00001000/` with one safetensors file per thing that has a name (a part that is trained,
an average of one, an optimizer) and `state.json`: step, configuration, counters, the digest of every tensor file, and
which of the files are the model, raw and averaged. It is written under a temporary name beside its place, synced to
disk and renamed, so a folder of that name is always complete: a kill or a full disk in the middle leaves the earlier
ones as they were. Every file holds a digest of itself. Model files carry the model's configuration in their header and
can be loaded alone.
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
from scoresde.storage.tensors import FORMAT, CheckpointError, not_finite, other_format, read_tensors, write_tensors

STATE = "state.json"
OWN = "objective"
"""File of an objective's own buffers, which may hold what they like: infinities, too."""
_STEP = re.compile(r"step_(\d{8,})$")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Contents of a checkpoint folder.

    Attributes:
        path: the folder.
        step: optimizer steps done.
        tensors: per file ("part.model", "average.ema", "optimizer.train" …), tensors by name.
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
    result: tuple[str, str],
    models: Mapping[str, Mapping[str, Any] | None],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of a step, then delete all but the newest `keep`.

    Args:
        root: folder of the run's checkpoints.
        step: optimizer steps done.
        tensors: file -> tensors by name, all of them finite but those of `OWN`.
        state: what else the run needs, JSON-able.
        result: the files that hold the model, with raw and with averaged weights.
        models: file -> configuration of the model that it holds (`ScoreModel.config()`), for files that hold one.
        keep: number of checkpoints to keep, >= 1.

    Raises:
        ValueError: for keep < 1, a name that a file cannot have, or weights that are not finite: a bad checkpoint never
            pushes out a good one.
        FileExistsError: if the step has been saved already.
        OSError: if the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    if keep < 1:
        raise ValueError(f"`keep` must be >= 1, got {keep}.")
    root = Path(root)
    target = root / f"step_{step:08d}"
    if target.exists():
        raise FileExistsError(f"{target} exists already; checkpoints are never overwritten.")
    for file, values in tensors.items():
        if not _NAME.fullmatch(file):
            raise ValueError(f"{file!r} cannot be a file's name: use letters, digits, '_', '-' and '.'.")
        bad = None if file == OWN else not_finite(values)
        if bad is not None:
            what = "Optimizer state" if file.startswith("optimizer") else "Weight"
            raise ValueError(
                f"{what} {bad!r} ({file}) is NaN or infinite at step {step}: not saved, earlier checkpoints are kept. "
                "Lower the learning rate or the clipping norm."
            )
    temporary = root / f"{INCOMPLETE}{target.name}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        files = {}
        for file, values in tensors.items():
            files[file] = write_tensors(values, temporary / f"{file}.safetensors", models.get(file))
        chosen = {"raw": result[0], "averaged": result[1]}
        entry = {KEY: BLANK, "format": FORMAT, "step": step, "files": files, "result": chosen, **state}
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
    """What state.json of a checkpoint folder says: at least `step`; `files`, names (without their ending) and digests;
    and `result`, the two of them that hold the model, "raw" and "averaged".

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
        format_ = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {one_line(error)} {remedy}") from error
    if format_ != FORMAT:
        raise CheckpointError(other_format(path, format_))
    if not intact(file):
        raise CheckpointError(f"{file} is not what was written: damaged or changed. {remedy}")
    step, files, result = (state.get(name) for name in ("step", "files", "result"))
    good = type(step) is int and isinstance(files, dict) and all(_NAME.fullmatch(name) for name in files)
    if not good or not isinstance(result, dict) or any(result.get(k) not in [*files] for k in ("raw", "averaged")):
        raise CheckpointError(f"{file} is damaged: it needs `step`, `files` and, of these, `result`. {remedy}")
    found: dict[str, Any] = state
    return found


def model_file(path: Path, averaged: bool) -> Path:
    """The file of a checkpoint folder that holds the model, with averaged or raw weights.

    Raises:
        CheckpointError: see `read_state`.
    """
    return path / f"{read_state(path)['result']['averaged' if averaged else 'raw']}.safetensors"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and verify a checkpoint folder.

    Raises:
        FileNotFoundError: if it is not a checkpoint.
        CheckpointError: if a file is missing, truncated or changed.
    """
    path = Path(path)
    state = read_state(path)
    tensors = {}
    for file, digest in state["files"].items():
        member = path / f"{file}.safetensors"
        if not member.is_file():
            raise CheckpointError(f"{path} lacks {member.name}. Use an earlier checkpoint.")
        tensors[file], _ = read_tensors(member, digest)
    return Checkpoint(path, state["step"], tensors, state)
