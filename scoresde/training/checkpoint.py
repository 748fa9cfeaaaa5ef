"""Checkpoints: safetensors and JSON, written atomically, read without unpickling anything.

A checkpoint is a folder `step_00001000/` with `model.safetensors`, `ema.safetensors`, `optimizer.safetensors` and
`state.json` (step, configuration, counters, and the size and SHA-256 of every tensor file). It is written under a
temporary name beside its place, synced to disk and renamed, so a folder of that name is always complete: a kill or a
full disk in the middle leaves the earlier ones as they were. Model files carry the model's configuration in
their header and can be loaded alone.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.score_model import ScoreModel

FORMAT = "scoresde-1"
TENSOR_FILES = ("model", "ema", "optimizer")
_STEP = re.compile(r"step_(\d{8,})$")
_TEMPORARY = ".incomplete-"


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint. The message says which, why, and what to do."""


# --- tensor files -----------------------------------------------------------------------------------------------------
def write_tensors(tensors: Mapping[str, Tensor], path: Path, config: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file and sync it to disk; `config` goes into its header as JSON.

    Raises:
        OSError: if the disk is full or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # clones: safetensors refuses tensors that share memory, and views of a larger storage
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    header = {"format": "pt", "scoresde": json.dumps({"format": FORMAT, "model": config}, allow_nan=False)}
    try:
        save_file(plain, path, metadata=header)
    except SafetensorError as error:
        raise OSError(f"Cannot write {path}: {error}") from error
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read
    _sync(path)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors of a safetensors file, and the model configuration in its header (None if it has none).

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is a pickle, or is truncated or damaged.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = file.metadata() or {}
    return tensors, _model_of(header, path)


def read_config(path: str | Path) -> dict[str, Any] | None:
    """The model configuration alone; see `read_tensors`."""
    with _opened(path) as file:
        header = file.metadata() or {}
    return _model_of(header, path)


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {path}")
    with path.open("rb") as file:
        head = file.read(9)
    # torch.save writes a zip archive around a pickle, or (before torch 1.6) a bare pickle. A safetensors file starts
    # with the length of its header, whose first byte may be any, and then the brace of its JSON
    if head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise CheckpointError(
            f"{path} is a pickle (torch.save), which can run any code when it is loaded; it was not opened. If you "
            "trust it, read it with torch.load(path, weights_only=True) and write it with scoresde.training.save_model."
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: truncated or damaged ({error}). Use an earlier checkpoint, "
            "or copy the file again."
        ) from error


def _model_of(header: Mapping[str, str], path: str | Path) -> dict[str, Any] | None:
    """The model configuration in a header."""
    if "scoresde" not in header:
        return None
    try:
        entry = json.loads(header["scoresde"])
        if entry["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {entry['format']!r}; this version reads {FORMAT!r}.")
        model: dict[str, Any] | None = entry["model"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error!r}.") from error
    return model


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise a `CheckpointError` that names missing, unexpected and misshapen tensors, if there are any."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    problems = []
    for title, names in (("missing", missing), ("unexpected", extra), ("of another shape", shapes)):
        if names:
            more = f", … {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{title}: {', '.join(names[:4])}{more}")
    if not problems:
        return
    near = difflib.get_close_matches(missing[0], extra, 1) if missing and extra else []
    hint = f" Was {near[0]!r} meant to be {missing[0]!r}?" if near else " Was it saved from another configuration?"
    raise CheckpointError(f"The tensors of {where} do not fit the model; {'; '.join(problems)}.{hint}")


def _sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- models -----------------------------------------------------------------------------------------------------------
def save_model(model: ScoreModel, path: str | Path) -> Path:
    """Write a model, weights and configuration, into one .safetensors file, atomically.

    Args:
        model: what to save; its configuration must be rebuildable (`ScoreModel.config`).
        path: file name ending in .safetensors. An existing file is replaced only by a complete one.

    Raises:
        ValueError: for another ending.
        OSError: if the disk is full; an existing file is left as it was.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in .safetensors, got {str(path)!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        write_tensors(model.state_dict(), temporary, model.config())
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_model(path: str | Path, ema: bool = True, device: str | torch.device = "cpu") -> ScoreModel:
    """A score model from a .safetensors file, a checkpoint, or a run's workdir (its newest checkpoint).

    Args:
        path: file or folder.
        ema: whether a folder's averaged weights are taken (those to sample with) or the raw ones.
        device: where the model goes. It is returned in eval mode.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        CheckpointError: for pickles, truncated files, and tensors that do not fit; nothing is ever unpickled.
    """
    file = find_model(path, ema)
    tensors, config = read_tensors(file)
    if config is None:
        raise CheckpointError(
            f"{file} holds tensors but no scoresde model configuration. Build the ScoreModel yourself and load the "
            "tensors with load_state_dict."
        )
    try:
        model = ScoreModel.from_config(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"The model configuration in {file} cannot be built: {error}") from error
    check_tensors(tensors, model.state_dict(), file)
    floating = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if len(floating) == 1:  # a model saved in float64 comes back in float64
        model = model.to(floating.pop())
    model.load_state_dict(tensors)
    return model.to(device).eval()


def find_model(path: str | Path, ema: bool = True) -> Path:
    """The model file that `load_model` would read.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"No such file or folder: {path}")
    name = "ema.safetensors" if ema else "model.safetensors"
    if (path / "state.json").is_file():
        return path / name
    newest = latest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if newest is None:
        raise FileNotFoundError(f"No checkpoint in {path}: train first, or name a checkpoint folder or file.")
    return newest / name


