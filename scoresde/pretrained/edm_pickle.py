"""EDM's network pickles, read for conversion without running what they hold.

Such a file pickles Python source beside every object and asks the reader to execute it. This reader builds tensors and
containers only; every other object, whatever its class, becomes an inert record of its state. It is used by
``scoresde convert`` and by nothing else.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.storage import CheckpointError

PRECONDITIONERS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
"""Name of the pickled class -> `preconditioning` of `load_pretrained`."""


class _Record:
    """What is left of an object of a class that is not built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = args[0] if args else None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _storage(data: bytes) -> Any:
    """A tensor's memory: saved by torch inside of the pickle, and loaded without code too."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


_BUILT: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("dnnlib.util", "EasyDict"): dict,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch", "Size"): torch.Size,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BUILT:
            return _BUILT[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (_Record,), {})


def read(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """The averaged network's state dict, and how it is preconditioned.

    Raises:
        CheckpointError: if the file is damaged, or not a network pickle of EDM.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            stored = _Reader(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is not a pickle that can be read: {told}") from error
    found = _class_and_state(stored.get("ema") if isinstance(stored, Mapping) else None)
    if found is None or found[0] not in PRECONDITIONERS:
        known = ", ".join(PRECONDITIONERS)
        raise CheckpointError(f"{path} holds no averaged network (`ema`) of EDM, one of {known}.")
    name, state = found
    return dict(_tensors(state, "")), PRECONDITIONERS[name]


def _class_and_state(node: Any) -> tuple[str, Mapping[str, Any]] | None:
    """Name of the class and attributes of a pickled module: a record, or EDM's description of one."""
    if not isinstance(node, _Record):
        return None
    state = node.state
    if isinstance(state, Mapping) and "class_name" in state and "state" in state:
        return str(state["class_name"]), state["state"]
    return (type(node).__name__, state) if isinstance(state, Mapping) else None


def _tensors(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for group in ("_parameters", "_buffers"):
        for name, value in (state.get(group) or {}).items():
            if isinstance(value, Tensor):
                yield prefix + name, value.detach()
    for name, module in (state.get("_modules") or {}).items():
        found = _class_and_state(module)
        if found is not None:
            yield from _tensors(found[1], f"{prefix}{name}.")
