"""Whether the bars for the noise of the trace cover, by simulation: the rules in use beside those they replaced.

The exact trace on the same steps is the truth, so that the probes' error stands alone. Every case has a point and
probes of its own. Nominal coverage is 95 %; of n cases a share of 0.95 is seen to 2 sqrt(0.95 * 0.05 / n).

Old rules: the scatter of the estimates themselves in place of that of their shares; a target that is reached by adding
probes until the standard error they report is below it; two probes kept along the path, with a t of one degree of
freedom.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import VPSDE, GaussianMixture, log_likelihood
from scoresde.likelihood import Likelihood, RademacherProbes
from sde_lib import ReverseSDE

STEPS = 16


class Plain(RademacherProbes):
    """Signs that tell nothing but their estimates: the bars are those of the sample variance."""

    def signs(self, v: Tensor) -> None:
        return None


@dataclass
class Problem:
    """A reverse SDE, and points."""

    name: str
    rev: ReverseSDE
    x: Tensor


def gaussian(name: str, basis: Tensor, variances: Tensor, cases: int, g: torch.Generator) -> Problem:
    """Of these variances along the columns of a basis."""
    law = VPSDE()

    def noise(x: Tensor, t: Tensor) -> Tensor:
        knot = law.knot(t, ndim=x.ndim)
        return (x @ basis * (knot.sigma / (knot.alpha**2 * variances + knot.sigma**2))) @ basis.T

    z = torch.randn(cases, len(variances), generator=g, dtype=torch.float64)
    return Problem(name, law.reverse(noise=noise), (z * variances.sqrt()) @ basis.T)


def problems(cases: int) -> list[Problem]:
    g = torch.Generator().manual_seed(0)
    # data along one line that crosses all coordinates: the Jacobian is nearly of rank one while the noise is below it
    line = torch.cat([torch.ones(32, 1), torch.randn(32, 31, generator=g)], 1).double()
    long = torch.full((32,), 0.01, dtype=torch.float64)
    long[0] = 4.0
    wide = torch.logspace(-3, math.log10(9.0), 48, dtype=torch.float64)
    # half way between two components the Jacobian is that of each and a spike along the line from one to the other
    apart = torch.sign(torch.randn(32, generator=g)) * 0.25
    between = 0.2 * torch.randn(cases, 32, generator=g, dtype=torch.float64)
    along = (between @ apart.double() / 2.0)[:, None] * apart  # |apart|^2 = 2
    between -= (1.0 - 0.3 * torch.rand(cases, 1, generator=g)) * along
    spike = GaussianMixture(torch.stack([apart, -apart]), std=0.2)
    mixture = GaussianMixture(torch.randn(6, 32, generator=g), std=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    inside = mixture.sample(cases, g, torch.float64)
    square = torch.randn(48, 48, generator=g, dtype=torch.float64)
    return [
        gaussian("Gaussian, one long axis in 32 dimensions", torch.linalg.qr(line)[0], long, cases, g),
        Problem("mixture of 6 in 32 dimensions", mixture.reverse(VPSDE()), inside),
        Problem("spike: half way between 2 components in 32", spike.reverse(VPSDE()), between),
        gaussian("Gaussian, 48 variances from 0.001 to 9", torch.linalg.qr(square)[0], wide, cases, g),
    ]


@dataclass
class Row:
    """Errors in nats, bars, and probes per knot of the cases."""

    error: Tensor
    se: Tensor
    bar: Tensor
    probes: Tensor

    def __str__(self) -> str:
        ratio = float((self.se.square().mean() / self.error.square().mean()).sqrt())
        count = float(self.probes.double().mean())
        return f"{float(self.error.mean()):+.3f} ({self.bias:+.1f}) | {ratio:.2f} | {self.coverage:.3f} | {count:.1f}"

    @property
    def coverage(self) -> float:
        return float((self.error.abs() <= self.bar).double().mean())

    @property
    def bias(self) -> float:
        """In its standard errors."""
        return float(self.error.mean() / self.error.std()) * math.sqrt(len(self.error))


def row(result: Likelihood, truth: Tensor, probes: Tensor | float) -> Row:
    count = torch.as_tensor(probes, dtype=torch.float64).expand(len(truth))
    return Row(result.log_prob - truth, result.trace_se, result.trace_bar(), count)


def old_target(result: Likelihood, truth: Tensor, target: float, most: int) -> Row:
    """Add probes until the reported standard error is below the target, as it was done: at most eight times, to the
    number that the variance so far asks for, a number above eight rounded up to a power of two."""
    count = torch.full((len(truth),), 2.0, dtype=torch.float64)
    done = torch.zeros(len(truth), dtype=torch.bool)
    found = row(result, truth, 2.0)
    tries = torch.zeros(len(truth))
    for k in range(2, most + 1):
        here = (count == k) & ~done
        now = row(result, truth, float(k))
        found.error[here], found.se[here], found.bar[here] = now.error[here], now.se[here], now.bar[here]
        short = here & (result.trace_se > target) & (tries < 8)
        done |= here & ~short
        wanted = (k * result.trace_se.square() / target**2).ceil()
        more = wanted - k
        more = torch.where(more > 8, 2.0 ** more.clamp(min=1.0).log2().ceil(), more)
        count = torch.where(short, k + more, count)
        tries += short
        if bool(done.all()):
            break
        result = result.refine(num_probes=1)
    exact = ~done  # as many products as the exact trace takes
    found.error[exact], found.se[exact], found.bar[exact] = 0.0, 0.0, 0.0
    found.probes = count
    return found


FIXED = {"steps": STEPS, "doubling": False, "divergence": "hutchinson"}
KEPT = {"tol": 0.1, "doubling": False, "divergence": "hutchinson"}


def targets(problem: Problem, share: float = 0.6) -> tuple[Row, Row]:
    """A target of so much of what two probes per knot leave: by the old rule, and by the new one."""
    rev, x = problem.rev, problem.x
    truth = log_likelihood(rev, x, **{**FIXED, "divergence": "exact"}).log_prob
    two = log_likelihood(rev, x, num_probes=2, probes=Plain(), rng=0, **FIXED)
    target = share * float(two.trace_se.square().mean().sqrt())
    new = log_likelihood(rev, x, target_se=target, rng=1, **FIXED)
    return old_target(two, truth, target, x[0].numel()), row(new, truth, new.vjps.double() / (STEPS + 1))


def fixed(problem: Problem, n: int) -> tuple[Row, Row]:
    """n fresh probes per knot."""
    rev, x = problem.rev, problem.x
    truth = log_likelihood(rev, x, **{**FIXED, "divergence": "exact"}).log_prob
    old, new = (log_likelihood(rev, x, num_probes=n, probes=p, rng=2, **FIXED) for p in (Plain(), RademacherProbes()))
    return row(old, truth, float(n)), row(new, truth, float(n))


def kept(problem: Problem) -> tuple[Row, Row]:
    """Probes kept along the path: two, and six."""
    rev, x = problem.rev, problem.x
    truth = log_likelihood(rev, x, **{**KEPT, "divergence": "exact", "tol": 1e-3}).log_prob
    pair = torch.stack([log_likelihood(rev, x, num_probes=1, rng=seed, **KEPT).log_prob for seed in (3, 4)])
    se = (pair[0] - pair[1]).abs() / 2
    old = Row(pair.mean(0) - truth, se, 12.7062 * se, torch.full_like(se, 2.0))  # t of one degree of freedom
    return old, row(log_likelihood(rev, x, rng=5, **KEPT), truth, 6.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    print("| problem | rule | bias, nats (in its standard errors) | reported / true | coverage | probes per knot |")
    print("|---|---|---|---|---|---|")
    for problem in problems(arguments.cases):
        rows = {"target": targets(problem)} | {f"{n} fresh": fixed(problem, n) for n in (2, 4, 8)}
        for name, (old, new) in (rows | {"kept": kept(problem)}).items():
            print(f"| {problem.name} | {name}, old | {old} |\n| {problem.name} | {name} | {new} |", flush=True)
    print(f"\n{arguments.cases} cases each, {time.process_time() - start:.0f} s of CPU time")


if __name__ == "__main__":
    main()
