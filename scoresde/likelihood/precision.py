"""The arithmetic: TF32 on NVIDIA GPUs, which torch keeps per process, and what rounding leaves uncertain."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sde_lib import SDE, ReverseSDE

ROUNDING = 16.0
"""Error of log p by rounding inside a network, in units of roundoff * sqrt(D): 5 to 17 were measured in bfloat16."""


class _Setting:
    """What is set for all runs that are under way: the first to come sets it, the last to go puts back what was there.

    A run that asks for the other value waits until they are through. One inside another, in its thread, has the
    precision of the outer.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.runs: dict[int, int] = {}  # by thread, how many inside each other
        self.allowed = False
        self.before: _Flags | None = None

    def enter(self, allowed: bool) -> None:
        me = threading.get_ident()
        with self.changed:
            if me not in self.runs:
                self.changed.wait_for(lambda: not self.runs or self.allowed == allowed)
                if not self.runs:
                    self.allowed, self.before = allowed, _Flags()
                    self.before.set(allowed)
            self.runs[me] = self.runs.get(me, 0) + 1

    def leave(self) -> None:
        me = threading.get_ident()
        with self.changed:
            self.runs[me] -= 1
            if not self.runs[me]:
                del self.runs[me]
            if not self.runs and self.before is not None:
                self.before.put_back()
                self.changed.notify_all()


class _Flags:
    """The switches as they are now.

    torch has an old and a new set of them on one state, and reading the old ones raises RuntimeError where the new ones
    were set to what those cannot say. So the old ones are used as long as they can be read, for others read them too
    (torch.compile), and the new ones otherwise.
    """

    def __init__(self) -> None:
        backends: Any = torch.backends
        self.cudnn = backends.cudnn
        self.gpu = [backends.cuda.matmul, self.cudnn.conv, self.cudnn.rnn]
        self.places = [*self.gpu, backends.mkldnn.matmul]  # the old ones reach the last too
        self.new = [place.fp32_precision for place in self.places]
        try:
            self.old: tuple[str, bool] | None = torch.get_float32_matmul_precision(), self.cudnn.allow_tf32
        except RuntimeError:
            self.old = None

    def set(self, allowed: bool) -> None:
        if self.old is None:
            for place in self.gpu:
                place.fp32_precision = "tf32" if allowed else "ieee"
            return
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        self.cudnn.allow_tf32 = allowed

    def put_back(self) -> None:
        if self.old is not None:
            torch.set_float32_matmul_precision(self.old[0])
            self.cudnn.allow_tf32 = self.old[1]
        for place, value in zip(self.places, self.new, strict=True):
            place.fp32_precision = value


_SETTING = _Setting()


@contextlib.contextmanager
def allow_tf32(allowed: bool, device: torch.device) -> Iterator[None]:
    """Allow TF32 in float32 products, or not, while this runs on an NVIDIA GPU; then it is as it was."""
    if device.type != "cuda":
        yield
        return
    _SETTING.enter(allowed)
    try:
        yield
    finally:
        _SETTING.leave()


def rounding(rev: ReverseSDE, law: SDE, x: Tensor, tf32: bool) -> float:
    """What the arithmetic leaves uncertain, in nats: rounding in the network, and of the state beside its noise."""
    knot = law.knot(law.t_min)
    network = ROUNDING * _roundoff(rev, x, tf32)
    return math.sqrt(x[0].numel()) * (network + torch.finfo(x.dtype).eps * math.exp(float(knot.half_log_snr)))


def _roundoff(rev: ReverseSDE, x: Tensor, tf32: bool) -> float:
    """Unit roundoff of the coarsest arithmetic in use: of the state, the score model, autocast, or TF32."""
    dtypes = [x.dtype]
    owner = getattr(rev.network, "__self__", None)
    if isinstance(getattr(owner, "dtype", None), torch.dtype):
        dtypes.append(owner.dtype)  # type: ignore[union-attr]
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    unit = max(torch.finfo(dtype).eps for dtype in dtypes) / 2
    if kind == "cuda" and torch.float32 in dtypes and tf32:
        unit = max(unit, 2.0**-11)
    return unit
