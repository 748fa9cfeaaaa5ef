"""A bar on the terminal for runs that take a while."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sde_lib import Knot, Prediction, ReverseSDE, Wrapper


class Bar:
    """tqdm's bar of network calls, with the time that the run has come to.

    Args:
        total: expected calls, or None where the solver decides.
    """

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.bar: Any = None

    def __enter__(self) -> Bar:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=self.total, unit="call")
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def tick(self, knot: Knot, calls: int) -> None:
        """So many calls more."""
        if not knot.per_sample:  # times of samples stay on their device
            self.bar.set_postfix_str(f"t = {knot.t:.3g}", refresh=False)
        self.bar.update(calls)


class Ticking(Wrapper):
    """Moves a bar at every call."""

    def __init__(self, inner: ReverseSDE, bar: Bar) -> None:
        super().__init__(inner)
        self.bar = bar

    def __call__(self, x: Tensor, t: Knot | float | Tensor) -> Prediction:
        prediction = self.inner(x, t)
        self.bar.tick(prediction.knot, self.nfe_per_call)
        return prediction
