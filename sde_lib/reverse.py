"""The reverse of a forward law: the one thing solvers and likelihoods see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sde_lib.knot import Knot, Law
from sde_lib.prediction import PARAMETERIZATIONS, Parameterization, Prediction


class ReverseSDE:
    """A law together with a score model. Calling it is the only way a network is evaluated.

    Made by ``sde.reverse(score=fn)``, ``chain.reverse(noise=fn)`` or ``model.reverse()``; wrappers (guidance,
    clipping) are subclasses that return a changed `Prediction`.

    Args:
        law: SDE or chain.
        network: ``network(x, knot, **condition) -> Tensor`` of the shape of x.
        parameterization: what the network's output stands for.
        condition: keyword arguments of every network call. A tensor with dimensions has the batch first and is
            sliced along with it; scalars are shared.
    """

    nfe_per_call = 1
    """Network evaluations per sample that one call costs (guidance costs two)."""

    def __init__(
        self,
        law: Law,
        network: Callable[..., Tensor],
        parameterization: Parameterization,
        condition: Mapping[str, Any] | None = None,
    ) -> None:
        self.law = law
        self.network = network
        self.parameterization = parameterization
        self.condition = dict(condition or {})

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        """Evaluate the network at state x, shape (B, *D), and a knot (or a time, () or (B,))."""
        knot = t if isinstance(t, Knot) else self.law.knot(t, ndim=x.ndim)
        return Prediction(x, knot, self.network(x, knot, **self.condition), self.parameterization)

    def given(self, **condition: Any) -> ReverseSDE:
        """The same reverse SDE under (additional) conditions."""
        return ReverseSDE(self.law, self.network, self.parameterization, {**self.condition, **condition})

    def select(self, rows: Tensor) -> ReverseSDE:
        """The reverse SDE of some rows of the batch: slices every condition that is a tensor with dimensions."""
        if not self.condition:
            return self
        return self.given(
            **{k: v[rows] if isinstance(v, Tensor) and v.ndim else v for k, v in self.condition.items()}
        )


def reverse_from_function(
    law: Law, call: Callable[..., Callable[..., Tensor]], options: Mapping[str, Any]
) -> ReverseSDE:
    """Body of `SDE.reverse` and `Chain.reverse`: exactly one of the parameterizations names the function.

    Args:
        law: SDE or chain.
        call: turns the user's function into one of (x, knot, **condition).
        options: e.g. ``{"score": fn}`` or ``{"edm": fn, "sigma_data": 0.5}``.
    """
    named = [k for k in options if k in PARAMETERIZATIONS]
    if len(named) != 1:
        raise ValueError(
            f"reverse() takes exactly one of {', '.join(PARAMETERIZATIONS)} as a function of (x, t), "
            f"e.g. sde.reverse(score=fn); got {', '.join(options) or 'nothing'}."
        )
    name = named[0]
    fn = options[name]
    if not callable(fn):
        raise TypeError(f"`{name}` must be a function of (x, t) that returns a tensor like x, got {type(fn).__name__}.")
    rest = {k: v for k, v in options.items() if k != name}
    try:
        parameterization = PARAMETERIZATIONS[name](**rest)
    except TypeError as error:
        raise TypeError(f"reverse({name}=…) got unknown option(s) {', '.join(rest)}.") from error
    return ReverseSDE(law, call(fn), parameterization)
