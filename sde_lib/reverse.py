"""The reverse of a forward law: the one thing solvers and likelihoods see."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sde_lib._checks import as_number, lookup
from sde_lib.knot import Knot, Law, compilable
from sde_lib.noise_levels import NOISE_LEVELS
from sde_lib.prediction import PARAMETERIZATIONS, Parameterization, Prediction

DESCRIBES = ("density", "guided", "map")
"""What a reverse is a model of: "density", the score of a law p_t, which has a likelihood; "guided", a field that pulls
samples somewhere, and is the score of no law; "map", a map from noise to data."""


class Reverse:
    """Base: a law, to be run backwards under conditions. What `solve` carries a state along.

    Args:
        law: the forward law.
        condition: keyword arguments of every network call. A tensor with dimensions has the batch first, at every depth
            of nested mappings, and is sliced along with it; tensors without dimensions and everything else are shared.
    """

    nfe_per_call: int = 1
    """Network evaluations per sample that one call costs (guidance costs two)."""
    describes: str = "density"
    """One of `DESCRIBES`: likelihoods and bounds are defined for a density only."""
    per_row: ClassVar[tuple[str, ...]] = ()
    """Names of a subclass's attributes that hold one entry per sample, as conditions do: `select` slices them. Added to
    those of its base classes."""

    def __init__(self, law: Law, condition: Mapping[str, Any] | None = None) -> None:
        self.law = law
        self.condition = dict(condition or {})

    def given(self, **condition: Any) -> Self:
        """The same reverse under (additional) conditions."""
        return self._changed(condition={**self.condition, **condition})

    def nulls(self, n: int, device: torch.device | str | None = None) -> dict[str, Any]:
        """What stands for none of each condition, for n samples, by name: of the conditions whose null is known to be a
        value. Of others it is None: the network without the argument."""
        return {}

    def select(self, rows: Tensor) -> Self:
        """The reverse of some rows of the batch: slices conditions and the attributes named in `per_row`."""
        own = self._own(rows)
        if not self.condition and not own:
            return self
        return self._changed(condition=select_rows(self.condition, rows), **own)

    def _own(self, rows: Tensor) -> dict[str, Any]:
        """Some rows of the attributes that this class and its bases name in `per_row`."""
        named = [name for cls in type(self).__mro__ for name in cls.__dict__.get("per_row", ())]
        return {name: select_rows(getattr(self, name), rows) for name in named}

    def _changed(self, **attributes: Any) -> Self:
        """A shallow copy with other attributes: a subclass stays what it is."""
        changed = copy.copy(self)
        for name, value in attributes.items():
            setattr(changed, name, value)
        return changed


class ReverseSDE(Reverse):
    """A law together with a score model. Calling it is the only way a network is evaluated.

    Made by ``sde.reverse(score=fn)``, ``chain.reverse(noise=fn)`` or ``model.reverse()``. What changes its predictions
    (guidance, clipping) or watches them is a `Wrapper`.

    Args:
        law: SDE or chain.
        network: ``network(x, knot, **condition) -> Tensor`` of the shape of x.
        parameterization: what the network's output stands for.
        condition: see `Reverse`.
    """

    def __init__(
        self,
        law: Law,
        network: Callable[..., Tensor],
        parameterization: Parameterization,
        condition: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(law, condition)
        self.network = network
        self.parameterization = parameterization

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        """Evaluate the network at state x, shape (B, *D), and a knot (or a time, () or (B,))."""
        knot = t if isinstance(t, Knot) else knot_of(self.law, x, t)
        if torch.compiler.is_compiling() or x.is_inference():  # neither counts changes
            return Prediction(x, knot, self.network(x, knot, **self.condition), self.parameterization)
        before = x._version
        raw = self.network(x, knot, **self.condition)
        if x._version != before:
            raise ValueError(
                "The network changed its input in place, so the state it was asked about is lost: let it work on a "
                "copy (x = x.clone()), or use operations without a trailing underscore."
            )
        return Prediction(x, knot, raw, self.parameterization)


def knot_of(law: Law, x: Tensor, t: float | int | Tensor) -> Knot:
    """The knot of a state, (B, *D), and a time (an index on a chain), () or (B,), that a user gives.

    Raises:
        TypeError: if x is no floating-point tensor, or t neither a number nor a tensor.
        ValueError: if t is not finite or leaves [t_min, t_max], or its shape does not match the batch.
    """
    law.check_state(x, "x")
    if isinstance(t, Tensor):
        if t.ndim and t.shape != x.shape[:1]:
            raise ValueError(f"`t` must have shape () or (B,) with B = {x.shape[0]}, got {tuple(t.shape)}.")
    elif not torch.compiler.is_compiling():
        as_number("t", t)
    if law.has_time and not _traced(t):
        times = torch.as_tensor(t, dtype=torch.float64)
        # a float32 end is taken for the law's own
        inside = (times >= law.t_min * (1 - 1e-6)) & (times <= law.t_max * (1 + 1e-6))
        if not bool(inside.all()):
            wrong = times.reshape(-1)[~inside.reshape(-1)][0].item()
            raise ValueError(f"t = {wrong} lies outside [{law.t_min}, {law.t_max}], where this model is defined.")
    return law.knot(compilable(t, x), ndim=x.ndim)


def _traced(t: Any) -> bool:
    """Whether a look at the numbers in t would end a compilation, an export or the capture of a CUDA graph."""
    if torch.compiler.is_compiling():
        return True
    return isinstance(t, Tensor) and t.is_cuda and torch.cuda.is_current_stream_capturing()


class Wrapper(ReverseSDE):
    """A reverse SDE around another one: base of guidance, clipping, counters, timers.

    A subclass gives ``__call__(x, t)`` and asks ``self.inner(x, t)`` there; `given` and `select` return the same
    wrapper around the changed inner one. Attributes with one entry per sample are named in `per_row`. Copies are
    shallow: what they are to share, such as a count, is a mutable object. A guidance sets ``describes = "guided"``.

    Args:
        inner: what is wrapped.
    """

    def __init__(self, inner: ReverseSDE) -> None:
        if not isinstance(inner, ReverseSDE):
            raise TypeError(
                f"{type(self).__name__} goes around a reverse SDE (sde.reverse(score=fn) or model.reverse()), got "
                f"{type(inner).__name__}."
            )
        super().__init__(inner.law, inner.network, inner.parameterization, inner.condition)
        self.inner = inner
        self.nfe_per_call = inner.nfe_per_call
        stated = next(cls for cls in type(self).__mro__ if "describes" in cls.__dict__)
        if stated is Reverse:  # no class between says otherwise: what the inner one is a model of
            self.describes = inner.describes

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        return self.inner(x, t)

    def given(self, **condition: Any) -> Self:
        return self._around(self.inner.given(**condition))

    def nulls(self, n: int, device: torch.device | str | None = None) -> dict[str, Any]:
        return self.inner.nulls(n, device)

    def select(self, rows: Tensor) -> Self:
        return self._around(self.inner.select(rows), **self._own(rows))

    def _around(self, inner: ReverseSDE, **own: Any) -> Self:
        """The same wrapper around another reverse SDE."""
        if inner is self.inner and not own:
            return self
        return self._changed(inner=inner, condition=inner.condition, **own)


def select_rows(value: Any, rows: Tensor) -> Any:
    """Some rows of a condition: tensors with dimensions are indexed, mappings and sequences entered, the rest kept."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim else value
    if isinstance(value, Mapping):
        return {name: select_rows(v, rows) for name, v in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor | Mapping | list | tuple) for v in value):
        return [select_rows(v, rows) for v in value]
    return value


