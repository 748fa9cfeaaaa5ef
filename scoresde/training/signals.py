"""Ctrl-C, and the signals by which a process is asked to end: noted, so that a run can save before it ends."""

from __future__ import annotations

import signal
import threading
from typing import Any, Self

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Signals:
    """Notes the first of SIGINT, SIGTERM and SIGHUP that comes, instead of dying of it; a context manager.

    A signal that is ignored, or that somebody else handles, is left alone (under nohup a run survives its terminal). In
    a thread other than the main one nothing is noted. After the first signal the others act as they did before: a
    second Ctrl-C ends the process at once.

    Args:
        once: False notes all there are: whoever starts several processes may send a signal twice.

    Attributes:
        caught: number of the signal, 0 as long as none came.
    """

    def __init__(self, once: bool = True) -> None:
        self.caught, self.once = 0, once
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: Any) -> None:
        self.caught = self.caught or number
        if self.once:
            self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(self, *_: object) -> None:
        self._restore()