# --- checkpoints of a run ---------------------------------------------------------------------------------------------
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
    found = [p for p in root.iterdir() if _STEP.match(p.name) and (p / "state.json").is_file()]
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
    for file in ("model", "ema"):
        for name, value in tensors[file].items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(
                    f"Weight {name!r} ({file}) is NaN or infinite at step {step}: not saved, earlier checkpoints are "
                    "kept. Lower the learning rate or the clipping norm."
                )
    temporary = root / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        files = {}
        for file in TENSOR_FILES:
            path = temporary / f"{file}.safetensors"
            write_tensors(tensors[file], path, None if file == "optimizer" else model_config)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        entry = {"format": FORMAT, "step": step, "files": files, "model": model_config, **state}
        with (temporary / "state.json").open("w", encoding="utf-8") as handle:
            json.dump(entry, handle, indent=1, allow_nan=False)
            handle.flush()
            os.fsync(handle.fileno())
        _sync(temporary)
        temporary.rename(target)
        _sync(root)
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
        doomed = old.with_name(f"{_TEMPORARY}{old.name}-{os.getpid()}")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return target


def clean(root: str | Path) -> None:
    """Remove what killed runs left half-written or half-deleted. Call it only where no other run is writing."""
    root = Path(root)
    if root.is_dir():
        for path in root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and verify a checkpoint folder.

    Raises:
        FileNotFoundError: if it is not a checkpoint.
        CheckpointError: if a file is missing, truncated or changed.
    """
    path = Path(path)
    if not (path / "state.json").is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no state.json.")
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        format_, step, files = state["format"], int(state["step"]), dict(state["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'} is damaged: {error!r}. Use an earlier checkpoint.") from error
    if format_ != FORMAT:
        raise CheckpointError(f"{path} has format {format_!r}; this version reads {FORMAT!r}.")
    tensors = {}
    for file in TENSOR_FILES:
        name = f"{file}.safetensors"
        member = path / name
        entry = files.get(name, {})
        if not member.is_file():
            raise CheckpointError(f"{path} lacks {name}. Use an earlier checkpoint.")
        if member.stat().st_size != entry.get("bytes") or _digest(member) != entry.get("sha256"):
            raise CheckpointError(
                f"{member} is not what was saved ({member.stat().st_size} bytes, {entry.get('bytes')} were written): "
                f"truncated or changed. Delete {path} to continue from the checkpoint before it."
            )
        tensors[file], _ = read_tensors(member)
    return Checkpoint(path, step, tensors, state)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- optimizers -------------------------------------------------------------------------------------------------------
def optimizer_tensors(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Tensor]:
    """State of an optimizer by parameter name: ``"network.inlet.weight|exp_avg"``."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}|{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return found


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: Mapping[str, Tensor], where: str | Path
) -> None:
    """Restore `optimizer_tensors`.

    Raises:
        CheckpointError: if a name or a shape does not belong to the model's parameters.
    """
    parameters = dict(model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("|")
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            raise CheckpointError(f"Optimizer state {key!r} {tuple(value.shape)} in {where} does not fit the model.")
        # a copy, which load_state_dict would share, in the layout of the parameter, which fused optimizers rely on
        like = parameters[name] if value.ndim else value
        state.setdefault(name, {})[field] = torch.empty_like(like, dtype=value.dtype, device="cpu").copy_(value)
    # by position, as torch numbers parameters over its groups; load_state_dict moves them to their devices
    numbers: dict[Tensor, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            numbers[parameter] = len(numbers)
    by_number = {numbers[parameters[name]]: fields for name, fields in state.items()}
    optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})
