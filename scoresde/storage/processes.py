"""Several processes that share work and files: rows are divided, results exchanged, and the first one writes.

Whatever exchanges something here is collective: every process of the group has to call it, in the same order. All of it
goes over the CPUs (gloo), beside whatever backend the group has for its devices, and no device waits for it.
"""

from __future__ import annotations

import math
import pickle
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for another one, which may be busy with its share. One that died is noticed at once."""
_side: tuple[weakref.ref[Any], Any] | None = None


def process() -> tuple[int, int]:
    """This process's number, and how many there are in the process group (0 and 1 without one)."""
    d = torch.distributed
    return (d.get_rank(), d.get_world_size()) if d.is_available() and d.is_initialized() else (0, 1)


def hosts() -> Any:
    """The group of all processes' CPUs: the process group itself if it has gloo, else one beside it, made by the first
    call (which is collective)."""
    global _side
    d = torch.distributed
    whole = d.group.WORLD
    if "gloo" in d.get_backend_config():
        return whole
    if _side is None or _side[0]() is not whole:
        _side = weakref.ref(whole), d.new_group(backend="gloo", timeout=PATIENCE)
    return _side[1]


# --- results and errors of all --------------------------------------------------------------------------------------


def together(make: Callable[[], T]) -> T:
    """What `make` returns in this process, once it has worked in all. If it fails in some, the error of the first of
    them is raised in every one, so that none waits for ever. `make` must not be collective itself."""
    if process()[1] == 1:
        return make()
    found: list[T] = []
    error: Exception | None = None
    try:
        found.append(make())
    except Exception as caught:  # the others would wait for ever
        error = caught
    _raise_first(from_all(None if error is None else _sendable(error)), error)
    return found[0]


def first_tells(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in every process. What it raises there, all raise."""
    rank, world = process()
    if world == 1:
        return make()
    told: list[Any] = [None, None]
    error: Exception | None = None
    if rank == 0:
        try:
            told[0] = make()
        except Exception as caught:  # the others would wait for ever
            error = caught
            told[1] = _sendable(caught)
    torch.distributed.broadcast_object_list(told, group=hosts())
    _raise_first([told[1]], error)
    found: T = told[0]
    return found


def from_all(value: T) -> list[T]:
    """What every process has, by its number, in every process."""
    world = process()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, value, group=hosts())
    return found


def told(error: BaseException) -> bool:
    """Whether all processes raise this error, so that it is enough if the first one says so."""
    return bool(getattr(error, "_in_all_processes", False))


def _raise_first(errors: Sequence[Exception | None], own: Exception | None) -> None:
    rank = process()[0]
    for number, error in enumerate(errors):
        if error is not None:
            raised = own if number == rank and own is not None else error
            raised._in_all_processes = True  # type: ignore[attr-defined]
            raise raised


def _sendable(error: Exception) -> Exception:
    """The error, or one of the nearest built-in kind with its words, if it does not survive the journey."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and str(again) == str(error):
            return error
    except Exception:  # whatever an exception's own constructor raises when it is copied
        pass
    kinds = (ArithmeticError, ImportError, OSError, TypeError, ValueError)
    kind = next((k for k in kinds if isinstance(error, k)), RuntimeError)
    return kind(f"{type(error).__name__}: {error}")


# --- rows ------------------------------------------------------------------------------------------------------------


class Shares:
    """Rows 0 … n - 1 in batches, which are dealt out to the processes in turn: each row is in exactly one.

    Batches hold `size` rows, as in one process, so that results are those of one process, bitwise; only if that left
    processes without work are they smaller, ceil(n / processes), and results differ by how batches of another size
    round.

    Args:
        n: number of rows.
        size: rows per batch, at most.
        coupled: whether the rows of a batch influence each other, so that batches must stay what they are.

    Attributes:
        batches: the rows of every batch.
        mine: the rows of this process's batches.
    """

    def __init__(self, n: int, size: int, coupled: bool = False) -> None:
        self.n = n
        rank, world = process()
        size = size if coupled else min(size, math.ceil(n / world))
        self.batches = [range(low, min(low + size, n)) for low in range(0, n, size)]
        self.mine = self.batches[rank::world]

    def first(self, parts: Sequence[Tensor]) -> Tensor | None:
        """Collective: in the first process the rows of all, on the CPU, None in the others.

        Args:
            parts: results for the batches in `mine`, (rows, *E) each, of one shape and dtype in all processes.
        """
        return self._gathered(parts, False)

    def all(self, parts: Sequence[Tensor]) -> Tensor:
        """Collective: the rows of all in every process, on the CPU. Arguments as `first`."""
        found = self._gathered(parts, True)
        assert found is not None
        return found

    def _gathered(self, parts: Sequence[Tensor], everywhere: bool) -> Tensor | None:
        rank, world = process()
        if world == 1:
            return torch.cat([part.cpu() for part in parts])
        d, group = torch.distributed, hosts()
        like = (tuple(parts[0].shape[1:]), parts[0].dtype) if parts else None
        shape, dtype = next(entry for entry in from_all(like) if entry is not None)
        out = torch.empty((self.n, *shape), dtype=dtype) if everywhere or rank == 0 else None
        own = iter(parts)
        for number, rows in enumerate(self.batches):
            owner = number % world
            if not (everywhere or rank in (0, owner)):
                continue
            part = next(own).cpu().contiguous() if owner == rank else torch.empty((len(rows), *shape), dtype=dtype)
            flat = part.reshape(-1).view(torch.uint8)  # whatever the dtype
            if everywhere:
                d.broadcast(flat, owner, group=group)
            elif owner == rank != 0:
                d.send(flat, 0, group=group)
            elif rank == 0 != owner:
                d.recv(flat, owner, group=group)
            if out is not None:
                out[rows.start : rows.stop] = part
        return out
