"""Estimates of the traces at the knots of a trajectory, pooled: their means, and what is uncertain about a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.likelihood.path import Estimates
from scoresde.likelihood.scatter import variance


@dataclass
class Pool:
    """So many estimates of the trace at every knot, or the exact ones.

    Attributes:
        means: per knot, (B,), float64.
        squares: per knot their `scatter.squares`, (B, 3).
        count: estimates per knot, a number or (B,) on the CPU; inf for the exact trace, 0 for none yet.
    """

    means: list[Tensor]
    squares: list[Tensor]
    count: Any

    @classmethod
    def of(cls, traces: Sequence[Estimates], low: int, high: int, split: int) -> Pool:
        """Of the estimates low … high - 1, whose scatter is in one split."""
        means = [t.values[:, low:high].mean(1) for t in traces]
        return cls(means, [t.squares[:, split] for t in traces], float(high - low))

    @classmethod
    def exact(cls, traces: Sequence[Estimates]) -> Pool:
        return cls([t.values[:, 0] for t in traces], [_none(t.values) for t in traces], math.inf)

    @classmethod
    def empty(cls, traces: Sequence[Estimates]) -> Pool:
        return cls([torch.zeros_like(t.values[:, 0]) for t in traces], [_none(t.values) for t in traces], 0.0)

    def copy(self) -> Pool:
        """With a count per sample; the tensors of a knot are replaced, never written to."""
        count = torch.as_tensor(self.count, dtype=torch.float64).expand(len(self.means[0])).clone()
        return Pool(list(self.means), list(self.squares), count)

    def joined(self, other: Pool) -> Pool:
        """Both together, where there is something in this one (Chan, Golub & LeVeque 1983)."""
        here, there = self._counts(), other._counts()
        total = here + there
        means, squares = [], []
        for m, n, s, t in zip(self.means, other.means, self.squares, other.squares, strict=True):
            gap = n.detach() - m.detach()
            between = gap.square() * (here * there / total)
            means.append(m + (n - m) * (there / total))
            squares.append(s + t + torch.stack([between, 0.0 * between, 0.0 * between + (here * there > 0.0)], 1))
        return Pool(means, squares, self.count + other.count)

    def put(self, rows: Tensor, new: Pool) -> None:
        """Estimates of some samples, beside those that are here or, exact ones, in their place."""
        at = rows.to(self.means[0].device)
        old = Pool([m[at] for m in self.means], [s[at] for s in self.squares], self.count[rows])
        if isinstance(new.count, Tensor) or math.isfinite(new.count):
            new = old.joined(new)
        for k, (mean, square) in enumerate(zip(new.means, new.squares, strict=True)):
            self.means[k] = self.means[k].index_copy(0, at, mean)
            self.squares[k] = self.squares[k].index_copy(0, at, square)
        self.count[rows] = new.count

    def variance(self, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        r"""Variance of :math:`\sum_k w_k m_k` over the knots, m_k the means, (B,), and its degrees of freedom.

        Knots are independent: from the degrees of freedom nu_k of the variances v_k of single knots follow those of the
        sum, :math:`\nu = (\sum_k v_k)^2 / \sum_k v_k^2 / \nu_k` (Welch 1947; Satterthwaite 1946). A variance of 0 and
        infinite ones for the exact trace; nan where there are fewer than two estimates.
        """
        like = self.means[0].detach()
        if isinstance(self.count, float) and math.isinf(self.count):
            return torch.zeros_like(like), torch.full_like(like, math.inf)
        if isinstance(self.count, float) and self.count < 2.0:
            return torch.full_like(like, math.nan), torch.zeros_like(like)
        count = self._counts()
        shares = [w**2 * s for w, s in zip(weights, self.squares, strict=True)]
        total = torch.stack(shares).sum(0)
        found = variance(total) / ((count - 1.0) * count)
        spread = torch.stack([v[:, 0].square() / s[:, 2] for v, s in zip(shares, self.squares, strict=True)]).sum(0)
        dof = torch.where(total[:, 0] == 0.0, math.inf, total[:, 0].square() / spread)
        return found, dof

    def _counts(self) -> Any:
        """On the device of the means."""
        return self.count.to(self.means[0].device) if isinstance(self.count, Tensor) else self.count


def _none(like: Tensor) -> Tensor:
    return torch.zeros(len(like), 3, dtype=torch.float64, device=like.device)
