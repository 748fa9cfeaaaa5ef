"""What a likelihood says: words for results and errors, and a bar while it is computed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sde_lib import Knot, Prediction, ReverseSDE, Wrapper


def density(t_min: float, at_zero: bool, terminal: bool) -> str:
    """What log p is the logarithm of: whether it is corrected to t = 0, and whether the law at the end is known."""
    place = "t = 0" if at_zero else f"t = {t_min:g}"
    prior = "" if terminal else ", its law at the end taken for the prior"
    return f"density at {place} by the probability-flow ODE{prior}"


def sentences(*parts: str) -> str:
    """Those that are not empty, one after the other."""
    return ". ".join(filter(None, parts))


def unknown_noise(kept: bool, count: int, least: int) -> str:
    """Why there is no bar for the trace."""
    if kept:
        return (
            f"{count} probes kept along the path may agree by chance and tell no noise: trace_se and error() are nan. "
            f"Take num_probes={least} or more, or fixed steps (steps=…)."
        )
    return "One probe per knot tells no noise: trace_se and error() are nan. Take num_probes=2 or more."


class _Shown(Wrapper):
    """Moves a bar at every call."""

    def __init__(self, inner: ReverseSDE, bar: tqdm) -> None:
        super().__init__(inner)
        self.bar = bar

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        self.bar.update()
        return self.inner(x, t)


@contextlib.contextmanager
def shown(rev: ReverseSDE, progress: bool | None) -> Iterator[ReverseSDE]:
    """The reverse SDE with a bar that counts its calls, on a terminal for None."""
    disable = None if progress is None else not progress
    if disable:
        yield rev
        return
    with tqdm(desc="log p", unit="call", disable=disable, file=sys.stderr) as bar:
        yield _Shown(rev, bar)


@contextlib.contextmanager
def enough_memory(x: Tensor) -> Iterator[None]:
    """A device that is too small for states x says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        raise MemoryError(
            f"The likelihood of {len(x)} samples of shape {tuple(x.shape[1:])} does not fit into the memory of "
            f"{x.device}. Score fewer samples at a time, lower `batch_rows` or `chunk`, or use fewer probes. ({error})"
        ) from error
