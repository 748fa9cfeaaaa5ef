"""Noise as a value: bound once to a state, then asked for unit increments between knots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde_lib import Knot
from sde_lib import _math as m
from sde_lib._math import Real
from solvers import counter
from solvers.exponential import rescaled


class Draw:
    """Noise bound to the shape, dtype and device of a state.

    ``draw(t, s)`` is the unit increment of the driving noise between two knots: N(0, I), independent over disjoint
    intervals. ``draw.normal(key…)`` and ``draw.uniform(key…)`` are noise that belongs to no interval (prior,
    correctors, projections, tokens), named by a key: a word, then numbers. Where seeds are counted the same key names
    the same noise.

    A method that goes over its steps again (resampling, as in RePaint) takes its noise from ``draw.fork(key…)`` then,
    so that keys are fresh too.
    """

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        raise NotImplementedError

    def normal(self, *key: Any) -> Tensor:
        """Standard normal noise of the state's shape."""
        raise NotImplementedError

    def uniform(self, *key: Any) -> Tensor:
        """Uniform noise on [0, 1) of the state's shape; float32 for a state that is not floating point."""
        raise NotImplementedError

    def integer(self) -> int:
        """A seed for a library that takes one."""
        raise NotImplementedError

    def fork(self, *key: Any) -> Draw:
        """Noise independent of this one and of forks with other keys; the same for the same key where seeds are counted
        (`PerSample`, `BrownianPath`: another path)."""
        raise NotImplementedError

    def begin(self) -> None:
        """Makes this place the beginning that `restart` goes back to, at the start of a run: what came before it (the
        prior, another run) is not part of its replay. Nothing to do where noise is a function of its key alone."""

    def restart(self) -> Draw:
        """The same noise from its beginning, for a replay."""
        raise NotImplementedError


class Noise:
    """A source of noise. `bind` makes the `Draw` of one run."""

    def bind(self, x: Tensor) -> Draw:
        """Noise for a state like x, (B, *D)."""
        raise NotImplementedError


class Independent(Noise):
    """Independent draws from one generator for the whole batch: the fastest, and what an int seed means.

    Args:
        rng: an int seed (every bind starts anew), a `torch.Generator` (every bind goes on), or None (a seed is taken
            from torch's global generator, so `torch.manual_seed` rules).
    """

    def __init__(self, rng: int | torch.Generator | None = None) -> None:
        if isinstance(rng, int) and not -(2**63) <= rng < 2**64:
            raise ValueError(f"A seed must fit into 64 bits, got {rng}.")
        self.rng = rng

    def bind(self, x: Tensor) -> Draw:
        return _IndependentDraw(self.rng, x)


class _IndependentDraw(Draw):
    """The generator is made, or looked at, at the first draw: a run that draws nothing touches none."""

    def __init__(self, rng: int | torch.Generator | None, x: Tensor, state: Tensor | None = None) -> None:
        self.rng, self.like, self.state = rng, x, state
        self.generator: torch.Generator | None = None

    def _source(self) -> torch.Generator:
        if self.generator is None:
            if self.state is not None:  # a replay
                device = self.rng.device if isinstance(self.rng, torch.Generator) else self.like.device
                self.generator = torch.Generator(device).set_state(self.state)
            elif isinstance(self.rng, torch.Generator):
                self.generator = self.rng
            else:
                seed = int(torch.randint(2**62, ())) if self.rng is None else self.rng
                self.generator = torch.Generator(self.like.device).manual_seed(seed)
            self.state = self.generator.get_state()
        return self.generator

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        return self.normal()

    def normal(self, *key: Any) -> Tensor:
        like = self.like
        return torch.randn(like.shape, generator=self._source(), dtype=_floating(like), device=like.device)

    def uniform(self, *key: Any) -> Tensor:
        like = self.like
        return torch.rand(like.shape, generator=self._source(), dtype=_floating(like), device=like.device)

    def fork(self, *key: Any) -> Draw:
        """The same generator: it never says a number twice."""
        return self

    def integer(self) -> int:
        generator = self._source()
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))

    def begin(self) -> None:
        if self.generator is not None:  # else the first draw will note the state
            self.state = self.generator.get_state()

    def restart(self) -> Draw:
        return _IndependentDraw(self.rng, self.like, self.state)


