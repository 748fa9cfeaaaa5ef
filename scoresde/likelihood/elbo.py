r"""Variational bounds on -log p: of the reverse SDE in continuous time, and of a chain (DDPM).

Both are a KL of the whole forward path against the reverse one, and have three parts: the noisiest level against the
prior, the path, and a decoder from the cleanest level to the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scoresde.codecs import Affine, Codec
from scoresde.data.spec import DataSpec
from scoresde.likelihood.bins import Bins
from scoresde.likelihood.bound import Bound, Run
from scoresde.likelihood.bound_chain import Variance, bound_of_chain
from scoresde.likelihood.bound_sde import bound_of_sde
from scoresde.likelihood.doors import check_density
from sde_lib import SDE, Chain, NoisePrediction, ReverseSDE, ScorePrediction
from sde_lib._checks import check_positive, check_state
from solvers.noise import Rng, as_draw

VARIANCES = ("small", "large")


def elbo(
    rev: ReverseSDE,
    x: Tensor,
    *,
    times: int | None = 128,
    draws: int = 8,
    data_spec: DataSpec | None = None,
    codec: Codec | None = None,
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
        rev: reverse SDE, or of a chain, under the score of a density.
        x: states without noise, in model units, (B, *D); the middles of the bins, ``model.encode(data)``, for integers.
        times: network evaluations of the path per sample, even; on a chain at most so many: equally many, at least
            two, at every level where that is enough, otherwise two in each cell of equal range in lambda. None takes
            every level of a chain once, the first four twice; the standard error then comes from the differences of
            neighbours (see `Variances.from_neighbours`), and is too large where they differ by more than their noise.
        draws: noise draws of the decoder, >= 2.
        data_spec: with levels: bound -log P of the integers instead of -log p.
        codec: how the integers became x, with `data_spec`: one under which independent noise of a state is independent
            noise of the data (a scale of every element, or one for all and a rotation); the default one of `data_spec`
            if None.
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
        TypeError, ValueError: for arguments that do not fit together, or what is no density's (`rev.describes`).
    """
    if not isinstance(rev, ReverseSDE):
        raise TypeError(f"`rev` must be a ReverseSDE (model.reverse()), got {type(rev).__name__}.")
    check_density("elbo", rev)
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
    bins = None
    if data_spec is not None and data_spec.levels is not None:
        learned = not isinstance(variance, str)
        bins = Bins.of(data_spec, Affine.fit(data_spec) if codec is None else codec, learned)
        bins.check_middles(x)
    last = rev.law.levels[-1] if isinstance(rev.law, Chain) else None
    if last is not None and last.alpha == 0.0 and isinstance(rev.parameterization, NoisePrediction | ScorePrediction):
        raise ValueError("At alpha = 0 the noise says nothing about the data: use a data, v, flow or edm model.")
    check_positive("sigma_data", sigma_data)
    share = sigma_data if control_variate and isinstance(variance, str) else 0.0
    rev = rev.given(**condition) if condition else rev
    run = Run(rev, x.detach(), as_draw(rng, x.detach()), bins, share, batch_rows)
    with torch.no_grad():
        if isinstance(rev.law, Chain):
            return bound_of_chain(run, rev.law, times, draws, variance)
        assert isinstance(rev.law, SDE) and times is not None
        return bound_of_sde(run, rev.law, times, draws)
