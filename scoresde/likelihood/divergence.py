"""Divergence of a vector field: exact, or by Hutchinson's estimator, from one evaluation of the field."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PROBES = ("rademacher", "gaussian")


def make_probes(z: Tensor, kind: str) -> Tensor:
    """Probe vectors with E[v v^T] = I from standard normal noise z: its signs, or z itself.

    Signs (Rademacher) have the smaller variance: they see no diagonal element of the Jacobian at all.
    """
    if kind == "gaussian":
        return z
    if kind == "rademacher":
        return torch.where(z >= 0, 1.0, -1.0).to(z)
    raise ValueError(f"`probe` must be one of {', '.join(PROBES)}, got {kind!r}.")


def divergence(
    fn: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Value of `fn` and its divergence, the trace of its Jacobian, sharing one evaluation.

    Without `probes`, the exact trace by one vector-Jacobian product per dimension; with K probes, Hutchinson's
    estimates :math:`v_k^T J v_k`, one product each (Hutchinson 1990; Grathwohl et al. 2019, arXiv:1810.01367). Each
    estimate is unbiased; their spread over k gives a standard error.

    Args:
        fn: maps (B, *D) to (B, *D), row by row.
        x: where, (B, *D).
        probes: (K, B, *D), or None for the exact trace.

    Returns:
        The value, (B, *D), and the divergence in float64, (B, 1) exact or (B, K). Neither carries a graph.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = fn(x)
    if not value.requires_grad:  # fn does not depend on x
        k = 1 if probes is None else len(probes)
        return value.detach(), torch.zeros(len(x), k, dtype=torch.float64, device=x.device)

    def vjp(v: Tensor, last: bool) -> Tensor:
        return torch.autograd.grad(value, x, v, retain_graph=not last)[0]

    if probes is not None:
        columns = [
            (vjp(v, k == len(probes) - 1) * v).reshape(len(x), -1).sum(1, dtype=torch.float64)
            for k, v in enumerate(probes)
        ]
        return value.detach(), torch.stack(columns, 1)
    d = x[0].numel()
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for i in range(d):
        unit = torch.zeros(len(x), d, dtype=value.dtype, device=x.device)
        unit[:, i] = 1.0
        total += vjp(unit.reshape(value.shape), i == d - 1).reshape(len(x), -1)[:, i]
    return value.detach(), total[:, None]
