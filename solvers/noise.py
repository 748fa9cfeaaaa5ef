"""Noise as a value: bound once to a state, then asked for unit increments between knots."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sde_lib import Knot
from sde_lib import _math as m
from sde_lib._math import Real


class Draw:
    """Noise bound to the shape, dtype and device of a state.

    ``draw(t, s)`` is the unit increment of the driving noise between two knots: N(0, I), independent over disjoint
    intervals. ``draw.normal(key…)`` is noise that belongs to no interval (prior, correctors, projections).
    """

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        raise NotImplementedError

    def normal(self, *key: Any) -> Tensor:
        """Standard normal noise of the state's shape, named by a key (a word, then numbers)."""
        raise NotImplementedError

    def integer(self) -> int:
        """A seed for a library that takes one."""
        raise NotImplementedError

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
        self.rng = rng

    def bind(self, x: Tensor) -> Draw:
        if isinstance(self.rng, torch.Generator):
            return _IndependentDraw(self.rng, x)
        seed = int(torch.randint(2**62, ())) if self.rng is None else self.rng
        return _IndependentDraw(torch.Generator(x.device).manual_seed(seed), x)


class _IndependentDraw(Draw):
    def __init__(self, generator: torch.Generator, x: Tensor) -> None:
        self.generator, self.like = generator, x
        self.start = generator.get_state()
        self.kwargs: dict[str, Any] = {"generator": generator, "dtype": x.dtype, "device": x.device}

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        return torch.randn(self.like.shape, **self.kwargs)

    def normal(self, *key: Any) -> Tensor:
        return torch.randn(self.like.shape, **self.kwargs)

    def integer(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))

    def restart(self) -> Draw:
        generator = torch.Generator(self.generator.device)
        generator.set_state(self.start)
        return _IndependentDraw(generator, self.like)


