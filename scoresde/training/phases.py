"""The phases of an objective: for each a module for Accelerate, an optimizer, and one update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.data.batch import Batch
from scoresde.objectives import At, Objective
from scoresde.training.optimizers import PhaseOptions


class _Wrapper(nn.Module):
    """What Accelerate wraps (DDP, autocast): a module whose parameters are those of one phase, and no others: a wrapper
    over two phases waits for ever, or dies, for the gradients of the other one."""

    def __init__(self, objective: Objective, phase: str) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: getattr(objective, name) for name in objective.phases[phase]})
        self._objective, self._phase = [objective], phase  # in a list, so that it is no child

    def forward(self, batch: Batch, at: At) -> Tensor:
        losses: Tensor = self._objective[0](self._phase, batch, at)
        return losses


class Phase:
    """One phase: which parts it trains, and with which optimizer.

    Args:
        objective: on its device.
        name: of the phase.
        options: of its optimizer.
        accelerator: wraps the phase's module.
        unused: whether the loss leaves some weights without a gradient: several processes have to look for them.

    Attributes:
        parts: the parts that it trains, by their names.
        wrapper: what is called for a loss, `wrapper(batch, at)`.
    """

    def __init__(self, objective: Objective, name: str, options: PhaseOptions, accelerator: Any, unused: bool) -> None:
        from accelerate.utils import DistributedDataParallelKwargs  # type: ignore[import-untyped]

        self.name, self.options, self.accelerator = name, options, accelerator
        module = _Wrapper(objective, name)
        self.parts: nn.ModuleDict = module.parts
        self.weights = [p for p in self.parts.parameters() if p.requires_grad]
        mine = set(self.weights)
        self._others = [p for p in objective.parameters() if p.requires_grad and p not in mine]
        self.optimizer = options.optimizer_of(self.weights)
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
        self.wrapper = accelerator.prepare_model(module)
        if isinstance(self.wrapper, nn.parallel.DistributedDataParallel):
            self.wrapper.broadcast_buffers = False  # after every update all of them are made the same, once

    def update(
        self, batches: Callable[[int], tuple[Batch, At]], accumulation: int
    ) -> tuple[Tensor, Tensor | None, bool]:
        """One update.

        Args:
            batches: part 0, 1, … of the batch -> this process's samples of it, and where training stands.
            accumulation: number of parts.

        Returns:
            The mean loss of this process's samples; the norm of the gradient (None where nothing asked for it); and
            whether weights changed: with fp16 an update whose gradient overflowed is skipped.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        with self._alone():
            for part in range(accumulation):
                batch, at = batches(part)
                last = part == accumulation - 1
                with nullcontext() if last else self.accelerator.no_sync(self.wrapper):
                    loss = self.wrapper(batch, at).mean() / accumulation
                    self.accelerator.backward(loss)
                total += loss.detach()
        return total, *self._step()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What other phases train gets no gradient."""
        for weight in self._others:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in self._others:
                weight.requires_grad_(True)

    def _step(self) -> tuple[Tensor | None, bool]:
        scaler, clip = self.accelerator.scaler, self.options.clip
        if scaler is not None:
            scaler.unscale_(self.optimizer)  # of this phase only: another one's may have been unscaled already
        norm, done = None, True
        if clip > 0.0 or scaler is not None:
            norm = nn.utils.clip_grad_norm_(self.weights, clip if clip > 0.0 else float("inf"))
        if scaler is None or norm is None:
            self.optimizer.step()
        else:
            done = bool(norm.isfinite())  # the one look at the device in a step, for fp16 only
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad()
        return norm, done

    def set_rate(self, step: int, fraction: float) -> float:
        """The learning rate of step 1, 2, …, set and returned."""
        rate = self.options.rate(step, fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate
