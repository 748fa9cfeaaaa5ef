"""What scorings of data sets refuse: labels that do not fit, and options that what they call does not have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from scoresde.data.spec import DataSpec
from sde_lib._checks import did_you_mean, options_of


def check_labels(spec: DataSpec, labels: Any, n: int) -> None:
    """Raise unless labels are None or one per sample, and classes of the specification if it has any."""
    if labels is None:
        return
    if spec.num_classes:
        spec.check_classes(labels)
    elif not isinstance(labels, Tensor):
        raise TypeError(f"`labels` must be a tensor of shape ({n},), got {type(labels).__name__}.")
    if labels.shape != (n,):
        raise ValueError(f"`labels` must have shape ({n},), got {tuple(labels.shape)}.")


def check_options(scoring: str, function: Callable[..., Any], given: Mapping[str, Any], own: Collection[str]) -> None:
    """Raise for an option that a function does not have, or that the scoring sets itself."""
    known = [name for name in options_of(function) if name not in own]
    for name in given:
        if name not in known:
            raise TypeError(
                f"{scoring} has no option {name!r}.{did_you_mean(name, known)} It takes its own and, of "
                f"{function.__name__}: {', '.join(known)}."
            )