class FunctionOfLevel:
    """A user's ``fn(x, level, **condition)`` as a network of knots. A class, not a closure, so that it pickles.

    Args:
        fn: the function.
        level: the noise level it is called with, of the knot; if None the index for an int64 `dtype`, else the time (a
            continuous model walks a chain's knots by their times).
        dtype: of the level; the state's if None.
    """

    def __init__(
        self,
        fn: Callable[..., Tensor],
        level: Callable[[Knot], Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.fn, self.level, self.dtype = fn, level, dtype

    def __call__(self, x: Tensor, knot: Knot, **condition: Any) -> Tensor:
        if self.level is not None:
            value = self.level(knot)
        else:
            value = knot.index if self.dtype == torch.int64 else knot.t
        level = knot.spread(value, x, self.dtype)
        if torch.compiler.is_compiling():
            return self.fn(x, level, **condition)
        try:
            return self.fn(x, level, **condition)
        except (RuntimeError, IndexError) as error:  # torch's own words for a time that indexes a table
            text = str(error)
            if level.is_floating_point() and ("'indices'" in text or "used as indices" in text):
                raise TypeError(
                    "This network looks its noise level up in a table, so it takes the integer levels of a chain, not "
                    "continuous times: use sde.discretize(1000).reverse(…) with the number of levels it was trained "
                    f"on. ({text.splitlines()[0]})"
                ) from error
            raise


class LevelNamed:
    """A noise level by its name in `NOISE_LEVELS`, with the number of levels that index maps count."""

    def __init__(self, name: str, levels: int) -> None:
        self.name, self.levels = name, levels

    def __call__(self, knot: Knot) -> Any:
        return NOISE_LEVELS[self.name](knot, self.levels)


def reverse_from_function(law: Law, options: Mapping[str, Any]) -> ReverseSDE:
    """Body of `SDE.reverse` and `Chain.reverse`: exactly one of the parameterizations names the function.

    Args:
        law: SDE or chain.
        options: e.g. ``{"score": fn}`` or ``{"edm": fn, "sigma_data": 0.5}``; `condition` and `noise_level` too.
    """
    rest = dict(options)
    condition, noise_level = rest.pop("condition", None), rest.pop("noise_level", None)
    named = [k for k in rest if k in PARAMETERIZATIONS]
    if len(named) != 1:
        raise ValueError(
            f"reverse() takes exactly one of {', '.join(PARAMETERIZATIONS)} as a function of (x, t), "
            f"e.g. sde.reverse(score=fn); got {', '.join(rest) or 'nothing'}."
        )
    name = named[0]
    fn = rest.pop(name)
    if not callable(fn):
        raise TypeError(f"`{name}` must be a function of (x, t) that returns a tensor like x, got {type(fn).__name__}.")
    try:
        parameterization = PARAMETERIZATIONS[name](**rest)
    except TypeError as error:
        unknown = ", ".join(rest)
        raise TypeError(
            f"reverse({name}=…) got unknown option(s) {unknown}. Arguments of the network are conditions: "
            f"reverse({name}=…, condition={{…}}), or .given({next(iter(rest))}=…) on the result."
        ) from error
    if condition is not None and not isinstance(condition, Mapping):
        raise TypeError(f"`condition` must be a mapping of the network's arguments, got {type(condition).__name__}.")
    _check_arguments(name, fn)
    # an index on a chain, from either end, is an integer; every other level is a real number
    index = noise_level is None or (isinstance(noise_level, str) and noise_level.startswith("index"))
    dtype = torch.int64 if index and not law.has_time else None
    return ReverseSDE(law, FunctionOfLevel(fn, _level(law, noise_level), dtype), parameterization, condition)


def _check_arguments(name: str, fn: Callable[..., Any]) -> None:
    """Raise unless `fn` can be called with a state and a time; its other arguments are conditions, given later."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # of builtins, which do not say
        return
    try:
        signature.bind_partial(None, None)
    except TypeError as error:
        raise TypeError(f"`{name}` is called as fn(x, t, **condition), and takes {signature}: {error}.") from error


def _level(law: Law, noise_level: str | Callable[[Knot], Any] | None) -> Callable[[Knot], Any] | None:
    """The map from knots to noise levels that a user names."""
    if noise_level is None or (callable(noise_level) and not isinstance(noise_level, str)):
        return noise_level
    lookup(NOISE_LEVELS, noise_level, "noise_level")
    levels = law.index_levels
    if noise_level.startswith("index") and not levels:
        raise ValueError(
            f'noise_level="{noise_level}" counts levels, and {law!r} has none: use a chain, sde.discretize(n), its '
            "`index_at` on chain.continuous(), or a function of the knot."
        )
    return LevelNamed(noise_level, levels)
