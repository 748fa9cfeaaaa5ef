"""Score models in files: saved with their configuration, built again from it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from scoresde.models import ScoreModel, model_from_config
from scoresde.storage.checkpoints import STATE, latest, model_file, read_state
from scoresde.storage.files import one_line
from scoresde.storage.tensors import CheckpointError, check_tensors, not_finite, read_tensors, write_tensors
from sde_lib.chain import MOST_LEVELS

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Those that a whole model may have."""


def save_model(model: ScoreModel, path: str | Path) -> Path:
    """Write a model, weights and configuration, into one .safetensors file, atomically.

    Equal models give equal bytes.

    Args:
        model: what to save; its configuration must be rebuildable (`ScoreModel.config`).
        path: file name ending in .safetensors. An existing file is replaced only by a complete one.

    Raises:
        ValueError: for another ending, or weights that are NaN or infinite.
        OSError: if the disk is full; an existing file is left as it was.
    """
    if not isinstance(model, ScoreModel):
        raise TypeError(f"`model` must be a ScoreModel, got {type(model).__name__}.")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in .safetensors, got {str(path)!r}.")
    tensors = model.state_dict()
    bad = not_finite(tensors)
    if bad is not None:
        raise ValueError(f"Weight {bad!r} is NaN or infinite: the model was not saved.")
    write_tensors(tensors, path, model.config())
    return path


Model = TypeVar("Model", bound=nn.Module)


@overload
def load_model(path: str | Path, ema: bool = True, device: str | torch.device = "cpu") -> ScoreModel: ...


@overload
def load_model(path: str | Path, ema: bool = True, device: str | torch.device = "cpu", *, model: Model) -> Model: ...


def load_model(
    path: str | Path, ema: bool = True, device: str | torch.device = "cpu", *, model: nn.Module | None = None
) -> nn.Module:
    """A score model from a .safetensors file, a checkpoint, or a run's workdir (its newest checkpoint).

    Nothing is unpickled, and the file must be what was written, byte for byte. The network is first built without
    memory (on torch's meta device) and compared with the tensors: names, shapes and dtypes.

    Args:
        path: file or folder.
        ema: whether a folder's averaged weights are taken (those to sample with) or the raw ones.
        device: where the model goes. It is returned in eval mode, in the dtype that it was saved in.
        model: takes the weights, instead of a model that is built from the file's configuration: for models that were
            put together in code, of which a file holds the weights alone.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        CheckpointError: for pickles, damaged files, configurations that cannot be built, tensors that do not fit, and
            weights that are NaN or infinite.
        ValueError: for a device that is not there.
    """
    device = usable_device(device)
    file = find_model(path, ema)
    listed = read_state(file.parent)["files"].get(file.stem) if (file.parent / STATE).is_file() else None
    tensors, config = read_tensors(file, listed)
    if model is not None:
        check_tensors(tensors, model.state_dict(), file)
        _check_finite(tensors, file)
        model.load_state_dict(tensors)
        return model.to(device).eval()
    if config is None:
        raise CheckpointError(
            f"{file} holds tensors but no scoresde model configuration. Read a published checkpoint with "
            "scoresde.load_pretrained, or build the model yourself and give it: load_model(path, model=…)."
        )
    return build_model(config, tensors, file).to(device).eval()


def build_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str | Path) -> ScoreModel:
    """The score model of a configuration, with the weights that were saved with it; `where` is for messages.

    Raises:
        CheckpointError: if they do not fit; before memory is taken.
    """
    weights = [value for name, value in tensors.items() if not name.startswith("codec.")]  # a codec keeps its own dtype
    floating = {value.dtype for value in weights if value.is_floating_point()}
    dtype = floating.pop() if len(floating) == 1 else None  # a model saved in float64 comes back in float64
    check_tensors(tensors, _skeleton(config, tensors, dtype, where), where)
    _check_finite(tensors, where)
    with _explained(where):
        model = model_from_config(config)
    if dtype is not None:
        model = model.to(dtype)
    model.load_state_dict(tensors)
    return model


def _check_finite(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    bad = not_finite(tensors)
    if bad is not None:
        raise CheckpointError(f"Weight {bad!r} in {where} is NaN or infinite: use an earlier checkpoint.")


def _skeleton(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None, where: str | Path
) -> dict[str, Tensor]:
    """Tensors without memory of the model that a configuration describes."""
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"{where} holds weights of dtype {dtype}, in which no network can be run.")
    with _explained(where):
        levels = config.get("levels", 0)
        if type(levels) is not int or not 0 <= levels <= MOST_LEVELS:
            raise ValueError(f"`levels` must be an int in 0 … {MOST_LEVELS}, got {levels!r}.")
        with torch.device("meta"), bounded(20 * len(tensors) + 200):  # two or three a tensor are usual
            model = model_from_config(config)
        return (model if dtype is None else model.to(dtype)).state_dict()


@contextmanager
def _explained(where: str | Path) -> Iterator[None]:
    """A configuration from a file may hold anything, so that building it may fail in any way: all say the same."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
        raise CheckpointError(f"The model configuration in {where} cannot be built: {kind}{one_line(error)}") from error


def find_model(path: str | Path, ema: bool = True) -> Path:
    """The model file that `load_model` would read: of a checkpoint, the one that its state.json names as the result.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: for a checkpoint whose state.json is damaged or of another format.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"`path` must be a path, got {type(path).__name__}.")
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"No such file or folder: {path}")
    if (path / STATE).is_file():
        return model_file(path, ema)
    newest = latest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if newest is not None:
        return model_file(newest, ema)
    theirs = (path / file for file in ("model_index.json", "unet/config.json", "config.json"))
    if any(file.is_file() and b'"_class_name"' in file.read_bytes() for file in theirs):
        raise FileNotFoundError(
            f"{path} holds a checkpoint of diffusers, not of this library: convert it once, scoresde convert {path} "
            f"{path.name}.safetensors, or use scoresde.load_pretrained."
        )
    raise FileNotFoundError(f"No checkpoint in {path}: train first, or name a checkpoint folder or file.")


def usable_device(device: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: for one that is not, or that torch does not know.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:  # torch's words for it
        raise ValueError(f"Cannot use device {str(device)!r}: {one_line(error)}") from error
    return found


@contextmanager
def bounded(most: int) -> Iterator[None]:
    """Stops a construction that makes more than so many modules: it could go on for ever."""
    thread, count = threading.get_ident(), 0

    def module(owner: nn.Module, name: str, value: nn.Module | None) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > most:
                raise ValueError("the network has more layers than the tensors that are there can belong to")

    hook = registration.register_module_module_registration_hook(module)
    try:
        yield
    finally:
        hook.remove()