class PerSample(Noise):
    """One seed per sample: sample i draws the same noise whatever the batch it is in.

    Normals come from a counter-based generator (the splitmix64 finalizer of Steele et al. 2014 over (seed, key,
    element), then Box-Muller): a function of its arguments, the same on every device up to rounding, with no loop over
    samples. Asking again for an interval gives the same noise.

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
    def __init__(self, seeds: Sequence[int], x: Tensor) -> None:
        self.like, self.n = x, x[0].numel()
        self.streams = torch.tensor([_signed(_mix(s)) for s in seeds], dtype=torch.int64, device=x.device)
        self.counter = torch.arange((self.n + 1) // 2, dtype=torch.int64, device=x.device) * _signed(_WEYL)
        self.seeds = seeds

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        return self._normal(_key("interval", t.half_log_snr, s.half_log_snr))

    def normal(self, *key: Any) -> Tensor:
        return self._normal(_key(*key))

    def integer(self) -> int:
        total = 0
        for seed in self.seeds:
            total = _mix(total ^ _mix(seed))
        return total >> 2

    def restart(self) -> Draw:
        return self

    def _normal(self, key: int | Tensor) -> Tensor:
        streams = _mix_tensor(self.streams ^ key)
        bits = _mix_tensor(streams[:, None] + self.counter)
        dtype = torch.float64 if self.like.dtype == torch.float64 else torch.float32
        # 32 bits each: u1 in (0, 1], u2 in [0, 1)
        u1 = ((bits & 0xFFFFFFFF).double() + 1.0) * 2.0**-32
        u2 = ((bits >> 32) & 0xFFFFFFFF).double() * 2.0**-32
        radius, angle = torch.sqrt(-2.0 * torch.log(u1)), 2.0 * math.pi * u2
        pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
        flat = pairs.reshape(len(bits), -1)[:, : self.n].to(dtype)
        return flat.reshape(self.like.shape).to(self.like.dtype)


class BrownianPath(Noise):
    r"""One Brownian path per sample, whatever the grid: solvers and step counts of a comparison share it.

    The path runs in the clock in which the reverse SDE's noise is a standard Brownian motion,
    :math:`\tau = \alpha^2 / \sigma^2 = e^{2\lambda}`; ``draw(t, s)`` is its increment between two knots, scaled to unit
    variance. Increments over neighbouring intervals add up to the increment over both, so refining a grid refines
    the noise. Values come from a tree of Brownian bridges, dyadic in lambda over [-16, 16] and 20 levels deep (cells
    of 3e-5), on the counter-based normals of `PerSample`; two points within one cell do not know of each other.
    `TorchSDE` takes only a seed from it and walks a path of its own.

    Args:
        seeds: an int, or one int per sample (sample i then keeps its path in any batch).
    """

    def __init__(self, seeds: int | Sequence[int] = 0) -> None:
        self.seeds = seeds

    def bind(self, x: Tensor) -> Draw:
        seeds = [_mix(self.seeds) + i for i in range(len(x))] if isinstance(self.seeds, int) else list(self.seeds)
        return _PathDraw(PerSample(seeds).bind(x), PerSample(seeds).bind(x.double()), x.dtype)


_REACH, _DEPTH = 16.0, 20


class _PathDraw(Draw):
    def __init__(self, draw: Draw, wide: Draw, dtype: torch.dtype) -> None:
        self.draw, self.wide, self.dtype = draw, wide, dtype
        self.recent: dict[float, Tensor] = {}

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        increment = self._at(s.half_log_snr) - self._at(t.half_log_snr)
        span = m.exp(2.0 * s.half_log_snr) - m.exp(2.0 * t.half_log_snr)
        return (increment / m.sqrt(span)).to(self.dtype)

    def normal(self, *key: Any) -> Tensor:
        return self.draw.normal(*key)

    def integer(self) -> int:
        return self.draw.integer()

    def restart(self) -> Draw:
        return self

    def _at(self, lam: Real) -> Tensor:
        """The path at lambda; on a fixed grid the last two values are remembered."""
        if isinstance(lam, Tensor):
            return self._descend(lam)
        if lam not in self.recent:
            if not lam < _REACH:
                raise ValueError(f"A BrownianPath reaches up to half_log_snr = {_REACH}, got {lam}.")
            value = self._descend(lam)
            self.recent = dict([*self.recent.items(), (lam, value)][-2:])
        return self.recent[lam]

    def _descend(self, lam: Real) -> Tensor:
        z = self.wide.normal
        low, high, index = m.full_like(lam, -_REACH), m.full_like(lam, _REACH), m.full_like(lam, 0.0)
        tau_low, tau_high = m.exp(2.0 * low), m.exp(2.0 * high)
        w_low = m.sqrt(tau_low) * z("low")
        w_high = w_low + m.sqrt(tau_high - tau_low) * z("high")
        if not isinstance(lam, Tensor) and lam <= -_REACH:  # alpha = 0: the path starts at zero there
            return m.exp(lam) / m.exp(-_REACH) * w_low
        for level in range(_DEPTH + 1):
            last = level == _DEPTH
            mid = lam if last else 0.5 * (low + high)
            tau = m.exp(2.0 * mid)
            share = (tau - tau_low) / (tau_high - tau_low)
            fresh = z("leaf", lam) if last else z("tree", float(level), index)
            w = w_low + share * (w_high - w_low) + m.sqrt(share * (tau_high - tau)) * fresh
            if isinstance(lam, Tensor) and isinstance(mid, Tensor):
                up = lam >= mid
                low, high = torch.where(up, mid, low), torch.where(up, high, mid)
                tau_low, tau_high = torch.where(up, tau, tau_low), torch.where(up, tau_high, tau)
                w_low, w_high = torch.where(up, w, w_low), torch.where(up, w_high, w)
                index = 2.0 * index + up
            elif lam >= mid:
                low, tau_low, w_low, index = mid, tau, w, 2.0 * index + 1.0
            else:
                high, tau_high, w_high, index = mid, tau, w, 2.0 * index
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

    def bind(self, x: Tensor) -> Draw:
        return _RecordedDraw(self.draws, x)


class _RecordedDraw(Draw):
    def __init__(self, draws: list[Tensor], x: Tensor) -> None:
        self.draws, self.like, self.used = draws, x, 0

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        return self.normal()

    def normal(self, *key: Any) -> Tensor:
        if self.used == len(self.draws):
            raise ValueError(f"The run asks for draw {self.used + 1} but only {len(self.draws)} were recorded.")
        z = self.draws[self.used]
        if z.shape != self.like.shape:
            raise ValueError(f"Recorded draw {self.used} has shape {tuple(z.shape)}, not {tuple(self.like.shape)}.")
        self.used += 1
        return z.to(self.like)

    def integer(self) -> int:
        return 0

    def restart(self) -> Draw:
        return _RecordedDraw(self.draws, self.like)


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


# --- counter-based bits: splitmix64's finalizer on Python ints and on int64 tensors (which wrap around) -------------
_WEYL, _M1, _M2, _MASK = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1


def _mix(z: int) -> int:
    z = (z + _WEYL) & _MASK
    z = ((z ^ (z >> 30)) * _M1) & _MASK
    z = ((z ^ (z >> 27)) * _M2) & _MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    z &= _MASK
    return z - (1 << 64) if z >> 63 else z


def _mix_tensor(z: Tensor) -> Tensor:
    z = z + _signed(_WEYL)
    z = (z ^ ((z >> 30) & (_MASK >> 30))) * _signed(_M1)
    z = (z ^ ((z >> 27) & (_MASK >> 27))) * _signed(_M2)
    return z ^ ((z >> 31) & (_MASK >> 31))


def _key(word: str, *values: Any) -> int | Tensor:
    """A 64-bit hash of a word and numbers; a (B,) tensor if a number is per sample."""
    key: int | Tensor = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    for value in values:
        if isinstance(value, Tensor):
            bits = value.reshape(-1).double().view(torch.int64)
            key = _mix_tensor((_signed(key) if isinstance(key, int) else key) ^ bits)
        else:
            bits_of = struct.unpack("<Q", struct.pack("<d", float(value)))[0]
            key = _mix(key ^ bits_of) if isinstance(key, int) else _mix_tensor(key ^ _signed(bits_of))
    return _signed(key) if isinstance(key, int) else key
