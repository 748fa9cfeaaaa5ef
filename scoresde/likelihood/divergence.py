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
from scoresde.likelihood.scatter import squares, variance
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
        standard_error: of the trace, (B,): 0 if exact, nan for a single estimate, which cannot tell. A matrix with very
            few entries beside its diagonal may show the same to all of a few signs: take 6 estimates or more there.
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
    if not callable(fn):
        raise TypeError(f"`fn` must be a function of states, got {type(fn).__name__}.")
    check_state("x", x)
    check_trace_options(method, num_probes, chunk)
    shape = x.shape[1:]
    if is_exact(method, shape):
        value, traces = value_and_traces(fn, x, None, chunk, differentiable)
        trace = traces.values[:, 0]
        return Divergence(value, trace, torch.zeros_like(trace.detach()), math.prod(shape))
    law = as_probes(probes, shape)
    draw = as_draw(rng, x.detach())
    groups = [law.group(draw.normal("probe", k)) for k in range(num_probes)]
    value, traces = value_and_traces(fn, x, groups, chunk, differentiable, law)
    error = (variance(traces.squares(0, num_probes)) / (num_probes * max(num_probes - 1, 1))).sqrt()
    error = error if num_probes > 1 else torch.full_like(error, math.nan)
    return Divergence(value, traces.values.mean(1), error, num_probes * law.size(shape))


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


class Traces(NamedTuple):
    """Estimates of a divergence.

    Attributes:
        values: (B, K), or (B, 1) for the exact one; float64.
        signs: of the probes in their basis, (B, K, D); None where the law has none or was not told.
        shares: of the elements of that basis in the estimates, (B, K, D), or None.
    """

    values: Tensor
    signs: Tensor | None = None
    shares: Tensor | None = None

    def squares(self, low: int, high: int) -> Tensor:
        """`scatter.squares` of the estimates low … high - 1, (B, 3); without signs, of the estimates themselves."""
        if self.signs is not None and self.shares is not None:
            return squares(self.signs[:, low:high], self.shares[:, low:high])
        away = self.values[:, low:high].detach()
        both = (away - away.mean(1, keepdim=True)).square().sum(1)
        return torch.stack([both, torch.zeros_like(both), torch.full_like(both, high - low - 1)], 1)


def value_and_traces(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    groups: Sequence[Sequence[Tensor]] | None,
    chunk: int = CHUNK,
    differentiable: bool = False,
    law: Probes | None = None,
) -> tuple[Tensor, Traces]:
    """fn(x) and estimates of its divergence: one column per group of probe vectors, or the exact one for None.

    Args:
        fn, x, chunk, differentiable: as in `divergence`.
        groups: probe vectors of `law`.
        law: for the shares of the elements in the estimates.

    Returns:
        The value (B, *D) and the traces, without a graph unless `differentiable`.
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
        products = _Products(value, x, differentiable)
        if groups is None:
            traces = Traces(products.exact(chunk))
        else:
            traces = products.estimates(groups, law)
    return (value, traces) if differentiable else (value.detach(), traces)


class _Products:
    """Vector-Jacobian products of a value with respect to x; without the graph after the last one."""

    def __init__(self, value: Tensor, x: Tensor, differentiable: bool) -> None:
        self.value, self.x, self.differentiable = value, x, differentiable

    def __call__(self, v: Tensor, last: bool, batched: bool = False) -> Tensor:
        if not self.value.requires_grad:  # fn does not depend on x
            return torch.zeros_like(v)
        keep = self.differentiable or not last
        return torch.autograd.grad(
            self.value, self.x, v, retain_graph=keep, create_graph=self.differentiable, is_grads_batched=batched
        )[0]

    def estimates(self, groups: Sequence[Sequence[Tensor]], law: Probes | None) -> Traces:
        b, last = len(self.x), groups[-1][-1]
        columns, signs, shares = [], [], []
        for group in groups:
            pairs = [(v, self(v, v is last)) for v in group]
            columns.append(torch.stack([(p * v).reshape(b, -1).sum(1, dtype=torch.float64) for v, p in pairs]).sum(0))
            turned = [] if law is None else [(law.signs(v), law.signs(p.detach())) for v, p in pairs]
            known = [(z.reshape(b, -1), w.reshape(b, -1)) for z, w in turned if z is not None and w is not None]
            if known:  # the vectors of a group do not overlap
                signs.append(torch.stack([z for z, _ in known]).sum(0))
                shares.append(torch.stack([z * w for z, w in known]).sum(0))
        values = torch.stack(columns, 1)
        return Traces(values, torch.stack(signs, 1), torch.stack(shares, 1)) if signs else Traces(values)

    def exact(self, chunk: int) -> Tensor:
        """(B, 1), by unit vectors, `chunk` at a time."""
        value, x = self.value, self.x
        b, d = len(x), x[0].numel()
        total = torch.zeros(b, dtype=torch.float64, device=x.device)
        for low in range(0, d, chunk):
            at = torch.arange(min(chunk, d - low), device=x.device)
            units = torch.zeros(len(at), b, d, dtype=value.dtype, device=x.device)
            units[at, :, low + at] = 1.0
            last = low + chunk >= d
            if chunk > 1:
                rows = self(units.reshape(-1, *value.shape), last, batched=True)
            else:
                rows = self(units[0].reshape(value.shape), last)
            total = total + rows.reshape(len(at), b, d)[at, :, low + at].sum(0, dtype=torch.float64)
        return total[:, None]
