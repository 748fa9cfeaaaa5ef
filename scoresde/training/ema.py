"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    r"""Shadow weights :math:`\bar\theta \leftarrow \bar\theta + (1 - d_n)(\theta - \bar\theta)`.

    :math:`d_n = \min(decay, (1 + n) / (10 + n))` at the n-th update, n = 1, 2, …: early weights are forgotten fast,
    so short runs profit too. Buffers are copied. Samples and likelihoods are taken with the shadow weights.

    Source: Song et al. 2021, arXiv:2011.13456, app. G and H (the average), and the warm-up of their code.

    Args:
        model: whose weights are followed.
        decay: in [0, 1). 0.999 averages over about the last 1000 updates.

    Raises:
        ValueError: for a decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` must be in [0, 1), got {decay!r}.")
        self.decay, self.updates = decay, 0
        self._model = model
        self._shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._averaged = [name for name, value in model.named_parameters() if value.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the weights the model has now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = self._model.state_dict()
        shadow = [self._shadow[name] for name in self._averaged]
        if shadow:
            torch._foreach_lerp_(shadow, [now[name] for name in self._averaged], 1.0 - decay)
        averaged = set(self._averaged)
        for name, value in now.items():
            if name not in averaged:
                self._shadow[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the shadow weights, for the length of a `with` block."""
        now = self._model.state_dict()
        kept = {name: value.clone() for name, value in now.items()}
        self._copy(self._shadow, now)
        try:
            yield
        finally:
            self._copy(kept, now)

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow weights by the names of the model (not copied)."""
        return dict(self._shadow)

    def load(self, shadow: Mapping[str, Tensor], updates: int) -> None:
        """Continue from saved shadow weights, whose names and shapes were checked against the model."""
        self._copy(shadow, self._shadow)
        self.updates = updates

    @staticmethod
    @torch.no_grad()
    def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        for name, value in target.items():
            value.copy_(source[name])
