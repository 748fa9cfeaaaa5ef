"""Where the time of a run goes: the network, the noise, and the rest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from sde_lib import Knot, Prediction, ReverseSDE, Wrapper
from solvers import Draw


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to do on the CPU."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if device.type != "cpu" and wait is not None:
        wait()


class Stopwatch:
    """Adds up the time spent inside ``with watch:``.

    On a GPU events are recorded in the stream and read at the end, so that a run is not held up by being timed; the
    host's clock elsewhere, waiting for the device at both ends where there is one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._total, self._start = 0.0, 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            self._events.append((self._event(), None))
        else:
            synchronize(self.device)
            self._start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self._events[-1] = (self._events[-1][0], self._event())
        else:
            synchronize(self.device)
            self._total += time.perf_counter() - self._start

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @property
    def seconds(self) -> float:
        """Total so far; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self._total += sum(a.elapsed_time(b) for a, b in self._events) / 1000.0
            self._events.clear()
        return self._total


class Timed(Wrapper):
    """A reverse SDE whose calls are timed."""

    def __init__(self, inner: ReverseSDE, watch: Stopwatch) -> None:
        super().__init__(inner)
        self.watch = watch

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        with self.watch:
            return self.inner(x, t)


class Followed(Wrapper):
    """A reverse SDE that tells somebody at which knot it was called."""

    def __init__(self, inner: ReverseSDE, told: Callable[[Knot], None]) -> None:
        super().__init__(inner)
        self.told = told

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        prediction = self.inner(x, t)
        self.told(prediction.knot)
        return prediction


class WatchedDraw(Draw):
    """Noise that is timed, and counted by kind.

    Attributes:
        draws: tensors drawn.
        off_path: draws that are no increment between two knots (correctors, churn, a library's seed, a fork): a path
            shared between grids does not determine them.
    """

    def __init__(self, inner: Draw, watch: Stopwatch) -> None:
        self.inner, self.watch = inner, watch
        self._counts = {"draws": 0, "off_path": 0}

    @property
    def draws(self) -> int:
        return self._counts["draws"]

    @property
    def off_path(self) -> int:
        return self._counts["off_path"]

    def __call__(self, t: Knot, s: Knot) -> Tensor:
        self._counts["draws"] += 1
        with self.watch:
            return self.inner(t, s)

    def normal(self, *key: Any) -> Tensor:
        return self._drawn(self.inner.normal, key)

    def uniform(self, *key: Any) -> Tensor:
        return self._drawn(self.inner.uniform, key)

    def _drawn(self, draw: Callable[..., Tensor], key: tuple[Any, ...]) -> Tensor:
        self._counts["draws"] += 1
        self._counts["off_path"] += 1
        with self.watch:
            return draw(*key)

    def integer(self) -> int:
        self._counts["off_path"] += 1
        return self.inner.integer()

    def fork(self, *key: Any) -> Draw:
        self._counts["off_path"] += 1
        forked = WatchedDraw(self.inner.fork(*key), self.watch)
        forked._counts = self._counts
        return forked

    def begin(self) -> None:
        self.inner.begin()

    def restart(self) -> Draw:
        return self.inner.restart()


def plain_draw_seconds(x: Tensor) -> float:
    """What one ordinary `torch.randn` of the shape of x takes: the median of nine."""
    generator = torch.Generator(x.device)
    times = []
    for _ in range(9):
        watch = Stopwatch(x.device)
        with watch:
            torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        times.append(watch.seconds)
    return statistics.median(times)


def median_seconds(run: Callable[[], object], min_run_time: float) -> float:
    """Median wall clock of repeated runs, by `torch.utils.benchmark`: warm, on all threads, waiting for the device.

    Args:
        run: what is timed.
        min_run_time: seconds to spend on repetitions at least.
    """
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=min_run_time).median)
