"""Tensors in safetensors files: equal bytes for equal contents, with a digest that is checked when they are read."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.storage.digests import BLANK, KEY, intact, place
from scoresde.storage.files import one_line, parse_json, replacing

FORMAT = "scoresde-3"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint. The message says which, why, and what to do."""


def other_format(path: str | Path, found: object) -> str:
    """What to say of a file of another format."""
    return f"{path} has format {found!r} and this version reads {FORMAT!r} only: train again, or use the other version."


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, config: Mapping[str, Any] | None = None) -> str:
    """Write a safetensors file: whole, synced and renamed, or not at all.

    The bytes are a function of the contents: tensors by falling size of an element (which keeps them aligned), then by
    name. The header holds `config` as JSON, and a digest of the file (see `scoresde.storage.digests`).

    Args:
        tensors: by name; those that share memory are written once each.
        path: of the file.
        config: of the model.

    Returns:
        The digest that the file says.

    Raises:
        TypeError: for what is not a tensor, or of a dtype that is not stored (complex, quantized).
        OSError: if the disk is full or the file cannot be written.
    """
    check_storable(tensors)
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    entry = json.dumps({"format": FORMAT, "model": config}, allow_nan=False, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": {KEY: BLANK, "format": "pt", "scoresde": entry}}
    offset = 0
    for name in order:
        value = tensors[name]
        end = offset + value.numel() * value.itemsize
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    found = place(head)
    assert found is not None
    digest = hashlib.sha256(head)
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(head)
        for name in order:
            data = _bytes(tensors[name])
            digest.update(data)
            file.write(data)
        file.seek(found[0])
        file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def check_storable(tensors: Mapping[str, Any]) -> None:
    """Raise a TypeError that names what cannot be written: no tensor, or of a dtype that is not stored."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name!r} cannot be stored: expected a real, whole or bool tensor, got {kind}.")


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensors(
    path: str | Path, digest: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors of a safetensors file, and the model configuration in its header (None if it has none).

    A file of this library is read only if it is what was written, byte for byte. Files of others say no digest.

    Args:
        path: the file.
        digest: that it must say, where it is known from elsewhere.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is a pickle, is truncated, damaged or changed, or of an older format.
    """
    from safetensors import SafetensorError

    path = Path(path)
    file, header, head = _opened(path)
    whole = intact(path, head)
    if whole is False:
        raise CheckpointError(
            f"{path} is not what was written: its digest differs, so a part of it was changed or damaged. Use an "
            "earlier checkpoint, or copy the file again."
        )
    config = _model_of(header, path)
    if whole is None and "scoresde" in header:
        raise CheckpointError(f"{path} has lost its digest: it was changed. Copy it again from where it is whole.")
    if digest is not None and header.get(KEY) != digest:
        raise CheckpointError(f"{path} is not the file that was saved there: the checkpoint lists another digest.")
    try:
        return {name: file.get_tensor(name) for name in file.keys()}, config
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} holds tensors that cannot be read: {one_line(error)}.") from error


def read_config(path: str | Path) -> dict[str, Any] | None:
    """The model configuration alone, of a file whose tensors are not looked at; see `read_tensors`."""
    return _model_of(_opened(Path(path))[1], path)


def _opened(path: Path) -> tuple[Any, dict[str, str], int]:
    """A safetensors file, the text entries of its header, and where that ends."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"No such file: {path}")
    with path.open("rb") as file:
        head = file.read(9)
    # torch.save writes a zip archive around a pickle, or (before torch 1.6) a bare pickle. A safetensors file starts
    # with the length of its header, whose first byte may be any, and then the brace of its JSON
    if head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise CheckpointError(
            f"{path} is a pickle (torch.save), which can run any code when it is loaded; it was not opened. If you "
            "trust it, read it with torch.load(path, weights_only=True) and write it with scoresde.save_model."
        )
    try:
        found = safe_open(path, framework="pt")
        return found, found.metadata() or {}, 8 + int.from_bytes(head[:8], "little")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: truncated or damaged ({one_line(error)}). Use an earlier "
            "checkpoint, or copy the file again."
        ) from error


def _model_of(header: Mapping[str, str], path: str | Path) -> dict[str, Any] | None:
    """The model configuration in a header."""
    if "scoresde" not in header:
        return None
    try:
        entry = parse_json(header["scoresde"], "it")
        format_, model = entry["format"], entry["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has a damaged header: {one_line(error)}") from error
    if format_ != FORMAT:
        raise CheckpointError(other_format(path, format_))
    if model is not None and not isinstance(model, dict):
        raise CheckpointError(f"{path} has a damaged header: a model configuration is a mapping.")
    return model


# --- checks -----------------------------------------------------------------------------------------------------------
def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise a `CheckpointError` that names missing and unexpected tensors, and those of another shape or dtype.

    `wanted` may be on the meta device: it is not looked into.
    """
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    both = [(name, found[name], wanted[name]) for name in wanted if name in found]
    shapes = [f"{name} {tuple(a.shape)} instead of {tuple(b.shape)}" for name, a, b in both if a.shape != b.shape]
    dtypes = [f"{name} {_word(a)} instead of {_word(b)}" for name, a, b in both if a.dtype != b.dtype]
    problems = []
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", shapes), ("of another dtype", dtypes))
    for title, names in kinds:
        if names:
            more = f", … {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{title}: {', '.join(names[:4])}{more}")
    if not problems:
        return
    near = difflib.get_close_matches(missing[0], extra, 1) if missing and extra else []
    hint = f" Was {near[0]!r} meant to be {missing[0]!r}?" if near else " Was it saved from another configuration?"
    raise CheckpointError(f"The tensors of {where} do not fit the model; {'; '.join(problems)}.{hint}")


def _word(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinite values, or None."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            return name
    return None
