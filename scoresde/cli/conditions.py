"""Conditions on the command line: ``--condition.NAME=VALUE``, ``--class`` for short, ``--given`` for those of the data.

A value is the number of a class, `all` classes in turn, or a .npy or .npz file: one value for all samples, or one for
each, the samples first.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sde_lib._checks import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from scoresde.data import Split
    from scoresde.data.conditions import ConditionSpec
    from scoresde.data.spec import DataSpec

PREFIX = "--condition."
_GIVEN = "score log p(x | conditions): those that the data come with, all or NAMES"
_EPILOG = """\
Conditions: --condition.NAME=VALUE for each that the model has. VALUE is a class, `all` classes in turn, or a .npy or
.npz file: one value for all samples, or the samples first. Tokens are an .npz file of `tokens` and a `mask`.
"""


def add_conditions(p: argparse.ArgumentParser) -> None:
    """The options of a command that takes conditions; those of the form --condition.NAME are split off by `main`."""
    p.add_argument("--class", dest="class_label", metavar="C", help="short for --condition.class_label=C")
    p.set_defaults(takes_conditions=True)
    p.epilog = f"{_EPILOG}\n{p.epilog or ''}"


def add_given(p: argparse.ArgumentParser) -> None:
    """The options of a command that scores data: the conditions that these come with."""
    p.add_argument("--given", nargs="?", const="", metavar="NAMES", help=_GIVEN)
    p.add_argument("--given-class", action="store_true", help="short for --given=class_label")


def split_conditions(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """What --condition.NAME=VALUE say, by name, and the other words."""
    found: dict[str, str] = {}
    for word in words:
        if word.startswith(PREFIX):
            name, equals, value = word.removeprefix(PREFIX).partition("=")
            if not name or not equals or not value:
                raise ValueError(f"Write conditions as {PREFIX}NAME=VALUE, got {word!r}.")
            if name in found:
                raise ValueError(f"{PREFIX}{name} is given twice.")
            found[name] = value
    return found, [word for word in words if not word.startswith(PREFIX)]


def given_conditions(arguments: argparse.Namespace) -> dict[str, str]:
    """Texts of the conditions on the command line, --class among them."""
    found: dict[str, str] = dict(arguments.condition)
    if arguments.class_label is not None:
        if "class_label" in found:
            raise ValueError(f"Give --class or {PREFIX}class_label, not both.")
        found["class_label"] = arguments.class_label
    return found


def condition_of(texts: Mapping[str, str], spec: DataSpec, n: int) -> dict[str, Any]:
    """Conditions for n samples, by name.

    Raises:
        ValueError: for a name that the model does not have, or a value that is none of this condition.
        OSError: for a file that cannot be read.
    """
    found = {}
    for name, text in texts.items():
        spec.check_condition({name: None})  # an unknown name
        found[name] = value_of(name, text, spec.conditions[name], n)
    return found


def condition_of_data(arguments: argparse.Namespace, split: Split, spec: DataSpec) -> dict[str, Any]:
    """Conditions of the samples of a split: what they come with as far as --given asks for it, and what the command
    line says of the others.

    Raises:
        ValueError: for a name that the data do not have, or that both say; see `condition_of`, too.
    """
    texts = given_conditions(arguments)
    names = [] if arguments.given is None else [n for n in arguments.given.split(",") if n] or list(split.condition)
    if arguments.given is not None and not names:
        raise ValueError("--given needs data with conditions, and these have none.")
    if arguments.given_class:
        names.append("class_label")
    for name in names:
        if name not in split.condition:
            there = f" They come with {', '.join(split.condition)}." if split.condition else " They have none."
            near = did_you_mean(name, split.condition)
            raise ValueError(f"The data come without a condition {name!r}, which --given asks for.{near}{there}")
        if name in texts:
            raise ValueError(f"Give --given or {PREFIX}{name}, not both.")
    return {name: split.condition[name] for name in names} | condition_of(texts, spec, len(split))


def value_of(name: str, text: str, spec: ConditionSpec, n: int) -> Any:
    """The value of one condition for n samples that a text stands for."""
    import torch

    what = f"{PREFIX}{name}"
    if Path(text).suffix in (".npy", ".npz"):
        value = _rows(what, _read(what, name, Path(text)), spec, n)
    elif spec.kind != "class":
        raise ValueError(f"{what} must be a .npy or .npz file, got {text!r}.")
    elif text == "all":
        value = torch.arange(n) % spec.classes
    else:
        try:
            value = torch.full((n,), int(text))
        except ValueError:
            raise ValueError(
                f"{what} must be a class, a number or `all`, or a .npy or .npz file, got {text!r}."
            ) from None
    if spec.kind == "class" and not (value >= 0).logical_and(value < spec.classes).all():
        wrong = int(value[(value < 0) | (value >= spec.classes)][0])
        raise ValueError(f"{what}: classes go from 0 to {spec.classes - 1}, got {wrong}.")
    spec.check(name, value, n)
    return value


# --- files ------------------------------------------------------------------------------------------------------------
def _read(what: str, name: str, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name; one array alone is `value`."""
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{what}: {path} is no NumPy file of numbers ({error}).") from error
    if isinstance(loaded, np.ndarray):
        return {"value": loaded}
    with loaded:
        arrays = {key: loaded[key] for key in loaded.files}
    if "tokens" in arrays:
        return arrays
    if len(arrays) != 1 and name not in arrays:
        raise ValueError(f"{what}: {path} holds {', '.join(arrays)}; name one of them {name!r}.")
    return {"value": arrays[name] if name in arrays else next(iter(arrays.values()))}


