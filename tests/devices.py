"""What would make the host wait for an accelerator, seen without one.

The meta device stands for it: a tensor there has no values, so that reading one raises, and every copy to or from the
CPU can be seen as it is dispatched. `torch.tensor(list, device=…)` is such a copy; it is seen as it is called.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
COPIES = ("_to_copy", "copy_", "copy")
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique2", "masked_select")
LITERALS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor, torch.from_numpy)


class _Dispatched(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if name in READS and any(isinstance(v, Tensor) and v.device.type != "cpu" for v in args):
            self.seen.append(f"{name} {_caller()}")
        out = func(*args, **kwargs)
        if name in COPIES and len({v.device for v in (*args, out) if isinstance(v, Tensor)}) > 1:
            self.seen.append(f"{name} {_caller()}")
        return out


class _Called(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in LITERALS and out.device.type != "cpu" and not isinstance(args[0], Tensor):
            self.seen.append(f"{func.__name__} {_caller()}")
        return out


def _caller() -> str:
    """The innermost line of the project, or of its tests."""
    frames = [f for f in traceback.extract_stack() if "site-packages" not in f.filename and f.filename != __file__]
    return f"at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"


@contextmanager
def waits() -> Iterator[list[str]]:
    """Inside, every wait for a device is added to the list, with its place."""
    seen: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(_Dispatched(seen))
        stack.enter_context(_Called(seen))
        yield seen
