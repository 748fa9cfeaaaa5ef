r"""Variational bounds on -log p: of the reverse SDE in continuous time, and of a chain (DDPM).

Both are a KL of the whole forward path against the reverse one, and have three parts: the noisiest level against the
prior, the path, and a decoder from the cleanest level to the data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.data.spec import DataSpec
from scoresde.likelihood.dequantization import AUTO
from scoresde.likelihood.doors import check_labels, check_options
from scoresde.likelihood.intervals import half_width, satterthwaite
from scoresde.models.score_model import ScoreModel
from sde_lib import SDE, Chain, Knot, NoisePrediction, Prediction, ReverseSDE, ScorePrediction
from sde_lib._checks import check_count, check_positive, check_state
from solvers import PerSample
from solvers.noise import Draw, Rng, as_draw

VARIANCES = ("small", "large")
HEAD = 4
"""Levels next to the data that are drawn twice where the others are drawn once: their terms fall too steeply to tell
noise from trend by differences (on DDPM's 1000 levels 31 nats^2 of trend beside a variance of 0.8)."""
Variance = str | Callable[[Tensor, Knot], Tensor]


@dataclass
class Bound:
    """An upper bound on -log p in nats, per sample: (B,), float64, on the CPU.

    Attributes:
        nats: the bound, an unbiased estimate of it.
        standard_error: of `nats`, by the random times and noise. Multiply by the t-quantile of `dof` degrees of
            freedom, as `bar` does.
        dof: degrees of freedom of `standard_error` (Welch and Satterthwaite).
        reconstruction: the decoder's part.
        diffusion: the path's part.
        prior: the prior's part.
        nfe: network evaluations.
        what: what it is a bound of.
    """

    nats: Tensor
    standard_error: Tensor
    dof: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    prior: Tensor
    nfe: Tensor
    what: str

    def bar(self, confidence: float = 0.95) -> Tensor:
        """Half width of the confidence interval of `nats`: t-quantile times standard error, (B,)."""
        return half_width(self.standard_error, self.dof, confidence)


def elbo(
    rev: ReverseSDE,
    x: Tensor,
    *,
    times: int | None = 128,
    draws: int = 8,
    data_spec: DataSpec | None = None,
    variance: Variance = "small",
    control_variate: bool = True,
    sigma_data: float = 1.0,
    rng: Rng = None,
    condition: Mapping[str, Any] | None = None,
    batch_rows: int = 1024,
) -> Bound:
    r"""Upper bound on -log p(x) in nats by the evidence lower bound.

    *On an SDE* (Kingma et al. 2021, arXiv:2107.00630, eqs. 11-18; Song et al. 2021, arXiv:2101.09258, theorem 3):

    .. math:: -\log p(x) \le \mathrm{KL}(N(\alpha_T x, \sigma_T^2 I) \| \pi)
              + \int_{\lambda_T}^{\lambda_0} E\|\epsilon - \hat\epsilon(\alpha x + \sigma\epsilon)\|^2 d\lambda
              + E[-\log p(x | x_0)],

    with 0 and T standing for t_min and t_max. It is exact for an exact score, up to the decoder. Times are uniform in
    lambda, where the weight of the likelihood is constant: two in each of `times` / 2 equal cells, so that their
    differences give the standard error. The decoder of a density is :math:`N(\hat x_0(x_0), (\sigma/\alpha)^2 I)`; of
    integers the softmax over the levels of :math:`\log N(x_0 / \alpha;\, x_k, (\sigma/\alpha)^2)` per element (VDM,
    eq. 13). On the flow SDE the path ends at ``drift_t_max``, where lambda is finite; the prior's part is of that time.

    *On a chain* (Ho et al. 2020, arXiv:2006.11239, eq. 5): the KL of every step, of posteriors with mean
    :math:`c_t x_i + c_0 \hat x_0` and a variance of choice, and at level 0 the decoder: the Gaussian of mean
    :math:`\hat x_0`, for integers its mass of their bins, the first and last of which have no end (section 3.3).

    Args:
        rev: reverse SDE, or of a chain.
        x: data in model units, (B, *D); the middles of the bins, ``data_spec.encode(data)``, for integers.
        times: network evaluations of the path per sample, even; on a chain at most so many: equally many, at least
            two, at every level where that is enough, otherwise two in each cell of equal range in lambda. None takes
            every level of a chain once, the first four twice; the standard error then comes from the differences of
            neighbours (see `_from_neighbours`), and is too large where they differ by more than their noise.
        draws: noise draws of the decoder, >= 2.
        data_spec: with levels: bound -log P of the integers instead of -log p.
        variance: of the chain's steps: "small", the posterior's own; "large", that of the forward step; or learned, a
            function (x, knot) -> log variance like x. At level 0, where the posterior has none, "small" takes level
            1's, and so does "large" for integers (Nichol & Dhariwal 2021, arXiv:2102.09672); for densities "large"
            stays that of the forward step, with which the bound of a growing chain tends to that of the SDE.
        control_variate: take :math:`c^2 (\|\epsilon\|^2 - D)`, whose mean is zero, off every squared error of the
            noise, with c the error's share of the noise for Gaussian data: the same expectation with less scatter. Not
            used with a learned variance, which may depend on the noise.
        sigma_data: standard deviation of the data in model units, for c.
        rng: noise, as in `solvers.solve`; a list of ints makes a sample's result its own.
        condition: keyword arguments for the network, batch first.
        batch_rows: rows per network call.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    if not isinstance(rev, ReverseSDE):
        raise TypeError(f"`rev` must be a ReverseSDE (model.reverse()), got {type(rev).__name__}.")
    check_state("x", x)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("`x` contains NaN or infinite values.")
    n = rev.law.n - 1 if isinstance(rev.law, Chain) else None
    if times is None and n is None:
        raise ValueError("`times` = None takes every level of a chain; give a number on an SDE.")
    if times is not None and (not isinstance(times, int) or times < 2 or times % 2):
        raise ValueError(f"`times` must be an even int >= 2, got {times!r}.")
    if not isinstance(draws, int) or draws < 2:
        raise ValueError(f"`draws` must be an int >= 2, got {draws!r}.")
    if isinstance(variance, str) and variance not in VARIANCES:
        raise ValueError(f"`variance` must be one of {', '.join(VARIANCES)}, or a function, got {variance!r}.")
    if not isinstance(batch_rows, int) or batch_rows < 1:
        raise ValueError(f"`batch_rows` must be an int >= 1, got {batch_rows!r}.")
    levels = data_spec if data_spec is not None and data_spec.levels is not None else None
    if levels is not None:
        _check_middles(levels, x)
    last = rev.law.levels[-1] if isinstance(rev.law, Chain) else None
    if last is not None and last.alpha == 0.0 and isinstance(rev.parameterization, NoisePrediction | ScorePrediction):
        raise ValueError("At alpha = 0 the noise says nothing about the data: use a data, v, flow or edm model.")
    check_positive("sigma_data", sigma_data)
    share = sigma_data if control_variate and isinstance(variance, str) else 0.0
    rev = rev.given(**condition) if condition else rev
    run = _Run(rev, x.detach(), as_draw(rng, x.detach()), levels, share, batch_rows)
    with torch.no_grad():
        if isinstance(rev.law, Chain):
            return _of_chain(run, rev.law, times, draws, variance)
        assert isinstance(rev.law, SDE) and times is not None
        return _of_sde(run, rev.law, times, draws)


def _check_middles(spec: DataSpec, x: Tensor) -> None:
    """Raise unless x are the middles of bins."""
    k = x.double() * spec.scale + spec.shift - 0.5
    assert spec.levels is not None
    if bool(((k - k.round()).abs() > 0.02).any()) or bool((k.round() < 0).any() | (k.round() >= spec.levels).any()):
        raise ValueError(
            f"With {spec.levels} levels `x` must be the middles of the bins, data_spec.encode(data): these are other "
            "values (dequantized, or scaled otherwise?)."
        )


@dataclass
class _Run:
    """Data, noise, and batches of evaluations."""

    rev: ReverseSDE
    x: Tensor
    draw: Draw
    levels: DataSpec | None
    sigma_data: float
    batch_rows: int

    def scatter(self, knot: Knot, noise: Tensor) -> Tensor:
        """c^2 (eps^2 - 1), float64, of mean zero."""
        signal, sigma = (torch.as_tensor(k).double() for k in (knot.alpha * self.sigma_data, knot.sigma))
        c = signal.square() / (signal.square() + sigma.square())
        return c.square().to(noise.device) * (noise.double().square() - 1.0)

    def squared_error(self, prediction: Prediction, noise: Tensor) -> Tensor:
        """(eps - eps_hat)^2 less its control variate, float64."""
        return (prediction.noise - noise).double().square() - self.scatter(prediction.knot, noise)

    def uniform(self, j: int) -> Tensor:
        """The j-th uniform numbers, (B,) in [0, 1), float64; a draw of the state's shape holds D of them."""
        d = self.x[0].numel()
        normal = self.draw.normal("time", j // d).reshape(len(self.x), -1)[:, j % d]
        return torch.special.ndtr(normal.double()).clamp(max=1 - 1e-12)

    def at(self, places: list[Tensor], *key: Any) -> Iterator[tuple[slice, Tensor, Prediction]]:
        """Predictions at alpha x + sigma eps for times or levels (B,), in batches: (which, eps, prediction)."""
        x, b, law = self.x, len(self.x), self.rev.law
        together = max(1, self.batch_rows // b)
        for low in range(0, len(places), together):
            part = places[low : low + together]
            noise = torch.cat([self.draw.normal(*key, low + j) for j in range(len(part))])
            rows = torch.arange(b, device=x.device).repeat(len(part))
            knot = law.knot(torch.cat(part), x.ndim)
            alpha, sigma = (torch.as_tensor(c).to(x.dtype) for c in (knot.alpha, knot.sigma))
            state = alpha * x[rows] + sigma * noise
            found = [
                self.rev.select(rows[r])(state[r], knot.select(r))
                for r in torch.arange(len(rows), device=x.device).split(self.batch_rows)
            ]
            raw = torch.cat([prediction.raw for prediction in found])
            yield slice(low, low + len(part)), noise, Prediction(state, knot, raw, found[0].parameterization)


def _sum(x: Tensor) -> Tensor:
    """Over the elements of a sample, float64."""
    return x.reshape(len(x), -1).sum(1, dtype=torch.float64)


def _prior(x: Tensor, knot: Knot, std: float) -> Tensor:
    """KL(N(alpha x, sigma^2 I) || N(0, std^2 I)), (B,)."""
    d, ratio = x[0].numel(), (float(knot.sigma) / std) ** 2
    return 0.5 * ((float(knot.alpha) / std) ** 2 * _sum(x.double().square()) + d * (ratio - 1.0 - math.log(ratio)))


@dataclass
class _Variances:
    """Independent estimates of variances, (k, B), that add up, and the degrees of freedom of each, (k,)."""

    values: Tensor
    dof: Tensor

    @classmethod
    def of_means(cls, values: Tensor) -> _Variances:
        """Of the means of equal draws, (k, n, B)."""
        k, n = values.shape[:2]
        return cls(values.var(1) / n, torch.full((k,), n - 1.0, dtype=torch.float64, device=values.device))

    def __add__(self, other: _Variances) -> _Variances:
        return _Variances(torch.cat([self.values, other.values]), torch.cat([self.dof, other.dof]))

    def sum(self) -> tuple[Tensor, Tensor]:
        """The variance of the sum, (B,), and its degrees of freedom (`satterthwaite`)."""
        return self.values.sum(0), satterthwaite(self.values, self.dof[:, None])


def _bound(run: _Run, parts: tuple[Tensor, Tensor, Tensor], variances: _Variances, nfe: int, what: str) -> Bound:
    reconstruction, diffusion, prior = (p.cpu() for p in parts)
    total = reconstruction + diffusion + prior
    calls = torch.full(total.shape, nfe * run.rev.nfe_per_call, dtype=torch.int64)
    variance, dof = variances.sum()
    return Bound(total, variance.sqrt().cpu(), dof.cpu(), reconstruction, diffusion, prior, calls, what)


# --- continuous time -------------------------------------------------------------------------------------------------


def _of_sde(run: _Run, law: SDE, times: int, draws: int) -> Bound:
    x, b = run.x, len(run.x)
    first, last = law.knot(law.t_min), law.knot(law.drift_t_max)
    span = float(first.half_log_snr) - float(last.half_log_snr)
    width = span / (times // 2)
    places = []
    for j in range(times):
        lam = float(last.half_log_snr) + width * (j // 2 + run.uniform(j))
        places.append(torch.as_tensor(law.time_at(lam)).clamp(law.t_min, law.drift_t_max))
    errors = torch.empty(times, b, dtype=torch.float64, device=x.device)
    for which, noise, prediction in run.at(places, "noise"):
        errors[which] = _sum(run.squared_error(prediction, noise)).reshape(-1, b)
    pairs = errors.reshape(-1, 2, b)
    diffusion = width * pairs.mean(1).sum(0)
    decoded, calls = _decoder(run, law, first, draws)
    prior = _prior(x, last, law.prior_std)
    of = "-log P of the integers" if run.levels else "-log p"
    what = f"variational bound on {of} in continuous time, from t = {law.t_min:g} to {law.drift_t_max:g}"
    variances = _Variances.of_means(width * pairs) + _Variances.of_means(decoded[None])
    return _bound(run, (decoded.mean(0), diffusion, prior), variances, times + calls, what)


def _decoder(run: _Run, law: SDE, first: Knot, draws: int) -> tuple[Tensor, int]:
    """-log p(x | x_0) at draws of x_0, (draws, B), and the calls made."""
    x, b = run.x, len(run.x)
    std = math.exp(-float(first.half_log_snr))
    values = torch.empty(draws, b, dtype=torch.float64, device=x.device)
    if run.levels is not None:
        for j in range(draws):
            y = x.double() + std * run.draw.normal("decoder", j).double()
            values[j] = -_sum(_softmax(run.levels, y, x, std))
    else:
        places = [torch.full((b,), law.t_min, dtype=torch.float64, device=x.device)] * draws
        constant = x[0].numel() * (math.log(std) + 0.5 * math.log(2.0 * math.pi))
        for which, noise, prediction in run.at(places, "decoder"):
            # the prediction's distance from x is std (eps - eps_hat)
            values[which] = (0.5 * _sum(run.squared_error(prediction, noise)) + constant).reshape(-1, b)
    return values, 0 if run.levels is not None else draws


def _softmax(spec: DataSpec, y: Tensor, x: Tensor, std: float) -> Tensor:
    """log P(k | y) per element, with P(k | y) in proportion to N(y; x_k, std^2), at the level whose middle is x."""
    assert spec.levels is not None
    total = torch.full_like(y, -math.inf)
    for k in range(spec.levels):
        middle = (k + 0.5 - spec.shift) / spec.scale
        total = torch.logaddexp(total, -0.5 * ((y - middle) / std).square())
    return -0.5 * ((y - x.double()) / std).square() - total


# --- a chain ---------------------------------------------------------------------------------------------------------


def _of_chain(run: _Run, chain: Chain, times: int | None, draws: int, variance: Variance) -> Bound:
    x, b = run.x, len(run.x)
    zero = torch.zeros(b, dtype=torch.int64, device=x.device)
    m = chain.n - 1
    twice = m if m <= HEAD + 1 else HEAD  # a single level left over would have no neighbour
    cells = [[i] for i in range(1, chain.n)]
    if times is None:
        counts = [2] * twice + [1] * (m - twice)
    elif times >= 2 * m:
        counts = [times // m] * m
    else:
        cells = _cells(chain, times // 2)
        counts = [2] * len(cells)
    steps: list[Tensor] = []
    for cell in [cell for cell, count in zip(cells, counts, strict=True) for _ in range(count)]:
        inside = (run.uniform(len(steps)) * len(cell)).long().clamp(max=len(cell) - 1) if len(cell) > 1 else zero
        steps.append(cell[0] + inside)
    kl = torch.empty(len(steps), b, dtype=torch.float64, device=x.device)
    for which, noise, prediction in run.at(steps, "noise"):
        kl[which] = _step_kl(run, chain, prediction, noise, variance).reshape(-1, b)
    if times is None:
        head, rest = kl[: 2 * twice].reshape(twice, 2, b), kl[2 * twice :]
        diffusion = head.mean(1).sum(0) + rest.sum(0)
        variances = _Variances.of_means(head)
        variances = variances + _from_neighbours(rest) if len(rest) else variances
    else:
        sizes = torch.tensor([float(len(cell)) for cell in cells], dtype=kl.dtype, device=kl.device)[:, None]
        equal = sizes[:, None] * kl.reshape(len(cells), -1, b)
        diffusion, variances = equal.mean(1).sum(0), _Variances.of_means(equal)
    decoded = torch.empty(draws, b, dtype=torch.float64, device=x.device)
    for which, noise, prediction in run.at([zero] * draws, "decoder"):
        decoded[which] = -_sum(_decoded(run, chain, prediction, noise, variance)).reshape(-1, b)
    prior = _prior(x, chain.levels[-1], chain.prior_std)
    of = "-log P of the integers" if run.levels else "-log p"
    what = f"variational bound on {of} of a chain of {chain.n} steps"
    variances = variances + _Variances.of_means(decoded[None])
    return _bound(run, (decoded.mean(0), diffusion, prior), variances, len(steps) + draws, what)


def _from_neighbours(kl: Tensor) -> _Variances:
    r"""Variances of the sum over levels from one draw of each, (m, B).

    Four neighbours at a time: :math:`(k_1 - k_2 - k_3 + k_4)^2` has no part of a trend that is linear over them, and
    its expectation is :math:`v_1 + v_2 + v_3 + v_4` otherwise, so every level's variance counts once, those of the ends
    too. (Squared second differences, :math:`(k_1 - 2 k_2 + k_3)^2 / 6`, count the first and last level a sixth.) Up to
    three that are left over at the noisy end give their sample variance. What a trend leaves adds to it.
    """
    m = len(kl)
    values, dof = [], []
    sizes = [4] * (m // 4) + [m % 4] * (m % 4 > 0)
    if m % 4 == 1 and m > 1:
        sizes[-2:] = [2, 3]
    for part in kl.split(sizes):
        four = len(part) == 4
        values.append((part[0] - part[1] - part[2] + part[3]).square() if four else len(part) * part.var(0))
        dof.append(1.0 if four else len(part) - 1.0)
    return _Variances(torch.stack(values), torch.tensor(dof, dtype=kl.dtype, device=kl.device))


def _cells(chain: Chain, count: int) -> list[list[int]]:
    """The levels from 1 up in at most `count` cells of equal range in lambda: near the data a cell holds one level."""
    lams = [float(level.half_log_snr) for level in chain.levels]
    if math.isinf(lams[-1]):  # alpha = 0
        lams[-1] = 2.0 * lams[-2] - lams[-3] if len(lams) > 2 else lams[0] - 1.0
    cells: dict[int, list[int]] = {}
    for i in range(1, chain.n):
        place = (lams[0] - lams[i]) / (lams[0] - lams[-1])
        cells.setdefault(max(0, math.ceil(place * count - 1e-9) - 1), []).append(i)
    return list(cells.values())


def _log_variance(run: _Run, chain: Chain, prediction: Prediction, variance: Variance) -> Tensor:
    """Of the model's step from the prediction's level, shaped to go with the state, float64."""
    knot, x = prediction.knot, prediction.x
    if not isinstance(variance, str):
        learned = variance(x, knot)
        if learned.shape != x.shape:
            raise ValueError(f"`variance` must return a log variance like x, {tuple(x.shape)}, got {learned.shape}.")
        return learned.double()
    index = torch.as_tensor(knot.index)
    if variance == "small":
        table = torch.cat([chain.posterior_std[1:2].square(), chain.posterior_std[1:].square()])
    elif run.levels is None:
        table = chain.betas
    else:
        table = torch.cat([chain.posterior_std[1:2].square(), chain.betas[1:]])
    return table.to(x.device)[index].log()


def _square(run: _Run, prediction: Prediction, noise: Tensor) -> Tensor:
    """(x - x_hat)^2 less its control variate, float64; x_hat - x = (sigma / alpha) (eps - eps_hat)."""
    knot, repeat = prediction.knot, len(prediction.x) // len(run.x)
    x = run.x.repeat(repeat, *[1] * (run.x.ndim - 1)).double()
    alpha, sigma = torch.as_tensor(knot.alpha).double(), torch.as_tensor(knot.sigma).double()
    ratio = torch.where(alpha > 0, sigma / alpha, 0.0).to(x.device)
    return (x - prediction.data.double()).square() - ratio.square() * run.scatter(knot, noise)


def _step_kl(run: _Run, chain: Chain, prediction: Prediction, noise: Tensor, variance: Variance) -> Tensor:
    """KL of the posterior of the step from the prediction's level against the model's, (rows,)."""
    index = torch.as_tensor(prediction.knot.index)
    weight, std = (table.to(noise.device)[index] for table in (chain.posterior_x_0, chain.posterior_std))
    log_model, log_true = _log_variance(run, chain, prediction, variance), 2.0 * std.log()
    off = weight.square() * _square(run, prediction, noise)
    terms = log_model - log_true - 1.0 + torch.exp(log_true - log_model) + off * torch.exp(-log_model)
    return 0.5 * _sum(terms.expand_as(off))


def _decoded(run: _Run, chain: Chain, prediction: Prediction, noise: Tensor, variance: Variance) -> Tensor:
    """log p(x | x_0) per element: of the density, or of the bin whose middle is x."""
    log_variance = _log_variance(run, chain, prediction, variance)
    if run.levels is None:
        square = _square(run, prediction, noise)
        return -0.5 * (square * torch.exp(-log_variance) + log_variance + math.log(2.0 * math.pi))
    spec, mean = run.levels, prediction.data.double()
    x = run.x.repeat(len(mean) // len(run.x), *[1] * (run.x.ndim - 1)).double()
    std = torch.exp(0.5 * log_variance).expand_as(mean)
    assert spec.levels is not None
    half, k = 0.5 / spec.scale, (x * spec.scale + spec.shift).floor()
    low, high = (x - half - mean) / std, (x + half - mean) / std
    low = torch.where(k <= 0, -math.inf, low)
    high = torch.where(k >= spec.levels - 1, math.inf, high)
    # both ends on the side where the tail is small: a difference of numbers near one would lose it
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log1p(-torch.exp(lower - upper))


# --- data sets -------------------------------------------------------------------------------------------------------


@dataclass
class DataBound:
    """Bits per dimension of a data set by the variational bound.

    Attributes:
        mean: over the samples.
        standard_error: of the mean, over samples; it contains the noise of times and draws.
        per_sample: (N,), float64, in bits/dim, as are the following.
        sample_error: standard error of each.
        reconstruction: the decoder's part.
        diffusion: the path's part.
        prior: the prior's part.
        nfe: network evaluations per sample, (N,).
        what: a sentence that says what the figure is.
    """

    mean: float
    standard_error: float
    per_sample: Tensor
    sample_error: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    prior: Tensor
    nfe: Tensor
    what: str

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.standard_error:.4f} bits/dim ({self.what})"

    def summary(self) -> dict[str, Any]:
        """All but the figures per sample, ready for JSON."""
        parts = {name: float(getattr(self, name).mean()) for name in ("reconstruction", "diffusion", "prior")}
        return {
            "mean": self.mean,
            "standard_error": self.standard_error,
            **parts,
            "nfe_per_sample": float(self.nfe.double().mean()),
            "count": len(self.per_sample),
            "what": self.what,
        }


def elbo_of_data(
    model: ScoreModel,
    data: Tensor,
    *,
    labels: Tensor | None = None,
    dequantization: str = "auto",
    batch_size: int = 256,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> DataBound:
    """Bits per dimension of a data set by `elbo`: of integers where the data have levels, else of the density.

    Args:
        model: a score model on an SDE or a chain, with a data specification.
        data: (N, *D) in data units, checked. All are scored, in batches.
        labels: class labels (N,) for a conditional model.
        dequantization: of integers: "none" bounds -log P with the discrete decoder, from the middles of the bins;
            "uniform" bounds the density at k + u, u uniform, whose average bounds -log P too; "auto": the former
            where the noise at t_min is at least a quarter of a bin wide. A model that was trained on dequantized data
            has spread its mass over the bins, and narrow noise about their middles leaves out most of it.
        batch_size: samples per batch; results do not depend on it.
        seed: noise; sample i draws from the stream of seed and i alone.
        progress: progress bar; on a terminal by default.
        **options: of `elbo` (times, draws, variance).

    Raises:
        TypeError: for what is no score model, an option that there is not, labels or data that are no tensor.
        ValueError: for data that do not fit the specification, or a model without one.
    """
    if not isinstance(model, ScoreModel):
        raise TypeError(f"elbo_of_data needs a ScoreModel, got {type(model).__name__} (see elbo).")
    check_options("elbo_of_data", elbo, options, ("rev", "x", "data_spec", "rng", "condition"))
    check_count("batch_size", batch_size)
    spec = model.data_spec
    if spec is None:
        raise ValueError("elbo_of_data needs a model with a data_spec: shape, scaling and levels of the data.")
    if len(data) == 0:
        raise ValueError("`data` is empty.")
    spec.check(data)
    check_labels(spec, labels, len(data))
    if dequantization not in ("auto", "none", "uniform"):
        raise ValueError(f"`dequantization` must be auto, none or uniform, got {dequantization!r}.")
    law = model.law
    if dequantization == "auto":
        first = law.levels[0] if isinstance(law, Chain) else law.knot(law.t_min)
        dequantization = "none" if spec.scale * math.exp(-float(first.half_log_snr)) >= AUTO else "uniform"
    discrete = spec.levels is not None and dequantization == "none"
    rev, bounds = model.reverse(), []
    with tqdm(
        total=len(data), desc="elbo", unit="sample", disable=None if progress is None else not progress, file=sys.stderr
    ) as bar:
        for low in range(0, len(data), batch_size):
            part = slice(low, low + batch_size)
            batch = data[part].to(model.device)
            rng = PerSample([seed * 2**32 + low + i for i in range(len(batch))])
            u = None
            if spec.levels is not None and not discrete:
                like = torch.empty(batch.shape, dtype=torch.float64, device=batch.device)
                u = torch.special.ndtr(rng.bind(like).normal("dequant"))
            x = spec.encode(batch, u, dtype=torch.float64).to(model.dtype)
            condition = {} if labels is None else {"class_label": labels[part].to(model.device)}
            given = {"sigma_data": model.sigma_data, **options}
            bounds.append(
                elbo(rev, x, data_spec=spec if discrete else None, rng=rng, condition=condition, **given)
            )
            bar.update(len(x))
    bits = spec.dims * math.log(2.0)
    jacobian = 0.0 if discrete else spec.dims * math.log(spec.scale)
    column = {
        name: torch.cat([getattr(bound, name) for bound in bounds]) / bits
        for name in ("nats", "standard_error", "reconstruction", "diffusion", "prior")
    }
    figures = column["nats"] + jacobian / bits
    dequantized = "" if discrete or spec.levels is None else f", {spec.levels} levels dequantized uniformly"
    return DataBound(
        mean=float(figures.mean()),
        standard_error=float(figures.std() / math.sqrt(len(figures))) if len(figures) > 1 else math.nan,
        per_sample=figures,
        sample_error=column["standard_error"],
        reconstruction=column["reconstruction"] + jacobian / bits,
        diffusion=column["diffusion"],
        prior=column["prior"],
        nfe=torch.cat([bound.nfe for bound in bounds]),
        what=bounds[0].what + dequantized,
    )
