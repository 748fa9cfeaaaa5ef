"""A likelihood in words, and a bar while it is computed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sde_lib import Knot, Prediction, ReverseSDE, Wrapper

if TYPE_CHECKING:
    from scoresde.likelihood.log_likelihood import Likelihood


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


def described(result: Likelihood) -> str:
    """A few lines: log p, how far off it may be and why, what it took, what went wrong."""
    solved = torch.isfinite(result.log_prob)
    b, d = len(solved), result.latent[0].numel()
    lines = [f"log p of {b} sample{'s' * (b != 1)} in {d} dimensions, nats: {result.what}"]
    if bool(solved.any()):
        low, middle, high = (float(q) for q in _quantiles(result.log_prob.detach()[solved]))
        lines.append(f"  {middle:.6g}" if b == 1 else f"  median {middle:.6g}, from {low:.6g} to {high:.6g}")
        parts = {
            "trace": result.trace_bar(),
            "discretization": 3.0 * result.discretization,
            "remainder": result.remainder,
            "precision": result.precision,
        }
        causes = ", ".join(f"{name} {_size(value[solved])}" for name, value in parts.items())
        lines.append(f"  95 % bar {_size(result.error()[solved])}: {causes}")
        biases = (("truncation", "truncation", result.truncation), ("prior", "prior mismatch", result.prior_mismatch))
        left = [
            f"{words} {float(v[solved].median()):+.2g}"
            for key, words, v in biases
            if key not in result.corrected and bool(v[solved].any())  # 0 where there is none: a known terminal density
        ]
        if left:
            lines.append(f"  not added: {', '.join(left)}")
    calls, products = (float(v.double().mean()) for v in (result.nfe, result.vjps))
    lines.append(f"  {calls:.4g} network calls and {products:.4g} vector-Jacobian products per sample")
    return "\n".join([*lines, f"  {result.message}"] if result.message else lines)


def _quantiles(x: Tensor) -> Tensor:
    return torch.stack([x.min(), x.median(), x.max()])


def _size(x: Tensor) -> str:
    """Median and largest of a bar."""
    if bool(torch.isnan(x).all()):
        return "unknown"
    middle, high = f"{float(x.nanmedian()):.2g}", f"{float(x.nan_to_num(nan=0.0).max()):.2g}"
    return middle if middle == high else f"{middle} (at most {high})"


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
