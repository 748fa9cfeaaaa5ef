"""What a network is told about the noise level: maps from a knot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sde_lib.knot import Knot


def _time(knot: Knot, n: int) -> Any:
    return knot.t


def _t999(knot: Knot, n: int) -> Any:
    return 999.0 * knot.t


def _index(knot: Knot, n: int) -> Any:
    return n * knot.t - 1.0 if knot.has_time else knot.index


def _index_down(knot: Knot, n: int) -> Any:
    return (n - 1) * (1.0 - knot.t) if knot.has_time else n - 1 - knot.index


def _half_log_snr(knot: Knot, n: int) -> Any:
    return knot.half_log_snr


def _log_sigma(knot: Knot, n: int) -> Any:
    return -knot.half_log_snr


def _log_half_sigma(knot: Knot, n: int) -> Any:
    return -knot.half_log_snr - math.log(2.0)


def _quarter_log_sigma(knot: Knot, n: int) -> Any:
    return -0.25 * knot.half_log_snr


NOISE_LEVELS: Mapping[str, Callable[[Knot, int], Any]] = {
    "time": _time,
    "t999": _t999,
    "index": _index,
    "index_down": _index_down,
    "half_log_snr": _half_log_snr,
    "log_sigma": _log_sigma,
    "log_half_sigma": _log_half_sigma,
    "quarter_log_sigma": _quarter_log_sigma,
}
"""Name -> what the network is told about the noise level, of the knot and the number of levels: the time; 999 t
(score_sde's VP networks); a chain's index, from the cleanest or from the noisiest level (NCSN); lambda;
log(sigma / alpha); that of half the ratio (score_sde's VE networks, whose sigma was for data in [0, 1]); a quarter of
it (EDM). On an SDE the index goes on between the levels: n t - 1 (level i at t = (i + 1) / n), and (n - 1)(1 - t) from
the noisiest (level i at t = i / (n - 1))."""