class PerSample(Noise):
    """One seed per sample: sample i draws the same noise whatever the batch it is in.

    Normals come from a counter-based generator (`solvers.counter`): a function of (seed, key, element), the same on
    every device up to rounding, with no loop over samples and nothing that waits for a device, so that runs on it
    compile and can be captured. (Seeds that are no regular sequence are copied to the device by `bind`: call it before
    a capture.) An interval asked for again within a
    run gives fresh noise: how often it was asked for is part of its key (where every sample has times of its own, a
    solver that repeats them must `fork`). In float32 the uniforms have 24 bits, as torch's own, and tails end at 6.0
    standard deviations; in float64 32 bits and 6.7.

    Args:
        seeds: B integers.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        if not seeds or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
            raise ValueError(f"Per-sample seeds must be a non-empty list of ints, got {seeds!r}.")
        self.seeds = list(seeds)

    def bind(self, x: Tensor) -> Draw:
        if len(self.seeds) != x.shape[0]:
            raise ValueError(f"Need one seed per sample: got {len(self.seeds)} seeds for a batch of {x.shape[0]}.")
        return _PerSampleDraw(self.seeds, x)


class _PerSampleDraw(Draw):
    def __init__(self, seeds: Sequence[int], x: Tensor, lanes: Tensor | None = None) -> None:
        self.like, self.n = x, x[0].numel()
        self.lanes = counter.lanes_of(seeds, x.device) if lanes is None else lanes
        self.places = counter.places((self.n + 1) // 2, x.device)
        self.seeds = seeds
        self.asked: dict[Any, int] = {}
        self.asked_before: dict[Any, int] = {}

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        interval = (t.half_log_snr, s.half_log_snr)
        before = 0
        if not (t.per_sample or s.per_sample):
            before = self.asked.get(interval, 0)
            self.asked[interval] = before + 1
        return self.normal("interval", *interval, *([before] if before else []))

    def normal(self, *key: Any) -> Tensor:
        z = counter.normals(self.lanes + counter.key(*key), self.n, _floating(self.like), self.places)
        return z.reshape(self.like.shape)

    def uniform(self, *key: Any) -> Tensor:
        lanes = self.lanes + counter.key("uniform", *map(_number, key))
        return counter.uniforms(lanes, self.n, _floating(self.like), self.places).reshape(self.like.shape)

    def integer(self) -> int:
        total = 0
        for seed in self.seeds:
            total = counter.mix(total ^ counter.mix(seed))
        return total >> 2

    def fork(self, *key: Any) -> Draw:
        return self._again(counter.mix_tensor(self.lanes ^ counter.key("fork", *map(_number, key))))

    def begin(self) -> None:
        self.asked_before = dict(self.asked)

    def restart(self) -> Draw:
        again = self._again(self.lanes)
        again.asked, again.asked_before = dict(self.asked_before), dict(self.asked_before)
        return again

    def _again(self, lanes: Tensor) -> _PerSampleDraw:
        return _PerSampleDraw(self.seeds, self.like, lanes)

    def normals(self, lanes: Tensor) -> Tensor:
        """Standard normals (*lanes.shape, n) in float64 for a float64 state and float32 for others."""
        dtype = torch.float64 if self.like.dtype == torch.float64 else torch.float32
        return counter.normals(lanes, self.n, dtype, self.places)


def _floating(like: Tensor) -> torch.dtype:
    """The dtype of noise for a state: its own, float32 for tokens."""
    return like.dtype if like.is_floating_point() else torch.float32


def _number(part: Any) -> Any:
    """A word inside a key as a number."""
    return counter.word(part) % 2**53 if isinstance(part, str) else part


class BrownianPath(Noise):
    r"""One Brownian path per sample, whatever the grid: solvers and step counts of a comparison share it.

    The path runs in the clock in which the reverse SDE's noise is a standard Brownian motion,
    :math:`\tau = \alpha^2 / \sigma^2 = e^{2\lambda}`; ``draw(t, s)`` is its increment between two knots, scaled to unit
    variance. Increments over neighbouring intervals add up to the increment over both, so refining a grid refines
    the noise. Values come from a tree of Brownian bridges, dyadic in lambda over [-16, 16] and 18 levels deep, on the
    counter-based normals of `PerSample`: a function of the seed and lambda alone, whatever was asked before. A run down
    a grid finds the upper part of the tree in memory (19 values of the state's size) and draws the rest, about
    19 - log2(32 / step) normals per knot: 12 for steps of 0.2 in lambda. Within a cell of 1.2e-4 in lambda the path is
    a smooth bridge, so that rounding a time does not change it; steps shorter than that are refused. `TorchSDE` takes
    only a seed from it and walks a path of its own. An interval asked for again gives the same increment, as a path
    must: a method that repeats steps takes another path, ``draw.fork(key)``.

    Args:
        seeds: an int, or one int per sample (sample i then keeps its path in any batch).
    """

    def __init__(self, seeds: int | Sequence[int] = 0) -> None:
        if not isinstance(seeds, int):
            PerSample(seeds)  # refuses what is no list of ints
        self.seeds = seeds

    def bind(self, x: Tensor) -> Draw:
        seeds = self.seeds
        if isinstance(seeds, int):
            first = counter.mix(seeds)
            seeds = range(first, first + len(x))
        if len(seeds) != len(x):
            raise ValueError(f"Need one seed per sample: got {len(seeds)} seeds for a batch of {len(x)}.")
        return _PathDraw(_PerSampleDraw(seeds, x))


_REACH, _DEPTH = 16.0, 18
_CELL = 2.0 * _REACH / 2**_DEPTH
_SMALL = 16384  # elements: above, one pass over several draws only misses the cache


class _Node(NamedTuple):
    """A bridged value: which node of its level, its clock, the path there."""

    place: int
    tau: float
    w: Tensor


class _PathDraw(Draw):
    def __init__(self, draw: Any) -> None:  # a _PerSampleDraw
        self.draw, self.like = draw, draw.like
        self.recent: dict[float, Tensor] = {}
        self.ends: tuple[Tensor, Tensor] | None = None
        self.branch: list[_Node] = []

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        lam_t, lam_s = t.half_log_snr, s.half_log_snr
        if not isinstance(lam_t, Tensor) and abs(lam_s - lam_t) < _CELL:
            raise ValueError(
                f"A BrownianPath resolves steps of {_CELL:.2g} in half_log_snr; the step from t = {t.t} to {s.t} has "
                f"{abs(lam_s - lam_t):.2g}."
            )
        increment = self._at(lam_s) - self._at(lam_t)
        span = m.exp(2.0 * lam_s) - m.exp(2.0 * lam_t)
        return rescaled(increment, 1.0 / m.sqrt(span)).to(self.like.dtype)

    def normal(self, *key: Any) -> Tensor:
        return self.draw.normal(*key)

    def uniform(self, *key: Any) -> Tensor:
        return self.draw.uniform(*key)

    def integer(self) -> int:
        return self.draw.integer()

    def fork(self, *key: Any) -> Draw:
        return _PathDraw(self.draw.fork(*key))

    def restart(self) -> Draw:
        return _PathDraw(self.draw.restart())

    def _normals(self, keys: Sequence[int | Tensor]) -> Sequence[Tensor] | Tensor:
        """One draw per key; float64 for a float64 state, else float32. Small ones in one pass."""
        lanes = [self.draw.lanes + key for key in keys]
        if self.like.numel() > _SMALL:
            return [self.draw.normals(lane).reshape(self.like.shape) for lane in lanes]
        return self.draw.normals(torch.stack(lanes)).reshape(len(keys), *self.like.shape)

    def _at(self, lam: Real) -> Tensor:
        """The path at lambda; on a fixed grid the last two values are remembered."""
        if self.ends is None:
            low, high = self._normals([counter.key("low"), counter.key("high")])
            w_low = math.exp(-_REACH) * low
            self.ends = w_low, w_low + math.sqrt(math.exp(2.0 * _REACH) - math.exp(-2.0 * _REACH)) * high
        if isinstance(lam, Tensor):
            return self._rows(lam)
        if lam not in self.recent:
            if not lam < _REACH:
                raise ValueError(f"A BrownianPath reaches up to half_log_snr = {_REACH}, got {lam}.")
            value = self._descend(lam)
            self.recent = dict([*self.recent.items(), (lam, value)][-2:])
        return self.recent[lam]

    def _descend(self, lam: float) -> Tensor:
        """Down the tree to a number, from where the last descent went another way."""
        assert self.ends is not None
        w_low, w_high = self.ends
        if lam <= -_REACH:  # alpha = 0: the path starts at zero there
            return math.exp(lam + _REACH) * w_low
        middles, index, low, high = [], 0, -_REACH, _REACH
        for _ in range(_DEPTH):
            middle = 0.5 * (low + high)
            middles.append((middle, index))
            low, high, index = (middle, high, 2 * index + 1) if lam >= middle else (low, middle, 2 * index)
        known = 0
        while known < len(self.branch) and self.branch[known].place == middles[known][1]:
            known += 1
        fresh: list[int | Tensor] = [counter.key("tree", level, middles[level][1]) for level in range(known, _DEPTH)]
        z = self._normals([*fresh, counter.key("leaf", index)])
        tau_low, tau_high = math.exp(-2.0 * _REACH), math.exp(2.0 * _REACH)
        branch = self.branch[:known]
        for level in range(_DEPTH + 1):
            if level < known:
                middle, (_, tau, w) = middles[level][0], branch[level]
            else:
                middle = middles[level][0] if level < _DEPTH else lam
                tau = math.exp(2.0 * middle)
                share = (tau - tau_low) / (tau_high - tau_low)
                w = torch.mul(w_low, 1.0 - share).add_(w_high, alpha=share)
                w = w.add_(z[level - known], alpha=math.sqrt(share * (tau_high - tau)))
                if level < _DEPTH:
                    branch.append(_Node(middles[level][1], tau, w))
            if lam >= middle:
                tau_low, w_low = tau, w
            else:
                tau_high, w_high = tau, w
        self.branch = branch
        return w

    def _rows(self, lam: Tensor) -> Tensor:
        """Every row at its own lambda, (B, 1, …): the same tree, from the top."""
        assert self.ends is not None
        w_low, w_high = self.ends
        low, high, index = (m.full_like(lam, v) for v in (-_REACH, _REACH, 0.0))
        tau_low, tau_high = m.exp(2.0 * low), m.exp(2.0 * high)
        w = w_low
        for level in range(_DEPTH + 1):
            leaf = level == _DEPTH
            middle = lam if leaf else 0.5 * (low + high)
            tau = m.exp(2.0 * middle)
            share = (tau - tau_low) / (tau_high - tau_low)
            z = self._normals([counter.key("leaf", index) if leaf else counter.key("tree", level, index)])[0]
            w = rescaled(w_low, 1.0 - share) + rescaled(w_high, share) + rescaled(z, m.sqrt(share * (tau_high - tau)))
            up = lam >= middle
            low, high = torch.where(up, middle, low), torch.where(up, high, middle)
            tau_low, tau_high = torch.where(up, tau, tau_low), torch.where(up, tau_high, tau)
            w_low, w_high = torch.where(up, w, w_low), torch.where(up, w_high, w)
            index = 2.0 * index + up
        return w


class Recorded(Noise):
    """Given noise, handed out in the order of the draws: replays a published run, probes a solver with impulses.

    Args:
        draws: tensors of the state's shape (or a stacked one, along the first dimension).

    Raises:
        ValueError: when a run asks for more draws than were recorded, or a shape disagrees.
    """

    def __init__(self, draws: Sequence[Tensor] | Tensor) -> None:
        self.draws = list(draws)
        if not all(isinstance(z, Tensor) for z in self.draws):
            raise TypeError(f"`draws` must be tensors of the state's shape, got {draws!r}.")

    def bind(self, x: Tensor) -> Draw:
        return _RecordedDraw(self.draws, x)


class _RecordedDraw(Draw):
    def __init__(self, draws: list[Tensor], x: Tensor, used: int = 0) -> None:
        self.draws, self.like, self.used, self.used_before = draws, x, used, used

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        return self.normal()

    def normal(self, *key: Any) -> Tensor:
        if self.used == len(self.draws):
            raise ValueError(f"The run asks for draw {self.used + 1} but only {len(self.draws)} were recorded.")
        z = self.draws[self.used]
        if z.shape != self.like.shape:
            raise ValueError(f"Recorded draw {self.used} has shape {tuple(z.shape)}, not {tuple(self.like.shape)}.")
        self.used += 1
        return z.to(self.like.device, _floating(self.like))

    def uniform(self, *key: Any) -> Tensor:
        """A recorded draw, which must lie in [0, 1)."""
        u = self.normal()
        if not bool(((u >= 0) & (u < 1)).all()):
            raise ValueError(f"Recorded draw {self.used - 1} is asked for as uniform noise but leaves [0, 1).")
        return u

    def fork(self, *key: Any) -> Draw:
        """The same list: its order is the order of the draws."""
        return self

    def integer(self) -> int:
        return 0

    def begin(self) -> None:
        self.used_before = self.used

    def restart(self) -> Draw:
        return _RecordedDraw(self.draws, self.like, self.used_before)


Rng = int | Sequence[int] | torch.Generator | Noise | Draw | None


def as_draw(rng: Rng, x: Tensor) -> Draw:
    """The noise of a run from whatever a user hands over as `rng`.

    Args:
        rng: None (torch's global generator), an int, one int per sample, a `torch.Generator`, a `Noise`, or noise that
            is already bound.
        x: state, (B, *D).
    """
    if isinstance(rng, Draw):
        return rng
    if isinstance(rng, Noise):
        return rng.bind(x)
    if isinstance(rng, torch.Generator) or rng is None or (isinstance(rng, int) and not isinstance(rng, bool)):
        return Independent(rng).bind(x)
    if isinstance(rng, Sequence):
        return PerSample(list(rng)).bind(x)
    raise TypeError(
        "`rng` must be an int, a list of ints (one per sample), a torch.Generator or a Noise, "
        f"got {type(rng).__name__}."
    )
