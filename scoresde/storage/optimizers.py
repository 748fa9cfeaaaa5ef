"""The state of an optimizer as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from scoresde.storage.tensors import CheckpointError


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Tensor]:
    """State of an optimizer by parameter name: ``"network.inlet.weight|exp_avg"``."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}|{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return found


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: Mapping[str, Tensor], where: str | Path
) -> None:
    """Restore `optimizer_tensors`.

    Raises:
        CheckpointError: if a name or a shape does not belong to the model's parameters.
    """
    parameters = dict(model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("|")
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            raise CheckpointError(f"Optimizer state {key!r} {tuple(value.shape)} in {where} does not fit the model.")
        # a copy, which load_state_dict would share, in the layout of the parameter, which fused optimizers rely on
        like = parameters[name] if value.ndim else value
        state.setdefault(name, {})[field] = torch.empty_like(like, dtype=value.dtype, device="cpu").copy_(value)
    # by position, as torch numbers parameters over its groups; load_state_dict moves them to their devices
    numbers: dict[Tensor, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            numbers[parameter] = len(numbers)
    by_number = {numbers[parameters[name]]: fields for name, fields in state.items()}
    optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})
