"""The result of a likelihood: log p per sample, how far off it may be by cause, and a few lines that say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.likelihood.intervals import half_width
from solvers import Status


@dataclass(repr=False)
class Likelihood:
    r"""Log densities in nats, and how far off they may be, by cause. Per sample, float64, on the CPU.

    Attributes:
        log_prob: log p at t_min of the state, (B,), or at t = 0 with ``correct=("truncation",)``; nan where it failed.
        trace_se: standard error of the trace estimate, (B,): 0 for the exact trace, nan for a single probe or for less
            than `KEPT` kept ones, which cannot tell. Statistical: multiply by the t-quantile of `trace_dof` degrees of
            freedom, as `trace_bar` does. See `scoresde.likelihood.scatter.squares`.
        trace_dof: degrees of freedom of `trace_se`, (B,) (Welch and Satterthwaite); inf for the exact trace.
        discretization: difference between the result and the one with half as many steps (fixed grids; or, if larger,
            1/32 of the difference between half and a quarter) or with a tolerance per step 32 times larger
            (adaptive), (B,); nan without doubling. Three times this is a bar; the result is usually closer by the order
            of the method.
        truncation: a bias, known to first order: what leads from the density at t_min to that at t = 0, signed, (B,).
            See `log_likelihood`.
        prior_mismatch: a bias, known to first order: the model's own estimate of log p_T - log prior at the latent,
            signed, (B,); 0 where the terminal density was handed over.
        remainder: a bound on what the terms in `corrected` leave, (B,): twice their next orders, which take three more
            calls for each; 0 where nothing is corrected. Too small where sigma at t_min is above a third of the
            smallest scale of the data: there the series of truncation does not converge.
        precision: what the arithmetic leaves uncertain, (B,): an order of magnitude.
        log_prior: log density of the latent under the prior, (B,).
        latent: the state at t_max, (B, *D), on the device of x.
        nfe: network evaluations, (B,).
        vjps: vector-Jacobian products, (B,).
        status: `solvers.Status`, (B,).
        corrected: which of `CORRECTIONS` are part of `log_prob`.
        kept_log_prob: log p on the one probe that `doubling` keeps along the path, (B,): noisier than `log_prob`, but
            smooth in everything else, so that runs can be compared; None without one.
        message: what went wrong and where, or why the noise of the trace is unknown; empty if nothing is to be said.
        what: what log p is the logarithm of.
    """

    log_prob: Tensor
    trace_se: Tensor
    trace_dof: Tensor
    discretization: Tensor
    truncation: Tensor
    prior_mismatch: Tensor
    remainder: Tensor
    precision: Tensor
    log_prior: Tensor
    latent: Tensor
    nfe: Tensor
    vjps: Tensor
    status: Tensor
    corrected: tuple[str, ...] = ()
    kept_log_prob: Tensor | None = None
    message: str = ""
    what: str = "density"
    _more: Callable[[int | None, float | None], Likelihood] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return _described(self)

    @property
    def ok(self) -> bool:
        """Whether every sample was solved."""
        return bool((self.status == Status.OK).all())

    def trace_bar(self, confidence: float = 0.95) -> Tensor:
        """Half width of the confidence interval for the noise of the trace: t-quantile times standard error, (B,)."""
        return half_width(self.trace_se, self.trace_dof, confidence)

    def error(self, confidence: float = 0.95) -> Tensor:
        r"""Half width of the interval about `log_prob` for the density that `log_prob` is of, (B,), in nats.

        :math:`\sqrt{\mathrm{trace}^2 + (3\,\mathrm{disc})^2} + \mathrm{remainder} + \mathrm{precision}`: a random bar
        with the confidence asked for, a difference of runs, and bounds. As long as nothing is corrected that density is
        the ODE's, from the prior to t_min. With ``correct=["prior"]`` it is p at t_min, with ``"truncation"`` too p at
        t = 0. What is not corrected is a bias with a sign, not a bar: see `bias`. A model's own error, the distance of
        its density from the data's, is not and cannot be part of it.
        """
        trace = self.trace_bar(confidence)
        return (trace.square() + 9.0 * self.discretization.square()).sqrt() + self.remainder + self.precision

    @property
    def bias(self) -> Tensor:
        """Truncation and prior mismatch as far as they are not corrected, signed, (B,): ``log_prob + bias`` is the
        estimate of log p at t = 0. Known to first order, without a bound on what that leaves: for one use `correct`."""
        terms = {"truncation": self.truncation, "prior": self.prior_mismatch}
        left = [term for name, term in terms.items() if name not in self.corrected]
        return torch.stack([torch.zeros_like(self.truncation), *left]).sum(0)

    def refine(self, num_probes: int | None = None, target_se: float | None = None) -> Likelihood:
        """More probes at the stored knots, without solving the trajectory again.

        Args:
            num_probes: add so many per knot and sample.
            target_se: give each sample what it needs for a standard error of so many nats; the exact trace where that
                is cheaper. How many that is, is decided by a pilot, the first `PILOT` estimates per knot; the result is
                that of the others alone, so that it is unbiased and its bar covers (`nfe` and `vjps` count the pilot).
                The standard error it reports is measured anew and scatters about the target.

        Raises:
            ValueError: after an adaptive run, whose probes are fixed along the path, and with ``keep=False``.
        """
        if (num_probes is None) == (target_se is None):
            raise ValueError("Give `num_probes` or `target_se`.")
        if self._more is None:
            raise ValueError(
                "Nothing is stored to refine: use fixed steps (steps=…), not `tol`, with keep=True and check=True."
            )
        return self._more(num_probes, target_se)


def _described(result: Likelihood) -> str:
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
