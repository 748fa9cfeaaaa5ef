r"""What a score network says at one time, and every view of it.

A network may be trained to output the noise, the data, the score, v, the flow or EDM's target. All of them are
linear in the pair (E[x_0 | x], E[eps | x]), with weights that depend on the time only. A `Parameterization` is such a
pair of weights. It names what a network outputs, what a view shows, what an exponential solver interpolates
(`solvers.exponential`) and how fast the state moves along a coordinate (`solvers.coordinates`). With

.. math:: F = p\, \hat x_0 + q\, \hat\epsilon, \qquad x = \alpha \hat x_0 + \sigma \hat\epsilon,

so any wanted combination :math:`G = a\, \hat x_0 + b\, \hat\epsilon` is a weighted sum of x and F,

.. math:: G = \frac{(a q - b p)\, x + (\alpha b - \sigma a)\, F}{\alpha q - \sigma p},

without passing through a third quantity: the score of a data prediction, or the data of a v prediction, loses no
digits at either end of time. A DDIM step is the same formula with (a, b) = (alpha_s, sigma_s).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sde_lib._checks import check_positive
from sde_lib._math import Real
from sde_lib.knot import Knot, state_std


class Parameterization:
    """A quantity F = p x_0 + q eps, such as what the raw output of a network stands for."""

    def coefficients(self, knot: Knot) -> tuple[Real, Real]:
        """(p, q) at a knot."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoisePrediction(Parameterization):
    """F = eps (Ho et al. 2020)."""

    def coefficients(self, knot: Knot) -> tuple[Real, Real]:
        return 0.0, 1.0


@dataclass(frozen=True)
class DataPrediction(Parameterization):
    """F = E[x_0 | x]."""

    def coefficients(self, knot: Knot) -> tuple[Real, Real]:
        return 1.0, 0.0


@dataclass(frozen=True)
class ScorePrediction(Parameterization):
    """F = grad log p_t = -eps / sigma (Song et al. 2021, arXiv:2011.13456)."""

    def coefficients(self, knot: Knot) -> tuple[Real, Real]:
        return 0.0, -1.0 / knot.sigma


@dataclass(frozen=True)
class VPrediction(Parameterization):
    """F = v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv:2202.00512)."""

    def coefficients(self, knot: Knot) -> tuple[Real, Real]:
        return -knot.sigma, knot.alpha


@dataclass(frozen=True)
class FlowPrediction(Parameterization):
    """F = eps - x_0 (rectified flow; Liu et al. 2022, arXiv:2209.03003, with t = 0 at the data)."""

    def coefficients(self, knot: Knot) -> tuple[Real, Real]:
        return -1.0, 1.0


@dataclass(frozen=True)
class UnitVPrediction(Parameterization):
    r"""v of unit variance: :math:`F = (\alpha \sigma_d\, \epsilon - \sigma x_0 / \sigma_d) / r` with
    :math:`r^2 = \sigma^2 + \alpha^2 \sigma_d^2`. v itself where alpha^2 + sigma^2 = 1 and sigma_data = 1; dy/dtheta of
    `solvers.Angle`.

    Args:
        sigma_data: standard deviation of the data in model units, > 0.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_positive("sigma_data", self.sigma_data)

    def coefficients(self, knot: Knot) -> tuple[Real, Real]:
        r = state_std(knot, self.sigma_data)
        return -knot.sigma / (r * self.sigma_data), knot.alpha * self.sigma_data / r


@dataclass(frozen=True)
class EDMPrediction(UnitVPrediction):
    r"""Karras et al. 2022, arXiv:2206.00364, Table 1: D = c_skip y + c_out F in y = x / alpha.

    This is :math:`F = (\sigma x_0 / \sigma_d - \alpha \sigma_d\, \epsilon) / r`, the negative of `UnitVPrediction`: a
    target of unit variance at every noise level when the data have standard deviation `sigma_data`.

    Args:
        sigma_data: standard deviation of the data in model units, > 0.
    """

    sigma_data: float = 0.5

    def coefficients(self, knot: Knot) -> tuple[Real, Real]:
        p, q = super().coefficients(knot)
        return -p, -q


@dataclass(frozen=True)
class Velocity(Parameterization):
    """F = dx/dt = alpha' x_0 + sigma' eps, the velocity of the probability-flow ODE. Raises ValueError on a chain."""

    def coefficients(self, knot: Knot) -> tuple[Real, Real]:
        return knot.rates


PARAMETERIZATIONS: Mapping[str, type[Parameterization]] = {
    "noise": NoisePrediction,
    "data": DataPrediction,
    "score": ScorePrediction,
    "v": VPrediction,
    "flow": FlowPrediction,
    "edm": EDMPrediction,
}
"""What networks may output, by name."""

_DATA, _NOISE, _SCORE = DataPrediction(), NoisePrediction(), ScorePrediction()
_V, _FLOW, _VELOCITY = VPrediction(), FlowPrediction(), Velocity()


def weighted_sum(x: Tensor, a: Real, y: Tensor, b: Real) -> Tensor:
    """a x + b y; float weights ride along as scalars, per-sample weights are cast to the state's dtype."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a = a.to(x.dtype) if isinstance(a, Tensor) else a
        b = b.to(x.dtype) if isinstance(b, Tensor) else b
        return a * x + b * y
    if a == 0.0:
        return y if b == 1.0 else y * b
    return (x * a).add_(y, alpha=b)