def _rows(what: str, arrays: Mapping[str, np.ndarray], spec: ConditionSpec, n: int) -> Any:
    """Arrays as a value for n samples."""
    import torch

    dtype = torch.int64 if spec.classes else torch.float32
    if spec.kind == "tokens":
        return _tokens(what, arrays, spec, n, dtype)
    if "value" not in arrays:
        raise ValueError(f"{what} is no condition of tokens: give one array, not tokens and a mask.")
    return _repeated(what, arrays["value"], spec.shape, n, dtype)


def _tokens(what: str, arrays: Mapping[str, np.ndarray], spec: ConditionSpec, n: int, dtype: torch.dtype) -> Any:
    """Tokens and their mask, padded to the length of the model."""
    import numpy as np
    import torch
    from torch.nn.functional import pad

    tokens = arrays["tokens"] if "tokens" in arrays else arrays["value"]
    most, *width = spec.shape
    one = len(spec.shape)
    length = tokens.shape[tokens.ndim - one] if tokens.ndim in (one, one + 1) else most + 1
    if length > most:
        raise ValueError(f"{what}: tokens have shape (samples, at most {most}, …), got {tokens.shape}.")
    mask = arrays["mask"] if "mask" in arrays else np.ones(tokens.shape[: tokens.ndim - one + 1], dtype=bool)
    value = _repeated(what, tokens, (length, *width), n, dtype)
    kept = _repeated(f"{what} (mask)", mask, (length,), n, torch.int64).bool()
    return {"tokens": pad(value, (0, 0) * len(width) + (0, most - length)), "mask": pad(kept, (0, most - length))}


def _repeated(what: str, array: np.ndarray, shape: tuple[int, ...], n: int, dtype: torch.dtype) -> Tensor:
    """An array as a tensor (n, *shape): as it is, or one value for all."""
    import torch

    if array.dtype.kind not in ("biuf" if dtype.is_floating_point else "biu"):
        kind = "numbers" if dtype.is_floating_point else "whole numbers"
        raise ValueError(f"{what} must hold {kind}, got an array of {array.dtype}.")
    value = torch.from_numpy(array.astype("float64" if dtype.is_floating_point else "int64")).to(dtype)
    if tuple(value.shape) == shape:
        return value.expand(n, *shape).clone()
    if tuple(value.shape) != (n, *shape):
        raise ValueError(
            f"{what} must have shape {(n, *shape)}, a value for each of the {n} samples, or {shape}, one for all, got "
            f"{tuple(value.shape)}."
        )
    return value
