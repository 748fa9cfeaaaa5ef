"""Divergence of a vector field: exact, or by Hutchinson's estimator, from one evaluation of the field."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.likelihood.probes import Probes, as_probes
from sde_lib._checks import check_state
from solvers.noise import Rng, as_draw

METHODS = ("auto", "exact", "hutchinson")
EXACT_UP_TO = 16
"""Number of dimensions up to which "auto" takes the exact trace: there it costs about as much as a few probes."""
CHUNK = 16
"""Vector-Jacobian products of the exact trace that are taken together."""


class Divergence(NamedTuple):
    """Value and divergence of a field at some points.

    Attributes:
        value: fn(x), (B, *D).
        trace: the divergence, (B,), float64.
        standard_error: of the trace, (B,): 0 if exact, nan for a single estimate, which cannot tell.
        vjps: vector-Jacobian products taken per sample.
    """

    value: Tensor
    trace: Tensor
    standard_error: Tensor
    vjps: int


def divergence(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    method: str = "auto",
    *,
    probes: Probes | str = "adapted",
    num_probes: int = 2,
    rng: Rng = None,
    chunk: int = CHUNK,
    differentiable: bool = False,
) -> Divergence:
    r"""Value of `fn` and its divergence, the trace of its Jacobian J, sharing one evaluation.

    Exact: one vector-Jacobian product per dimension. Hutchinson: the mean over `num_probes` unbiased estimates
    :math:`z^T J z` with random z (Hutchinson 1990; Grathwohl et al. 2019, arXiv:1810.01367); their spread gives the
    standard error. Reverse mode costs about one evaluation per product, half of what forward mode does.

    Args:
        fn: maps (B, *D) to (B, *D), row by row.
        x: where, (B, *D), floating point.
        method: "exact", "hutchinson", or "auto": exact up to `EXACT_UP_TO` dimensions.
        probes: law of z, a name or an object (see `scoresde.likelihood.probes`); "adapted" is the cosine basis for
            images (C, H, W), and signs for all else.
        num_probes: number of estimates.
        rng: noise of the probes, as in `solvers.solve`.
        chunk: products of the exact trace taken in one batched call, which needs memory for as many gradients and
            derivatives that `torch.vmap` knows; 1 takes them one by one.
        differentiable: record a graph through the value and the trace.

    Raises:
        TypeError, ValueError: for arguments out of range or a value that has not the shape of x.
    """
    check_state("x", x)
    check_trace_options(method, num_probes, chunk)
    shape = x.shape[1:]
    if is_exact(method, shape):
        value, traces = value_and_traces(fn, x, None, chunk, differentiable)
        return Divergence(value, traces[:, 0], torch.zeros_like(traces[:, 0].detach()), math.prod(shape))
    law = as_probes(probes, shape)
    draw = as_draw(rng, x.detach())
    groups = [law.group(draw.normal("probe", k)) for k in range(num_probes)]
    value, traces = value_and_traces(fn, x, groups, chunk, differentiable)
    spread = traces.detach().std(1) if num_probes > 1 else torch.full_like(traces[:, 0], math.nan)
    return Divergence(value, traces.mean(1), spread / math.sqrt(num_probes), num_probes * law.size(shape))


def check_trace_options(method: str, num_probes: int, chunk: int) -> None:
    """What `divergence` and `log_likelihood` both refuse."""
    if method not in METHODS:
        raise ValueError(f"The divergence must be one of {', '.join(METHODS)}, got {method!r}.")
    for name, count in (("num_probes", num_probes), ("chunk", chunk)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"`{name}` must be an int >= 1, got {count!r}.")


def is_exact(method: str, shape: Sequence[int]) -> bool:
    """Whether the trace is taken exactly for states of shape D."""
    return method == "exact" or (method == "auto" and math.prod(shape) <= EXACT_UP_TO)


def value_and_traces(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    groups: Sequence[Sequence[Tensor]] | None,
    chunk: int = CHUNK,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor]:
    """fn(x) and estimates of its divergence: one column per group of probe vectors, or the exact one for None.

    Returns:
        The value (B, *D) and the traces in float64, (B, K) or (B, 1); without a graph unless `differentiable`.
    """
    # fused attention knows neither second derivatives nor batches of products
    plain = differentiable or (groups is None and chunk > 1)
    attention = sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()
    with torch.enable_grad(), attention:
        if not (differentiable and x.requires_grad):
            x = x.detach().requires_grad_()
        value = fn(x)
        if value.shape != x.shape:
            raise ValueError(f"The field must keep the shape {tuple(x.shape)}, got {tuple(value.shape)}.")
        traces = _traces(value, x, groups, chunk, differentiable)
    return (value, traces) if differentiable else (value.detach(), traces)


def _traces(
    value: Tensor, x: Tensor, groups: Sequence[Sequence[Tensor]] | None, chunk: int, differentiable: bool
) -> Tensor:
    b, d = len(x), x[0].numel()
    if not value.requires_grad:  # fn does not depend on x
        return torch.zeros(b, 1 if groups is None else len(groups), dtype=torch.float64, device=x.device)
    left = -(-d // chunk) if groups is None else sum(map(len, groups))

    def products(v: Tensor, batched: bool = False) -> Tensor:
        nonlocal left
        left -= 1
        keep = left > 0 or differentiable
        return torch.autograd.grad(
            value, x, v, retain_graph=keep, create_graph=differentiable, is_grads_batched=batched
        )[0]

    if groups is not None:
        columns = [
            sum((products(v) * v).reshape(b, -1).sum(1, dtype=torch.float64) for v in group) for group in groups
        ]
        return torch.stack([torch.as_tensor(c) for c in columns], 1)
    total = torch.zeros(b, dtype=torch.float64, device=x.device)
    for low in range(0, d, chunk):
        at = torch.arange(min(chunk, d - low), device=x.device)
        units = torch.zeros(len(at), b, d, dtype=value.dtype, device=x.device)
        units[at, :, low + at] = 1.0
        rows = products(units.reshape(-1, *value.shape), True) if chunk > 1 else products(units[0].reshape(value.shape))
        total = total + rows.reshape(len(at), b, d)[at, :, low + at].sum(0, dtype=torch.float64)
    return total[:, None]