class Prediction:
    """The raw output F of one network call at (x, knot), with its views computed when asked.

    Attributes:
        x: state, shape (B, *D).
        knot: the time it was evaluated at.
        raw: network output in the dtype of `x`, shape (B, *D).
        parameterization: what `raw` stands for.
    """

    __slots__ = ("_pq", "knot", "parameterization", "raw", "x")

    def __init__(self, x: Tensor, knot: Knot, raw: Tensor, parameterization: Parameterization) -> None:
        if not isinstance(raw, Tensor) or raw.shape != x.shape:
            got = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(f"The network must answer with a tensor in its state's shape {tuple(x.shape)}, got {got}.")
        self.x, self.knot, self.parameterization = x, knot, parameterization
        self.raw = raw if raw.dtype == x.dtype else raw.to(x.dtype)
        self._pq = parameterization.coefficients(knot)

    def weights(self, data: Real, noise: Real) -> tuple[Real, Real]:
        """Weights (of x, of raw) that give `data` x_0 + `noise` eps."""
        p, q = self._pq
        alpha, sigma = self.knot.alpha, self.knot.sigma
        det = alpha * q - sigma * p
        if isinstance(det, float) and det == 0.0:
            name = type(self.parameterization).__name__
            raise ValueError(
                f"{name} does not determine the data at alpha = {alpha}, sigma = {sigma} (t = {self.knot.t}): "
                "start at a time with alpha > 0, or use a data, v, flow or edm parameterization."
            )
        return (data * q - noise * p) / det, (alpha * noise - sigma * data) / det

    def mix(self, data: Real, noise: Real) -> Tensor:
        """`data` E[x_0 | x] + `noise` E[eps | x] as one weighted sum of x and the raw output."""
        a, b = self.weights(data, noise)
        return weighted_sum(self.x, a, self.raw, b)

    def view(self, quantity: Parameterization) -> Tensor:
        """Any quantity p x_0 + q eps at this knot."""
        return self.mix(*quantity.coefficients(self.knot))

    @property
    def data(self) -> Tensor:
        """E[x_0 | x_t = x]."""
        return self.view(_DATA)

    @property
    def noise(self) -> Tensor:
        """E[eps | x_t = x] = -sigma score."""
        return self.view(_NOISE)

    @property
    def score(self) -> Tensor:
        """grad_x log p_t(x)."""
        return self.view(_SCORE)

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x_0."""
        return self.view(_V)

    @property
    def flow(self) -> Tensor:
        """eps - x_0."""
        return self.view(_FLOW)

    @property
    def velocity(self) -> Tensor:
        r"""dx/dt of the probability-flow ODE.

        :math:`f x - \tfrac12 g^2 \nabla\log p_t = \alpha' x_0 + \sigma' \epsilon`; the second form is the one
        computed, for it is finite where f and g are not.

        Song et al. 2021, eq. 13. Raises ValueError on a chain, which has no continuous time.
        """
        return self.view(_VELOCITY)

    @property
    def drift(self) -> Tensor:
        r"""Drift of the reverse SDE, :math:`f x - g^2 \nabla\log p_t` (Song et al. 2021, eq. 6).

        Raises ValueError on a chain, which has no continuous time.
        """
        f, g2 = self.knot.f, self.knot.g2
        return self.mix(f * self.knot.alpha, f * self.knot.sigma + g2 / self.knot.sigma)

    def replace(self, raw: Tensor, parameterization: Parameterization | None = None) -> Prediction:
        """The same point with another output: what guidance and clipping return."""
        return Prediction(self.x, self.knot, raw, parameterization or self.parameterization)
