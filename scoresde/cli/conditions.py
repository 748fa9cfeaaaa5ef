"""Conditions on the command line."""

from __future__ import annotations

from typing import Any


def class_labels(text: str | None, n: int, classes: int) -> Any:
    """What --class says: a number, all classes in turn for n samples, or None."""
    if text is None:
        return None
    import torch

    if text == "all":
        if not classes:
            raise ValueError("This model was trained without classes.")
        return torch.arange(n) % classes
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--class must be a number or `all`, got {text!r}.") from None
