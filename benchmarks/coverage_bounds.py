"""Whether bars cover that are not of the trace's noise: of chains' bounds, of the ends of the ODE, of flags.

Closed-form scores; every row is beside the rule it replaced. Nominal coverage is 95 %.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from scoresde import VPSDE, GaussianMixture, elbo, log_likelihood
from sde_lib import SDE, VESDE, FlowSDE
from solvers import Status

CLUSTERS = GaussianMixture(
    torch.randn(6, 8, generator=torch.Generator().manual_seed(4)), std=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
)
SPECTRUM = GaussianMixture(
    torch.zeros(1, 48), covariances=torch.diag(torch.logspace(-3, math.log10(9.0), 48).double())[None]
)
LINEAR = GaussianMixture(torch.zeros(1, 24), covariances=torch.diag(torch.logspace(-2, 0.6, 24).double())[None])


def share(inside: Tensor) -> float:
    return float(inside.double().mean())


def chains(cases: int) -> None:
    """Repetitions on one point: reported over true variance, and coverage with 1.96 and with the t-quantile."""
    print("| chain | times | calls | reported / true variance | coverage, 1.96 | coverage |\n|---|---|---|---|---|---|")
    x = LINEAR.sample(1, torch.Generator().manual_seed(1), torch.float64).expand(cases, -1)
    for name, law in (("VE", VESDE(0.05, 10.0)), ("VP", VPSDE(beta_max=5.0))):
        for n in (6, 10, 20, 100):
            for times in (128, 16, None):
                bound = elbo(LINEAR.reverse(law.discretize(n)), x, times=times, rng=0)
                error = bound.nats - bound.nats.mean()
                ratio = float(bound.standard_error.square().mean() / error.var())
                plain, t = share(error.abs() < 1.96 * bound.standard_error), share(error.abs() < bound.bar())
                print(f"| {name}, {n} | {times} | {int(bound.nfe[0])} | {ratio:.2f} | {plain:.3f} | {t:.3f} |")


def ends(cases: int) -> None:
    """Samples of the data: the terms as bars of what they correct, and what is left, under the bar that replaces them.
    """
    print("\n| data, law | density | term, RMS nats | as a bar | error corrected, RMS | its bar, RMS | coverage |")
    print("|---|---|---|---|---|---|---|")
    for name, data in (("6 clusters in 8-d", CLUSTERS), ("48 variances", SPECTRUM)):
        for law in (VESDE(0.01, 5.0), VESDE(0.01, 50.0), VPSDE(beta_max=5.0), VPSDE(t_min=0.01)):
            x = data.sample(cases, torch.Generator().manual_seed(0), torch.float64)
            rev, options = data.reverse(law), {"steps": 96, "divergence": "exact"}
            raw = log_likelihood(rev, x, **options)
            at_min, at_0 = data.log_prob(x, law.knot(law.t_min)), data.log_prob(x)
            for which, correct, truth in (("t_min", ["prior"], at_min), ("t = 0", ["prior", "truncation"], at_0)):
                term = raw.prior_mismatch if which == "t_min" else raw.bias
                sizes = raw.prior_mismatch.abs() + (raw.truncation.abs() if which == "t = 0" else 0.0)
                as_bar = share((raw.log_prob - truth).abs() <= sizes + 3 * raw.discretization)
                found = log_likelihood(rev, x, correct=correct, **options)
                error, bar = (found.log_prob - truth).abs(), found.error()
                figures = (float(v.square().mean().sqrt()) for v in (term, error, bar))
                size, left, width = figures
                what = f"{type(law).__name__}({law.t_min:g}, {float(law.sigma(law.t_max)):.3g})"
                print(f"| {name}, {what} | {which} | {size:.1e} | {as_bar:.3f} | {left:.1e} | {width:.1e} | "
                      f"{share(error <= bar):.3f} |")


def old_flags(law: SDE, x: Tensor, steps: int, options: dict) -> Tensor:
    """Halving the steps mattered more than half as much the second time, and more than 1e-3 bits/dim."""
    runs = [log_likelihood(CLUSTERS.reverse(law), x, steps=n, doubling=False, **options).log_prob
            for n in (steps, steps // 2, steps // 4)]
    last, before = (runs[0] - runs[1]).abs(), (runs[1] - runs[2]).abs()
    return (2.0 * last > before) & (last > 0.01 + 1e-3 * 8 * math.log(2.0))


def flags(cases: int) -> None:
    """Who is flagged, and who is not and yet off by more than 0.1 bits/dim."""
    print("\n| law | steps | flagged before | missed before | worst flagged | flagged | missed | worst flagged |")
    print("|---|---|---|---|---|---|---|---|")
    limit = 0.1 * 8 * math.log(2.0)
    for law in (VPSDE(), VESDE(), FlowSDE()):
        x = CLUSTERS.sample(cases, torch.Generator().manual_seed(1), torch.float64) * law.alpha(law.t_min)
        exact = CLUSTERS.log_prob(x, law.knot(law.t_min))
        options = {"divergence": "exact", "prior": lambda z, law=law: CLUSTERS.log_prob(z, law.knot(law.t_max))}
        for steps in (16, 32, 64):
            result = log_likelihood(CLUSTERS.reverse(law), x, steps=steps, **options)
            error = (result.log_prob - exact).abs()
            cells = []
            for flagged in (old_flags(law, x, steps, options), result.status == Status.NOT_CONVERGED):
                missed = share(~flagged & (error > limit))
                cells.append(f"{share(flagged):.3f} | {missed:.3f} | {'yes' if flagged[error.argmax()] else 'no'}")
            print(f"| {type(law).__name__} | {steps} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=400)
    cases = parser.parse_args().cases
    torch.set_num_threads(1)
    start = time.process_time()
    chains(5 * cases)
    ends(cases)
    flags(cases)
    print(f"\n{time.process_time() - start:.0f} s of CPU time")


if __name__ == "__main__":
    main()
